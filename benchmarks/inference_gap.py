r"""What amortised guides of variational autoencoders lose, by their family and by amortisation [1].

Trains the autoencoders of [1], and then finds, for some training images, log evidence, local optima L[q*] and L[q]:
the approximation gap is log p - L[q*], the amortisation gap L[q*] - L[q]. Prints a table beside the figures measured
with a public implementation's trained weights (3280 epochs, 100 training images of MNIST, ten of each digit; its
auxiliary flows evaluated with the right bound); writes CSV, JSON, a CSV per experiment with a line per image, and
figures. Trained weights and finished images are kept in the output folder, and are taken up again.

A: encoder and decoder of 200-200 units. B: encoder of 500-500. C: without warm-up of the guide's entropy. D-large,
D-small: decoder of 500-500, and a linear one. E: A-ffg's decoder, frozen, under a linear encoder. Each with a
factorised Gaussian guide (ffg), or a flow with an auxiliary variable (auxiliary); E also with planar flows. Any of the
local families (--families) on any of them: ffg, full_rank, planar, coupling, auxiliary.

Without MNIST (--data-dir, or NUMPYRO_SMC_DATA) the digits of scikit-learn are taken, and no figures stand beside.
Published: --epochs 3280 --warm_up 400 --num_images 100 --learning_rates 0.001 --num_mc 50 --max_steps 100000
--num_chains 100 --num_temperatures 500 --num_leapfrog 10 --families ffg auxiliary, and all experiments.

1. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax import Array, lax, random
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from tqdm import trange

from benchmarks import report
from benchmarks.annealed_training import fill_table
from models import vae
from models.images import Images, load_images
from numpyro_smc import kl_q_p
from numpyro_smc.engines.checkpoint import load_pytree, save_pytree
from numpyro_smc.guides.auxiliary import AuxiliaryFlowGuide
from numpyro_smc.guides.flow import FlowGuide
from numpyro_smc.guides.gap_result import InferenceGap
from numpyro_smc.guides.inference_gap import inference_gap
from numpyro_smc.guides.local import LocalOptimizer
from numpyro_smc.guides.starts import Start

NAME = "inference_gap"
Params = dict[str, Any]


class Experiment(NamedTuple):
    """An autoencoder: the key of :data:`models.vae.LAYERS`, the guide's family, and how it is trained."""

    layers: str
    guide: str
    has_warm_up: bool = True
    decoder_of: str | None = None


EXPERIMENTS = {
    "A-ffg": Experiment("standard", "ffg"),
    "A-auxiliary": Experiment("standard", "auxiliary"),
    "B-ffg": Experiment("large encoder", "ffg"),
    "B-auxiliary": Experiment("large encoder", "auxiliary"),
    "C-ffg": Experiment("standard", "ffg", has_warm_up=False),
    "C-auxiliary": Experiment("standard", "auxiliary", has_warm_up=False),
    "D-large-ffg": Experiment("large decoder", "ffg"),
    "D-large-auxiliary": Experiment("large decoder", "auxiliary"),
    "D-small-ffg": Experiment("small decoder", "ffg"),
    "D-small-auxiliary": Experiment("small decoder", "auxiliary"),
    "E-ffg": Experiment("linear encoder", "ffg", decoder_of="A-ffg"),
    "E-auxiliary": Experiment("linear encoder", "auxiliary", decoder_of="A-ffg"),
    "E-planar": Experiment("linear encoder", "planar", decoder_of="A-ffg"),
}

#: Nats per image, measured with the trained weights of a public implementation: log p is the larger of AIS and IWAE
#: for the two A, IWAE-1000 or -5000 for the others; the local bounds of auxiliary flows lack a term of their own.
REFERENCE: dict[str, dict[str, float]] = {
    "A-ffg": {
        "log p": -86.41,
        "L[q]": -90.59,
        "L[q*] ffg": -88.47,
        "approximation ffg": 2.06,
        "amortisation ffg": 2.13,
        "inference": 4.19,
        "L[q*] auxiliary": -87.07,
    },
    "A-auxiliary": {"log p": -86.00, "L[q]": -89.64, "L[q*] ffg": -99.53, "L[q*] auxiliary": -86.71},
    "B-ffg": {"log p": -86.72, "L[q]": -90.06, "L[q*] ffg": -88.65},
    "B-auxiliary": {"log p": -85.56, "L[q]": -88.46, "L[q*] ffg": -99.17, "L[q*] auxiliary": -86.26},
    "C-ffg": {"log p": -86.33, "L[q]": -89.73, "L[q*] ffg": -87.73},
    "C-auxiliary": {"log p": -86.34, "L[q]": -89.66, "L[q*] ffg": -99.76, "L[q*] auxiliary": -86.81},
    "D-large-ffg": {"log p": -82.63, "L[q]": -86.64, "L[q*] ffg": -84.07, "L[q*] auxiliary": -82.61},
    "D-large-auxiliary": {"log p": -81.76, "L[q]": -85.76, "L[q*] ffg": -93.65, "L[q*] auxiliary": -82.22},
    "D-small-ffg": {"log p": -101.86, "L[q]": -106.54, "L[q*] ffg": -105.56, "L[q*] auxiliary": -101.86},
    "D-small-auxiliary": {"log p": -104.35, "L[q]": -107.49, "L[q*] auxiliary": -105.20},
    "E-ffg": {"log p": -112.08, "L[q]": -133.91},
    "E-auxiliary": {"log p": -90.42, "L[q]": -100.01, "L[q*] auxiliary": -86.99},
    "E-planar": {"log p": -91.82, "L[q]": -103.53, "L[q*] planar": -89.48},
}

