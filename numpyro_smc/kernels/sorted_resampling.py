r"""Systematic resampling of sorted particles with a given uniform: a smooth function, nearly, of weights and states.

Particles in the order in which they were made have nothing to do with those of another run of the filter. In the order
of their state, or along a Hilbert curve through the space of states, clouds of two runs with nearly the same draws have
nearly the same ancestors [1, 2]. Any order is allowed: each particle keeps :math:`N W_i` offspring on average.

**References**

1. *Sequential quasi Monte Carlo*, M. Gerber, N. Chopin (2015)
2. *The correlated pseudo-marginal method*, G. Deligiannidis, A. Doucet, M. Pitt (2018)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_smc.programs.resample import Decision, Resampled, ResampleFn
from numpyro_smc.programs.resampling.inverse_cdf import scaled_weights
from numpyro_smc.programs.resampling.offspring import search_strata

ORDERS = ("state", "hilbert")


def sorted_systematic(uniforms: Array, decide: Decision, order: str | None, user: str) -> ResampleFn:
    """Resampling of sorted particles.

    :param uniforms: one for each step, ``[T]``, in [0, 1).
    :param decide: when to resample.
    :param order: ``"state"`` (scalar states), ``"hilbert"``, or ``None`` for the one that fits.
    :param user: who asks, for error messages.
    """

    def resample(
        rng_key: Array, log_weights: Array, particles: Any, t: Array, allowed: Array, pivots: Array | None = None
    ) -> Resampled:
        del rng_key
        assert pivots is None and log_weights.ndim == 1
        size = log_weights.shape[0]
        identity = jnp.arange(size, dtype=jnp.int32)

        def move(operand: tuple[Array, Any]) -> Resampled:
            log_weights, particles = operand
            permutation = sorted_by_state(particles, order, user)
            weights = scaled_weights(log_weights)[permutation]
            chosen = permutation[search_strata(weights, uniforms[t], size)]
            alive = jnp.max(log_weights) > -jnp.inf
            ancestors = jnp.where(alive, chosen, identity).astype(jnp.int32)
            moved = jax.tree.map(lambda leaf: leaf[ancestors], particles)
            new_log_weights = jnp.where(alive, jnp.zeros_like(log_weights), log_weights)
            return Resampled(moved, new_log_weights, ancestors, jnp.asarray(True), jnp.zeros(()))

        def stay(operand: tuple[Array, Any]) -> Resampled:
            log_weights, particles = operand
            return Resampled(particles, log_weights, identity, jnp.asarray(False), jnp.zeros(()))

        return lax.cond(decide(log_weights, t) & allowed, move, stay, (log_weights, particles))

    return resample


def sorted_by_state(particles: Any, order: str | None, user: str) -> Array:
    """The permutation that sorts particles by the model's carry, int32 ``[N]``.

    :raises ValueError: for ``order="state"`` and states of more than one number.
    """
    leaves = particles["model"]
    numbers = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)] or leaves
    size = jax.tree.leaves(particles)[0].shape[0] if jax.tree.leaves(particles) else 0
    if not numbers:
        return jnp.arange(size, dtype=jnp.int32)
    states = jnp.concatenate([leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in numbers], axis=1)
    if order == "state" and states.shape[1] > 1:
        raise ValueError(
            f"{user}: sort='state' needs states of one number, and this model carries {states.shape[1]} of them from "
            f"step to step. Use sort='hilbert'."
        )
    # One sort of integers, position above and particle below: several times as fast as sorting pairs.
    below = max(size - 1, 1).bit_length()
    identity = jnp.arange(size, dtype=jnp.uint32)
    position = hilbert_index(states, 32 - below)
    packed = lax.sort((position << below) | identity, is_stable=False)
    return (packed & jnp.uint32(2**below - 1)).astype(jnp.int32)


def hilbert_index(states: Array, num_bits: int = 32) -> Array:
    r"""How far along a Hilbert curve each state lies, uint32 ``[N]``; of scalar states, how far along the line.

    States are standardised, squashed to the unit cube by :math:`1/(1 + e^{-x})`, and put on a grid of as many bits in
    each dimension as there are (at most 24 in one dimension, 16 in more); of more dimensions than bits the first count.
    The walk along the curve is Skilling's [1].

    :param states: ``[N, D]``.
    :param num_bits: of the index.

    **References**

    1. *Programming the Hilbert curve*, J. Skilling (2004)
    """
    states = states[:, :num_bits]
    dimension = states.shape[1]
    bits = min(num_bits // dimension, 24 if dimension == 1 else 16)
    spread = jnp.std(states, axis=0)
    centred = (states - jnp.mean(states, axis=0)) / jnp.where(spread > 0.0, spread, 1.0)
    unit = jax.nn.sigmoid(jnp.where(jnp.isfinite(centred), centred, 0.0))
    cells = jnp.minimum(unit * 2**bits, 2**bits - 1).astype(jnp.uint32)
    return cells[:, 0] if dimension == 1 else along_the_curve(cells, bits)


def along_the_curve(cells: Array, bits: int) -> Array:
    """Skilling's transform of grid coordinates to the transposed index, whose bits are then interleaved.

    :param cells: uint32 ``[N, D]``, below ``2**bits``.
    :return: uint32 ``[N]``, below ``2**(D * bits)``.
    """
    dimension = cells.shape[1]
    x = [cells[:, axis] for axis in range(dimension)]
    for level in range(bits - 1, 0, -1):
        bit, below = jnp.uint32(1 << level), jnp.uint32((1 << level) - 1)
        for axis in range(dimension):
            flip = (x[axis] & bit) != 0
            swapped = (x[0] ^ x[axis]) & below
            # Invert the low bits of the first coordinate, or exchange them with this one's.
            first = jnp.where(flip, x[0] ^ below, x[0] ^ swapped)
            if axis:
                x[axis] = jnp.where(flip, x[axis], x[axis] ^ swapped)
            x[0] = first
    for axis in range(1, dimension):
        x[axis] = x[axis] ^ x[axis - 1]
    gray = jnp.zeros_like(x[0])
    for level in range(bits - 1, 0, -1):
        gray = jnp.where((x[-1] & jnp.uint32(1 << level)) != 0, gray ^ jnp.uint32((1 << level) - 1), gray)
    index = jnp.zeros_like(x[0])
    for level in range(bits - 1, -1, -1):
        for axis in range(dimension):
            index = (index << 1) | (((x[axis] ^ gray) >> level) & 1)
    return index
