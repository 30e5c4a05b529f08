"""A cloud of particles as a matrix: what every scheme that mixes particles instead of indexing them starts from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def as_matrix(scheme: str, log_weights: Array, particles: Any) -> tuple[Array, Callable[[Array], Any]]:
    """The states of all particles as one matrix, and the way back.

    Every leaf counts, also one that is a function of others (a guide's carry, a stored log twist): each is mixed on
    its own coordinates. States of dead particles that are not finite are replaced by zero, so that zero weight times
    infinity does not spread; states of living ones are left as they are.

    :param scheme: name of the scheme, for the error.
    :param log_weights: shape ``[N]``.
    :param particles: pytree of real arrays with leading axis ``N``.
    :return: the matrix, float32 or wider, ``[N, d]``; and a function from such a matrix to particles.
    :raises ValueError: if some leaf is not real, which cannot be mixed.
    """
    leaves, structure = jax.tree.flatten(particles)
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"Resampler '{scheme}' mixes particles, which needs real states, but part of the particles' state has "
                f"dtype {leaf.dtype} and shape {leaf.shape} (a discrete latent in the scan's carry, perhaps). Use a "
                f"scheme that copies particles, such as 'systematic' or 'gapped_straight_through'."
            )
    size = log_weights.shape[0]
    dtype = jnp.result_type(jnp.float32, *leaves)
    matrix = jnp.concatenate([leaf.reshape(size, -1).astype(dtype) for leaf in leaves] or [jnp.zeros((size, 0))], 1)
    lost = jnp.isneginf(log_weights)[:, None] & ~jnp.isfinite(matrix)
    matrix = jnp.where(lost, 0.0, matrix)

    def rebuild(matrix: Array) -> Any:
        parts, start = [], 0
        for leaf in leaves:
            width = leaf.size // size
            parts.append(matrix[:, start : start + width].reshape(leaf.shape).astype(leaf.dtype))
            start += width
        return jax.tree.unflatten(structure, parts)

    return matrix, rebuild


def log_probabilities(log_weights: Array) -> Array:
    """Log weights that sum to one, differentiable; equal ones if every particle is dead.

    :param log_weights: unnormalised, shape ``[N]``; ``-inf`` marks a dead particle.
    """
    all_dead = jnp.all(jnp.isneginf(log_weights))
    return jax.nn.log_softmax(jnp.where(all_dead, 0.0, log_weights))


def squared_distances(x: Array, y: Array) -> Array:
    """Squared Euclidean distances between the rows of two matrices, ``[n, N]``, without an array of their differences.

    Centre and scale both first: the error is the rounding of the largest squared norm.
    """
    products = jnp.matmul(x, y.T, precision="highest")
    return jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1) - 2 * products
