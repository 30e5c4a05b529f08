"""Residual resampling: the whole part of every expected offspring for certain, multinomial for the rest."""

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_smc.programs.resampling.inverse_cdf import identity_unless_alive, pin, scaled_weights, search


def residual(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
    r"""Ancestor indices with :math:`\lfloor n W_i \rfloor` certain copies of each particle, the rest multinomial [1].

    Never more variance than :func:`multinomial`. Cost: O(N + n log N), about twice :func:`multinomial`: all ``n`` slots
    draw from the remainder, and the certain ones discard it, so that shapes are static.

    :param log_weights: unnormalised, shape ``[N]``; ``-inf`` marks a dead particle, which is never chosen.
    :return: int32 ``[num_samples]``: the certain slots first, non-decreasing, then the others in no order. A particle
        has at least ``floor(num_samples * w)`` offspring. If every particle is dead, ``arange(num_samples) % N``.

    **References**

    1. *Sequential Monte Carlo methods for dynamic systems*, J. Liu, R. Chen (1998)
    """
    weights = scaled_weights(log_weights)
    expected, copies = _expected_and_copies(weights, num_samples)
    remainder = expected - copies
    # In huge clouds rounding may leave a slot to fill and no remainder to fill it from.
    remainder = jnp.where(jnp.any(remainder > 0), remainder, weights)
    drawn = search(remainder, jax.random.uniform(rng_key, (num_samples,), weights.dtype))
    certain = jnp.repeat(jnp.arange(weights.shape[0], dtype=jnp.int32), copies, total_repeat_length=num_samples)
    ancestors = jnp.where(jnp.arange(num_samples) < copies.sum(), certain, drawn)
    return identity_unless_alive(ancestors, weights)


def conditional(
    rng_key: Array, log_weights: Array, num_samples: int, pivot_in: int | Array, pivot_out: int | Array
) -> Array:
    r"""Residual ancestor indices, cyclically shifted at random, given that ``result[pivot_out] == pivot_in``.

    The slot that chose pivot :math:`i` is one of its certain ones with probability
    :math:`\lfloor n W_i \rfloor / (n W_i)`, else one of the multinomial slots, which is then pinned to :math:`i`; the
    other slots are drawn as ever; then all are shifted to bring the pivot's to ``pivot_out``.

    :param log_weights: unnormalised, shape ``[N]``.
    :param pivot_in: the ancestor that is kept, a scalar.
    :param pivot_out: the slot that keeps it, a scalar.
    :return: int32 ``[num_samples]`` with ``result[pivot_out] == pivot_in``.
    """
    key_kind, key_slot, key_others = jax.random.split(rng_key, 3)
    weights = scaled_weights(log_weights)
    expected, copies = _expected_and_copies(weights, num_samples)
    certain = copies.sum()
    is_certain = jax.random.uniform(key_kind, (), weights.dtype) * expected[pivot_in] < copies[pivot_in]
    first = jnp.where(is_certain, jnp.cumsum(copies)[pivot_in] - copies[pivot_in], certain)
    choices = jnp.where(is_certain, copies[pivot_in], num_samples - certain)
    slot = first + jnp.floor(jax.random.uniform(key_slot, (), weights.dtype) * choices).astype(jnp.int32)
    slot = jnp.clip(slot, 0, num_samples - 1)
    return pin(residual(key_others, log_weights, num_samples), slot, pivot_in, pivot_out)


def _expected_and_copies(weights: Array, num_samples: int) -> tuple[Array, Array]:
    """Expected offspring, float ``[N]``, and its whole part, int32 ``[N]``; zero if every particle is dead."""
    total = weights.sum()
    expected = num_samples * weights / jnp.where(total > 0, total, 1.0)
    return expected, jnp.floor(expected).astype(jnp.int32)
