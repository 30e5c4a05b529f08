"""Multinomial resampling: independent ancestors, the only scheme here whose score is a sum over slots."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import logsumexp

from numpyro_smc.programs.resampling.inverse_cdf import scaled_weights, search


def multinomial(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
    r"""Independent ancestor indices :math:`a_j \sim W`, the normalised weights [1].

    Cost: O(N + n log N); n uniforms, looked up in no order, so slower than :func:`systematic` in large clouds. Of all
    schemes here it adds the most variance.

    :param log_weights: unnormalised, shape ``[N]``; ``-inf`` marks a dead particle, which is never chosen.
    :return: int32 ``[num_samples]``, in no order. If every particle is dead, ``arange(num_samples) % N``.

    **References**

    1. *Novel approach to nonlinear/non-Gaussian Bayesian state estimation*, N. Gordon, D. Salmond, A. Smith (1993)
    """
    weights = scaled_weights(log_weights)
    return search(weights, jax.random.uniform(rng_key, (num_samples,), weights.dtype))


def conditional(
    rng_key: Array, log_weights: Array, num_samples: int, pivot_in: int | Array, pivot_out: int | Array
) -> Array:
    """Multinomial ancestor indices given that ``result[pivot_out] == pivot_in``: the others stay independent.

    :param log_weights: unnormalised, shape ``[N]``.
    :param pivot_in: the ancestor that is kept, a scalar.
    :param pivot_out: the slot that keeps it, a scalar.
    :return: int32 ``[num_samples]`` with ``result[pivot_out] == pivot_in``.
    """
    ancestors = multinomial(rng_key, log_weights, num_samples)
    return ancestors.at[pivot_out].set(jnp.asarray(pivot_in, ancestors.dtype))


def log_prob(ancestors: Array, log_weights: Array) -> Array:
    r"""Log probability :math:`\sum_j \log W_{a_j}` of independent ancestors; its gradient is the score of resampling.

    Differentiable in the weights. Dead particles that were not chosen get a zero gradient, not ``nan``; if every
    particle is dead the ancestors are certain, and value and gradient are zero.

    :param ancestors: int, shape ``[num_samples]``.
    :param log_weights: unnormalised, shape ``[N]``.
    :return: a scalar.
    """
    all_dead = jnp.all(log_weights == -jnp.inf)
    log_weights = jnp.where(all_dead, 0.0, log_weights)
    value = jnp.sum(log_weights[ancestors]) - ancestors.shape[0] * logsumexp(log_weights)
    return jnp.where(all_dead, 0.0, value)
