r"""Differentiable resampling on a linear-Gaussian model: what schemes do to the log evidence and to its gradient.

.. math:: x_1 \sim \mathcal N(0, 1), \qquad x_t \sim \mathcal N(\theta_1 x_{t-1}, 1), \qquad
   y_t \sim \mathcal N(\theta_2 x_t, 1/2), \qquad \theta = (0.5, 1), \qquad t = 1, \dots, 129.

A bootstrap filter of 32 particles that resamples at every step; the Kalman filter has the exact answers. Two tables,
by scheme and treatment of its gradient:

  gradient    at the true parameters, on the published series: minus log evidence less that of the Kalman filter, and
              its gradient, mean and standard deviation over keys, beside the numbers measured with the published code
              [1] (50 keys; 12 for optimal transport); milliseconds of CPU time (median) for a value with its
              gradient, compiled
  fit         maximum likelihood by L-BFGS-B from theta + 1 at one key, on that series and on simulated ones: fits
              that ended elsewhere than at the start (moved), distance from the exact maximum (rms, both parameters),
              evaluations

An estimate with resampled ancestors is discontinuous in the parameters, and its gradient without a treatment is not the
gradient of anything: a line search on it fails. (The target at N = 32 is the gradient of E[log Z], not quite the
Kalman filter's.) Writes CSV, JSON and a figure. Finished cells are kept. Published: the same numbers of particles and
observations; the published code's loss lacks log N, which is added here.

1. *Diffusion differentiable resampling*, J. Andersson, Z. Zhao (2026)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from numpyro.contrib.control_flow import scan
from scipy.optimize import minimize

from benchmarks import report
from models import linear_gaussian
from numpyro_smc import FIVO, bootstrap, resampling

NAME = "differentiable_resampling"
TRUE = (0.5, 1.0)
NAMES = ("transition", "emission")
EMISSION_SCALE = 0.5**0.5

#: By name: the scheme, and the treatment of its gradient.
SCHEMES: dict[str, tuple[Any, str]] = {
    "multinomial": ("multinomial", "none"),
    "systematic": ("systematic", "none"),
    "soft .5": (resampling.soft(0.5), "none"),
    "stop-gradient": ("multinomial", "stop_gradient"),
    "stop-gradient systematic": ("systematic", "stop_gradient"),
    "gumbel .3": (resampling.gumbel_softmax(0.3), "none"),
    "diffusion": (resampling.diffusion(time=1.0, num_steps=4), "none"),
    "transport .8": (resampling.optimal_transport(0.8), "none"),
}

#: Minus log evidence less Kalman's, mean and standard deviation; means and standard deviations of both gradients.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "multinomial": (3.08, 3.1, 17.0, -3.6, 6.0, 4.3),
    "systematic": (3.32, 2.8, 17.0, -3.8, 6.6, 3.7),
    "soft .5": (4.58, 3.5, 14.8, -3.7, 7.5, 4.5),
    "stop-gradient": (3.08, 3.1, 10.0, -7.2, 23.9, 12.1),
    "gumbel .3": (2.96, 2.7, 8.5, -6.6, 6.1, 4.6),
    "diffusion": (2.84, 2.7, 8.8, -6.3, 5.9, 4.5),
    "transport .8": (3.60, 2.2, 11.5, -10.1, 6.0, 4.1),
}

#: Observations drawn by the published code, key 0.
_TEXT = """
-1.1726 -1.2585 -1.1662 0.7616 -0.7758 0.5302 -0.6503 0.3694 2.1182 -0.3777 0.3720 -1.8852 -0.7121 -2.2677 0.8177
-0.0712 1.7707 2.6443 0.5111 1.4418 -1.0817 -1.8894 -2.3836 -1.6398 -0.1615 -0.0800 -1.3337 1.2404 1.8047 0.0303
0.4469 -1.3226 -1.2791 -1.1651 0.4372 -0.7942 0.7182 -0.1737 -0.2678 -2.0419 -2.3830 1.2159 0.1136 -1.5005 -0.4316
2.8314 1.4059 1.0004 2.0028 -1.0826 0.5745 -1.1876 -0.8009 0.7939 -1.0497 -1.8980 -1.7376 0.8330 1.9723 1.5426 2.0254
-0.1468 0.6987 -0.6856 0.3891 0.4198 1.8607 1.8291 0.6174 -1.1086 0.2979 0.0745 1.0737 0.9008 0.1925 0.7588 1.8063
-0.3333 0.8852 0.2121 -2.6591 1.8690 2.1523 3.0684 -0.9029 2.3274 2.0462 0.1823 0.6770 -0.0315 -1.1690 0.3144 1.6618
-0.2881 1.7665 -0.1881 -1.9057 -1.2260 0.3239 1.7933 2.0801 2.4426 0.6823 1.0636 2.3733 -2.3229 0.2562 -2.3303 -2.1514
-0.1377 0.4609 -0.0743 0.1950 -0.9699 1.5768 -1.6628 -1.7723 -2.0427 -1.8113 -0.3818 1.2473 -0.5407 0.5666 -0.9407
-0.8950 0.0975 0.8289 1.1433 1.5443
"""
PUBLISHED_SERIES = np.array(_TEXT.split(), np.float32)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--steps", type=int, default=129, help="of the series; the published one is cut")
    parser.add_argument("--keys", type=int, default=50, help="of the filter, for the table of gradients")
    parser.add_argument("--series", type=int, default=8, help="to fit: the published one and simulated ones; 0: no fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}")
    return parser.parse_args(argv)


# The model


def model(y: Array) -> None:
    """The parameters are two ``param`` sites; ``y`` is ``[T]``."""
    transition, emission = (numpyro.param(name, true) for name, true in zip(NAMES, TRUE, strict=True))

    def step(x: Array, y_t: Array) -> tuple[Array, None]:
        x = numpyro.sample("x", dist.Normal(transition * x, 1.0))
        numpyro.sample("y", dist.Normal(emission * x, EMISSION_SCALE), obs=y_t)
        return x, None

    scan(step, 0.0, y)


@jax.jit
def exact_loss(theta: Array, y: Array) -> Array:
    """Minus log evidence by the Kalman filter; its initial state has all but no variance, as the model's has none."""
    parameters = linear_gaussian.ar1_parameters(theta[0], 1.0, EMISSION_SCALE, 1e-6)
    emission = parameters._replace(emission_matrix=jnp.reshape(theta[1], (1, 1)))
    return -linear_gaussian.log_evidence(emission, y[:, None])


