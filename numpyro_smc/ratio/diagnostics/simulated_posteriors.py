"""Posteriors of simulated observations whose parameters are known: the material of most checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from tqdm import tqdm

from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.programs.resampling import systematic
from numpyro_smc.samplers.result import SMCResult

if TYPE_CHECKING:
    from numpyro_smc.ratio.estimator import RatioEstimator


class SimulatedPosteriors(NamedTuple):
    """Pairs of the simulator, and draws from the posterior of each.

    - **theta** ``[P, D]``, **x** ``[P, *event]``, **context** ``[P, C]`` or ``None``. **samples** ``[P, N, D]``.
    """

    theta: Array
    x: Array
    context: Array | None
    samples: Array


def simulated_posteriors(
    rng_key: Array,
    estimator: RatioEstimator,
    num_pairs: int,
    num_samples: int,
    params: Sequence[str] | None = None,
    batch_size: int = 50,
    progress_bar: bool = False,
    **options: Any,
) -> SimulatedPosteriors:
    """Simulate pairs and sample the posterior of each output, by sequential Monte Carlo.

    :param num_pairs: P. **num_samples** - N, the particles of each run.
    :param params: parameters whose marginal ratio is taken.
    :param batch_size: posteriors sampled at once.
    :param options: of :class:`~numpyro_smc.SMCSampler`.
    """
    check_positive("diagnostics", num_pairs=num_pairs, num_samples=num_samples, batch_size=batch_size)
    check_whole_prior(estimator)
    pair_key, run_key = random.split(rng_key)
    theta, x, context = estimator.simulate(pair_key, num_pairs)
    batch_size = min(batch_size, num_pairs)
    simulator, samples = estimator.simulator, []
    for first in tqdm(range(0, num_pairs, batch_size), disable=not progress_bar, unit="batch"):
        # The last batch is filled up with rows of before, so that all have the shape that was compiled.
        rows = slice(max(min(first, num_pairs - batch_size), 0), first + batch_size)
        given = None if context is None else context[rows]
        key = random.fold_in(run_key, first)
        runs = estimator.sample_many(key, x[rows], params, given, num_particles=num_samples, **options)
        particles = jnp.stack([simulator.ravel(run.samples) for run in runs])
        draws = _resampled(random.split(random.fold_in(key, 1), len(runs)), particles, _weights(runs))
        samples.append(np.asarray(draws)[first - rows.start :])
    return SimulatedPosteriors(theta, x, context, jnp.asarray(np.concatenate(samples)))


def check_whole_prior(estimator: RatioEstimator) -> None:
    """:raises ValueError: for an estimator of a truncated prior."""
    if estimator.box is not None:
        raise ValueError(
            "diagnostics: the estimator is of a truncated prior; pairs of the whole prior are not its own."
        )


def _weights(runs: Sequence[SMCResult]) -> Array:
    return jnp.stack([run.log_weights for run in runs])


@jax.jit
@jax.vmap
def _resampled(rng_key: Array, particles: Array, log_weights: Array) -> Array:
    """Equally weighted, in random order."""
    order_key, ancestor_key = random.split(rng_key)
    chosen = systematic(ancestor_key, log_weights, len(log_weights))
    return particles[random.permutation(order_key, chosen)]


def log_posteriors(estimator: RatioEstimator, found: SimulatedPosteriors) -> tuple[np.ndarray, np.ndarray]:
    """Unnormalised log posterior densities of the true parameters ``[P]`` and of the samples ``[P, N]``."""
    log_prior = estimator.simulator.prior_of_elements(np.ones(len(estimator.elements), bool))

    def of_pair(theta: Array, x: Array, context: Array | None, samples: Array) -> tuple[Array, Array]:
        def log_density(theta: Array) -> Array:
            return estimator.log_ratio(theta, x, context=context) + log_prior(theta)

        return log_density(theta), jax.lax.map(log_density, samples, batch_size=1000)

    of_all = jax.jit(lambda found: jax.lax.map(lambda pair: of_pair(*pair), tuple(found)))
    true, sampled = of_all(found)
    return np.asarray(true), np.asarray(sampled)
