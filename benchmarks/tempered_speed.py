"""How fast tempered SMC on a NumPyro program is, beside BlackJAX's adaptive_tempered_smc in a loop of the user's own.

Gaussian in ten correlated dimensions, whose log evidence is known, and logistic regression (200 rows, 10 weights). Both
libraries have the same densities (NumPyro's distributions), particles, target ESS (N/2), systematic resampling, and 5
moves of 8 leapfrog steps at each temperature. BlackJAX's HMC has the step size of an option; ours tunes its own.
BlackJAX is called as its documentation does: `step` in a jitted while_loop. And annealed importance sampling on a
decoder of MNIST's size, from the prior, beside the bare gradient of the same decoder.

CPU time of all threads, single-threaded XLA, one pinned core; rounds alternate between the libraries and who is first.
Columns:

  stages        temperatures, mean over the keys
  evaluations   of the target per run (with or without gradient), from the algorithms
  ns/eval       CPU time of a run over its evaluations: median over keys and rounds
  ratio         of ns/eval: numpyro_smc over BlackJAX, median over keys and rounds; of the decoder
                the time of a gradient over that of the bare one
  recompiled    XLA compilations in a second run with another key
  log evidence  mean over keys, with its standard error; exact where known
  M/s           million gradients in one row's latents per CPU second
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks.one_core import conditions, use_one_core

if __name__ == "__main__":
    use_one_core()

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from blackjax.mcmc import hmc
from blackjax.smc import extend_params, resampling
from jax import Array, lax, random

from benchmarks import report
from benchmarks.filter_speed import counted_compilations
from models import logistic_regression, vae
from numpyro_smc import AIS, SMCSampler

NAME = "tempered_speed"
GAUSSIAN, LOGISTIC, DECODER = CASES = ("gaussian", "logistic", "decoder")
OURS, BLACKJAX, BARE = "numpyro_smc", "blackjax", "bare gradient"
DIM = 10


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--num-moves", type=int, default=5, help="at each temperature")
    parser.add_argument("--num-leapfrog", type=int, default=8, help="of each move")
    parser.add_argument("--num-keys", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="each runs every key with both libraries")
    parser.add_argument(
        "--step-size", type=float, default=0.6, help="BlackJAX's, times the narrowest scale of the posterior"
    )
    parser.add_argument("--num-rows", type=int, default=20, help="images of the decoder")
    parser.add_argument("--num-chains", type=int, default=16, help="of annealed importance sampling, for each image")
    parser.add_argument("--num-temperatures", type=int, default=200, help="of annealed importance sampling")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: does it work?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=f"results/{NAME}", help="folder of results")
    options = parser.parse_args(argv)
    if options.quick:
        options.num_particles, options.num_moves, options.num_leapfrog = 200, 3, 4
        options.num_keys, options.rounds = 3, 1
        options.num_rows, options.num_chains, options.num_temperatures = 3, 4, 5
    return options


class Target(NamedTuple):
    """A program with its data, and the same as functions of a vector, drawn from a normal prior."""

    program: Callable[..., None]
    args: tuple[Any, ...]
    log_prior: Callable[[Array], Array]
    log_likelihood: Callable[[Array], Array]
    prior_scale: float
    scale: float  # what BlackJAX's user takes for the posterior's narrowest direction
    log_evidence: float | None


def gaussian_program(y: Array, noise_factor: Array) -> None:
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([DIM]).to_event(1))
    numpyro.sample("y", dist.MultivariateNormal(x, scale_tril=noise_factor), obs=y)


def gaussian_target() -> Target:
    """Noise of scale 0.3 with correlations of 0.9 between neighbours."""
    lags = np.abs(np.subtract.outer(np.arange(DIM), np.arange(DIM)))
    covariance = 0.09 * 0.9**lags
    y, factor = jnp.linspace(-1.0, 2.0, DIM), jnp.asarray(np.linalg.cholesky(covariance))
    marginal = np.eye(DIM) + covariance
    exact = -0.5 * (
        np.asarray(y) @ np.linalg.solve(marginal, np.asarray(y)) + np.linalg.slogdet(2 * np.pi * marginal)[1]
    )
    posterior = np.linalg.inv(np.eye(DIM) + np.linalg.inv(covariance))
    return Target(
        gaussian_program,
        (y, factor),
        lambda x: dist.Normal(0.0, 1.0).expand([DIM]).to_event(1).log_prob(x),
        lambda x: dist.MultivariateNormal(x, scale_tril=factor).log_prob(y),
        1.0,
        float(np.linalg.eigvalsh(posterior)[0] ** 0.5),
        float(exact),
    )


def logistic_target(seed: int) -> Target:
    x, y = logistic_regression.simulate(random.key(seed), 200, DIM)
    x, y = jnp.asarray(x), jnp.asarray(y)
    return Target(
        logistic_regression.model,
        (x, y),
        lambda w: dist.Normal(0.0, 1.0).expand([DIM]).to_event(1).log_prob(w),
        lambda w: dist.Bernoulli(logits=x @ w).log_prob(y).sum(),
        1.0,
        0.2,
        None,
    )


class Outcome(NamedTuple):
    """Of one run: **seconds**, **num_stages**, **log_evidence**."""

    seconds: float
    num_stages: int
    log_evidence: float


def our_run(target: Target, options: argparse.Namespace) -> Callable[[Array], tuple[int, float]]:
    sampler = SMCSampler(
        target.program,
        options.num_particles,
        num_moves=options.num_moves,
        moves_kwargs={"num_integration_steps": options.num_leapfrog},
    )

    def run(rng_key: Array) -> tuple[int, float]:
        result = sampler.run(rng_key, *target.args, progress_bar=False)
        return len(result.betas), result.log_evidence

    return run


def blackjax_run(target: Target, options: argparse.Namespace) -> Callable[[Array], tuple[int, float]]:
    kernel = hmc.build_kernel()
    algorithm = blackjax.adaptive_tempered_smc(
        target.log_prior,
        target.log_likelihood,
        partial(kernel, num_integration_steps=options.num_leapfrog),
        hmc.init,
        extend_params({"step_size": options.step_size, "inverse_mass_matrix": jnp.full(DIM, target.scale**2)}),
        resampling.systematic,
        0.5,
        num_mcmc_steps=options.num_moves,
    )

    @jax.jit
    def loop(rng_key: Array) -> tuple[Array, Array]:
        start_key, rng_key = random.split(rng_key)
        state = algorithm.init(target.prior_scale * random.normal(start_key, (options.num_particles, DIM)))
        state = state._replace(tempering_param=jnp.zeros(()))

        def step(carry: tuple[Array, Any, Array, Array]) -> tuple[Array, Any, Array, Array]:
            num_stages, state, rng_key, log_evidence = carry
            rng_key, step_key = random.split(rng_key)
            state, info = algorithm.step(step_key, state)
            return num_stages + 1, state, rng_key, log_evidence + info.log_likelihood_increment

        carry = (jnp.zeros((), jnp.int32), state, rng_key, jnp.zeros(()))
        num_stages, _, _, log_evidence = lax.while_loop(lambda carry: carry[1].tempering_param < 1.0, step, carry)
        return num_stages, log_evidence

    def run(rng_key: Array) -> tuple[int, float]:
        num_stages, log_evidence = loop(rng_key)
        return int(num_stages), float(log_evidence)

    return run


def evaluations(library: str, num_stages: float, options: argparse.Namespace) -> float:
    """Of a whole run.

    A stage's moves take a gradient at the start and one for each leapfrog step. Ours then keeps the likelihood where
    the particles are, as it does once at the start; BlackJAX evaluates it before the moves, for the temperature, and
    after them, for the weights.
    """
    moves = 1 + options.num_moves * options.num_leapfrog
    per_particle = num_stages * (moves + 1) + 1 if library == OURS else num_stages * (moves + 2)
    return options.num_particles * per_particle


def timed(run: Callable[[Array], tuple[int, float]], rng_key: Array) -> Outcome:
    start = time.process_time()
    num_stages, log_evidence = run(rng_key)
    return Outcome(time.process_time() - start, num_stages, log_evidence)


def measure(case: str, target: Target, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each library."""
    runs = {OURS: our_run(target, options), BLACKJAX: blackjax_run(target, options)}
    keys = random.split(random.key(options.seed), options.num_keys)
    first, recompiled = {}, {}
    for library, run in runs.items():
        first[library] = timed(run, keys[0]).seconds
        with counted_compilations() as compiled:
            run(keys[-1])
        recompiled[library] = len(compiled)
    outcomes: dict[str, list[Outcome]] = {library: [] for library in runs}
    for number in range(options.rounds):
        for key in keys:
            for library in list(runs)[:: 1 if number % 2 == 0 else -1]:
                outcomes[library].append(timed(runs[library], key))
    cost = {
        library: np.array([1e9 * o.seconds / evaluations(library, o.num_stages, options) for o in found])
        for library, found in outcomes.items()
    }
    rows = []
    for library, found in outcomes.items():
        stages = float(np.mean([o.num_stages for o in found]))
        log_evidence = np.array([o.log_evidence for o in found[: len(keys)]])
        row = {"case": case, "library": library, "N": options.num_particles, "stages": stages}
        row["evaluations"] = evaluations(library, stages, options)
        row["CPU ms"] = 1e3 * float(np.median([o.seconds for o in found]))
        row["ms/stage"] = 1e3 * float(np.median([o.seconds / o.num_stages for o in found]))
        row["ns/eval"] = float(np.median(cost[library]))
        row["ratio"] = float(np.median(cost[library] / cost[BLACKJAX]))
        row["compile s"] = first[library] - row["CPU ms"] / 1e3
        row["recompiled"] = recompiled[library]
        row["log evidence"], row["s.e."] = log_evidence.mean(), log_evidence.std(ddof=1) / len(keys) ** 0.5
        row["exact"] = "" if target.log_evidence is None else target.log_evidence
        rows.append(row)
    return rows


