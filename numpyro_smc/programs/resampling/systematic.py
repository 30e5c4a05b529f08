"""Systematic resampling: one uniform shared by n equal strata of the cumulative weights."""

import jax
from jax import Array

from numpyro_smc.programs.resampling.inverse_cdf import pin, position_within, scaled_weights
from numpyro_smc.programs.resampling.offspring import search_strata


def systematic(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
    r"""Ancestor indices at the positions :math:`(j + U)/n` of the cumulative weights, a single :math:`U` [1].

    The cheapest scheme, and in practice among the least variable, though its variance depends on the order of the
    particles and can exceed that of :func:`multinomial`; :func:`ssp` has the same bound on offspring and a consistency
    proof. Cost: O(N + n log N) and one random number; on a CPU core 8 ns per particle.

    :param log_weights: unnormalised, shape ``[N]``; ``-inf`` marks a dead particle, which is never chosen.
    :return: int32 ``[num_samples]``, non-decreasing. Offspring counts differ from ``num_samples * w`` by less than one.
        If every particle is dead, ``arange(num_samples) % N``.

    **References**

    1. *Improved particle filter for nonlinear problems*, J. Carpenter, P. Clifford, P. Fearnhead (1999)
    """
    weights = scaled_weights(log_weights)
    offset = jax.random.uniform(rng_key, (), weights.dtype)
    return search_strata(weights, offset, num_samples)


def conditional(
    rng_key: Array, log_weights: Array, num_samples: int, pivot_in: int | Array, pivot_out: int | Array
) -> Array:
    """Systematic ancestor indices, cyclically shifted at random, given that ``result[pivot_out] == pivot_in``.

    The stratum that chose the pivot and the offset shared by all strata are those of a uniform position among those the
    pivot owns; then the slots are shifted to bring the pivot's to ``pivot_out`` [1].

    :param log_weights: unnormalised, shape ``[N]``.
    :param pivot_in: the ancestor that is kept, a scalar.
    :param pivot_out: the slot that keeps it, a scalar.
    :return: int32 ``[num_samples]`` with ``result[pivot_out] == pivot_in``, sorted up to a cyclic shift.

    **References**

    1. *On particle Gibbs sampling*, N. Chopin, S. Singh (2015)
    """
    weights = scaled_weights(log_weights)
    slot, offset = position_within(rng_key, weights, pivot_in, num_samples)
    return pin(search_strata(weights, offset, num_samples), slot, pivot_in, pivot_out)
