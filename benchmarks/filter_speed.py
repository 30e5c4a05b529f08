"""How fast the particle filter of a NumPyro program is, beside a filter written by hand in JAX and other packages.

Bootstrap filter, systematic resampling when ESS < N/2, log evidence only: a linear-Gaussian AR(1) program and a
stochastic volatility program; a plate of series; the gradient of the FIVO bound in one parameter; peak memory with many
particles. On a CPU: CPU time of all threads, single-threaded XLA, one pinned core. On an accelerator: wall time. The
minimum over repeats in interleaved rounds counts. Columns:

  ratio         time over that of the fastest hand-written filter of the cell
  over value    time of the gradient (with its value) over that of the value alone
  M/s           million particle-steps per second, of all series
  compile s     first call (tracing, compilation, run) less one run
  recompiled    XLA compilations in a second call with another key; must be 0
  error (nat)   log evidence at one key less the exact one

Packages that are not installed, and cells that fail, keep a row. A package that cannot live beside numpyro_smc is
measured from its own environment, on the same machine and with the same settings, and merged:

  OTHER/bin/python -m benchmarks.filter_speed --peers-only particles
  python -m benchmarks.filter_speed --merge results/filter_speed/particles.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.one_core import conditions, use_one_core

if __name__ == "__main__":
    all_cores = use_one_core()

# An environment for --peers-only may have none of these.
alone = any(argument.startswith("--peers-only") for argument in sys.argv)
optional = contextlib.suppress(ModuleNotFoundError) if alone else contextlib.nullcontext()
with optional:
    import jax
    import jax.numpy as jnp
    from jax import Array, lax, random
    from jax.scipy.special import logsumexp
with optional:
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers
    from numpyro.contrib.control_flow import scan

    from benchmarks import report
    from models import linear_gaussian
    from numpyro_smc import FIVO, ParticleFilter, bootstrap

CASES = ("linear-gaussian", "volatility", "plate", "gradient", "memory")
LINEAR_GAUSSIAN, VOLATILITY, PLATE, GRADIENT, MEMORY = CASES
BOUND = "bound"  # the value, beside its gradient
NAME = "filter_speed"
OURS, HAND_WRITTEN = "numpyro_smc", "hand-written"
MEMORY_LIMIT_GIB = 2.0
SECONDS_PER_CELL = 1.0  # of a round; a cell that is slower is repeated less

Run = Callable[[int], Any]  # of the attempt, 0 or 1, which chooses the random key; returns log evidence


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--num-particles", type=int, nargs="+", default=[1000, 10000], help="of one series")
    parser.add_argument("--num-steps", type=int, default=500, help="of one series")
    parser.add_argument("--plate", type=int, nargs=3, default=[32, 256, 200], metavar=("SERIES", "PARTICLES", "STEPS"))
    parser.add_argument("--gradient-particles", type=int, default=1000)
    parser.add_argument("--memory-particles", type=int, default=1_000_000)
    parser.add_argument("--skip-memory", action="store_true", help="the same as leaving memory out of --cases")
    parser.add_argument("--rounds", type=int, default=4, help="interleaved over the libraries of a cell")
    parser.add_argument("--repeats", type=int, default=8, help=f"per round, up to {SECONDS_PER_CELL:g} s of them")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round: does it work?")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="other packages; may be empty")
    parser.add_argument("--peers-only", choices=PEERS, help="measure this package alone; numpyro_smc is not needed")
    parser.add_argument("--merge", nargs="+", default=[], metavar="FILE", help="what --peers-only wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results")
    parser.add_argument("--peak-memory", action="store_true", help=argparse.SUPPRESS)  # the memory case's subprocess
    options = parser.parse_args(argv)
    if options.quick:
        options.num_particles, options.num_steps, options.plate = [1000], 50, [4, 256, 20]
        options.gradient_particles, options.memory_particles = 100, 10_000
        options.rounds, options.repeats = 1, 2
    if options.skip_memory:
        options.cases = [case for case in options.cases if case != MEMORY]
    return options


# The models: a Gaussian AR(1) process, observed with Gaussian noise or as a log variance


class Model(NamedTuple):
    """What the hand-written filter and the packages that take functions are given.

    ``x_0`` is not observed; ``emission(x, exp)`` is the mean and the scale of a Gaussian observation.
    """

    coefficient: Any
    transition_scale: float
    initial_scale: float
    emission: Callable[[Any, Callable[[Any], Any]], tuple[Any, Any]]

    def initial(self, noise: Any) -> Any:
        return self.initial_scale * noise

    def move(self, x: Any, noise: Any) -> Any:
        return self.coefficient * x + self.transition_scale * noise

    def log_likelihood(self, y: Any, x: Any) -> Any:
        loc, scale = self.emission(x, jnp.exp)
        return -0.5 * ((y - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * math.log(2 * math.pi)

    def first_scale(self) -> float:
        """Scale of ``x_1``, for packages whose first state is observed."""
        return math.hypot(self.coefficient * self.initial_scale, self.transition_scale)


EMISSION_SCALE = 0.5
AR1 = Model(0.9, 0.5, 1.0, lambda x, exp: (x, EMISSION_SCALE))
LOG_VARIANCE = Model(0.95, 0.3, 1.0, lambda x, exp: (0.0, exp(x / 2)))


def linear_gaussian_program(y: Array, coefficient: Any = AR1.coefficient) -> None:
    linear_gaussian.ar1_model(y, None, coefficient, AR1.transition_scale, EMISSION_SCALE, AR1.initial_scale)


def linear_gaussian_program_to_train(y: Array) -> None:
    linear_gaussian_program(y, numpyro.param("coefficient", AR1.coefficient))


def plate_program(y: Array) -> None:
    """``y`` is ``[S, T]``."""
    series = numpyro.plate("series", len(y))

    def step(x: Array, y_t: Array) -> tuple[Array, None]:
        with series:
            x = numpyro.sample("x", dist.Normal(AR1.coefficient * x, AR1.transition_scale))
            numpyro.sample("y", dist.Normal(x, EMISSION_SCALE), obs=y_t)
        return x, None

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, AR1.initial_scale))
    scan(step, x_0, y.T)


def volatility_program(y: Array) -> None:
    def step(x: Array, y_t: Array) -> tuple[Array, None]:
        x = numpyro.sample("x", dist.Normal(LOG_VARIANCE.coefficient * x, LOG_VARIANCE.transition_scale))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, LOG_VARIANCE.initial_scale)), y)


def simulate(model: Model, num_series: int, num_steps: int, seed: int) -> np.ndarray:
    """Observations ``[S, T]``, drawn with NumPy: every environment has the same."""
    rng = np.random.default_rng(seed)
    x = model.initial(rng.standard_normal(num_series))
    y = np.empty((num_series, num_steps), np.float32)
    for t in range(num_steps):
        x = model.move(x, rng.standard_normal(num_series))
        loc, scale = model.emission(x, np.exp)
        y[:, t] = loc + scale * rng.standard_normal(num_series)
    return y


def kalman_log_evidence(y: np.ndarray) -> float:
    """Exact log evidence of the linear-Gaussian program, summed over series."""
    parameters = linear_gaussian.ar1_parameters(*AR1[:2], EMISSION_SCALE, AR1.initial_scale)
    return float(jax.vmap(partial(linear_gaussian.log_evidence, parameters))(jnp.asarray(y)[..., None]).sum())


# The filter as one writes it by hand


def hand_written(model: Model, num_particles: int, rng_key: Array, y: Array) -> Array:
    """Log evidence of one series ``[T]``: one draw per step, no history, nothing checked."""
    initial_key, scan_key = random.split(rng_key)
    positions = jnp.arange(num_particles)

    def step(particles: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        x, log_weights = particles  # weights of mean one
        y_t, (resample_key, move_key) = inputs
        weights = jnp.exp(log_weights)

        def resample(x: Array, log_weights: Array) -> tuple[Array, Array]:
            cumulative = jnp.cumsum(weights)
            points = (positions + random.uniform(resample_key)) * (cumulative[-1] / num_particles)
            return x[search(cumulative, points)], jnp.zeros_like(log_weights)

        ess = weights.sum() ** 2 / (weights**2).sum()
        x, log_weights = lax.cond(ess < num_particles / 2, resample, lambda *particles: particles, x, log_weights)
        x = model.move(x, random.normal(move_key, (num_particles,)))
        log_weights = log_weights + model.log_likelihood(y_t, x)
        increment = logsumexp(log_weights) - math.log(num_particles)
        return (x, log_weights - increment), increment

    x = model.initial(random.normal(initial_key, (num_particles,)))
    _, increments = lax.scan(step, (x, jnp.zeros(num_particles)), (y, random.split(scan_key, (len(y), 2))))
    return increments.sum()


def hand_written_batch(model: Model, num_particles: int, rng_key: Array, y: Array) -> Array:
    """Log evidences of series ``[S, T]``, written for the batch: one draw per step, and no work if none resamples."""
    num_series, num_steps = y.shape
    initial_key, scan_key = random.split(rng_key)
    positions = jnp.arange(num_particles)

    def step(particles: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        x, log_weights = particles
        y_t, (resample_key, move_key) = inputs
        weights = jnp.exp(log_weights)
        degenerate = weights.sum(-1, keepdims=True) ** 2 / (weights**2).sum(-1, keepdims=True) < num_particles / 2

        def resample(x: Array, log_weights: Array) -> tuple[Array, Array]:
            cumulative = jnp.cumsum(weights, -1)
            points = (positions + random.uniform(resample_key, (num_series, 1))) * (cumulative[:, -1:] / num_particles)
            ancestors = jnp.where(degenerate, jax.vmap(search)(cumulative, points), positions)
            return jnp.take_along_axis(x, ancestors, -1), jnp.where(degenerate, 0.0, log_weights)

        x, log_weights = lax.cond(degenerate.any(), resample, lambda *particles: particles, x, log_weights)
        x = model.move(x, random.normal(move_key, x.shape))
        log_weights = log_weights + model.log_likelihood(y_t[:, None], x)
        increment = logsumexp(log_weights, -1) - math.log(num_particles)
        return (x, log_weights - increment[:, None]), increment

    x = model.initial(random.normal(initial_key, (num_series, num_particles)))
    _, increments = lax.scan(step, (x, jnp.zeros_like(x)), (y.T, random.split(scan_key, (num_steps, 2))))
    return increments.sum(0)


def search(cumulative: Array, points: Array) -> Array:
    """The bin of each point, by the method that is fast on the platform."""
    method = "scan" if on_cpu() else "sort"
    return jnp.minimum(jnp.searchsorted(cumulative, points, method=method), len(cumulative) - 1)


# The cells


class Problem(NamedTuple):
    """One cell, which several libraries fill."""

    case: str
    model: Model
    y: np.ndarray  # [S, T]
    num_particles: int
    seed: int

    @property
    def key_pair(self) -> Array:
        return random.split(random.key(self.seed))


def problems(options: argparse.Namespace) -> Iterator[Problem]:
    for case, model in ((LINEAR_GAUSSIAN, AR1), (VOLATILITY, LOG_VARIANCE)):
        y = simulate(model, 1, options.num_steps, options.seed)
        for num_particles in options.num_particles:
            yield Problem(case, model, y, num_particles, options.seed)
    num_series, num_particles, num_steps = options.plate
    yield Problem(PLATE, AR1, simulate(AR1, num_series, num_steps, options.seed), num_particles, options.seed)
    y = simulate(AR1, 1, options.num_steps, options.seed)
    yield Problem(BOUND, AR1, y, options.gradient_particles, options.seed)
    yield Problem(GRADIENT, AR1, y, options.gradient_particles, options.seed)


def chosen(problem: Problem, options: argparse.Namespace) -> bool:
    return (GRADIENT if problem.case == BOUND else problem.case) in options.cases


def runs(problem: Problem) -> dict[str, Run]:
    """The filters of this repository, by the name of their row: written by hand, and of the program."""
    if problem.case in (BOUND, GRADIENT):
        return runs_of_bound(problem)
    case, model, y, num_particles, _ = problem
    data = jnp.asarray(y if case == PLATE else y[0])
    keys = problem.key_pair
    program = {LINEAR_GAUSSIAN: linear_gaussian_program, VOLATILITY: volatility_program, PLATE: plate_program}[case]
    ours = jax.jit(ParticleFilter(program, num_particles, history=False).log_evidence)
    if case == PLATE:
        one = partial(hand_written, model, num_particles)
        mapped = jax.jit(lambda key, y: jax.vmap(one)(random.split(key, len(y)), y))
        batched = jax.jit(partial(hand_written_batch, model, num_particles))
        return {
            f"{HAND_WRITTEN}, vmap": lambda attempt: mapped(keys[attempt], data),
            f"{HAND_WRITTEN}, batched": lambda attempt: batched(keys[attempt], data),
            OURS: lambda attempt: ours(keys[attempt], data),
        }
    by_hand = jax.jit(partial(hand_written, model, num_particles))
    named: dict[str, Run] = {
        HAND_WRITTEN: lambda attempt: by_hand(keys[attempt], data),
        OURS: lambda attempt: ours(keys[attempt], data),
    }
    if case == LINEAR_GAUSSIAN:
        with_history = ParticleFilter(program, num_particles)
        named[f"{OURS}, as documented"] = lambda attempt: with_history.run(keys[attempt], data).log_evidence
    return named


def runs_of_bound(problem: Problem) -> dict[str, Run]:
    """The bound, or the bound and its gradient in the AR coefficient; and those of the hand-written filter."""
    data, keys = jnp.asarray(problem.y[0]), problem.key_pair
    params = {"coefficient": jnp.asarray(AR1.coefficient)}
    loss = FIVO(problem.num_particles, resampler="systematic")
    guide = bootstrap(linear_gaussian_program_to_train)

    def bound(params: dict[str, Array], key: Array) -> Array:
        return -loss.loss(key, params, linear_gaussian_program_to_train, guide, data)

    def by_hand(params: dict[str, Array], key: Array) -> Array:
        return hand_written(problem.model._replace(coefficient=params["coefficient"]), problem.num_particles, key, data)

    def run(fn: Callable[[dict[str, Array], Array], Array]) -> Run:
        if problem.case == BOUND:
            value = jax.jit(fn)
            return lambda attempt: value(params, keys[attempt])
        value_and_gradient = jax.jit(jax.value_and_grad(fn))
        return lambda attempt: jax.block_until_ready(value_and_gradient(params, keys[attempt]))[0]

    return {HAND_WRITTEN: run(by_hand), OURS: run(bound)}


# Other packages: functions from a problem to the package's filters, by the name of their row


def peer_runs(name: str, problem: Problem) -> dict[str, Run]:
    """A package's filters; one that raises, if they cannot be built."""
    if problem.case in (BOUND, GRADIENT):
        return {}
    try:
        return PEERS[name](problem)
    except Exception as error:
        return {name: partial(fail, error)}


