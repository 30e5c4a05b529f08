"""Paths by tracing ancestors back from the final particles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.programs.resampling.inverse_cdf import draw_one
from numpyro_smc.programs.resampling.multinomial import multinomial


def sample_paths(rng_key: Array, history: Any, num_samples: int) -> dict[str, Array]:
    """Draw final particles by their weights and follow their ancestors.

    :param history: a :class:`~numpyro_smc.filtering.result.History` with particles.
    :return: by site, ``[num_samples, T, ...]`` (``[num_samples, ...]`` before the scan).
    """
    last = draw_final(rng_key, history.steps["log_weights"][-1], num_samples)
    return follow(history, *trace_back(history.ancestors, last))


def trace_back(ancestors: Array, last: Array) -> tuple[Array, Array]:
    """The lineages of final particles.

    :param ancestors: ``[T, N, *batch]``. **last** - the final particles, ``[M, *batch]``.
    :return: initial particles ``[M, *batch]``, and the particles of each step ``[T, M, *batch]``.
    """
    rank = ancestors.ndim - 2

    def back(index: Array, ancestors: Array) -> tuple[Array, Array]:
        return take(ancestors, index, rank), index

    return lax.scan(back, last, ancestors, reverse=True)


def follow(history: Any, first: Array, path: Array) -> dict[str, Array]:
    """Site values along paths of particles.

    :param first: initial particles, ``[M, *batch]``. **path** - the particles of each step, ``[T, M, *batch]``.
    :return: by site, ``[M, T, ...]`` (``[M, ...]`` before the scan).
    """
    rank = first.ndim - 1
    initial = jax.tree.map(lambda leaf: take(leaf, first, rank), history.initial["values"])
    values = jax.tree.map(lambda leaf: jax.vmap(lambda v, i: take(v, i, rank))(leaf, path), history.steps["values"])
    return initial | jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), values)


def draw_final(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
    """Indices of particles drawn independently by their weights, ``[num_samples, *batch]``."""

    def draw(rng_key: Array, log_weights: Array) -> Array:
        if num_samples == 1:
            return draw_one(rng_key, log_weights)[None]
        return multinomial(rng_key, log_weights, num_samples)

    if log_weights.ndim == 1:
        return draw(rng_key, log_weights)
    flat = log_weights.reshape(log_weights.shape[0], -1)
    keys = random.split(rng_key, flat.shape[1])
    return jax.vmap(draw, (0, 1), 1)(keys, flat).reshape(num_samples, *log_weights.shape[1:])


def take(leaf: Array, index: Array, rank: int) -> Array:
    """Select particles, separately for each element of ``rank`` batch axes.

    :param leaf: ``[N, *batch, ...]``.
    :param index: ``[M, *batch]``.
    :return: ``[M, *batch, ...]``.
    """
    if rank == 0:
        return leaf[index]
    flat = leaf.reshape(leaf.shape[0], -1, *leaf.shape[1 + rank :])
    columns = index.reshape(index.shape[0], -1)
    return flat[columns, jnp.arange(flat.shape[1])].reshape(index.shape + leaf.shape[1 + rank :])
