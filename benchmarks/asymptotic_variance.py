r"""Variance and signal-to-noise ratio of gradient estimators as the number of particles K grows.

A Gaussian toy model at its optimum plus a little noise [2]; the gradient of the guide's bias "b" of the bound, averaged
over all data. Prints SNR, directional SNR, variance and magnitude beside the published figure, and their slopes in K:
the SNR of VIMCO and of pathwise gradients falls as K^-1/2 [1], that of OVIS rises as K^1/2 [2]. Writes CSV, JSON and a
figure. Finished cells (estimator, K, seed) are kept: call again to go on, or with more of them.

"--config main" is the published figure, "extended" the one with doubly reparameterised estimators, "mini" a quick one;
the other arguments override it. A seed draws data, parameters' noise and gradients; the published figures are of one.

1. *Tighter Variational Bounds are Not Necessarily Better*, T. Rainforth et al. (2018)
2. *Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds*, V. Lievin,
   A. Dittadi, A. Christensen, O. Winther (2020)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jax import random
from numpyro.infer.elbo import ELBO

from benchmarks import report
from benchmarks.estimators import EXAMPLES, make_estimator
from models import gaussian_toy
from numpyro_smc import gradient_statistics

NAME = "asymptotic_variance"
EXTENDED = ["ovis-gamma0", "ovis-gamma1", "iwelbo", "stl", "dreg"]
MAIN = ["ovis-gamma0", "ovis-S50-exclusive", "ovis-S10-exclusive", "ovis-S1-exclusive", "iwelbo", "vimco"]
PUBLISHED_SIZE = {"particles": [3, 12, 54, 234, 1000], "replicates": 10_000, "seeds": [10]}
CONFIGS: dict[str, dict[str, Any]] = {
    "main": {"estimators": MAIN, **PUBLISHED_SIZE},
    "extended": {"estimators": EXTENDED, **PUBLISHED_SIZE},
    "mini": {"estimators": MAIN, "particles": [3, 17, 100], "replicates": 1000, "num_data": 100, "seeds": [10]},
}

#: What a row holds of the gradient, with its name in figures.
QUANTITIES = {"SNR": "signal-to-noise ratio", "DSNR": "directional SNR", "variance": "variance", "|mean|": "|mean|"}

#: Published figure of [2] (extended), read off the image to about 3 %; N = 1024, D = 20, 10,000 replicates, one draw of
#: the noise. STL and DReG are left out: the published code evaluates the guide with scale 1 instead of 2/3 there.
PUBLISHED_PARTICLES = (3, 12, 54, 234, 1000)
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "ovis-gamma0": {
        "SNR": (2.186, 3.831, 5.623, 8.133, 12.48),
        "DSNR": (3.062, 5.583, 8.789, 14.6, 25.23),
        "variance": (2.263e-4, 8.871e-6, 2.695e-7, 7.276e-9, 1.746e-10),
        "|mean|": (0.03529, 0.01169, 0.003014, 0.0007547, 0.0001756),
    },
    "ovis-gamma1": {
        "SNR": (3.162, 6.615, 13.63, 28.1, 57.92),
        "DSNR": (4.449, 9.271, 19.32, 39.72, 81.67),
        "variance": (None, None, 2.51e-5, 5.99e-6, 1.46e-6),
        "|mean|": (0.0817, 0.0842, 0.0854, 0.0854, 0.0854),
    },
    "iwelbo": {
        "SNR": (1.248, 0.7227, 0.3665, 0.1859, 0.0889),
        "DSNR": (1.725, 0.998, 0.519, 0.304, 0.23),
        "variance": (7.793e-4, 2.596e-4, 6.57e-5, 1.599e-5, 3.89e-6),
        "|mean|": (0.03529, 0.01169, 0.003014, 0.0007547, 0.0001756),
    },
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, help="published settings to start from")
    parser.add_argument("--estimators", nargs="+", default=[*EXTENDED, "vimco"], help=EXAMPLES)
    parser.add_argument("--particles", type=int, nargs="+", default=[3, 12, 54, 100], help="numbers of particles K")
    parser.add_argument(
        "--geomspace", type=int, nargs=3, metavar=("MIN", "MAX", "NUMBER"), help="K as a geometric progression instead"
    )
    parser.add_argument("--replicates", type=int, default=100, help="draws of the gradient (published: 10000)")
    parser.add_argument("--num_data", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.01, help="standard deviation around the optimum")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch_size", type=int, default=16, help="particles at a time, which bounds the memory")
    parser.add_argument("--slope_range", type=int, nargs=2, default=[3, 100], help="K over which slopes are fitted")
    parser.add_argument("--output", default="results/asymptotic_variance")
    config = parser.parse_known_args(argv)[0].config
    parser.set_defaults(**CONFIGS.get(config, {}))
    options = parser.parse_args(argv)
    if options.geomspace:
        options.particles = [int(k) for k in np.geomspace(*options.geomspace)]
    return options


@cache  # one object for all seeds, so that it is compiled once
def loss_of(estimator: str, num_particles: int, batch_size: int) -> ELBO:
    return make_estimator(estimator, num_particles, batch_size=batch_size)


def measure(estimator: str, num_particles: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Statistics of the gradient of the mean bound of a datapoint."""
    data_key, noise_key, gradient_key = random.split(random.key(seed), 3)
    x = gaussian_toy.simulate(data_key, options.num_data, options.dim)
    params = gaussian_toy.perturbed_optimum(noise_key, x, options.noise)
    loss = loss_of(estimator, num_particles, options.batch_size)
    started = time.perf_counter()
    found = gradient_statistics(
        random.fold_in(gradient_key, num_particles),
        loss,
        gaussian_toy.model,
        gaussian_toy.guide,
        params,
        x,
        names={"b"},
        num_samples=options.replicates,
        min_variance=1e-15 * options.num_data**2,
    )
    return {
        "SNR": found.average_snr,
        "DSNR": found.dsnr,
        "variance": found.average_variance / options.num_data**2,
        "|mean|": found.average_magnitude / options.num_data,
        "SNR 5%": found.snr_percentiles[5],
        "SNR 50%": found.snr_percentiles[50],
        "SNR 95%": found.snr_percentiles[95],
        "ESS": found.ess,
        "seconds": round(time.perf_counter() - started, 1),
    }


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages of the seeds, with the published values beside them."""
    averages = []
    cells = dict.fromkeys((row["estimator"], row["K"]) for row in rows)
    for estimator, num_particles in cells:
        chosen = [row for row in rows if (row["estimator"], row["K"]) == (estimator, num_particles)]
        done = [row for row in chosen if "error" not in row]
        average: dict[str, Any] = {"estimator": estimator, "K": num_particles, "seeds": len(done)}
        for quantity in QUANTITIES:
            average[quantity] = float(np.mean([row[quantity] for row in done])) if done else ""
            values = PUBLISHED.get(estimator, {}).get(quantity, (None,) * len(PUBLISHED_PARTICLES))
            known = dict(zip(PUBLISHED_PARTICLES, values, strict=True)).get(num_particles)
            average[f"{quantity} publ."] = "" if known is None else known
        averages.append(average)
    return averages


def slopes(rows: Sequence[dict[str, Any]], limits: Sequence[int]) -> list[dict[str, Any]]:
    """Slopes of the logarithms in log K, by least squares for each seed, averaged; published ones beside them."""
    table = []
    for estimator in dict.fromkeys(row["estimator"] for row in rows):
        by_seed: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            if row["estimator"] == estimator and "error" not in row and limits[0] <= row["K"] <= limits[1]:
                by_seed.setdefault(row["seed"], []).append(row)
        lines = [line for line in by_seed.values() if len(line) > 1]
        slope: dict[str, Any] = {"estimator": estimator, "seeds": len(lines)}
        for quantity in QUANTITIES:
            fits = [_slope([row["K"] for row in line], [row[quantity] for row in line]) for line in lines]
            slope[quantity] = float(np.mean(fits)) if fits else ""
            known = PUBLISHED.get(estimator, {}).get(quantity, ())
            pairs = [(k, v) for k, v in zip(PUBLISHED_PARTICLES, known, strict=False) if v and k <= limits[1]]
            slope[f"{quantity} publ."] = _slope(*zip(*pairs, strict=True)) if len(pairs) > 1 else ""
        table.append(slope)
    return table


def _slope(num_particles: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(num_particles), np.log(values), 1)[0])


def plot(averages: Sequence[dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    averages = [row for row in averages if row["seeds"]]
    if not averages:
        return
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained", sharex=True)
    for number, estimator in enumerate(dict.fromkeys(row["estimator"] for row in averages)):
        done = sorted((row for row in averages if row["estimator"] == estimator), key=lambda row: row["K"])
        for ax, quantity in zip(axes.flat, QUANTITIES, strict=True):
            label = estimator if ax is axes.flat[0] else None
            ax.plot([r["K"] for r in done], [r[quantity] for r in done], f"C{number}.-", label=label)
            known = PUBLISHED.get(estimator, {}).get(quantity)
            if known:
                ax.plot(PUBLISHED_PARTICLES, known, f"C{number}o", mfc="none", ms=7)
    for ax, (quantity, title) in zip(axes.flat, QUANTITIES.items(), strict=True):
        ax.set(xscale="log", yscale="log", title=title, xlabel="K" if quantity in ("variance", "|mean|") else "")
    axes.flat[0].plot([], [], "o", color="0.3", mfc="none", ms=7, label="published")
    figure.legend(loc="outside right", frameon=False)
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = vars(options)
    report.print_environment(settings)
    free = ("config", "estimators", "particles", "geomspace", "seeds", "slope_range", "output")
    rows = {(row["estimator"], row["K"], row["seed"]): row for row in report.load(options.output, NAME, settings, free)}
    cells = [(e, k, seed) for k in sorted(options.particles) for e in options.estimators for seed in options.seeds]
    for cell in cells:
        if cell in rows:
            continue
        row = dict(zip(("estimator", "K", "seed"), cell, strict=True))
        try:
            row |= measure(*cell, options)
        except Exception as error:  # a cell that fails keeps its row, and is tried again next time
            row["error"] = f"{type(error).__name__}: {error}"
        rows[cell] = row
        print("  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
        report.write(options.output, NAME, list(rows.values()), settings)
    averages = over_seeds(list(rows.values()))
    plot(averages, Path(options.output))
    print(f"\nmeans over seeds, {options.replicates} replicates; publ.: N = 1024, D = 20, 10,000 replicates, one seed")
    report.print_table(averages)
    print(f"\nslopes of the logarithms in log K, K = {options.slope_range[0]} to {options.slope_range[1]}")
    report.print_table(slopes(list(rows.values()), options.slope_range))
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return list(rows.values())


if __name__ == "__main__":
    main()
