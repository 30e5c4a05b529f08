r"""Persistent sampling: tempered sequential Monte Carlo that reweighs the particles of all past stages [1].

With temperatures :math:`\beta_0 = 0, \dots, \beta_{t-1}` behind it and N particles from each, all :math:`tN` of them
stand for the mixture of the past targets, and at :math:`\beta_t` weigh

.. math:: w(u) = \frac{L(u)^{\beta_t}}{\frac1t \sum_{s<t} L(u)^{\beta_s} / \hat Z_s}, \qquad
   \hat Z_t = \frac1{tN} \sum w .

N of them are resampled and moved. The effective sample size may exceed N. The evidence is consistent, not unbiased.

**References**

1. *Persistent Sampling: Enhancing the Efficiency of Sequential Monte Carlo*, M. Karamanis, U. Seljak (2024)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, random
from jax.nn import logsumexp

from numpyro_smc.programs.unconstrained import Split
from numpyro_smc.programs.weights import normalise
from numpyro_smc.samplers import tempering
from numpyro_smc.samplers.genealogy import genealogical_variance, moments
from numpyro_smc.samplers.moves import Tuning, cloud_scale, move_cloud, over_particles
from numpyro_smc.samplers.paths import Path, next_temperature, tempered
from numpyro_smc.samplers.tempering import Settings, StageReport, as_vector

_FIRST_CAPACITY = 16


class Pool(NamedTuple):
    """Where a run stands, with room for ``S`` generations, of which the first ``num_stages + 1`` are there.

    - **position** ``[S, N, D]``, **log_likelihood** ``[S, N]``, **families** ``[S, N]``.
    - **log_mixture** - log of the sum of :math:`L^{\\beta_s} / \\hat Z_s` over the generations there, ``[S, N]``.
    - **temperatures**, **log_evidences** - ``[S]``.
    """

    position: Array
    log_likelihood: Array
    families: Array
    log_mixture: Array
    temperatures: Array
    log_evidences: Array
    num_stages: Array
    log_step_size: Array
    rng_key: Array

    @property
    def temperature(self) -> Array:
        return self.temperatures[self.num_stages]

    @property
    def positions_and_weights(self) -> tuple[Array, Array]:
        """All particles so far, ``[S N, D]`` with zero weight where there are none yet, and log weights of mean one."""
        log_weights = normalise(_log_weights(self, self.temperature))[0]
        return self.position.reshape(-1, self.position.shape[-1]), log_weights


def start(rng_key: Array, path: Path, settings: Settings) -> tuple[Pool, Split]:
    """The pool at temperature zero, and the log densities of its particles."""
    cloud, split = tempering.start(rng_key, path, settings)

    def first(leaf: Array) -> Array:
        return jnp.zeros((_FIRST_CAPACITY, *leaf.shape), leaf.dtype).at[0].set(leaf)

    zeros = jnp.zeros(_FIRST_CAPACITY, split.likelihood.dtype)
    pool = Pool(
        first(cloud.position),
        first(cloud.log_likelihood),
        first(cloud.families),
        first(jnp.zeros_like(cloud.log_likelihood)),
        zeros,
        zeros,
        cloud.num_stages,
        cloud.log_step_size,
        cloud.rng_key,
    )
    return pool, split


def grown(pool: Pool) -> Pool:
    """The same pool with twice the room."""
    names = ("position", "log_likelihood", "families", "log_mixture", "temperatures", "log_evidences")
    leaves = {name: getattr(pool, name) for name in names}
    return pool._replace(**{name: jnp.concatenate([leaf, jnp.zeros_like(leaf)]) for name, leaf in leaves.items()})


def advance(pool: Pool, scheduled: Array, path: Path, settings: Settings) -> tuple[Pool, Array]:
    """One stage; see :func:`numpyro_smc.samplers.tempering.advance`."""
    resample_key, move_key = random.split(random.fold_in(pool.rng_key, pool.num_stages))
    num_particles, dimension = settings.num_particles, pool.position.shape[-1]

    def log_weights_at(temperature: Array) -> Array:
        return _log_weights(pool, temperature)

    temperature = path.at(scheduled)
    if settings.target_ess is not None:
        temperature = next_temperature(log_weights_at, pool.temperature, settings.target_ess, num_particles)
    log_weights, log_mean, ess = normalise(log_weights_at(temperature))
    log_evidence = log_mean + jnp.log(len(pool.temperatures) / (pool.num_stages + 1.0))
    flat = pool.position.reshape(-1, dimension)
    weights = jnp.exp(log_weights) / log_weights.shape[0]
    families = pool.families.reshape(-1)
    relative_variance = genealogical_variance(weights, families, num_particles, 1)

    scale = jnp.ones_like(flat[0])
    if settings.tune_scale:
        scale = cloud_scale(flat, weights, settings.dense)
    assert settings.scheme.ancestors is not None
    ancestors = settings.scheme.ancestors(resample_key, log_weights, num_particles)
    moved = move_cloud(
        move_key,
        settings.move,
        flat[ancestors],
        lambda u: path.log_density(u, temperature),
        Tuning(pool.log_step_size, scale),
        settings.num_moves,
        tune_step_size=settings.tune_step_size,
        batch_size=settings.batch_size,
    )
    position = moved.path[0]
    log_likelihood = over_particles(path.kept, position, settings.batch_size)
    newest, equal = pool.log_likelihood[pool.num_stages], jnp.zeros_like(log_likelihood)
    before, after = moments(newest, equal), moments(log_likelihood, equal)
    report = StageReport(
        temperature,
        log_evidence - pool.log_evidences[pool.num_stages],
        ess,
        relative_variance,
        moved.acceptance,
        jnp.exp(moved.log_step_size),
        jnp.ones(()),
        after.mean,
        after.variance,
        before.mean,
        before.variance,
        jnp.asarray(jnp.nan),
    )
    row = pool.num_stages + 1
    new = pool._replace(
        position=pool.position.at[row].set(position),
        log_likelihood=pool.log_likelihood.at[row].set(log_likelihood),
        families=pool.families.at[row].set(families[ancestors]),
        temperatures=pool.temperatures.at[row].set(temperature),
        log_evidences=pool.log_evidences.at[row].set(log_evidence),
        num_stages=row,
        log_step_size=moved.log_step_size,
    )
    older = jnp.logaddexp(pool.log_mixture, _component(pool.log_likelihood, temperature, log_evidence))
    past = _component(log_likelihood, new.temperatures[:, None], new.log_evidences[:, None])
    there = jnp.arange(len(past))[:, None] <= row
    own = logsumexp(jnp.where(there, past, -jnp.inf), axis=0)
    return new._replace(log_mixture=older.at[row].set(own)), as_vector(report)


def _component(log_likelihood: Array, temperature: Array, log_evidence: Array) -> Array:
    dead = jnp.isneginf(log_likelihood)
    tilted = temperature * jnp.where(dead, 0.0, log_likelihood)
    return jnp.where(dead & (temperature > 0.0), -jnp.inf, tilted) - log_evidence


def _log_weights(pool: Pool, temperature: Array) -> Array:
    """Log weights of all particles, ``[S N]``, up to the ``num_stages + 1`` in their mean."""
    there = jnp.arange(len(pool.temperatures))[:, None] <= pool.num_stages
    log_proposal = pool.log_mixture - jnp.log(pool.num_stages + 1.0)
    log_weights = tempered(temperature, pool.log_likelihood) - log_proposal
    return jnp.where(there, log_weights, -jnp.inf).reshape(-1)