#: Test ELBO after ten epochs without warm-up, measured with the same implementation; A then is C.
REFERENCE_TEN_EPOCHS = {"A-ffg": -103.5, "A-auxiliary": -103.7, "C-ffg": -103.5, "C-auxiliary": -103.7}


# The local families


def _free(start: Start) -> Callable[[Array], tuple[Array, Array]]:
    """In place of an encoder: mean and scales that are parameters of the datum."""

    def encoder(rows: Array) -> tuple[Array, Array]:
        del rows
        loc = numpyro.param("local_loc", start.values["z"])
        return loc, numpyro.param("local_scale", start.scales["z"], constraint=constraints.softplus_positive)

    return encoder


def planar(model: Any, start: Start) -> FlowGuide:
    del model
    return FlowGuide(_free(start), "planar")


def coupling(model: Any, start: Start) -> FlowGuide:
    del model
    return FlowGuide(_free(start), "coupling", hidden=100)


def auxiliary(model: Any, start: Start) -> AuxiliaryFlowGuide:
    del model
    return AuxiliaryFlowGuide(_free(start), start.scales["z"].shape[-1], hidden=100)


FAMILIES: dict[str, Any] = {
    "ffg": "ffg",
    "full_rank": "full_rank",
    "planar": planar,
    "coupling": coupling,
    "auxiliary": auxiliary,
}


# Training


class Trained(NamedTuple):
    """Programs of the data, and their parameters."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    params: Params


def make_programs(
    name: str, data_size: int, latent_size: int, seed: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide of an experiment, with their initial weights."""
    experiment = EXPERIMENTS[name]
    context_size = latent_size if experiment.guide == "auxiliary" else 0
    layers = vae.LAYERS[experiment.layers]
    encoder, decoder = vae.elu_networks(random.key(seed), data_size, latent_size, context_size, *layers)
    encode = vae.gaussian_encoder(encoder, latent_size)
    guides = {
        "ffg": lambda: FlowGuide(encode, "affine"),
        "planar": lambda: FlowGuide(encode, "planar"),
        "auxiliary": lambda: AuxiliaryFlowGuide(encode, latent_size),
    }
    return vae.gaussian_model(decoder, latent_size), guides[experiment.guide]()


def learning_rates(base: float, steps_per_epoch: int) -> optax.Schedule:
    r"""Stage :math:`i = 0, \dots, 7` lasts :math:`3^i` epochs at :math:`10^{-i/7}` times the base."""
    ends = np.cumsum(3 ** np.arange(7)) * steps_per_epoch
    return optax.join_schedules([optax.constant_schedule(base * 10 ** (-i / 7)) for i in range(8)], ends.tolist())