def fail(error: Exception, attempt: int) -> None:
    raise error


def cuthbert_runs(problem: Problem) -> dict[str, Run]:
    import cuthbert
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import ess_decorator, systematic

    case, model, y, num_particles, _ = problem

    def log_evidence(key: Array, y: Array) -> Array:
        bootstrap_filter = particle_filter.build_filter(
            init_sample=lambda key: model.initial(random.normal(key)),
            propagate_sample=lambda key, x, y_t: model.move(x, random.normal(key)),
            log_potential=lambda previous, x, y_t: model.log_likelihood(y_t, x),
            n_filter_particles=num_particles,
            resampling_fn=ess_decorator(systematic.resampling, 0.5),
        )
        initial_key, filter_key = random.split(key)
        states = cuthbert.filter(bootstrap_filter, y, bootstrap_filter.init_prepare(key=initial_key), key=filter_key)
        return states.log_normalizing_constant[-1]

    return jitted_and_plain("cuthbert", case, log_evidence, log_evidence, problem.key_pair, y)


def smcx_runs(problem: Problem) -> dict[str, Run]:
    import smcx

    case, model, y, num_particles, _ = problem

    def log_evidence(key: Array, y: Array, store_history: bool = True) -> Array:
        return smcx.bootstrap_filter(
            key,
            lambda key, num_particles: model.first_scale() * random.normal(key, (num_particles, 1)),
            lambda key, x: model.move(x, random.normal(key, x.shape)),
            lambda y_t, x: model.log_likelihood(y_t[0], x[0]),
            y[:, None],
            num_particles,
            resampling_threshold=0.5,
            store_history=store_history,
        ).marginal_loglik

    return jitted_and_plain("smcx", case, partial(log_evidence, store_history=False), log_evidence, problem.key_pair, y)


