"""Stratified resampling: one independent uniform in each of n equal strata of the cumulative weights."""

import jax
from jax import Array

from numpyro_smc.programs.resampling.inverse_cdf import pin, position_within, scaled_weights
from numpyro_smc.programs.resampling.offspring import search_strata


def stratified(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
    r"""Ancestor indices at the positions :math:`(j + U_j)/n` of the cumulative weights, :math:`U_j` independent [1].

    Never more variance than :func:`multinomial`. Cost: O(N + n log N).

    :param log_weights: unnormalised, shape ``[N]``; ``-inf`` marks a dead particle, which is never chosen.
    :return: int32 ``[num_samples]``, non-decreasing. Offspring counts differ from ``num_samples * w`` by less than two.
        If every particle is dead, ``arange(num_samples) % N``.

    **References**

    1. *Monte Carlo filter and smoother for non-Gaussian nonlinear state space models*, G. Kitagawa (1996)
    """
    weights = scaled_weights(log_weights)
    offsets = jax.random.uniform(rng_key, (num_samples,), weights.dtype)
    return search_strata(weights, offsets, num_samples)


def conditional(
    rng_key: Array, log_weights: Array, num_samples: int, pivot_in: int | Array, pivot_out: int | Array
) -> Array:
    """Stratified ancestor indices, cyclically shifted at random, given that ``result[pivot_out] == pivot_in``.

    The stratum that chose the pivot is that of a uniform position among those the pivot owns; the other strata draw
    afresh; then the slots are shifted to bring the pivot's to ``pivot_out``.

    :param log_weights: unnormalised, shape ``[N]``.
    :param pivot_in: the ancestor that is kept, a scalar.
    :param pivot_out: the slot that keeps it, a scalar.
    :return: int32 ``[num_samples]`` with ``result[pivot_out] == pivot_in``, sorted up to a cyclic shift.
    """
    key_pivot, key_others = jax.random.split(rng_key)
    slot, _ = position_within(key_pivot, scaled_weights(log_weights), pivot_in, num_samples)
    return pin(stratified(key_others, log_weights, num_samples), slot, pivot_in, pivot_out)