def train(name: str, images: Images, options: argparse.Namespace) -> Trained:
    """The experiment's programs and their weights: those in the output folder, or trained from there on."""
    experiment = EXPERIMENTS[name]
    model, guide = make_programs(name, images.train.shape[1], options.latent_size, options.seed)
    kept: Params = {}
    if experiment.decoder_of is not None:
        kept = {"decoder$params": train(experiment.decoder_of, images, options).params["decoder$params"]}
    trainable = handlers.block(handlers.substitute(model, data=kept), hide=list(kept)) if kept else model
    x, size = jnp.asarray(images.train), options.train_batch_size
    num_batches = len(x) // size

    # The mean over the batch, and the whole of log q tempered: the guide's entropy is warmed up.
    def scaled_model(rows: Array, entropy: Array) -> None:
        handlers.scale(trainable, scale=1.0 / size)(rows)

    def scaled_guide(rows: Array, entropy: Array) -> None:
        handlers.scale(guide, scale=entropy / size)(rows)

    adam = optax.adam(learning_rates(options.lr, num_batches), eps=1e-4)
    svi = SVI(scaled_model, scaled_guide, adam, Trace_ELBO())

    @jax.jit
    def epoch(state: Any, rng_key: Array, entropy: Array) -> tuple[Any, Array]:
        order = random.permutation(rng_key, len(x))[: num_batches * size].reshape(num_batches, size)
        return lax.scan(lambda state, rows: svi.update(state, x[rows], entropy), state, order)

    key = random.key(options.seed)
    state = svi.init(key, x[:size], jnp.asarray(1.0))
    warm_up = options.warm_up if experiment.has_warm_up else 0
    digest = report.digest({k: v for k, v in vars(options).items() if k in TRAINING} | {"data": str(images)})
    path, done = Path(options.output) / f"{name}-{digest}.npz", 0
    if path.exists():
        saved = load_pytree(path, {"state": state, "epochs": 0})
        state, done = saved["state"], saved["epochs"]
    if done > options.epochs:
        raise ValueError(f"{path} was trained for {done} epochs, more than {options.epochs}; use another --output.")
    bar = trange(done, options.epochs, desc=f"train {name}", disable=options.no_progress)
    for number in bar:
        entropy = jnp.asarray(min(1.0, (number + 1) / warm_up) if warm_up else 1.0)
        state, losses = epoch(state, random.fold_in(key, number), entropy)
        bar.set_postfix(ELBO=f"{-float(jnp.mean(losses)):.2f}", refresh=False)
        if number + 1 == options.epochs or (number + 1) % 50 == 0:
            save_pytree(path, {"state": state, "epochs": number + 1})
    return Trained(model, guide, svi.get_params(state) | kept)


def mean_test_elbo(trained: Trained, images: Images, seed: int) -> tuple[float, float]:
    """Mean over the test images and its standard error, of ten draws each."""
    size, values = min(1000, len(images.test)), []
    for first in range(0, len(images.test) - size + 1, size):
        rows = jnp.asarray(images.test[first : first + size])
        key = random.fold_in(random.key(seed), first)
        values.append(np.asarray(kl_q_p(key, *trained, rows, num_particles=10, batch_size=1).elbo))
    found = np.concatenate(values)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found)))


# Gaps