def jitted_and_plain(
    name: str,
    case: str,
    log_evidence: Callable[[Array, Array], Any],
    plain: Callable[[Array, Array], Any],
    keys: Array,
    y: np.ndarray,
) -> dict[str, Run]:
    """A package of functions: inside the user's own jit (and vmap); and called plainly, as its documentation does."""
    if case == PLATE:
        mapped, series = jax.jit(jax.vmap(log_evidence)), jnp.asarray(y)
        series_keys = [random.split(key, len(y)) for key in keys]
        return {f"{name}, vmap": lambda attempt: mapped(series_keys[attempt], series)}
    jitted, data = jax.jit(log_evidence), jnp.asarray(y[0])
    named: dict[str, Run] = {name: lambda attempt: jitted(keys[attempt], data)}
    if case == LINEAR_GAUSSIAN:
        named[f"{name}, as documented"] = lambda attempt: plain(keys[attempt], data)
    return named


def dynestyx_runs(problem: Problem) -> dict[str, Run]:
    import dynestyx
    from dynestyx.inference.filters import Filter, PFConfig

    case, model, y, num_particles, _ = problem
    if case == PLATE:
        return {}
    data, keys = jnp.asarray(y[0]), problem.key_pair

    def transition(x: Array) -> dist.Distribution:
        return dist.Normal(model.coefficient * x, model.transition_scale).to_event(1)

    def program(y: Array) -> None:
        dynamics = dynestyx.DynamicalModel(
            initial_condition=dist.Normal(jnp.zeros(1), model.first_scale()).to_event(1),
            state_evolution=lambda x, u, t_now, t_next: transition(x),
            observation_model=lambda x, u, t: dist.Normal(*model.emission(x, jnp.exp)).to_event(1),
        )
        dynestyx.sample("f", dynamics, obs_times=jnp.arange(len(y), dtype=y.dtype), obs_values=y[:, None])

    @jax.jit
    def log_evidence(key: Array, y: Array) -> Array:
        config = PFConfig(n_particles=num_particles, ess_threshold_ratio=0.5)
        with Filter(filter_config=config), handlers.seed(rng_seed=key):
            return handlers.trace(program).get_trace(y)["f_marginal_loglik"]["value"]

    return {"dynestyx": lambda attempt: log_evidence(keys[attempt], data)}


