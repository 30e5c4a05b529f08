"""Paths by tracing ancestors back from the final particles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random


def sample_paths(rng_key: Array, history: Any, num_samples: int) -> dict[str, Array]:
    """Draw final particles by their weights and follow their ancestors.

    :param history: a :class:`~numpyro_smc.filtering.result.History` with particles.
    :return: by site, ``[num_samples, T, ...]`` (``[num_samples, ...]`` before the scan).
    """
    log_weights = history.steps["log_weights"]
    last = draw_final(rng_key, log_weights[-1], num_samples)

    def back(index: Array, inputs: tuple[Array, dict[str, Array]]) -> tuple[Array, dict[str, Array]]:
        ancestors, values = inputs
        rank = ancestors.ndim - 1
        return take(ancestors, index, rank), jax.tree.map(lambda leaf: take(leaf, index, rank), values)

    first, path = lax.scan(back, last, (history.ancestors, history.steps["values"]), reverse=True)
    initial = jax.tree.map(lambda leaf: take(leaf, first, first.ndim - 1), history.initial["values"])
    return initial | jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), path)


def draw_final(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
    """Indices of particles drawn by their weights, ``[num_samples, *batch]``."""
    batch = log_weights.shape[1:]
    return random.categorical(rng_key, log_weights, axis=0, shape=(num_samples, *batch))


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