def simulated_series(seed: int, num_steps: int) -> np.ndarray:
    """Observations ``[T]`` at the true parameters."""
    rng = np.random.default_rng(seed)
    x, y = 0.0, np.empty(num_steps, np.float32)
    for t in range(num_steps):
        x = TRUE[0] * x + rng.standard_normal()
        y[t] = TRUE[1] * x + EMISSION_SCALE * rng.standard_normal()
    return y


def make_loss(name: str, num_particles: int) -> Callable[[Array, Array, Array], Array]:
    """``loss(theta, rng_key, y)``: minus the filter's estimate of the log evidence."""
    scheme, gradient = SCHEMES[name]
    bound = FIVO(num_particles, resampler=scheme, resample="always", resampling_gradient=gradient)
    guide = bootstrap(model)

    def loss(theta: Array, rng_key: Array, y: Array) -> Array:
        return bound.loss(rng_key, dict(zip(NAMES, theta, strict=True)), model, guide, y)

    return loss


# The cells


def gradients(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Value and gradient at the true parameters over keys: a row of the first table."""
    y, theta = jnp.asarray(PUBLISHED_SERIES[: options.steps]), jnp.array(TRUE)
    one = jax.jit(jax.value_and_grad(make_loss(name, options.particles)))
    keys = random.split(random.key(options.seed), options.keys)
    jax.block_until_ready(one(theta, keys[0], y))
    found, seconds = [], []
    for key in keys:
        began = time.process_time()
        found.append(jax.block_until_ready(one(theta, key, y)))
        seconds.append(time.process_time() - began)
    values = np.array([value for value, _ in found], np.float64) - float(exact_loss(theta, y))
    slopes = np.array([slope for _, slope in found], np.float64)
    row = {
        "less Kalman": values.mean(),
        "sd": values.std(ddof=1),
        **{f"{each} mean": slopes[:, i].mean() for i, each in enumerate(NAMES)},
        **{f"{each} sd": slopes[:, i].std(ddof=1) for i, each in enumerate(NAMES)},
    }
    return {column: float(value) for column, value in row.items()} | {
        "keys": options.keys,
        "ms": 1e3 * float(np.median(seconds)),
    }


def fit(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fits of all series: a row of the second table."""
    one = jax.jit(jax.value_and_grad(make_loss(name, options.particles)))
    exact = jax.value_and_grad(exact_loss)
    start = np.array(TRUE) + 1.0
    moved, errors, exact_errors, evaluations, ends = 0, [], [], [], []
    began = time.process_time()
    for number in range(options.series):
        y = PUBLISHED_SERIES[: options.steps] if number == 0 else simulated_series(number, options.steps)
        rng_key = random.fold_in(random.key(options.seed), number)
        best = _minimise(lambda theta, y=y: exact(theta, y), start)
        found = _minimise(lambda theta, y=y, rng_key=rng_key: one(theta, rng_key, y), start)
        moved += bool(np.linalg.norm(found.x - start) > 1e-3)
        errors.append(np.linalg.norm(found.x - best.x))
        exact_errors.append(np.linalg.norm(best.x - TRUE))
        evaluations.append(found.nfev)
        ends.append([round(float(value), 4) for value in found.x])
    return {
        "series": options.series,
        "moved": moved,
        "close": int(np.sum(np.array(errors) < 0.2)),
        "from maximum": float(np.sqrt(np.mean(np.square(errors)))),
        "median": float(np.median(errors)),
        "maximum from truth": float(np.sqrt(np.mean(np.square(exact_errors)))),
        "evaluations": float(np.mean(evaluations)),
        "CPU s": (time.process_time() - began) / options.series,
        "ends": str(ends),
    }


def _minimise(value_and_gradient: Callable[[Array], tuple[Array, Array]], start: np.ndarray) -> Any:
    def evaluate(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_gradient(jnp.asarray(theta, jnp.float32))
        return float(value), np.asarray(gradient, np.float64)

    return minimize(evaluate, start, jac=True, method="L-BFGS-B")


# The tables


def measure(
    name: str, cells: Sequence[str], make: Callable[[str], dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows by scheme, kept from an earlier run of the same settings and written after each."""
    rows = {row["scheme"]: row for row in report.load(settings["output"], name, settings, ("schemes", "output"))}
    for scheme in cells:
        if scheme in rows:
            continue
        began, row = time.perf_counter(), {"scheme": scheme}
        try:
            row |= make(scheme)
        except Exception as error:  # a cell that fails keeps its row, and is tried again next time
            row["error"] = f"{type(error).__name__}: {error}"
        rows[scheme] = row
        print(f"{name}: {scheme}: {time.perf_counter() - began:.0f} s", flush=True)
        report.write(settings["output"], name, list(rows.values()), settings)
    return list(rows.values())


def beside_published(row: dict[str, Any], comparable: bool) -> dict[str, Any]:
    """A row of the first table for print: pairs of numbers, ours and, at the published sizes, the published ones."""
    if "error" in row:
        return {"scheme": row["scheme"], "less Kalman": row["error"]}
    pair = "{:.1f}, {:.1f}".format
    known = PUBLISHED.get(row["scheme"]) if comparable else None
    return {
        "scheme": row["scheme"],
        "less Kalman": f"{row['less Kalman']:.2f}",
        "sd": f"{row['sd']:.1f}",
        "published": "{:.2f}, {:.1f}".format(*known) if known else "",
        "gradient": pair(*(row[f"{each} mean"] for each in NAMES)),
        "its published": pair(*known[2:4]) if known else "",
        "sd of gradient": pair(*(row[f"{each} sd"] for each in NAMES)),
        "sd published": pair(*known[4:]) if known else "",
        "ms": f"{row['ms']:.2f}",
    }


def plot(rows: Sequence[dict[str, Any]], exact: np.ndarray, folder: Path) -> None:
    """Mean gradients with two standard deviations, the published means, and the Kalman filter's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "error" not in row]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for i, (ax, name) in enumerate(zip(axes, NAMES, strict=True)):
        for at, row in enumerate(rows):
            error = row[f"{name} sd"]
            ax.errorbar(row[f"{name} mean"], at, xerr=2 * error / row["keys"] ** 0.5, fmt="o", color="C0")
            ax.errorbar(row[f"{name} mean"], at, xerr=2 * error, fmt="none", color="C0", alpha=0.3)
            if row["scheme"] in PUBLISHED:
                ax.plot(PUBLISHED[row["scheme"]][2 + i], at, "x", color="C1")
        ax.axvline(exact[i], color="0.5", lw=0.8)
        ax.set(title=f"gradient in the {name} coefficient", yticks=range(len(rows)))
        ax.set_yticklabels([row["scheme"] for row in rows])
    axes[0].set_xlabel("mean ± 2 s.e. (pale: ± 2 sd); crosses: published; line: Kalman filter")
    figure.savefig(folder / f"{NAME}.png", dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    options = parse_arguments(argv)
    settings = vars(options)
    report.print_environment(settings)
    rows = measure(NAME, options.schemes, partial(gradients, options=options), settings)
    fits: list[dict[str, Any]] = []
    if options.series:
        fits = measure(f"{NAME}_fits", options.schemes, partial(fit, options=options), settings)
    theta, y = jnp.array(TRUE), jnp.asarray(PUBLISHED_SERIES[: options.steps])
    value, slope = jax.value_and_grad(exact_loss)(theta, y)
    plot(rows, np.asarray(slope), Path(options.output))
    print(f"\nAt the true parameters. Kalman filter: {float(value):.3f}, gradient {slope[0]:.2f}, {slope[1]:.2f}")
    comparable = (options.particles, len(y)) == (32, len(PUBLISHED_SERIES))
    report.print_table([beside_published(row, comparable) for row in rows])
    if fits:
        print("\nMaximum likelihood from theta + 1 (close: within 0.2 of the exact maximum)")
        shown = ("scheme", "series", "moved", "close", "from maximum", "median", "evaluations", "CPU s")
        report.print_table([{**row, "moved": row.get("error", row.get("moved"))} for row in fits], shown)
    print(f"\nresults and figure {NAME}.png: {options.output}")
    return {NAME: rows, f"{NAME}_fits": fits}


if __name__ == "__main__":
    main()
