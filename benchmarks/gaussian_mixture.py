r"""Gaussian mixture with a discrete latent: which estimators train the guide.

Learns the proportions of 20 clusters and a network for the cluster of an observation [1, 2], from fresh data at every
step, several seeds side by side. Prints the distance of the guide from the true posterior and of the proportions from
the truth (at the end, and the smallest over training, as published), the effective sample size and the signal-to-noise
ratio of the guide's gradient at the end, beside the published figure; writes CSV, JSON, curves and a figure. Resumes
from checkpoints, and goes on from a shorter run.

Published: --num_steps 100000 --seeds 0 1 2 3 4 5 6 7 8 9 --particles 2 5 10 20 --num_gradients 500.

1. *Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow*, T. A. Le et al. (2019)
2. *Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds*, V. Lievin,
   A. Dittadi, A. Christensen, O. Winther (2020)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, random
from numpyro.infer import SVI

from benchmarks import replicates, report
from benchmarks.estimators import EXAMPLES, make_estimator
from models import gaussian_mixture as mixture
from numpyro_smc import gradient_statistics
from numpyro_smc.programs.density import log_weights
from numpyro_smc.programs.weights import effective_sample_size

NAME = "gaussian_mixture"
ESTIMATORS = ["ovis-gamma0", "ovis-gamma1", "ovis-S10-exclusive", "vimco", "rws", "tvo-part5-beta2", "reinforce"]

#: Smallest distances over 100,000 steps, and average signal-to-noise ratio of the guide's gradient over training, of
#: the published figure of [2] (10 seeds), read off the image.
PUBLISHED_PARTICLES = (2, 5, 10, 20)
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "posterior": {
        "ovis-gamma0": (0.553, 0.102, 0.023, 0.0226),
        "ovis-gamma1": (0.6, 0.1, 0.0125, 0.0126),
        "ovis-S50-exclusive": (None, 0.084, 0.011, None),
        "ovis-S10-exclusive": (None, 0.134, 0.013, 0.0156),
        "ovis-S1-exclusive": (None, None, 0.0158, None),
        "vimco": (0.64, 0.23, 0.226, 0.276),
        "tvo-part5-beta2": (0.826, 0.4005, 0.181, 0.0362),
        "rws": (None, 0.252, 0.0301, 0.0241),
        "reinforce": (0.7, 0.544, 0.593, 0.662),
    },
    "prior": {
        "ovis-gamma0": (0.282, 0.094, 0.00275, 0.0026),
        "ovis-gamma1": (0.328, 0.1205, 0.00265, 0.0026),
        "ovis-S50-exclusive": (0.372, 0.075, 0.0027, 0.0027),
        "tvo-part5-beta2": (0.497, 0.2325, 0.1402, 0.0028),
        "rws": (0.45, 0.157, 0.0028, 0.0027),
        "reinforce": (None, 0.13, 0.0377, 0.0322),
    },
    "SNR": {
        "ovis-gamma0": (0.404, 0.505, 0.711, 1.06),
        "ovis-gamma1": (0.626, 1.124, 1.597, 2.314),
        "ovis-S50-exclusive": (0.66, 0.99, 1.93, 2.81),
        "ovis-S1-exclusive": (0.479, 0.807, 1.301, 1.932),
        "vimco": (0.201, 0.2, 0.18, 0.161),
        "tvo-part5-beta2": (0.276, 0.342, 0.384, 0.454),
        "rws": (0.45, 0.432, 0.528, 0.677),
        "reinforce": (0.089, 0.067, 0.0525, 0.0428),
    },
}

#: Distance from the posterior after 4,000 steps with K = 10, measured with the published code (2 seeds).
PUBLISHED_CODE_STEPS, PUBLISHED_CODE_PARTICLES = 4000, 10
PUBLISHED_CODE = {
    "ovis-gamma0": 0.616,
    "ovis-gamma1": 0.555,
    "ovis-S10-exclusive": 0.639,
    "vimco": 0.644,
    "rws": 0.452,
    "tvo-part5-beta2": 0.558,
    "reinforce": 0.69,
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimators", nargs="+", default=ESTIMATORS, help=EXAMPLES)
    parser.add_argument("--particles", type=int, nargs="+", default=[10], help="numbers of particles K")
    parser.add_argument("--num_steps", type=int, default=4000, help="training steps (published: 100000)")
    parser.add_argument("--evaluate_every", type=int, default=1000, help="steps between evaluations (published: 3000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch_size", type=int, default=100, help="fresh observations per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--num_eval_data", type=int, default=1000, help="fresh observations per evaluation")
    parser.add_argument("--num_gradients", type=int, default=100, help="draws of the gradient (published: 500)")
    parser.add_argument("--output", default="results/gaussian_mixture")
    parser.add_argument("--no-progress", action="store_true")
    return parser.parse_args(argv)


def initial_params(rng_key: Array) -> dict[str, Any]:
    """The proportions equal, the network drawn."""
    network = eqx.partition(mixture.encoder(rng_key), eqx.is_inexact_array)[0]
    return {"encoder$params": network, "prior_logits": jnp.zeros(mixture.NUM_CLUSTERS)}


def train(
    estimator: str, num_particles: int, checkpoint: Path, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train all seeds of one estimator; its row of the table and its curves."""
    loss = make_estimator(estimator, num_particles)
    guide = mixture.make_guide(random.key(0))
    svi = SVI(mixture.model, guide, optax.adam(options.lr), loss)

    def evaluate(params: dict[str, Any], rng_key: Array) -> dict[str, Array]:
        data_key, weight_key = random.split(rng_key)
        x = mixture.simulate(data_key, options.num_eval_data)
        weights = log_weights(weight_key, mixture.model, guide, params, (x,), {}, num_particles=num_particles).values
        return {
            "posterior": mixture.posterior_error(params, x),
            "prior": mixture.prior_error(params),
            "ESS": jnp.mean(effective_sample_size(weights)),
        }

    result = replicates.train(
        svi,
        options.seeds,
        options.num_steps,
        lambda rng_key: (mixture.simulate(rng_key, options.batch_size),),
        evaluate=evaluate,
        num_evaluations=max(options.num_steps // options.evaluate_every, 1),
        init_params=initial_params,
        checkpoint=checkpoint,
        progress_bar=not options.no_progress,
        description=f"{estimator}, K={num_particles}",
    )
    gradients = []
    for number, seed in enumerate(options.seeds):
        data_key, gradient_key = random.split(random.fold_in(random.key(seed), 4))
        x = mixture.simulate(data_key, options.batch_size)
        params = jax.tree.map(lambda value, number=number: value[number], result.params)
        gradients.append(
            gradient_statistics(
                gradient_key,
                loss,
                mixture.model,
                guide,
                params,
                x,
                names="encoder",
                num_samples=options.num_gradients,
                min_variance=1e-9 * options.batch_size**2,  # published: of the gradient averaged over the batch
            )
        )
    curves, number = result.curves, len(options.seeds)
    row = {
        "posterior": float(curves["posterior"][-1].mean()),
        "s.e.": float(curves["posterior"][-1].std(ddof=1) / np.sqrt(number)) if number > 1 else float("nan"),
        "smallest": float(curves["posterior"].min(0).mean()),
        "prior": float(curves["prior"][-1].mean()),
        "smallest prior": float(curves["prior"].min(0).mean()),
        "ESS": float(curves["ESS"][-1].mean()),
        "SNR": float(np.mean([found.average_snr for found in gradients])),
        "DSNR": float(np.mean([found.dsnr for found in gradients])),
        "seeds": number,
        "seconds": round(result.seconds, 1),
    }
    points = [
        {"step": int(step)}
        | {name: float(curves[name][i].mean()) for name in ("posterior", "prior", "ESS")}
        | {"posterior min": float(curves["posterior"][i].min()), "posterior max": float(curves["posterior"][i].max())}
        for i, step in enumerate(curves["step"])
    ]
    return row, points


def beside_published(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the published values that its budget compares with."""
    estimator, num_particles = row["estimator"], row["K"]
    known: dict[str, Any] = {}
    for quantity, by_estimator in PUBLISHED.items():
        values = by_estimator.get(estimator, (None,) * len(PUBLISHED_PARTICLES))
        value = dict(zip(PUBLISHED_PARTICLES, values, strict=True)).get(num_particles)
        known[quantity] = "" if value is None else value
    same_budget = (row["steps"], num_particles) == (PUBLISHED_CODE_STEPS, PUBLISHED_CODE_PARTICLES)
    code = PUBLISHED_CODE.get(estimator) if same_budget else None
    return {
        "estimator": estimator,
        "K": num_particles,
        "steps": row["steps"],
        "seeds": row.get("seeds", ""),
        "posterior": row.get("posterior", row.get("error")),
        "publ. code": code or "",
        "ratio": row["posterior"] / code if code and "posterior" in row else "",
        "smallest": row.get("smallest", ""),
        "publ. 100k": known["posterior"],
        "smallest prior": row.get("smallest prior", ""),
        "publ. prior 100k": known["prior"],
        "ESS": row.get("ESS", ""),
        "SNR": row.get("SNR", ""),
        "publ. SNR": known["SNR"],
        "DSNR": row.get("DSNR", ""),
    }


def plot(curves: Sequence[dict[str, Any]], folder: Path) -> None:
    """Distances and effective sample size over training, one column per number of particles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({point["K"] for point in curves})
    if not sizes:
        return
    titles = {"posterior": "distance from the posterior", "prior": "distance from the prior", "ESS": "ESS"}
    figure, axes = plt.subplots(
        3, len(sizes), figsize=(3 + 3.5 * len(sizes), 8), layout="constrained", squeeze=False, sharex=True
    )
    for number, estimator in enumerate(dict.fromkeys(point["estimator"] for point in curves)):
        for column, num_particles in enumerate(sizes):
            chosen = [p for p in curves if (p["estimator"], p["K"]) == (estimator, num_particles)]
            longest = max((point["steps"] for point in chosen), default=0)
            line = [point for point in chosen if point["steps"] == longest]
            steps = [point["step"] for point in line]
            for ax, quantity in zip(axes[:, column], titles, strict=True):
                label = estimator if column == 0 and quantity == "posterior" else None
                ax.plot(steps, [point[quantity] for point in line], f"C{number}", label=label)
            limits = [[point[f"posterior {end}"] for point in line] for end in ("min", "max")]
            axes[0, column].fill_between(steps, *limits, color=f"C{number}", alpha=0.2, lw=0)
            axes[0, column].set_title(f"K = {num_particles}")
            axes[2, column].set_xlabel("training step")
    for row, (quantity, title) in zip(axes, titles.items(), strict=True):
        row[0].set_ylabel(title)
        if quantity != "ESS":
            for ax in row:
                ax.set_yscale("log")
    figure.legend(loc="outside right", frameon=False)
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = vars(options)
    report.print_environment(settings)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    free = ("estimators", "particles", "num_steps", "output", "no_progress")
    fixed = {name: value for name, value in settings.items() if name not in free}
    rows = {(row["estimator"], row["K"], row["steps"]): row for row in report.load(folder, NAME, settings, free)}
    curves = report.load(folder, f"{NAME}_curves", settings, free)
    for num_particles in options.particles:
        for estimator in options.estimators:
            cell = (estimator, num_particles, options.num_steps)
            if cell in rows:
                continue
            row: dict[str, Any] = dict(zip(("estimator", "K", "steps"), cell, strict=True))
            started = time.perf_counter()
            try:
                checkpoint = folder / f"{estimator}-K{num_particles}-{report.digest(fixed)}.npz"
                measured, points = train(estimator, num_particles, checkpoint, options)
                row |= measured
                curves += [dict(zip(("estimator", "K", "steps"), cell, strict=True)) | point for point in points]
            except Exception as error:  # a cell that fails keeps its row, and is tried again next time
                row["error"] = f"{type(error).__name__}: {error}"
            rows[cell] = row
            print(f"{estimator}, K={num_particles}: {time.perf_counter() - started:.0f} s", flush=True)
            report.write(folder, NAME, list(rows.values()), settings)
            report.write(folder, f"{NAME}_curves", curves, settings)
    plot(curves, folder)
    print(
        "\nposterior: mean distance after the last step (publ. code: measured with the published code, "
        f"{PUBLISHED_CODE_STEPS} steps, 2 seeds)\nsmallest: over training (publ. 100k: the published figure, 100,000 "
        "steps, 10 seeds)\nSNR, DSNR: at the end (published: average over training)"
    )
    report.print_table([beside_published(row) for row in rows.values()])
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return list(rows.values())


if __name__ == "__main__":
    main()
