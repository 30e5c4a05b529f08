"""Detectors against published positions, tensors and times, and what an antenna pattern must satisfy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import detectors
from models.detectors import DETECTORS

#: LIGO-T980044: vertices in metres, and responses.
POSITIONS = {
    "H1": (-2161414.92636, -3834695.17889, 4600350.22664),
    "L1": (-74276.0447238, -5496283.71971, 3224257.01744),
}
RESPONSES = {
    "H1": [
        [-0.3926141, -0.0776130, -0.2473886],
        [-0.0776130, 0.3195244, 0.2279981],
        [-0.2473886, 0.2279981, 0.0730903],
    ],
    "L1": [
        [0.4112809, 0.1402097, 0.2472943],
        [0.1402097, -0.1090056, -0.1816157],
        [0.2472943, -0.1816157, -0.3022755],
    ],
}


@pytest.mark.parametrize("name", DETECTORS)
def test_positions_and_responses_are_the_published_ones(name):
    np.testing.assert_allclose(DETECTORS[name].position, POSITIONS[name], atol=1e-3)
    np.testing.assert_allclose(DETECTORS[name].response, RESPONSES[name], atol=1e-6)
    assert abs(np.trace(DETECTORS[name].response)) < 1e-9


@pytest.mark.parametrize(
    ("julian_day", "hours"), [(2446895.5, 13 + 10 / 60 + 46.3668 / 3600), (2446896.30625, 8.5825249)]
)
def test_sidereal_time_is_meeus_example(julian_day, hours):
    """10 April 1987, at 0h and at 19h 21m of universal time."""
    assert detectors._mean_sidereal_time(julian_day) * 12 / math.pi == pytest.approx(hours, abs=1e-6)


def test_gps_counts_leap_seconds():
    """The leap second of 30 June 2015 came at GPS 1119744016; a day later, the sky has turned by 3 min 56.6 s more."""
    late = detectors.sidereal_time(1_119_744_017) - detectors.sidereal_time(1_119_744_015)
    assert late * 43_200 / math.pi == pytest.approx(1.0027379, abs=1e-3)  # two seconds of GPS, one of universal time
    day = detectors.sidereal_time(1_126_259_462.4 + 86_400) - detectors.sidereal_time(1_126_259_462.4)
    assert day * 43_200 / math.pi == pytest.approx(236.555, abs=1e-2)
    with pytest.raises(ValueError, match="before July 2012"):
        detectors.sidereal_time(9e8)


def sky(num_directions: int):
    """Directions uniform on the sphere, and polarisation angles."""
    keys = jax.random.split(jax.random.key(0), 3)
    ra, psi = (jax.random.uniform(key, (num_directions,), maxval=2 * math.pi) for key in keys[:2])
    return ra, jnp.arcsin(jax.random.uniform(keys[2], (num_directions,), minval=-1.0)), psi


@pytest.mark.parametrize("name", DETECTORS)
def test_mean_squares_of_the_antenna_pattern_are_a_fifth(name):
    """50,000 directions: the standard error is at most 0.001."""
    plus, cross = detectors.antenna_pattern(DETECTORS[name], *sky(50_000), 1.0)
    for pattern in (plus, cross):
        assert float(jnp.mean(pattern**2)) == pytest.approx(0.2, abs=0.005)
    assert float(jnp.max(plus**2 + cross**2)) <= 1 + 1e-5


def test_pattern_is_one_overhead_and_half_from_along_an_arm():
    """A detector at the north pole, its arms along x and y."""
    pole = detectors.Detector(np.zeros(3), np.diag([0.5, -0.5, 0.0]))
    plus, cross = detectors.antenna_pattern(pole, 0.0, math.pi / 2, jnp.array([0.0, math.pi / 4]), 0.0)
    np.testing.assert_allclose(plus, [-1, 0], atol=1e-6)
    np.testing.assert_allclose(cross, [0, 1], atol=1e-6)
    plus, cross = detectors.antenna_pattern(pole, 0.0, 0.0, 0.0, 0.0)
    np.testing.assert_allclose((plus, cross), (-0.5, 0), atol=1e-6)


def test_turning_the_polarisation_turns_the_pattern():
    ra, dec, psi = sky(100)
    plus, cross = detectors.antenna_pattern(DETECTORS["L1"], ra, dec, psi, 2.0)
    turned = detectors.antenna_pattern(DETECTORS["L1"], ra, dec, psi + math.pi / 2, 2.0)
    np.testing.assert_allclose(turned, (-plus, -cross), atol=1e-5)
    rotated = detectors.antenna_pattern(DETECTORS["L1"], ra, dec, 0.0, 2.0)
    np.testing.assert_allclose(plus, rotated[0] * jnp.cos(2 * psi) + rotated[1] * jnp.sin(2 * psi), atol=1e-5)


def test_sky_turns_with_the_earth():
    ra, dec, psi = sky(20)
    first = detectors.antenna_pattern(DETECTORS["H1"], ra, dec, psi, 0.4)
    np.testing.assert_allclose(first, detectors.antenna_pattern(DETECTORS["H1"], ra + 1.1, dec, psi, 1.5), atol=1e-5)


def test_delay_between_the_sites_is_at_most_their_distance():
    """10.0128 ms, reached along the line through both."""
    with jax.enable_x64(True):
        line = DETECTORS["L1"].position - DETECTORS["H1"].position
        distance = np.linalg.norm(line) / detectors.LIGHT
        assert distance == pytest.approx(10.0128e-3, abs=1e-7)
        ra, dec, _ = sky(5000)
        first, second = (detectors.delay(DETECTORS[name], ra, dec, 1.7) for name in DETECTORS)
        assert 0.99 * distance < float(jnp.max(jnp.abs(first - second))) <= distance
        towards = line / np.linalg.norm(line)  # a source beyond L1 is seen there first
        angles = math.atan2(towards[1], towards[0]) + 1.7, math.asin(towards[2])
        first, second = (float(detectors.delay(DETECTORS[name], *angles, 1.7)) for name in DETECTORS)
        assert first - second == pytest.approx(distance, rel=1e-6)
