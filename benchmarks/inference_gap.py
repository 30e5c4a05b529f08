r"""What amortised guides of variational autoencoders lose, by their family and by amortisation [1].

Trains the autoencoders of [1], and then finds, for some training images, log evidence, local optima L[q*] and L[q]:
the approximation gap is log p - L[q*], the amortisation gap L[q*] - L[q]. Prints a table beside the figures measured
with a public implementation's trained weights (3280 epochs, 100 training images of MNIST, ten of each digit; its
auxiliary flows evaluated with the right bound); writes CSV, JSON, a CSV per experiment with a line per image, and
figures. Trained weights and finished images are kept in the output folder, and are taken up again.

A: encoder and decoder of 200-200 units. B: encoder of 500-500. C: without warm-up of the guide's entropy. D-large,
D-small: decoder of 500-500, and a linear one. E: A-ffg's decoder, frozen, under a linear encoder. Each with a
factorised Gaussian guide (ffg), or a flow with an auxiliary variable (auxiliary); A and E also with two planar flows,
A with coupling flows. Any of the local families (--families) on any of them: ffg, full_rank, planar, coupling,
auxiliary. With --checkpoints 1 3, gaps are also those after 1 and 3 epochs, and a figure shows them over training.

Without MNIST (--data-dir, or NUMPYRO_SMC_DATA) the digits of scikit-learn are taken, and no figures stand beside; a
folder with Fashion-MNIST's IDX files is taken likewise.
Published: --epochs 3280 --warm_up 400 --num_images 100 --learning_rates 0.001 --num_mc 50 --max_steps 100000
--num_chains 100 --num_temperatures 500 --num_leapfrog 10 --families ffg auxiliary, and all experiments; over training
--checkpoints 100 400 1600 2800.

1. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import random

from benchmarks import report
from benchmarks.annealed_training import fill_table
from benchmarks.inference_gap_experiments import EXPERIMENTS, FAMILIES, FLOWS, REFERENCE, REFERENCE_TEN_EPOCHS
from benchmarks.inference_gap_figures import image_table, plot_all
from benchmarks.inference_gap_training import add_arguments, mean_test_elbo, train
from models.images import Images, load_images
from numpyro_smc.guides.gap_result import InferenceGap
from numpyro_smc.guides.inference_gap import inference_gap
from numpyro_smc.guides.local import LocalOptimizer

NAME = "inference_gap"

#: Settings that choose cells, or where things are.
FREE = ("experiments", "checkpoints", "epochs", "data_dir", "output", "no_progress")


def measure(
    experiment: str, epochs: int, images: Images, options: argparse.Namespace
) -> tuple[dict[str, Any], list[Any]]:
    """Train an experiment and find its gaps; the rest of its row."""
    trained = train(experiment, images, options, epochs)
    folder = Path(options.output)
    elbo, error = mean_test_elbo(trained, images, options.seed)
    row: dict[str, Any] = {"test ELBO": elbo, "test s.e.": error}
    optimizers = [
        LocalOptimizer(
            FAMILIES[name],
            init=tuple(int(start) if start.isdigit() else start for start in options.init),
            learning_rate=tuple(options.flow_learning_rates if name in FLOWS else options.learning_rates),
            num_mc=options.num_mc,
            patience=options.patience,
            max_steps=options.max_steps,
        )
        for name in options.families
    ]
    x = jnp.asarray((images.train if options.split == "train" else images.test)[: options.num_images])
    digest = report.digest({key: value for key, value in vars(options).items() if key not in FREE})
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
        num_simulated=options.num_simulated if EXPERIMENTS[experiment].guide != "auxiliary" else 0,
        checkpoint=folder / f"{experiment}-gap-{digest}-{epochs}.npz",
        progress_bar=not options.no_progress,
    )
    if gap.interrupted:
        raise KeyboardInterrupt
    print(gap, flush=True)
    gap.to_csv(folder / image_table(NAME, {"experiment": experiment, "epochs": epochs}))
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
    cell = {"experiment": row["experiment"], "epochs": row["epochs"]}
    if "error" in row:
        return [cell | {"quantity": row["error"]}]
    reference = dict(REFERENCE[row["experiment"]]) if on_mnist else {}
    if "log p" in reference:
        reference.setdefault("inference", reference["log p"] - reference["L[q]"])
        for name in options.families:
            if f"L[q*] {name}" in reference:
                reference.setdefault(f"approximation {name}", reference["log p"] - reference[f"L[q*] {name}"])
                reference.setdefault(f"amortisation {name}", reference[f"L[q*] {name}"] - reference["L[q]"])
    if on_mnist and row["epochs"] == 10 and options.warm_up == 0 and row["experiment"] in REFERENCE_TEN_EPOCHS:
        reference["test ELBO"] = REFERENCE_TEN_EPOCHS[row["experiment"]]
    quantities = ["test ELBO", "log p", *(f"L[q*] {name}" for name in options.families), "L[q]"]
    quantities += [f"{gap} {name}" for name in options.families for gap in ("approximation", "amortisation")]
    return [
        cell
        | {
            "quantity": name,
            "nats": row.get(name, ""),
            "s.e.": row.get("test s.e." if name == "test ELBO" else f"{name} s.e.", ""),
            "reference": round(reference[name], 2) if name in reference else "",
        }
        for name in [*quantities, "inference"]
    ]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=["A-ffg", "C-ffg", "E-ffg"], choices=EXPERIMENTS)
    parser.add_argument("--families", nargs="+", default=["ffg", "full_rank"], choices=FAMILIES, help="local families")
    add_arguments(parser, epochs=100, warm_up=10)
    parser.add_argument(
        "--checkpoints", type=int, nargs="+", default=[], help="earlier epochs whose gaps are found too"
    )
    parser.add_argument("--split", default="train", choices=("train", "test"), help="which images' gaps")
    parser.add_argument("--num_images", type=int, default=50)
    parser.add_argument(
        "--init", nargs="+", default=["encoder"], help="starts: encoder, zeros, or how many random ones"
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-2, 1e-3], help="of local optimisation")
    parser.add_argument("--flow_learning_rates", type=float, nargs="+", default=[1e-3], help="where it is of flows")
    parser.add_argument("--num_mc", type=int, default=16)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--max_steps", type=int, default=20_000)
    parser.add_argument("--num_chains", type=int, default=16, help="of AIS, from the guide")
    parser.add_argument("--num_temperatures", type=int, default=100)
    parser.add_argument("--num_leapfrog", type=int, default=5)
    parser.add_argument("--num_samples", type=int, default=5000, help="of IWAE and L[q]")
    parser.add_argument("--num_simulated", type=int, default=0, help="data sets that certify the settings of AIS")
    parser.add_argument("--batch_size", type=int, default=50, help="images at a time")
    parser.add_argument("--output", default="results/inference_gap")
    options = parser.parse_args(argv)
    if any(not 0 < epochs < options.epochs for epochs in options.checkpoints):
        parser.error(f"--checkpoints must lie between 0 and --epochs {options.epochs}, got {options.checkpoints}")
    return options


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    images = load_images(options.data_dir, options.binarisation)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "data_dir")}
    settings |= {"data": str(images)}
    report.print_environment(settings)
    folder = Path(options.output)
    epochs = sorted({*options.checkpoints, options.epochs})
    cells = [{"experiment": name, "epochs": number} for name in options.experiments for number in epochs]
    rows, _ = fill_table(NAME, cells, partial(measure, images=images, options=options), folder, settings, FREE)
    figures = plot_all(rows, options.families, folder, NAME)
    report.print_table([line for row in rows for line in beside_reference(row, options, images.name == "MNIST")])
    print(f"\nresults and figures {', '.join(figures)}: {options.output}")
    return rows


if __name__ == "__main__":
    main()
