"""How well smoothers smooth per CPU second: the score and the smoothed states of a linear-Gaussian series.

Bootstrap filter of an AR(1) program (systematic resampling when ESS < N/2) in 500 steps. Score: the gradient of the log
evidence in the AR coefficient and both scales, by Fisher's identity with each smoother of `FilterResult.score`, beside
`FIVO(resampling_gradient="stop_gradient")` differentiated; exact by differentiating the Kalman filter. States: first
and second moments of every step by `FilterResult.smooth`; exact by the Rauch-Tung-Striebel smoother. CPU time of all
threads, single-threaded XLA, one pinned core. Columns:

  CPU ms        of one estimate, its filter run included: replicates are mapped one after another in one program
  bias, sd      of a parameter's score over the replicates; mse is their sum of squares
  gain          mse of the stop-gradient estimator over mse, at equal CPU time, by parameter: the stop-gradient's mse is
                interpolated (log-log) between its numbers of particles, and taken to fall as 1/time beyond them
  least gain    the smallest over the parameters; total gain: of the sums of mse over the parameters
  rms ...       root mean square error over steps and replicates of the smoothed moments; of averages: of the
                replicates' averages, so that biases show
  mse x CPU s   mean-squared error of the smoothed means times the CPU seconds of one estimate: less is better
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.one_core import conditions, use_one_core

if __name__ == "__main__":
    use_one_core()

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax, random

from benchmarks import report
from models import linear_gaussian
from numpyro_smc import FIVO, ParticleFilter, bootstrap
from numpyro_smc.filtering.score import score_of
from numpyro_smc.filtering.smoothing.runs import expectation_of, repeat

NAME = "smoothing"
SCORE, STATES = CASES = ("score", "states")
STOP_GRADIENT = "stop-gradient"
PARAMS = {"coefficient": 0.9, "transition_scale": 0.5, "emission_scale": 0.5}
#: Method and options by the name of the row, and a factor of the number of particles: quadratic ones take fewer.
SMOOTHERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "backward_mcmc": ("backward_mcmc", {}, 1.0),
    "paris": ("paris", {}, 1.0),
    "backward_rejection": ("backward_rejection", {}, 0.5),
    "ffbsm": ("ffbsm", {}, 0.5),
    "fixed_lag": ("fixed_lag", {"lag": 15}, 1.0),
    "genealogy": ("genealogy", {}, 1.0),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--methods", nargs="+", default=list(SMOOTHERS), choices=list(SMOOTHERS))
    parser.add_argument("--num-particles", type=int, nargs="+", default=[250, 1000])
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--replicates", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="small shapes, few replicates: does it work?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results; its rows are kept")
    options = parser.parse_args(argv)
    if options.quick:
        options.num_particles, options.num_steps, options.replicates = [200], 30, 8
        options.methods = ["backward_mcmc"]
    return options


def program(y: Array) -> None:
    linear_gaussian.ar1_model(y, None, *(numpyro.param(name, value) for name, value in PARAMS.items()), 1.0)


def exact_score(y: Array) -> np.ndarray:
    """Gradient of the Kalman filter's log evidence, in double precision."""

    def log_evidence(values: Array) -> Array:
        return linear_gaussian.log_evidence(linear_gaussian.ar1_parameters(*values, 1.0), y[:, None])

    with jax.enable_x64(True):
        values, y = jnp.asarray(list(PARAMS.values()), jnp.float64), jnp.asarray(y, jnp.float64)
        return np.asarray(jax.grad(log_evidence)(values))


def exact_moments(y: Array) -> np.ndarray:
    """Smoothed first and second moments of the states, ``[T, 2]``."""
    parameters = linear_gaussian.ar1_parameters(*PARAMS.values(), 1.0)
    smoothed = linear_gaussian.rts_smoother(parameters, linear_gaussian.kalman_filter(parameters, y[:, None]))
    means = smoothed.means[:, 0]
    return np.stack([means, smoothed.covariances[:, 0, 0] + means**2], axis=1)


def moments(t: Array, carry: Array, values: dict[str, Array]) -> Array:
    return jnp.stack([values["x"], values["x"] ** 2])


def stop_gradient_score(num_particles: int, y: Array) -> Callable[[Array], Array]:
    loss = FIVO(num_particles, resampler="systematic", resampling_gradient="stop_gradient")
    guide = bootstrap(program)

    def estimate(rng_key: Array) -> Array:
        params = {name: jnp.asarray(value) for name, value in PARAMS.items()}
        gradient = jax.grad(lambda params: -loss.loss(rng_key, params, program, guide, y))(params)
        return jnp.stack([gradient[name] for name in PARAMS])

    return estimate


def smoothed(case: str, name: str, num_particles: int, y: Array) -> Callable[[Array], Array]:
    """One estimate of the score, or of the moments, by one run of the filter."""
    particle_filter = ParticleFilter(program, num_particles)
    method, method_options, _ = SMOOTHERS[name]
    params = {name: jnp.asarray(value) for name, value in PARAMS.items()}
    question = score_of(particle_filter, tuple(PARAMS)) if case == SCORE else expectation_of(moments, False)

    def estimate(rng_key: Array) -> Array:
        run_key, key = random.split(rng_key)
        whole = (params, (y,), {})
        answer = repeat(particle_filter, case, question, run_key, key, whole, 1, method, method_options)[0]
        return jnp.stack([answer[name][0] for name in PARAMS]) if case == SCORE else answer[0]

    return estimate


