"""The rates at which the gates of Hodgkin and Huxley's neuron open and close (1 / ms), at a potential in mV [1].

Constants as in [1]; the potential counts from the outside, as in [2].

**References**

1. *A quantitative description of membrane current and its application to conduction and excitation in nerve*,
   A. Hodgkin, A. Huxley (1952)
2. *Smoothing of, and parameter estimation from, noisy biophysical recordings*, Q. Huys, L. Paninski (2009)
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

#: Where :func:`exponential_ratio` changes from the formula to its series.
SERIES_BELOW = 0.05


def potassium_activation(potential: Array) -> tuple[Array, Array]:
    """Opening and closing rate of the gate n, elementwise."""
    opening = 0.1 * exponential_ratio(-(potential + 55.0) / 10.0)
    return opening, 0.125 * jnp.exp(-(potential + 65.0) / 80.0)


def sodium_activation(potential: Array) -> tuple[Array, Array]:
    """Opening and closing rate of the gate m, elementwise."""
    opening = exponential_ratio(-(potential + 35.0) / 10.0)
    return opening, 4.0 * jnp.exp(-(potential + 65.0) / 18.0)


def sodium_inactivation(potential: Array) -> tuple[Array, Array]:
    """Opening and closing rate of the gate h, elementwise."""
    opening = 0.07 * jnp.exp(-(potential + 50.0) / 20.0)
    return opening, 1.0 / (jnp.exp(-(potential + 35.0) / 10.0) + 1.0)


#: The rates of the gates, in the order in which a state holds them.
GATES = (potassium_activation, sodium_activation, sodium_inactivation)


def exponential_ratio(z: Array) -> Array:
    """``z / (exp(z) - 1)``, elementwise; value and gradient are right at 0 and beside it too."""
    near = jnp.abs(z) < SERIES_BELOW
    far = jnp.where(near, 1.0, z)
    square = jnp.where(near, z, 0.0) ** 2
    return jnp.where(near, 1.0 - z / 2.0 + square / 12.0 - square**2 / 720.0, far / jnp.expm1(far))