def measure(experiment: str, images: Images, options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """Train an experiment and find its gaps; the rest of its row."""
    trained = train(experiment, images, options)
    folder = Path(options.output)
    elbo, error = mean_test_elbo(trained, images, options.seed)
    row: dict[str, Any] = {"test ELBO": elbo, "test s.e.": error}
    optimizers = [
        LocalOptimizer(
            FAMILIES[name],
            init=tuple(int(start) if start.isdigit() else start for start in options.init),
            learning_rate=tuple(options.learning_rates),
            num_mc=options.num_mc,
            patience=options.patience,
            max_steps=options.max_steps,
        )
        for name in options.families
    ]
    x = jnp.asarray((images.train if options.split == "train" else images.test)[: options.num_images])
    gap = inference_gap(
        random.key(options.seed + 1),
        *trained,
        x,
        families=optimizers,
        evidence_options={
            "num_chains": options.num_chains,
            "num_temperatures": options.num_temperatures,
            "num_leapfrog": options.num_leapfrog,
        },
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        num_simulated=options.num_simulated if EXPERIMENTS[experiment].guide == "ffg" else 0,
        checkpoint=folder
        / f"{experiment}-gap-{report.digest({k: v for k, v in vars(options).items() if k not in FREE})}.npz",
        progress_bar=not options.no_progress,
    )
    if gap.interrupted:
        raise KeyboardInterrupt
    print(gap, flush=True)
    gap.to_csv(folder / f"{NAME}_{experiment}.csv")
    return row | row_of(gap), []


def row_of(gap: InferenceGap) -> dict[str, Any]:
    """Means over images, their standard errors, and what was found of the settings."""
    names = {"log p(x)": "log p", "approximation gap": "approximation", "amortisation gap": "amortisation"}
    names |= {"inference gap": "inference"}
    row: dict[str, Any] = {}
    for line in gap.table():
        name = f"{names.get(line['quantity'], line['quantity'])} {line['family']}".strip()
        row |= {name: line["mean"], f"{name} s.e.": line["s.e."]}
    row |= {f"log p by {method}": float(values.mean()) for method, values in gap.estimates.items()}
    row |= {f"steps {name}": float(steps.mean()) for name, steps in gap.num_steps.items()}
    row |= {f"converged {name}": float(done.mean()) for name, done in gap.converged.items()}
    if gap.certificate is not None:
        row |= {"bidirectional gap": gap.certificate.mean_gap, "bidirectional s.e.": gap.certificate.mean_gap_error}
    return row


def beside_reference(row: dict[str, Any], options: argparse.Namespace, on_mnist: bool) -> list[dict[str, Any]]:
    """Lines of the printed table: measured, its paired standard error, and the reference."""
    if "error" in row:
        return [{"experiment": row["experiment"], "quantity": row["error"]}]
    reference = dict(REFERENCE[row["experiment"]]) if on_mnist else {}
    if "log p" in reference:
        reference.setdefault("inference", reference["log p"] - reference["L[q]"])
        for name in options.families:
            if f"L[q*] {name}" in reference:
                reference.setdefault(f"approximation {name}", reference["log p"] - reference[f"L[q*] {name}"])
                reference.setdefault(f"amortisation {name}", reference[f"L[q*] {name}"] - reference["L[q]"])
    if on_mnist and options.epochs == 10 and options.warm_up == 0 and row["experiment"] in REFERENCE_TEN_EPOCHS:
        reference["test ELBO"] = REFERENCE_TEN_EPOCHS[row["experiment"]]
    quantities = ["test ELBO", "log p", *(f"L[q*] {name}" for name in options.families), "L[q]"]
    quantities += [f"{gap} {name}" for name in options.families for gap in ("approximation", "amortisation")]
    return [
        {
            "experiment": row["experiment"],
            "quantity": name,
            "nats": row.get(name, ""),
            "s.e.": row.get("test s.e." if name == "test ELBO" else f"{name} s.e.", ""),
            "reference": round(reference[name], 2) if name in reference else "",
        }
        for name in [*quantities, "inference"]
    ]


def plot(rows: Sequence[dict[str, Any]], options: argparse.Namespace, folder: Path) -> None:
    """Approximation and amortisation gaps of every experiment and family, stacked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(row, name) for row in rows for name in options.families if f"approximation {name}" in row]
    if not bars:
        return
    figure, ax = plt.subplots(figsize=(2 + 1.1 * len(bars), 4), layout="constrained")
    labels = [f"{row['experiment']}\nlocal {name}" for row, name in bars]
    base = np.zeros(len(bars))
    for gap in ("approximation", "amortisation"):
        heights = np.array([row[f"{gap} {name}"] for row, name in bars])
        errors = np.array([2 * row[f"{gap} {name} s.e."] for row, name in bars])
        ax.bar(labels, heights, bottom=base, yerr=errors, width=0.6, capsize=3, label=gap)
        base = base + heights
    ax.set_ylabel("gap (nats per image, ± 2 s.e.)")
    ax.legend(frameon=False)
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


#: Settings of the training; settings that choose cells, or where things are.
TRAINING = ("latent_size", "warm_up", "lr", "train_batch_size", "binarisation", "seed")
FREE = ("experiments", "data_dir", "output", "no_progress")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=["A-ffg", "C-ffg", "E-ffg"], choices=EXPERIMENTS)
    parser.add_argument("--families", nargs="+", default=["ffg", "full_rank"], choices=FAMILIES, help="local families")
    parser.add_argument("--latent_size", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warm_up", type=int, default=10, help="epochs over which log q gets its full weight")
    parser.add_argument("--lr", type=float, default=1e-3, help="of training; falls in stages, by epochs")
    parser.add_argument("--train_batch_size", type=int, default=100)
    parser.add_argument("--binarisation", default="fixed", choices=("fixed", "threshold"))
    parser.add_argument("--split", default="train", choices=("train", "test"), help="which images' gaps")
    parser.add_argument("--num_images", type=int, default=50)
    parser.add_argument(
        "--init", nargs="+", default=["encoder"], help="starts: encoder, zeros, or how many random ones"
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-2, 1e-3], help="of local optimisation")
    parser.add_argument("--num_mc", type=int, default=16)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--max_steps", type=int, default=20_000)
    parser.add_argument("--num_chains", type=int, default=16, help="of AIS, from the guide")
    parser.add_argument("--num_temperatures", type=int, default=100)
    parser.add_argument("--num_leapfrog", type=int, default=5)
    parser.add_argument("--num_samples", type=int, default=5000, help="of IWAE and L[q]")
    parser.add_argument("--num_simulated", type=int, default=0, help="data sets that certify the settings of AIS")
    parser.add_argument("--batch_size", type=int, default=50, help="images at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data-dir", help="folder of MNIST, or of its fixed binarisation")
    parser.add_argument("--output", default="results/inference_gap")
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    images = load_images(options.data_dir, options.binarisation)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "data_dir")}
    settings |= {"data": str(images)}
    report.print_environment(settings)
    folder = Path(options.output)
    cells = [{"experiment": name} for name in options.experiments]
    rows, _ = fill_table(NAME, cells, partial(measure, images=images, options=options), folder, settings, FREE)
    plot(rows, options, folder)
    report.print_table([line for row in rows for line in beside_reference(row, options, images.name == "MNIST")])
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return rows


if __name__ == "__main__":
    main()
