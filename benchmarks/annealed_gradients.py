r"""Gradients through resampling against finite differences: which of them is the gradient of the bound.

On the mixture of eight Gaussians of [1], with multinomial resampling before every transition but the first, the mean of
each gradient estimator over many runs is compared with the finite difference of the bound, the runs at both points
having common random numbers. Four numbers stand for the sampler:

.. math:: \delta = 0.25\,\sigma(a), \qquad M = e^m, \qquad \eta = 0.01 + 0.98\,\sigma(u), \qquad
   \beta_k = (k / K)^{e^w},

of which the table calls the derivatives "step", "mass", "refreshment" and "schedule". In double precision. Prints each
mean with its standard error, its distance from the finite difference in standard errors, and the standard deviation of
a single run, beside what was measured with a re-implementation of the published code; writes CSV, JSON and a figure.
Finished cells are kept.

1. *Resampling Gradients Vanish in Differentiable Sequential Monte Carlo Samplers*, J. Zenn, R. Bamler (2023)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from benchmarks import report
from benchmarks.annealed_bounds import target_means
from benchmarks.annealed_training import METHODS, fill_table, make_loss
from models import static_targets

NAME = "annealed_gradients"
DIFFERENCE = "finite difference"
DEFAULT_METHODS = ["none-always", "published-gst", "stop_gradient-always", "score-always", "score_rb-always"]
PARAMETERS = ("step", "mass", "refreshment", "schedule")
STEP_SIZE_MAX = 0.25

#: (a, m, u, w) by dimension, number of particles and of transitions: steps of 0.06, and what training leads to.
POINTS: dict[tuple[int, int, int], dict[str, tuple[float, float, float, float]]] = {
    (2, 8, 8): {"small": (-1.2, -1.0, 0.95, 0.0), "good": (1.0, -2.5, 2.0, 0.3)},
    (10, 16, 8): {"small": (-1.2, -1.0, 0.95, 0.0), "good": (1.0, -2.7, 2.0, 0.3)},
}

#: Measured with a re-implementation of the published code that agrees with it to the last digit: derivatives as in
#: PARAMETERS, and their standard errors of 40,000 (D = 10: 12,000) runs for the differences, 20,000 (6,000) for others.
REFERENCE: dict[tuple[int, str], dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    (2, "small"): {
        DIFFERENCE: ((0.0419, -0.0268, 0.0031, -0.4672), (0.0019, 0.0015, 0.0011, 0.0144)),
        "none-always": ((0.0316, -0.0206, 0.0054, 0.9199), (0.0017, 0.0011, 0.0008, 0.0034)),
        "published-gst": ((0.0317, -0.0206, 0.0054, 0.9181), (0.0017, 0.0011, 0.0008, 0.0034)),
        "stop_gradient-always": ((0.0414, -0.0269, 0.0046, -0.0017), (0.0019, 0.0012, 0.0009, 0.0013)),
        "score-always": ((0.0461, -0.0300, 0.0050, -0.4767), (0.0022, 0.0014, 0.0010, 0.0468)),
    },
    (2, "good"): {
        DIFFERENCE: ((0.1391, -0.2516, -0.0137, -0.4150), (0.0037, 0.0054, 0.0032, 0.0138)),
        "none-always": ((0.0162, -0.0301, 0.0017, 0.5700), (0.0027, 0.0050, 0.0027, 0.0070)),
        "published-gst": ((0.0167, -0.0310, 0.0016, 0.5687), (0.0027, 0.0050, 0.0027, 0.0070)),
        "stop_gradient-always": ((0.1018, -0.1892, -0.0101, -0.1903), (0.0029, 0.0054, 0.0030, 0.0081)),
        "score-always": ((0.1309, -0.2433, -0.0123, -0.3729), (0.0039, 0.0073, 0.0035, 0.0322)),
    },
    (10, "small"): {
        DIFFERENCE: ((1.6478, -1.0752, 0.1493, 0.1357), (0.0128, 0.0088, 0.0061, 0.0220)),
        "none-always": ((1.3849, -0.9010, 0.1931, 1.4927), (0.0153, 0.0100, 0.0073, 0.0117)),
        "published-gst": ((1.3833, -0.9000, 0.1923, 1.5139), (0.0153, 0.0099, 0.0073, 0.0118)),
        "stop_gradient-always": ((1.6116, -1.0485, 0.1604, 0.2951), (0.0166, 0.0108, 0.0075, 0.0108)),
        "score-always": ((1.7538, -1.1410, 0.0682, 1.2320), (0.1138, 0.0740, 0.0428, 1.9119)),
    },
    (10, "good"): {
        DIFFERENCE: ((1.4529, -2.6606, -0.2260, 1.0795), (0.0230, 0.0328, 0.0192, 0.0689)),
        "none-always": ((0.8695, -1.6165, -0.0911, 3.3831), (0.0185, 0.0344, 0.0151, 0.0485)),
        "published-gst": ((0.8660, -1.6101, -0.0909, 3.3961), (0.0185, 0.0344, 0.0151, 0.0485)),
        "stop_gradient-always": ((1.3709, -2.5488, -0.1678, 1.4436), (0.0212, 0.0394, 0.0171, 0.0571)),
        "score-always": ((1.6679, -3.1009, -0.0422, 1.1608), (0.1970, 0.3662, 0.0990, 0.7303)),
    },
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 10], choices=[2, 10])
    parser.add_argument("--points", nargs="+", default=["small", "good"], choices=["small", "good"])
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, help=METHODS)
    parser.add_argument("--num_runs", type=int, default=40_000, help="runs behind each mean")
    parser.add_argument("--width", type=float, default=0.1, help="half the distance of the two points of a difference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/annealed_gradients")
    return parser.parse_args(argv)


def make_bound(method: str, num_particles: int, num_transitions: int, dim: int) -> Callable[[Array, Array], Array]:
    """``bound(theta, rng_key)``: the log evidence estimate of one run at the four numbers (a, m, u, w).

    Its derivative is one draw of the method's gradient; multinomial resampling before every transition but the first.
    """
    options: dict[str, Any] = {"step_size_max": STEP_SIZE_MAX, "remat": None}
    if not method.startswith("published") and method != "dais":
        options["resampler"] = "multinomial"
    loss = make_loss(method, num_particles, num_transitions, **options)
    target = static_targets.gaussian_mixture(target_means(dim))
    guide = loss.wrap(static_targets.guide)

    def bound(theta: Array, rng_key: Array) -> Array:
        raw_step, log_mass, raw_refreshment, warp = theta
        betas = (jnp.arange(num_transitions + 1) / num_transitions) ** jnp.exp(warp)
        params = {
            "betas": jnp.log(jnp.diff(betas)),
            "step_size": jnp.full(num_transitions, STEP_SIZE_MAX * jax.nn.sigmoid(raw_step)),
            "mass": jnp.exp(log_mass),
            "refreshment": 0.01 + 0.98 * jax.nn.sigmoid(raw_refreshment),
        }
        params = {f"annealing${name}": value for name, value in params.items()}
        return -loss.loss(rng_key, params, static_targets.model, guide, target)

    return bound


def gradients(bound: Callable[[Array, Array], Array], theta: Array, rng_keys: Array) -> Array:
    """The gradient of each run, ``[runs, 4]``."""
    return _over_runs(lambda rng_key: jax.grad(bound)(theta, rng_key), rng_keys)


def finite_differences(bound: Callable[[Array, Array], Array], theta: Array, rng_keys: Array, width: float) -> Array:
    """The difference quotients of each run, at common random numbers: ``[runs, 4]``."""

    def one(rng_key: Array) -> Array:
        moves = width * jnp.eye(len(theta))
        ends = [jax.vmap(bound, (0, None))(theta + sign * moves, rng_key) for sign in (1.0, -1.0)]
        return (ends[0] - ends[1]) / (2 * width)

    return _over_runs(one, rng_keys)


def _over_runs(function: Callable[[Array], Array], rng_keys: Array) -> Array:
    return jax.jit(partial(lax.map, function, batch_size=min(500, len(rng_keys))))(rng_keys)


def measure(dim: int, point: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Mean, standard error and standard deviation of each derivative."""
    with jax.enable_x64(True):
        size = next(size for size in POINTS if size[0] == dim)
        theta = jnp.array(POINTS[size][point])
        differs = method == DIFFERENCE
        rng_key = random.fold_in(random.key(options.seed), int(differs))  # the differences' runs are independent
        keys = random.split(rng_key, options.num_runs)
        bound = make_bound("none-always" if differs else method, *size[1:], dim)
        if differs:
            values = np.asarray(finite_differences(bound, theta, keys, options.width))
        else:
            values = np.asarray(gradients(bound, theta, keys))
    row: dict[str, Any] = {}
    for name, column in zip(PARAMETERS, values.T, strict=True):
        spread = column.std(ddof=1)
        row |= {name: column.mean(), f"{name} s.e.": spread / np.sqrt(len(column)), f"{name} s.d.": spread}
    return {name: float(value) for name, value in row.items()}


