"""Killing: each particle stays where it is with a probability that grows with its weight, else is replaced."""

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_smc.programs.resampling.inverse_cdf import pin, scaled_weights, search
from numpyro_smc.programs.resampling.multinomial import multinomial


def killing(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
    r"""Ancestor indices where slot :math:`i` keeps :math:`i` with probability :math:`w_i / \max_j w_j` [1].

    Otherwise the slot draws from the normalised weights. Nearly equal weights move nearly nothing, which suits weights
    that change little from step to step [2]. Cost: O(N log N), little more than :func:`multinomial`.

    :param log_weights: unnormalised, shape ``[N]``; ``-inf`` marks a dead particle, which is never chosen.
    :param num_samples: must be ``N``.
    :return: int32 ``[N]``, in no order. If every particle is dead, ``arange(N)``.
    :raises ValueError: if ``num_samples`` is not ``N``.

    **References**

    1. *Feynman-Kac Formulae*, P. Del Moral (2004)
    2. *On resampling schemes for particle filters with weakly informative observations*, N. Chopin, S. Singh, T. Soto,
       M. Vihola (2022)
    """
    weights = scaled_weights(log_weights)
    size = weights.shape[0]
    if num_samples != size:
        raise ValueError(
            f"killing: num_samples is {num_samples}, but there are {size} particles, each of which keeps its own slot. "
            "Use another resampler, such as 'systematic', to change the number of particles."
        )
    key_keep, key_draw = jax.random.split(rng_key)
    keeps = jax.random.uniform(key_keep, (size,), weights.dtype) < weights
    return jnp.where(keeps, jnp.arange(size, dtype=jnp.int32), multinomial(key_draw, log_weights, size))


def conditional(
    rng_key: Array, log_weights: Array, num_samples: int, pivot_in: int | Array, pivot_out: int | Array
) -> Array:
    r"""Killing, cyclically shifted at random, given that ``result[pivot_out] == pivot_in``.

    Slot :math:`j` chose pivot :math:`i` with probability proportional to
    :math:`P(a_j = i) \propto 1 - w_j + [j = i] \sum_k w_k`, the largest weight being one; the other slots are drawn as
    ever; then all are shifted to bring the pivot's to ``pivot_out``.

    :param log_weights: unnormalised, shape ``[N]``.
    :param num_samples: must be ``N``.
    :param pivot_in: the ancestor that is kept, a scalar.
    :param pivot_out: the slot that keeps it, a scalar.
    :return: int32 ``[N]`` with ``result[pivot_out] == pivot_in``.
    :raises ValueError: if ``num_samples`` is not ``N``.
    """
    key_slot, key_others = jax.random.split(rng_key)
    weights = scaled_weights(log_weights)
    slot_weights = (1 - weights).at[pivot_in].add(weights.sum())
    slot = search(slot_weights, jax.random.uniform(key_slot, (1,), weights.dtype))[0]
    return pin(killing(key_others, log_weights, num_samples), slot, pivot_in, pivot_out)