def measure_decoder(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Gradients in one row's latents per CPU second: annealed importance sampling, pilot included, and alone."""
    model, _ = vae.make_gaussian_vae(random.key(options.seed))
    images = random.bernoulli(random.key(options.seed + 1), 0.2, (options.num_rows, 784)).astype(jnp.float32)
    num_leapfrog, pilots = 5, 2  # the pilot is counted, but for its warm-up
    sampler = AIS(
        model,
        num_chains=options.num_chains,
        num_temperatures=options.num_temperatures,
        num_leapfrog=num_leapfrog,
        num_pilot_chains=pilots,
    )

    def annealed(rng_key: Array) -> None:
        jax.block_until_ready(sampler.run(rng_key, images).per_datapoint)

    def log_joint(z: Array) -> Array:
        """Of ``[chains, rows, latents]``, summed: its gradient has a row for each."""

        def of_chain(z: Array) -> Array:
            values = numpyro.handlers.seed(numpyro.handlers.substitute(model, {"z": z}), 0)
            return -numpyro.infer.util.potential_energy(values, (images,), {}, {"z": z})

        return jax.vmap(of_chain)(z).sum()

    repeats = options.num_temperatures * num_leapfrog
    gradient = jax.grad(log_joint)

    @jax.jit
    def climb(z: Array) -> Array:
        return lax.fori_loop(0, repeats, lambda _, z: z + 1e-4 * gradient(z), z)

    latents = random.normal(random.key(options.seed), (options.num_chains, options.num_rows, 200))

    def bare(rng_key: Array) -> None:
        jax.block_until_ready(climb(latents))

    counts = {OURS: (options.num_chains + pilots) * repeats, BARE: options.num_chains * repeats}
    runs = {OURS: annealed, BARE: bare}
    keys = random.split(random.key(options.seed), 2)
    recompiled, durations = {}, {library: [] for library in runs}
    for library, run in runs.items():
        run(keys[0])
        with counted_compilations() as compiled:
            run(keys[1])
        recompiled[library] = len(compiled)
    for number in range(options.rounds):
        for library in list(runs)[:: 1 if number % 2 == 0 else -1]:
            start = time.process_time()
            runs[library](keys[number % 2])
            durations[library].append(time.process_time() - start)
    rate = {lib: counts[lib] * options.num_rows / np.array(durations[lib]) / 1e6 for lib in runs}
    return [
        {
            "case": DECODER,
            "library": library,
            "rows": options.num_rows,
            "chains": options.num_chains,
            "CPU ms": 1e3 * float(np.median(durations[library])),
            "M/s": float(np.median(rate[library])),
            "ratio": float(np.median(rate[BARE] / rate[library])),
            "recompiled": recompiled[library],
        }
        for library in runs
    ]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return conditions() | {"blackjax": blackjax.__version__} | vars(options)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_arguments(argv)
    settings = settings_of(options)
    report.print_environment(settings)
    print()
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        if case == DECODER:
            rows += measure_decoder(options)
        else:
            rows += measure(case, gaussian_target() if case == GAUSSIAN else logistic_target(options.seed), options)
        report.write(options.output, NAME, rows, settings)
        print(f"{case}: measured", flush=True)
    print()
    report.print_table([row for row in rows if row["case"] != DECODER])
    print()
    report.print_table([row for row in rows if row["case"] == DECODER])
    print(f"\nresults: {options.output}/{NAME}.csv and .json")
    return rows


if __name__ == "__main__":
    main()
