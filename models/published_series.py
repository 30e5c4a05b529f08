r"""Series whose log likelihood others have published, with the programs that have it.

- :func:`nile`, the flow of the Nile at Aswan from 1871 on as a local level [1]:
  :math:`y_t \sim \mathcal N(\mu_t, 15099)`, :math:`\mu_{t+1} \sim \mathcal N(\mu_t, 1469.1)`.
- :func:`ricker`, a population that overshoots, counted; the series and the value are those of the R package pomp:
  :math:`N_{t+1} = r N_t e^{-N_t + e_t}`, :math:`y_t \sim \mathrm{Poisson}(10 N_t)`, :math:`N_0 = 7`.
- :func:`earthquakes`, major earthquakes of the years 1900 to 2006 as a hidden Markov chain in its stationary law [2].
- :func:`brownian`, ten observed, ten missing and ten observed steps of a Brownian motion, of the Inference Gym of
  TensorFlow Probability; its scales are log-normal if they are not given.
- :func:`output_gap`, the trend, its drift and an autoregressive cycle of order two in the log output of the United
  States [3], from the 21st quarter on, given what the first twenty tell.

**References**

1. *Time Series Analysis by State Space Methods*, J. Durbin, S. J. Koopman (2012)
2. *Hidden Markov Models for Time Series*, W. Zucchini, I. MacDonald, R. Langrock (2016)
3. *The cyclical component of U.S. economic activity*, P. Clark (1987); as in *State-Space Models with Regime
   Switching*, C.-J. Kim, C. Nelson (1999)
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.contrib.control_flow import scan

_NILE = """
    1120 1160 963 1210 1160 1160 813 1230 1370 1140 995 935 1110 994 1020 960 1180 799 958 1140 1100 1210 1150
    1250 1260 1220 1030 1100 774 840 874 694 940 833 701 916 692 1020 1050 969 831 726 456 824 702 1120 1100
    832 764 821 768 845 864 862 698 845 744 796 1040 759 781 865 845 944 984 897 822 1010 771 676 649 846 812
    742 801 1040 860 874 848 890 744 749 838 1050 918 986 797 923 975 815 1020 906 901 1170 912 746 919 718 714
    740
"""
_RICKER = """
    68 2 87 0 12 174 0 0 1 57 11 178 0 1 0 34 72 3 101 0 8 156 0 0 3 93 0 17 121 0 0 19 107 0 4 127 0 1 47 8
    117 0 3 82 2 39 70 11 275 0 0
"""
_EARTHQUAKES = """
    13 14 8 10 16 26 32 27 18 32 36 24 22 23 22 18 25 21 21 14 8 11 14 23 18 17 19 20 22 19 13 26 13 14 22 24
    21 22 26 21 23 24 27 41 31 27 35 26 28 36 39 21 17 22 17 19 15 34 10 15 22 18 15 20 15 22 19 16 30 27 29 23
    20 16 21 21 25 16 18 15 18 14 10 15 8 15 6 11 8 7 18 16 13 12 13 20 15 16 12 18 15 16 13 15 16 11 11
"""
_BROWNIAN = """
    0.21592641 0.118771404 -0.07945447 0.037677474 -0.27885845 -0.1484156 -0.3250906 -0.22957903 -0.44110894
    -0.09830782 nan nan nan nan nan nan nan nan nan nan -0.8786016 -0.83736074 -0.7384849 -0.8939254 -0.7774566
    -0.70238715 -0.87771565 -0.51853573 -0.6948214 -0.6202789
