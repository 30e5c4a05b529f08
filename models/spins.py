r"""From the angles in which precessing binaries are stated to the vectors that waveforms take.

Stated are tilts of the spins from the orbital angular momentum L, the angle ``phi_12`` between their projections, the
azimuth ``phi_jl`` of L around the total angular momentum J, and the angle ``theta_jn`` between J and the line of sight
N. Returned are spins in the frame whose z is L, in which N has the azimuth pi / 2 less the phase; and the inclination
of L to N. |L| is the Newtonian one times :math:`1 + (3/2 + \eta/6) v^2`, :math:`v = (\pi M f)^{1/3}`.

The sequence of rotations is that of LALSimulation's ``SimInspiralTransformPrecessingNewInitialConditions``, written
from its definition; no LALSuite was at hand to compare digits. Tests check what it has to satisfy: lengths, tilts and
``phi_12`` kept, J at ``theta_jn`` from N, L at the azimuth ``phi_jl``, and N at pi / 2 less the phase.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

SUN = 4.925490947641267e-6  # the sun's mass in seconds


def orbital_angular_momentum(m1: Array, m2: Array, frequency: float) -> Array:
    """|L| in units of the sun's mass squared."""
    total = m1 + m2
    ratio = m1 * m2 / total**2
    v = (math.pi * SUN * total * frequency) ** (1 / 3)
    return total**2 * ratio / v * (1 + (1.5 + ratio / 6) * v**2)


def spins_in_source_frame(
    m1: Array,
    m2: Array,
    a1: Array,
    a2: Array,
    tilt1: Array,
    tilt2: Array,
    phi_12: Array,
    phi_jl: Array,
    theta_jn: Array,
    phase: Array,
    *,
    reference_frequency: float,
) -> tuple[Array, Array, Array]:
    """Inclination, and both dimensionless spins ``[3]``."""
    first, second = direction(tilt1, phase), direction(tilt2, phase + phi_12)
    orbit = jnp.stack([*jnp.zeros((2, *jnp.shape(m1))), jnp.ones(jnp.shape(m1))])
    size = orbital_angular_momentum(m1, m2, reference_frequency)
    j = m1**2 * a1 * first + m2**2 * a2 * second + size * orbit
    polar, azimuth = angles(j)
    # The frame of J: its z is J, and L has the azimuth phi_jl.
    first, second, orbit = (
        around_z(phi_jl - math.pi, around_y(-polar, around_z(-azimuth, s))) for s in (first, second, orbit)
    )
    sight = direction(theta_jn, jnp.asarray(math.pi / 2))
    inclination = jnp.arccos(jnp.clip((sight * orbit).sum(0), -1.0, 1.0))
    # The frame of L: its z is L, and N has the azimuth pi / 2 less the phase.
    polar, azimuth = angles(orbit)
    first, second, sight = (around_y(-polar, around_z(-azimuth, s)) for s in (first, second, sight))
    turn = math.pi / 2 - jnp.arctan2(sight[1], sight[0]) - phase
    return inclination, a1 * around_z(turn, first), a2 * around_z(turn, second)


def direction(polar: Array, azimuth: Array) -> Array:
    """Unit vector, ``[3]``."""
    return jnp.stack([jnp.sin(polar) * jnp.cos(azimuth), jnp.sin(polar) * jnp.sin(azimuth), jnp.cos(polar)])


def angles(vector: Array) -> tuple[Array, Array]:
    """Polar angle and azimuth."""
    return jnp.arctan2(jnp.hypot(vector[0], vector[1]), vector[2]), jnp.arctan2(vector[1], vector[0])


def around_z(angle: Array, vector: Array) -> Array:
    x, y, z = vector
    return jnp.stack([x * jnp.cos(angle) - y * jnp.sin(angle), x * jnp.sin(angle) + y * jnp.cos(angle), z])


def around_y(angle: Array, vector: Array) -> Array:
    x, y, z = vector
    return jnp.stack([x * jnp.cos(angle) + z * jnp.sin(angle), y, -x * jnp.sin(angle) + z * jnp.cos(angle)])
