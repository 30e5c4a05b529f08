"""One ancestor in each stratum, however many particles: beyond a quarter of a million, single precision does not do."""

import jax.numpy as jnp
from jax import Array, lax

from numpyro_smc.programs.resampling.inverse_cdf import first_above, identity_unless_alive, search, strata

_LARGE = 2**18


def search_strata(weights: Array, offsets: Array, num_samples: int) -> Array:
    r"""The particle that owns each position :math:`j + U_j`, when the weights are laid end to end over ``[0, n)``.

    In single precision of many particles neither the cumulative weights nor the positions are exact to a stratum: of
    ten million, offspring were off by two. There the expected offspring are summed as integers, whole parts and 32 bits
    of their fractions, which no order of summation rounds.

    :param weights: from :func:`~numpyro_smc.programs.resampling.inverse_cdf.scaled_weights`, ``[N]``.
    :param offsets: :math:`U \in [0, 1)`, shape ``[]`` (shared by all strata) or ``[num_samples]``.
    :return: int32 ``[num_samples]``, non-decreasing; ``arange(n) % N`` unless some particle lives and all weights are
        finite.
    """
    is_double = jnp.finfo(weights.dtype).bits > 32
    if is_double or max(weights.shape[0], num_samples) <= _LARGE:
        return search(weights, strata(offsets, num_samples), num_samples)
    whole, fraction = expected_offspring_up_to(weights, num_samples)
    cell = jnp.clip(whole, 0, num_samples - 1)
    uniforms = offsets if offsets.ndim == 0 else offsets[cell]
    below = jnp.where(whole < num_samples, whole + (uniforms < fraction), num_samples)
    below = lax.cummax(jnp.clip(below, 0, num_samples).astype(jnp.int32))
    # Whatever rounding leaves over at the end is the last living particle's.
    last = weights.shape[0] - 1 - jnp.argmax(jnp.flip(weights > 0))
    below = jnp.where(jnp.arange(weights.shape[0]) >= last, num_samples, below)
    owners = first_above(below, jnp.arange(num_samples, dtype=jnp.int32))
    return identity_unless_alive(owners, weights)


def expected_offspring_up_to(weights: Array, num_samples: int) -> tuple[Array, Array]:
    r""":math:`n \sum_{j \le i} w_j / \sum_j w_j`: whole part, int32 ``[N]``, and fraction in [0, 1], float ``[N]``."""
    total = jnp.sum(weights)
    expected = weights * (num_samples / jnp.where(total > 0, total, 1.0))
    whole = jnp.floor(expected)
    bits = ((expected - whole) * 2.0**32).astype(jnp.uint32)
    fractions = jnp.cumsum(bits, dtype=jnp.uint32)
    carried = (fractions < bits).astype(jnp.int32)  # the sum of fractions went over a whole number
    whole = jnp.cumsum(whole.astype(jnp.int32) + carried, dtype=jnp.int32)
    fraction = fractions.astype(weights.dtype) * 2.0**-32
    # What rounding of the total and of the products took from n is given back in proportion.
    missing = (num_samples - whole[-1]).astype(weights.dtype) - fraction[-1]
    share = (whole.astype(weights.dtype) + fraction) / jnp.maximum(whole[-1].astype(weights.dtype), 1.0)
    fraction = fraction + missing * share
    below = jnp.floor(fraction)
    return whole + below.astype(jnp.int32), fraction - below