def particles_runs(problem: Problem) -> dict[str, Run]:
    import particles
    from particles import distributions, state_space_models

    case, model, y, num_particles, seed = problem
    if case == PLATE:
        return {}

    class AutoRegression(state_space_models.StateSpaceModel):
        def PX0(self) -> Any:
            return distributions.Normal(scale=model.first_scale())

        def PX(self, t: int, xp: np.ndarray) -> Any:
            return distributions.Normal(loc=model.coefficient * xp, scale=model.transition_scale)

        def PY(self, t: int, xp: np.ndarray, x: np.ndarray) -> Any:
            loc, scale = model.emission(x, np.exp)
            return distributions.Normal(loc=loc, scale=scale)

    def run(attempt: int) -> float:
        np.random.seed(2 * seed + attempt)  # the package draws from NumPy's global generator
        feynman_kac = state_space_models.Bootstrap(ssm=AutoRegression(), data=y[0].astype(float))
        smc = particles.SMC(fk=feynman_kac, N=num_particles, resampling="systematic", ESSrmin=0.5)
        smc.run()
        return smc.logLt

    return {"particles": run}


PEERS: dict[str, Callable[[Problem], dict[str, Run]]] = {
    "cuthbert": cuthbert_runs,
    "smcx": smcx_runs,
    "dynestyx": dynestyx_runs,
    "particles": particles_runs,
}