"""
NILE = np.array(_NILE.split(), np.float32)
RICKER = np.array(_RICKER.split(), np.int32)
EARTHQUAKES = np.array(_EARTHQUAKES.split(), np.int32)
#: Not a number where nothing was observed.
BROWNIAN = np.array(_BROWNIAN.split(), np.float32)

#: Rates and transitions of the two-state chain at its maximum, as published.
EARTHQUAKE_RATES = (15.472, 26.125)
EARTHQUAKE_TRANSITIONS = ((0.934, 0.066), (0.128, 0.872))


def nile(y: ArrayLike, loc: ArrayLike = 0.0, variance: ArrayLike = 1e7) -> None:
    """:param loc, variance: of the first level. Those of the second, ``y[0]`` and 15099 + 1469.1, given the first flow
    and nothing else, leave it out of the likelihood.
    """

    def step(level: Array, y_t: Array) -> tuple[Array, None]:
        numpyro.sample("y", dist.Normal(level, 15099.0**0.5), obs=y_t)
        return numpyro.sample("level", dist.Normal(level, 1469.1**0.5)), None

    scan(step, numpyro.sample("level_1", dist.Normal(loc, jnp.sqrt(variance))), y)  # type: ignore[arg-type]


def ricker(y: ArrayLike, log_r: ArrayLike = 3.8, sigma: ArrayLike = 0.3) -> None:
    y, log_n = jnp.asarray(y), jnp.log(7.0)
    numpyro.sample("y_0", dist.Poisson(10.0 * jnp.exp(log_n)), obs=y[0])

    def step(log_n: Array, y_t: Array) -> tuple[Array, None]:
        noise = numpyro.sample("noise", dist.Normal(0.0, sigma))
        log_n = log_n + log_r - jnp.exp(log_n) + noise
        numpyro.sample("y", dist.Poisson(10.0 * jnp.exp(log_n)), obs=y_t)
        return log_n, None

    scan(step, log_n, y[1:])


def earthquakes(
    y: ArrayLike, rates: ArrayLike = EARTHQUAKE_RATES, transitions: ArrayLike = EARTHQUAKE_TRANSITIONS
) -> None:
    rates, transitions = jnp.asarray(rates), jnp.asarray(transitions)
    states = len(rates)
    stationary = jnp.linalg.solve(jnp.eye(states) - transitions.T + 1.0, jnp.ones(states))

    def step(state: Array, y_t: Array) -> tuple[Array, None]:
        numpyro.sample("y", dist.Poisson(rates[state]), obs=y_t)
        return numpyro.sample("state", dist.Categorical(transitions[state])), None

    scan(step, numpyro.sample("state_1", dist.Categorical(stationary)), y)  # type: ignore[arg-type]


def brownian(y: ArrayLike, scale: ArrayLike | None = None, noise: ArrayLike | None = None) -> None:
    """:param scale, noise: of the increments and of the observations; without them, sites ``scale`` and ``noise``."""
    y = jnp.asarray(y)
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 2.0)) if scale is None else scale
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 2.0)) if noise is None else noise

    def step(x: Array, now: tuple[Array, Array]) -> tuple[Array, None]:
        y_t, seen = now
        x = numpyro.sample("x", dist.Normal(x, scale))
        with handlers.mask(mask=seen):
            numpyro.sample("y", dist.Normal(x, noise), obs=y_t)
        return x, None

    scan(step, 0.0, (jnp.nan_to_num(y), ~jnp.isnan(y)))  # type: ignore[arg-type]


def output_gap(y: ArrayLike, loc: ArrayLike, covariance: ArrayLike, parameters: ArrayLike) -> None:
    r"""Quarterly log output without noise of its own: trend and cycle add up to it, so that one of them is observed.

    :param y: log output of the quarter before the first and of all others.
    :param loc, covariance: of cycle, cycle before and drift in the quarter before the first.
    :param parameters: scales of trend, cycle and drift, and the two coefficients of the cycle.
    """
    y = jnp.asarray(y)
    trend_scale, cycle_scale, drift_scale, first, second = jnp.asarray(parameters)
    start = numpyro.sample("start", dist.MultivariateNormal(loc, covariance))

    def step(carry: tuple[Array, ...], y_t: Array) -> tuple[tuple[Array, ...], None]:
        trend, cycle, before, drift = carry
        new = numpyro.sample("cycle", dist.Normal(first * cycle + second * before, cycle_scale))
        numpyro.sample("y", dist.Normal(trend + drift + new, trend_scale), obs=y_t)
        return (y_t - new, new, cycle, numpyro.sample("drift", dist.Normal(drift, drift_scale))), None

    scan(step, (y[0] - start[0], start[0], start[1], start[2]), y[1:])


def kalman(
    y: np.ndarray, transition: np.ndarray, design: np.ndarray, covariance: np.ndarray, noise: float, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log likelihood of every observation ``[T]``, filtered means ``[T, D]`` and covariances ``[T, D, D]``, exact.

    :param y: ``[T]``, not a number where missing. :param start: covariance of the first state, whose mean is zero.
    """
    loc, spread, found = np.zeros(len(start)), np.asarray(start, np.float64), []
    for y_t in np.asarray(y, np.float64):
        log_density = 0.0
        if np.isfinite(y_t):
            variance = design @ spread @ design + noise
            gain, error = spread @ design / variance, y_t - design @ loc
            log_density = -0.5 * (np.log(2 * np.pi * variance) + error**2 / variance)
            loc, spread = loc + gain * error, spread - np.outer(gain, gain) * variance
        found.append((log_density, loc, spread))
        loc, spread = transition @ loc, transition @ spread @ transition.T + covariance
    log_densities, means, covariances = (np.stack(x) for x in zip(*found, strict=True))
    return log_densities, means, covariances


def load_output_gap() -> tuple[dict[str, np.ndarray], float]:
    """Arguments of :func:`output_gap` and its exact log likelihood; the data come with the package statsmodels.

    Log output is centred at the quarter before the first, to keep its digits in single precision.

    :raises ModuleNotFoundError: if statsmodels is not installed.
    """
    try:
        from statsmodels.tsa.statespace.tests.results.results_kalman_filter import uc_uni
    except ModuleNotFoundError as error:
        message = "load_output_gap: the series comes with the package 'statsmodels'; pip install statsmodels."
        raise ModuleNotFoundError(message, name=error.name) from error
    y, first = np.log(np.asarray(uc_uni["data"], np.float64)), uc_uni["start"]
    parameters = np.asarray(uc_uni["parameters"])
    trend, cycle, drift, phi, phi_before = parameters
    # States: trend, cycle, cycle before, drift.
    transition = np.array([[1.0, 0, 0, 1], [0, phi, phi_before, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    covariance = np.diag([trend**2, cycle**2, 0.0, drift**2])
    design = np.array([1.0, 1.0, 0.0, 0.0])
    found, means, covariances = kalman(y, transition, design, covariance, 0.0, 100 * transition @ transition.T)
    arguments = {
        "y": y[first - 1 :] - y[first - 1],
        "loc": means[first - 1][1:],
        "covariance": covariances[first - 1][1:, 1:],
        "parameters": parameters,
    }
    return {name: np.asarray(x, np.float32) for name, x in arguments.items()}, float(found[first:].sum())
