r"""Gravitational wave detectors on the turning Earth: where they are, how they respond, and when a wave arrives.

Frame: fixed to the Earth, z to the north pole, x to the Greenwich meridian; metres. Angles in radians. The response of
a detector with arms :math:`x, y` is :math:`D = (x x^\top - y y^\top) / 2`.

**References**

1. *Documentation on coordinate systems of the LIGO sites*, W. Althouse, L. Jones, A. Lazzarini, LIGO-T980044 (1998)
2. *Astronomical Algorithms*, J. Meeus (1998), chapter 12
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

LIGHT = 299_792_458.0  # m / s
EQUATOR, POLE = 6_378_137.0, 6_356_752.314  # semi-axes of the WGS-84 ellipsoid
#: Seconds of coordinated universal time behind GPS, from the start of the day on (GPS seconds); 2012 to 2017.
LEAP_SECONDS = ((1_025_136_016, 16), (1_119_744_017, 17), (1_167_264_018, 18))
GPS_START = 2_444_244.5  # Julian day
J2000 = 2_451_545.0


class Detector(NamedTuple):
    """Position of the vertex ``[3]`` and response ``[3, 3]``."""

    position: np.ndarray
    response: np.ndarray


def detector(
    latitude: float, longitude: float, elevation: float, azimuths: tuple[float, float], tilts: tuple[float, float]
) -> Detector:
    """From geodetic coordinates in degrees and metres; azimuths of the arms in degrees north of east."""
    latitude, longitude = math.radians(latitude), math.radians(longitude)
    east = np.array([-math.sin(longitude), math.cos(longitude), 0.0])
    up = np.array(
        [
            math.cos(latitude) * math.cos(longitude),
            math.cos(latitude) * math.sin(longitude),
            math.sin(latitude),
        ]
    )
    north = np.cross(up, east)
    radius = EQUATOR**2 / math.hypot(EQUATOR * math.cos(latitude), POLE * math.sin(latitude))
    position = (radius + elevation) * up
    position[2] = ((POLE / EQUATOR) ** 2 * radius + elevation) * up[2]
    arms = [
        math.cos(tilt) * (math.cos(azimuth) * east + math.sin(azimuth) * north) + math.sin(tilt) * up
        for azimuth, tilt in zip(map(math.radians, azimuths), tilts, strict=True)
    ]
    response = (np.outer(arms[0], arms[0]) - np.outer(arms[1], arms[1])) / 2
    return Detector(position, response)


def _degrees(degrees: float, minutes: float, seconds: float) -> float:
    return degrees + minutes / 60 + seconds / 3600


#: Hanford and Livingston.
DETECTORS = {
    "H1": detector(
        _degrees(46, 27, 18.528),
        -_degrees(119, 24, 27.5657),
        142.554,
        (125.9994, 215.9994),
        (-6.195e-4, 1.25e-5),
    ),
    "L1": detector(
        _degrees(30, 33, 46.4196),
        -_degrees(90, 46, 27.2654),
        -6.574,
        (197.7165, 287.7165),
        (-3.121e-4, -6.107e-4),
    ),
}


def sidereal_time(gps: float) -> float:
    """Greenwich mean sidereal time of an instant between 2012 and 2017 or later, in radians, universal time being UTC.

    :param gps: seconds.
    :raises ValueError: before July 2012, whose leap seconds are not in the table.
    """
    passed = [seconds for start, seconds in LEAP_SECONDS if gps >= start]
    if not passed:
        raise ValueError(f"sidereal_time: gps={gps} is before July 2012; expected {LEAP_SECONDS[0][0]} or later.")
    return _mean_sidereal_time(GPS_START + (gps - passed[-1]) / 86_400)


def _mean_sidereal_time(julian_day: float) -> float:
    days = julian_day - J2000
    centuries = days / 36_525
    degrees = 280.46061837 + 360.98564736629 * days + 0.000387933 * centuries**2 - centuries**3 / 38_710_000
    return math.radians(degrees % 360)


def antenna_pattern(
    detector: Detector, ra: ArrayLike, dec: ArrayLike, psi: ArrayLike, gmst: ArrayLike
) -> tuple[Array, Array]:
    """Response to a plus and a cross polarised wave from a direction of the sky."""
    ra, dec, psi = jnp.broadcast_arrays(ra, dec, psi)
    longitude = ra - gmst
    south = jnp.stack([jnp.cos(longitude) * jnp.sin(dec), jnp.sin(longitude) * jnp.sin(dec), -jnp.cos(dec)])
    east = jnp.stack([-jnp.sin(longitude), jnp.cos(longitude), jnp.zeros_like(longitude)])
    first = -south * jnp.sin(psi) - east * jnp.cos(psi)
    second = -south * jnp.cos(psi) + east * jnp.sin(psi)
    response = jnp.asarray(detector.response, float)

    def contract(a: Array, b: Array) -> Array:
        return jnp.einsum("i...,ij,j...->...", a, response, b)

    return contract(first, first) - contract(second, second), 2 * contract(first, second)


def delay(detector: Detector, ra: ArrayLike, dec: ArrayLike, gmst: ArrayLike) -> Array:
    """Seconds after the centre of the Earth at which a wave from a direction of the sky arrives."""
    longitude = jnp.asarray(ra) - gmst
    seconds = detector.position / LIGHT
    towards = seconds[0] * jnp.cos(longitude) + seconds[1] * jnp.sin(longitude)
    return -(towards * jnp.cos(dec) + seconds[2] * jnp.sin(dec))