def replicate(estimate: Callable[[Array], Array], options: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Estimates ``[R, ...]`` and CPU milliseconds of one; compilation is not in it."""
    keys = random.split(random.key(options.seed + 1), options.replicates)
    mapped = jax.jit(lambda keys: lax.map(estimate, keys)).lower(keys).compile()
    start = time.process_time()
    found = jax.block_until_ready(mapped(keys))
    return np.asarray(found, np.float64), 1e3 * (time.process_time() - start) / options.replicates


def score_row(name: str, num_particles: int, y: Array, options: argparse.Namespace) -> dict[str, Any]:
    make = stop_gradient_score if name == STOP_GRADIENT else partial(smoothed, SCORE, name)
    found, milliseconds = replicate(make(num_particles, y), options)
    row: dict[str, Any] = {"case": SCORE, "method": name, "N": num_particles, "CPU ms": milliseconds}
    for parameter, values, exact in zip(PARAMS, found.T, exact_score(y), strict=True):
        row |= {f"exact {parameter}": exact, f"bias {parameter}": values.mean() - exact}
        row |= {f"sd {parameter}": values.std(ddof=1), f"mse {parameter}": np.mean((values - exact) ** 2)}
    return row


def compare(row: dict[str, Any], reference: Sequence[dict[str, Any]]) -> None:
    """Add the gains over the stop-gradient estimator at equal CPU time."""
    at = [mse_at(row["CPU ms"], reference, f"mse {name}") for name in PARAMS]
    own = [row[f"mse {name}"] for name in PARAMS]
    for name, theirs, ours in zip(PARAMS, at, own, strict=True):
        row[f"gain {name}"] = theirs / ours
    row["least gain"] = min(theirs / ours for theirs, ours in zip(at, own, strict=True))
    row["total gain"] = sum(at) / sum(own)


def mse_at(milliseconds: float, reference: Sequence[dict[str, Any]], column: str) -> float:
    """The reference's mean-squared error at a CPU time."""
    times = np.log([row["CPU ms"] for row in reference])
    errors = np.log([row[column] for row in reference])
    order = np.argsort(times)
    times, errors, wanted = times[order], errors[order], np.log(milliseconds)
    inside = np.interp(wanted, times, errors)
    beyond = max(wanted - times[-1], 0.0) + min(wanted - times[0], 0.0)
    return float(np.exp(inside - beyond))


def state_row(name: str, num_particles: int, y: Array, options: argparse.Namespace) -> dict[str, Any]:
    exact = exact_moments(y)
    found, milliseconds = replicate(smoothed(STATES, name, num_particles, y), options)
    rms = np.sqrt(np.mean((found - exact) ** 2, axis=(0, 1)))
    bias = np.sqrt(np.mean((found[..., 0].mean(0) - exact[:, 0]) ** 2))
    row = {"case": STATES, "method": name, "N": num_particles, "CPU ms": milliseconds}
    row |= {"rms mean": rms[0], "rms second": rms[1], "rms of averages": bias}
    return row | {"mse x CPU s": rms[0] ** 2 * milliseconds / 1e3}


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """The rows: case, method, number of particles."""
    for case in options.cases:
        if case == SCORE:
            yield from ((SCORE, STOP_GRADIENT, num_particles) for num_particles in options.num_particles)
        for name in options.methods:
            yield from ((case, name, int(SMOOTHERS[name][2] * size)) for size in options.num_particles)


def in_order(wanted: tuple[str, str, int]) -> tuple[int, int, int]:
    """Cases and methods as they are listed, the stop-gradient estimator first."""
    case, name, num_particles = wanted
    return CASES.index(case), [STOP_GRADIENT, *SMOOTHERS].index(name), num_particles


def identity(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["case"], row["method"], row["N"]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = conditions() | vars(options)
    report.print_environment(settings)
    parameters = linear_gaussian.ar1_parameters(*PARAMS.values(), 1.0)
    y = linear_gaussian.simulate(random.key(options.seed), parameters, options.num_steps)[1][:, 0]
    rows: list[dict[str, Any]] = []
    free = ("cases", "methods", "num_particles", "load", "output")
    before = {identity(row): row for row in report.load(options.output, NAME, settings, free)}
    for case, name, size in sorted(set(wanted(options)) | before.keys(), key=in_order):
        row = before.get((case, name, size))
        if row is None:
            row = (score_row if case == SCORE else state_row)(name, size, y, options)
        rows.append(row)
        print(f"{case}: {name}, N = {size}: {row['CPU ms']:.1f} ms", flush=True)
        reference = [row for row in rows if row["method"] == STOP_GRADIENT]
        for row in rows:
            if row["case"] == SCORE:
                compare(row, reference)
        report.write(options.output, NAME, rows, settings)
    for case in CASES:
        chosen = [row for row in rows if row["case"] == case]
        hidden = ("exact", "mse ") if case == SCORE else ("exact",)
        if chosen:
            print()
            report.print_table(chosen, [c for c in chosen[0] if c != "case" and not c.startswith(hidden)])
    print(f"\nresults: {options.output}/{NAME}.csv and .json")
    return rows


if __name__ == "__main__":
    main()