def beside_reference(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means with standard errors; distances from the finite differences in standard errors; the reference."""
    shown = {name: row[name] for name in ("D", "point", "method")}
    if "error" in row:
        return shown | {PARAMETERS[0]: row["error"]}
    truth = next((r for r in rows if (r["D"], r["point"], r["method"]) == (row["D"], row["point"], DIFFERENCE)), None)
    known = REFERENCE.get((row["D"], row["point"]), {}).get(row["method"])
    for i, name in enumerate(PARAMETERS):
        shown[name] = f"{row[name]:.4f} ± {row[f'{name} s.e.']:.4f}"
        if row["method"] != DIFFERENCE and truth is not None and "error" not in truth:
            shown[name] += f" ({distance(row, truth, name):+.1f})"
        shown[f"ref. {name}"] = "" if known is None else f"{known[0][i]} ± {known[1][i]}"
    return shown


def distance(row: dict[str, Any], truth: dict[str, Any], name: str) -> float:
    """How far a mean is from the finite difference, in standard errors of both."""
    return (row[name] - truth[name]) / np.hypot(row[f"{name} s.e."], truth[f"{name} s.e."])


def plot(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Every derivative by estimator with five standard errors, the finite difference as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error" not in row]
    places = list(dict.fromkeys((row["D"], row["point"]) for row in rows))
    if not places:
        return
    figure, axes = plt.subplots(
        len(places), 4, figsize=(13, 0.5 + 2.3 * len(places)), layout="constrained", squeeze=False, sharey=True
    )
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != DIFFERENCE))
    for line, place in zip(axes, places, strict=True):
        for ax, name in zip(line, PARAMETERS, strict=True):
            for row in (row for row in rows if (row["D"], row["point"]) == place):
                mean, error = row[name], 5 * row[f"{name} s.e."]
                if row["method"] == DIFFERENCE:
                    ax.axvspan(mean - error, mean + error, color="k", alpha=0.25, lw=0)
                else:
                    ax.errorbar(mean, methods.index(row["method"]), xerr=error, fmt="o", capsize=3)
            ax.set_title(f"D={place[0]}, {place[1]} steps: {name}", fontsize="small")
            ax.set_yticks(range(len(methods)), methods)
            ax.locator_params(axis="x", nbins=5)
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = vars(options)
    report.print_environment(settings)
    cells = [
        {"D": dim, "point": point, "method": method}
        for dim in options.dims
        for point in options.points
        for method in (DIFFERENCE, *options.methods)
    ]
    folder = Path(options.output)

    def row(D: int, point: str, method: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return measure(D, point, method, options), []

    rows, _ = fill_table(NAME, cells, row, folder, settings, ("dims", "points", "methods", "output"))
    plot(rows, folder)
    print(
        f"\nmeans of {options.num_runs} runs; in brackets their distance from the finite difference, in standard errors"
        "\nref.: measured with a re-implementation of the published code"
    )
    report.print_table([beside_reference(row, rows) for row in rows])
    print("\nstandard deviations of one run")
    report.print_table(
        [
            {name: row[name] for name in ("D", "point", "method")} | {n: row[f"{n} s.d."] for n in PARAMETERS}
            for row in rows
            if "error" not in row
        ]
    )
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return rows


if __name__ == "__main__":
    main()
