"""Srinivasan sampling process: fractional offspring settled pair by pair, each a fair game."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_smc.programs.resampling.inverse_cdf import identity_unless_alive, scaled_weights


def ssp(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
    r"""Ancestor indices whose offspring counts round :math:`n W_i` up or down, at random and negatively associated [1].

    One particle at a time is unsettled, with fraction :math:`x` of an offspring; it meets the next particle, with
    fraction :math:`y`. If :math:`x + y < 1`, the next takes both fractions with probability :math:`y / (x + y)`, else
    the first does. If not, the first is rounded up with probability :math:`(1 - y) / (2 - x - y)`, else the next is;
    the other remains unsettled, with :math:`x + y - 1`. Either way both keep their expectations.

    Offspring counts as tight as those of :func:`systematic`, and consistent whatever the order of the particles. Cost:
    O(N), but in sequence: 30 ns per particle on a CPU core, far more on an accelerator; use :func:`systematic` there.

    :param log_weights: unnormalised, shape ``[N]``; ``-inf`` marks a dead particle, which is never chosen.
    :return: int32 ``[num_samples]``, non-decreasing. Offspring counts differ from ``num_samples * w`` by less than one.
        If every particle is dead, ``arange(num_samples) % N``.

    **References**

    1. *Negative association, ordering and convergence of resampling methods*, M. Gerber, N. Chopin, N. Whiteley (2019)
    """
    weights = scaled_weights(log_weights)
    size = weights.shape[0]
    total = weights.sum()
    expected = num_samples * weights / jnp.where(total > 0, total, 1.0)
    whole = jnp.floor(expected)
    particles = jnp.arange(size, dtype=jnp.int32)
    uniforms = jax.random.uniform(rng_key, (size,), weights.dtype)

    def meet(unsettled: tuple[Array, Array], entering: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (first, x), (following, y, u) = unsettled, entering
        both = x + y
        rounds_up = both >= 1
        following_stays = jnp.where(rounds_up, u * (2 - both) < 1 - y, (u * both < y) | (x == 0))
        remaining = jnp.where(following_stays, following, first)
        rounded_up = jnp.where(rounds_up, jnp.where(following_stays, first, following), size)  # size: nobody
        return (remaining, jnp.where(rounds_up, both - 1, both)), rounded_up

    nobody = jnp.int32(0), jnp.zeros((), weights.dtype)
    (last, fraction), rounded_up = lax.scan(meet, nobody, (particles, expected - whole, uniforms))
    offspring = whole.astype(jnp.int32).at[rounded_up].add(1, mode="drop")
    offspring = offspring.at[last].add(fraction > 0.5)  # zero or one, but for rounding
    missing = num_samples - offspring.sum(dtype=jnp.int32)  # zero, unless rounding adds up
    offspring = offspring.at[jnp.argmax(weights)].add(missing)
    ancestors = jnp.repeat(particles, offspring, total_repeat_length=num_samples)
    return identity_unless_alive(ancestors, weights, total)
