"""Spins in the source frame: what the stated angles mean must hold of the vectors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gravitational_waves, spins

STATED = {
    "m1": 38.0,
    "m2": 21.0,
    "a1": 0.7,
    "a2": 0.5,
    "tilt1": 0.9,
    "tilt2": 2.1,
    "phi_12": 1.4,
    "phi_jl": 4.4,
    "theta_jn": 0.6,
    "phase": 2.3,
}


@pytest.fixture(scope="module")
def found():
    """Inclination, both spins, and total angular momentum and line of sight, all in the frame of L."""
    with jax.enable_x64(True):
        p = {name: jnp.asarray(value) for name, value in STATED.items()}
        inclination, first, second = spins.spins_in_source_frame(**p, reference_frequency=20.0)
        size = spins.orbital_angular_momentum(p["m1"], p["m2"], 20.0)
        j = p["m1"] ** 2 * first + p["m2"] ** 2 * second + size * jnp.array([0, 0, 1])
        sight = spins.direction(inclination, math.pi / 2 - p["phase"])
        return tuple(np.asarray(value) for value in (inclination, first, second, j, sight))


def test_lengths_tilts_and_the_angle_between_projections_are_kept(found):
    _, first, second, *_ = found
    for spin, size, tilt in ((first, "a1", "tilt1"), (second, "a2", "tilt2")):
        assert np.linalg.norm(spin) == pytest.approx(STATED[size])
        assert math.acos(spin[2] / np.linalg.norm(spin)) == pytest.approx(STATED[tilt])
    between = math.atan2(second[1], second[0]) - math.atan2(first[1], first[0])
    assert between % (2 * math.pi) == pytest.approx(STATED["phi_12"])


def test_total_angular_momentum_has_its_angle_to_the_line_of_sight(found):
    *_, j, sight = found
    assert math.acos(j @ sight / np.linalg.norm(j)) == pytest.approx(STATED["theta_jn"])


def test_orbital_angular_momentum_has_its_azimuth_around_the_total_one(found):
    """In the frame of J whose y axis is the projection of the line of sight."""
    *_, j, sight = found
    z = j / np.linalg.norm(j)
    y = sight - (sight @ z) * z
    y /= np.linalg.norm(y)
    orbit = np.array([0.0, 0.0, 1.0])
    assert math.atan2(orbit @ y, orbit @ np.cross(y, z)) % (2 * math.pi) == pytest.approx(STATED["phi_jl"])


def test_waveforms_own_angle_is_the_stated_one(found):
    """Of the waveform's code, whose |L| has one order more: theta_jn differs by a part of a percent."""
    gravitational_waves._waveform()  # imports it without its side effect, double precision everywhere
    from ripplegw.waveforms.cbc.IMRPhenomD import IMRPhenomPv2_utils

    inclination, first, second, *_ = found
    with jax.enable_x64(True):
        arguments = STATED["m2"], STATED["m1"], 20.0, STATED["phase"], inclination, *second, *first
        theirs = IMRPhenomPv2_utils.convert_spins(*map(jnp.asarray, arguments))
    assert float(theirs[3]) == pytest.approx(STATED["theta_jn"], abs=0.01)


def test_aligned_spins_leave_the_inclination():
    aligned = STATED | {"tilt1": 0.0, "tilt2": 0.0}
    p = {name: jnp.asarray(value, jnp.float32) for name, value in aligned.items()}
    inclination, first, second = spins.spins_in_source_frame(**p, reference_frequency=20.0)
    assert float(inclination) == pytest.approx(STATED["theta_jn"], abs=1e-5)
    np.testing.assert_allclose(first, [0, 0, 0.7], atol=1e-6)
    np.testing.assert_allclose(second, [0, 0, 0.5], atol=1e-6)


def test_newtonian_angular_momentum_is_that_of_a_circular_orbit():
    """L = mu sqrt(M a) with Kepler's a, in units of G = c = 1; far apart the correction vanishes."""
    m1, m2, frequency = 30.0, 20.0, 1e-6
    total, reduced = m1 + m2, m1 * m2 / (m1 + m2)
    separation = (total * spins.SUN / (math.pi * frequency) ** 2) ** (1 / 3) / spins.SUN
    found = spins.orbital_angular_momentum(jnp.asarray(m1), jnp.asarray(m2), frequency)
    assert float(found) == pytest.approx(reduced * math.sqrt(total * separation), rel=1e-4)
