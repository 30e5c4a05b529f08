"""Runs of an annealed sampler at given parameters, compiled once: draws from its posterior, and what it did."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.engines.particles import ParticleState, run
from numpyro_smc.engines.path import AnnealedPath, Schedule
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.density import Params, Program
from numpyro_smc.programs.guide_target import State

if TYPE_CHECKING:
    from numpyro_smc.elbo.dsmcs import DSMCS

METHODS = ("weighted", "final", "initial")


@lru_cache(maxsize=32)
def compiled_draws(sampler: DSMCS, model: Program, guide: Program, num_samples: int, method: str) -> Compiled:
    """A function ``(rng_key, params, args, kwargs)`` to values of the guide's latent sites, ``[num_samples, ...]``, and
    log evidences of the runs.
    """

    def draws(rng_key: Array, params: Params, args: Any, kwargs: Any) -> tuple[dict[str, Array], Array]:
        run_key, path = sampler.path(rng_key, params, model, guide, args, kwargs)

        def one(rng_key: Array) -> tuple[dict[str, Array], Array]:
            if method == "initial":
                values = path.target.values(path.target.draw(rng_key, jnp.asarray(0)))
                return values, jnp.zeros(path.target.plates.shape)
            return draw(rng_key, path, sampler, weighted=method == "weighted")

        return lax.map(one, random.split(run_key, num_samples))

    return Compiled(draws)


@lru_cache(maxsize=32)
def compiled_runs(sampler: DSMCS, model: Program, guide: Program, num_runs: int) -> Compiled:
    """A function ``(rng_key, params, args, kwargs)`` to what :class:`AnnealingDiagnostics` reports."""

    def runs(rng_key: Array, params: Params, args: Any, kwargs: Any) -> tuple[Array, Array, Array, Schedule]:
        run_key, path = sampler.path(rng_key, params, model, guide, args, kwargs)

        def one(rng_key: Array) -> tuple[Array, Array, Array]:
            recursion = run(rng_key, path, sampler.num_particles, sampler.resampling)
            return recursion.log_evidence, recursion.steps.ess, recursion.steps.resampled

        return *lax.map(one, random.split(run_key, num_runs)), path.schedule

    return Compiled(runs)


def draw(
    rng_key: Array, path: AnnealedPath, sampler: DSMCS, weighted: bool = True, remat: bool | str = False
) -> tuple[dict[str, Array], Array]:
    """Latent values of one final particle of each problem, by its weight or any, and the run's log evidences."""
    run_key, choice_key = random.split(rng_key)
    recursion = run(run_key, path, sampler.num_particles, sampler.resampling, remat=remat)
    log_weights = recursion.state.log_weights
    state = recursion.state._replace(log_weights=log_weights if weighted else jnp.zeros_like(log_weights))
    return path.target.values(_choose(choice_key, state)), sampler.bound(recursion)


def _choose(rng_key: Array, state: ParticleState) -> State:
    chosen = random.categorical(rng_key, state.log_weights, axis=0)

    def pick(leaf: Array) -> Array:
        index = chosen.reshape(1, *chosen.shape, *(1,) * (leaf.ndim - 1 - chosen.ndim))
        return jnp.take_along_axis(leaf, index, axis=0)[0]

    return jax.tree.map(pick, state.cloud.particles[0].position)