# Measuring


def has_jax() -> bool:
    return "jax" in globals()


def on_cpu() -> bool:
    return not has_jax() or jax.default_backend() == "cpu"


def time_column() -> str:
    return "CPU ms" if on_cpu() else "wall ms"


def clock() -> float:
    return time.process_time() if on_cpu() else time.perf_counter()


def seconds(run: Run, attempt: int = 0) -> tuple[float, float]:
    """Time of one call, and the log evidence it gives, summed over series."""
    start = clock()
    value = run(attempt)
    if has_jax():
        value = jax.block_until_ready(value)
    return clock() - start, float(np.sum(value))


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """A list that grows by one at each XLA compilation."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    if not has_jax():
        yield compiled
        return
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure(problem: Problem, libraries: dict[str, Run], rounds: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each library; the rounds go round the libraries, so that all see the same load."""
    rows, first, best = {}, {}, {}
    for library, run in libraries.items():
        rows[library] = row = new_row(problem, library)
        try:
            first[library], row["log evidence"] = seconds(run, 0)
            with counted_compilations() as compiled:
                best[library], _ = seconds(run, 1)
            if has_jax():
                row["recompiled"] = len(compiled)
        except Exception as error:
            row["error"] = describe(error)
    for _ in range(rounds):
        for library in best:
            stop = time.perf_counter() + SECONDS_PER_CELL
            for _ in range(repeats):
                best[library] = min(best[library], seconds(libraries[library])[0])
                if time.perf_counter() > stop:
                    break
    for library, duration in best.items():
        rows[library][time_column()] = 1e3 * duration
        rows[library]["M/s"] = problem.y.size * problem.num_particles / duration / 1e6
        rows[library]["compile s"] = max(first[library] - duration, 0.0)
    return list(rows.values())


