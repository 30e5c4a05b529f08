"""Particle MCMC beside NUTS on the joint path: effective draws of parameters and path per CPU second.

Two models with priors on their parameters: stochastic volatility on daily returns of the S&P 500 (T = 500), and the
Ricker map on simulated counts, whose likelihood is rough. The samplers see the same program and data:

- ``nuts``: NUTS on parameters and path together, T + 4 dimensions;
- ``gibbs``: particle Gibbs with ancestor sampling, NUTS for the parameters given the path;
- ``metropolis``: particle Metropolis with the number of particles that its own ``tune`` chooses, paths kept;
- ``correlated``: the same with correlated noise.

Columns: smallest effective sample size over parameters and over steps of the path (and the median over steps), CPU
seconds of sampling without compilation and warm-up, effective draws per CPU second, largest R-hat of the parameters
(four chains, in one vectorised program). Then, for the volatility model, the time of one conditional-SMC sweep over
that of one filter pass with as many particles, medians of interleaved runs.

Settings for a long run: ``--num_warmup 2000 --num_samples 10000``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size, gelman_rubin
from numpyro.infer import MCMC, NUTS

from benchmarks import report
from models import bayesian_series
from models.series import load_sp500
from numpyro_smc import ConditionalSMC, ParticleFilter, ParticleGibbs, ParticleMetropolis

NAME = "particle_mcmc"
PARAMETERS = {"volatility": ("mu", "phi", "sigma"), "ricker": ("log_r", "sigma", "log_scale")}
MODELS = {"volatility": bayesian_series.stochastic_volatility, "ricker": bayesian_series.ricker}
SAMPLERS = ("nuts", "gibbs", "metropolis", "correlated")
TRUTH = {"log_r": 3.8, "sigma": 0.3, "log_scale": float(np.log(10.0))}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--num_steps", type=int, nargs=2, default=[500, 100], help="of volatility and of Ricker")
    parser.add_argument("--num_warmup", type=int, default=300)
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--num_chains", type=int, default=4)
    parser.add_argument("--num_particles", type=int, default=50, help="of particle Gibbs, and first of Metropolis")
    parser.add_argument("--sweep_particles", type=int, nargs="*", default=[100, 1000, 10000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results")
    return parser.parse_args(argv)


def data(model: str, options: argparse.Namespace) -> Array:
    """Returns in percent, or simulated counts."""
    if model == "volatility":
        return jnp.asarray(load_sp500()[0][-options.num_steps[0] :], jnp.float32)
    program = handlers.seed(handlers.substitute(MODELS[model], data=TRUTH), random.key(options.seed))
    return program(None, options.num_steps[1])[1]


def make_kernel(sampler: str, model: Callable, y: Array, options: argparse.Namespace) -> tuple[Any, int | None]:
    """The kernel, and its number of particles."""
    if sampler == "nuts":
        return NUTS(model), None
    if sampler == "gibbs":
        return ParticleGibbs(model, options.num_particles), options.num_particles
    correlated: dict[str, Any] = {"correlation": 0.99, "resample": "always"} if sampler == "correlated" else {}
    first = ParticleMetropolis(model, options.num_particles, keep_paths=not correlated, **correlated)
    kernel, variances = first.tune(random.key(options.seed + 1), y)
    print(variances)
    return kernel, kernel.num_particles


def run(sampler: str, name: str, y: Array, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    model = MODELS[name]
    kernel, num_particles = make_kernel(sampler, model, y, options)
    mcmc = MCMC(
        kernel,
        num_warmup=options.num_warmup,
        num_samples=options.num_samples,
        num_chains=options.num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    started = time.process_time()
    mcmc.warmup(random.key(options.seed), y)
    mcmc.run(random.key(options.seed + 1), y)  # compiles the sampling program
    mcmc.post_warmup_state = mcmc.last_state
    before = time.process_time()
    mcmc.run(random.key(options.seed + 2), y)
    jax.block_until_ready(mcmc.last_state)
    seconds = time.process_time() - before
    draws = {site: np.asarray(value, float) for site, value in mcmc.get_samples(group_by_chain=True).items()}
    sizes = {site: float(effective_sample_size(draws[site])) for site in PARAMETERS[name]}
    path = effective_sample_size(draws["x"]) if "x" in draws else np.array([np.nan])
    return {
        "model": name,
        "sampler": sampler,
        "particles": num_particles,
        "parameter ESS": min(sizes.values()),
        "path ESS, lowest": float(np.min(path)),
        "path ESS, median": float(np.median(path)),
        "CPU s": seconds,
        "parameter ESS / s": min(sizes.values()) / seconds,
        "path ESS / s": float(np.min(path)) / seconds,
        "R-hat": max(float(gelman_rubin(draws[site])) for site in PARAMETERS[name]),
        "warm-up CPU s": before - started,
        **{f"mean of {site}": float(draws[site].mean()) for site in PARAMETERS[name]},
    }


def sweep_costs(num_particles: int, y: Array, num_repeats: int = 15) -> list[dict[str, Any]]:
    """Times of conditional-SMC sweeps over that of a filter pass that keeps its history."""
    params = {"mu": -1.0, "phi": 0.95, "sigma": 0.3}
    model = bayesian_series.stochastic_volatility
    particle_filter = ParticleFilter(model, num_particles, resample="always")
    runs: dict[str, Callable[[Array], Any]] = {
        "filter": jax.jit(lambda key: particle_filter._run(key, params, (y,), {})),
    }
    kinds: dict[str, dict[str, bool]] = {
        "sweep, lineages": {"ancestor_sampling": False},
        "sweep, ancestor sampling": {},
        "sweep, backward sampling": {"backward_sampling": True},
    }
    for kind, choice in kinds.items():
        kernel = ConditionalSMC(model, num_particles, params=params, **choice)
        state = kernel.init(random.key(0), 0, None, (y,), {})
        runs[kind] = jax.jit(partial(_sweep, kernel, state, y))
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(num_repeats + 1):
        for kind, one in runs.items():
            before = time.process_time()
            jax.block_until_ready(one(random.key(number)))
            seconds[kind].append(time.process_time() - before)
    medians = {kind: float(np.median(values[1:])) for kind, values in seconds.items()}
    return [
        {"particles": num_particles, "run": kind, "CPU ms": 1e3 * value, "over the filter": value / medians["filter"]}
        for kind, value in medians.items()
    ]


def _sweep(kernel: ConditionalSMC, state: Any, y: Array, rng_key: Array) -> Any:
    return kernel.sample(state._replace(rng_key=rng_key), (y,), {})


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    free = ("models", "samplers", "sweep_particles")
    report.print_environment(settings)
    rows = report.load(options.output, NAME, settings, free)
    for name in options.models:
        y = data(name, options)
        for sampler in options.samplers:
            if any((row["model"], row["sampler"]) == (name, sampler) for row in rows):
                continue
            try:
                rows.append(run(sampler, name, y, options))
            except (FloatingPointError, NotImplementedError, ValueError) as error:
                rows.append({"model": name, "sampler": sampler, "error": str(error)})
            report.write(options.output, NAME, rows, settings)
    shown = [column for column in (rows[0] if rows else {}) if not column.startswith("mean of")]
    report.print_table(rows, shown)
    if options.sweep_particles:
        costs = [line for size in options.sweep_particles for line in sweep_costs(size, data("volatility", options))]
        report.write(options.output, f"{NAME}_sweeps", costs, settings)
        report.print_table(costs)
    return rows


if __name__ == "__main__":
    main()