def new_row(problem: Problem, library: str) -> dict[str, Any]:
    num_series, num_steps = problem.y.shape
    package = library.split(",")[0]
    package = "jax" if package == HAND_WRITTEN else package
    row = {"case": problem.case, "library": library, "version": importlib.metadata.version(package)}
    return row | {"N": problem.num_particles, "T": num_steps, "series": num_series}


def describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def measure_all(options: argparse.Namespace, installed: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows, cell by cell."""
    for problem in problems(options):
        if not chosen(problem, options):
            continue
        libraries = {} if options.peers_only else runs(problem)
        for name in installed:
            libraries |= peer_runs(name, problem)
        yield measure(problem, libraries, options.rounds, options.repeats)


def compare(rows: list[dict[str, Any]], exact: dict[tuple[int, ...], float]) -> None:
    """Fill in what compares rows: ratios, and errors of the linear-Gaussian log evidence.

    :param exact: log evidence by the shape of the data, ``(S, T)``.
    """
    times: dict[tuple[Any, ...], list[float]] = {cell_of(row): [] for row in rows}
    for row in rows:
        if row["library"].startswith(HAND_WRITTEN) and time_column() in row:
            times[cell_of(row)].append(row[time_column()])
    values = {(row["library"], row["N"], row["T"]): row.get(time_column()) for row in rows if row["case"] == BOUND}
    for row in rows:
        if time_column() in row:
            if times[cell_of(row)]:
                row["ratio"] = row[time_column()] / min(times[cell_of(row)])
            value = values.get((row["library"], row["N"], row["T"]))
            if row["case"] == GRADIENT and value:
                row["over value"] = row[time_column()] / value
        shape = (row["series"], row["T"])
        if "log evidence" in row and row["case"] != VOLATILITY and shape in exact:
            row["error (nat)"] = row["log evidence"] - exact[shape]


def cell_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("case", "N", "T", "series"))


# Memory


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one filter in a process of its own."""
    y = np.empty((1, options.num_steps))
    row = new_row(Problem(MEMORY, AR1, y, options.memory_particles, options.seed), OURS)
    command = [sys.executable, "-m", f"benchmarks.{NAME}", "--peak-memory", "--seed", str(options.seed)]
    command += ["--memory-particles", str(options.memory_particles), "--num-steps", str(options.num_steps)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if process.returncode:
        return row | {"error": " ".join(process.stderr.split())[-300:]}
    row |= json.loads(process.stdout.splitlines()[-1])
    if row["peak RSS GiB"] > MEMORY_LIMIT_GIB:
        row["error"] = f"more than {MEMORY_LIMIT_GIB:g} GiB"
    return row


def print_peak_memory(options: argparse.Namespace) -> None:
    """What the subprocess does: run the filter once, and say how large the process was before and at most."""
    y = simulate(AR1, 1, options.num_steps, options.seed)
    problem = Problem(MEMORY, AR1, y, options.memory_particles, options.seed)
    particle_filter = ParticleFilter(linear_gaussian_program, options.memory_particles, history=False)
    log_evidence = jax.jit(particle_filter.log_evidence)
    keys, data = problem.key_pair, jnp.asarray(y[0])
    before = peak_rss()
    start = clock()
    value = float(log_evidence(keys[0], data))
    row: dict[str, Any] = {"peak RSS GiB": peak_rss(), "before GiB": before}
    if not on_cpu():
        row["device GiB"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    print(json.dumps({"call s": clock() - start, "error (nat)": value - kalman_log_evidence(y)} | row))


def peak_rss() -> float:
    """Peak resident memory of this process in GiB."""
    with contextlib.suppress(OSError, StopIteration):
        # Linux: ru_maxrss also counts the parent, from which this process was forked; VmHWM does not.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# The program


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    clock_name = "CPU time of all threads" if on_cpu() else "wall time"
    settings = conditions() | {"clock": clock_name, "resampling": "systematic, ESS < N/2"}
    return settings | {name: value for name, value in vars(options).items() if name != "peak_memory"}


def measure_peer_alone(options: argparse.Namespace) -> list[dict[str, Any]]:
    """``--peers-only``: imports nothing of this repository beyond this file."""
    name = options.peers_only
    rows = [row for cell in measure_all(options, [name]) for row in cell]
    settings = settings_of(options) | {"python": platform.python_version(), "numpy": np.__version__}
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.json.part"
    temporary.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2, default=str) + "\n")
    temporary.replace(folder / f"{name}.json")
    for row in rows:
        print("  ".join(f"{column}={value}" for column, value in row.items()))
    print(f"\nmerge with: --merge {folder / f'{name}.json'}")
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    if options.peak_memory:
        print_peak_memory(options)
        return []
    if options.peers_only:
        return measure_peer_alone(options)
    documents = [json.loads(Path(path).read_text()) for path in options.merge]
    merged = [row for document in documents for row in document["rows"]]
    peers = [name for name in options.peers if not any(row["library"].split(",")[0] == name for row in merged)]
    installed = [name for name in peers if importlib.util.find_spec(name) is not None]
    settings = settings_of(options)
    for document in documents:
        settings[f"merged {document['settings']['peers_only']}"] = document["settings"]
    report.print_environment({name: value for name, value in settings.items() if not name.startswith("merged")})
    print()

    linear = [problem for problem in problems(options) if problem.case != VOLATILITY and chosen(problem, options)]
    exact = {shape: kalman_log_evidence(y) for shape, y in {problem.y.shape: problem.y for problem in linear}.items()}
    rows: list[dict[str, Any]] = []
    for cell in measure_all(options, installed):
        rows += cell
        rows += [row for row in merged if cell and cell_of(row) == cell_of(cell[0])]
        compare(rows, exact)
        report.write(options.output, NAME, rows, settings)
        print(f"{cell[0]['case']}, N={cell[0]['N']}: measured", flush=True)
    rows += [row for row in merged if row not in rows]
    rows += [{"case": "peer", "library": name, "error": "not installed"} for name in peers if name not in installed]
    if MEMORY in options.cases:
        rows.append(measure_memory(options))
    report.write(options.output, NAME, rows, settings)

    print()
    columns = ["case", "library", "version", "N", "T", "series", time_column(), "ratio", "over value", "M/s"]
    columns += ["compile s", "recompiled", "log evidence", "error (nat)"]
    report.print_table([row for row in rows if row["case"] != MEMORY], columns)
    print()
    report.print_table([row for row in rows if row["case"] == MEMORY])
    for row in rows:
        if "error" in row:
            print(f"{row['case']}, {row['library']}: {row['error']}")
    recompiled = [row for row in rows if row["library"].startswith(OURS) and row.get("recompiled")]
    print(f"\n{OURS} recompiles nothing at a second call: {not recompiled}")
    print(f"results: {options.output}/{NAME}.csv and .json")
    return rows


if __name__ == "__main__":
    if not on_cpu() and hasattr(os, "sched_setaffinity"):
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), all_cores)
    main()
