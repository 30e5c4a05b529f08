r"""Cholera in the district of Dhaka, 1891 to 1940: an epidemic with a seasonal reservoir, known by monthly deaths.

Susceptible, infectious and three stages of waning immunity [1] as a stochastic differential equation in Euler steps of
:math:`\Delta = 1/240` years; population :math:`N_t` by the census. With season's splines :math:`s_t` and
:math:`dW_t \sim \mathcal N(0, \Delta)`, infections in a step are

.. math::

    S_t \left(\omega_t \Delta + (\beta_t \Delta + \sigma\, dW_t) I_t / N_t\right), \qquad
    \log \beta_t = b \cdot s_t + b_0 (t - \bar t), \quad \log \omega_t = w \cdot s_t,

infections last :math:`1/\gamma` years on average, immunity :math:`1/\epsilon`, all die at rate :math:`\delta`, and the
infectious of cholera at rate :math:`m`. A month's reported deaths are normal around its deaths :math:`D`, with scale
:math:`\tau D`. Steps that make a class negative have next to no weight.

**References**

1. *Inapparent infections and cholera dynamics*, A. King, E. Ionides, M. Pascual, M. Bouma (2008)
"""

from __future__ import annotations

import csv
import math
import os
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from models.pomp_files import find

STEPS_A_MONTH = 20
#: An Euler step, in years.
STEP = 1 / 240
#: What a month in which a class turned negative is worth in the published filter.
FLOOR = 1e-18


class Parameters(NamedTuple):
    """The published estimates; rates by the year, the last five are shares at the start up to their sum."""

    gamma: float = 20.8
    epsilon: float = 19.1
    m: float = 0.06
    delta: float = 0.02
    trend: float = -0.00498
    log_beta: ArrayLike = (0.747, 6.38, -3.44, 4.23, 3.33, 4.55)
    log_omega: ArrayLike = tuple(map(math.log, (0.184, 0.0786, 0.0584, 0.00917, 0.000208, 0.0124)))
    sigma: float = 3.13
    tau: float = 0.23
    S_0: float = 0.621
    I_0: float = 0.378
    R1_0: float = 0.000843
    R2_0: float = 0.000972
    R3_0: float = 1.16e-7


class District(NamedTuple):
    """What is known, by the Euler step: ``[T]`` each, ``season`` ``[T, 6]``; ``trend`` is time less its mean."""

    deaths: np.ndarray
    reported: np.ndarray
    population: np.ndarray
    growth: np.ndarray
    trend: np.ndarray
    season: np.ndarray


def model(district: District, theta: Parameters) -> Array:
    """The epidemic, sites ``noise`` and ``deaths``, and the factor ``nonnegative``.

    :return: susceptible, infectious and immune after each step, ``[T, 5]``.
    """
    shares = jnp.array([theta.S_0, theta.I_0, theta.R1_0, theta.R2_0, theta.R3_0])
    start = jnp.round(district.population[0] * shares / shares.sum())
    log_beta, log_omega = jnp.asarray(theta.log_beta), jnp.asarray(theta.log_omega)
    waning = 3.0 * theta.epsilon

    def step(carry: tuple[Array, Array, Array], now: District) -> tuple[tuple[Array, Array, Array], Array]:
        people, died, possible = carry
        s, i, immune = people[0], people[1], people[2:]
        beta = jnp.exp(now.season @ log_beta + theta.trend * now.trend)
        omega = jnp.exp(now.season @ log_omega)
        noise = numpyro.sample("noise", dist.Normal(0.0, STEP**0.5)) / STEP
        infected = (omega + (beta + theta.sigma * noise) * i / now.population) * s
        passed = jnp.append(theta.gamma * i, waning * immune)  # into each stage, and at the end back to susceptible
        births = now.growth + theta.delta * now.population
        arrived = jnp.concatenate([jnp.stack([births + passed[3], infected]), passed[:3]])
        left = jnp.concatenate([jnp.stack([infected, theta.m * i + passed[0]]), passed[1:]])
        people = people + (arrived - left - theta.delta * people) * STEP
        died = died + theta.m * i * STEP
        possible = possible & jnp.all(people >= 0.0)
        people = jnp.maximum(people, 0.0)
        with handlers.mask(mask=now.reported):
            numpyro.sample("deaths", dist.Normal(died, theta.tau * died + FLOOR), obs=now.deaths)
            numpyro.factor("nonnegative", jnp.where(possible, 0.0, math.log(FLOOR)))
        return (people, jnp.where(now.reported, 0.0, died), possible | now.reported), people

    return scan(step, (start, jnp.zeros(()), jnp.array(True)), district)[1]  # type: ignore[arg-type]


def load(data_dir: str | os.PathLike | None = None) -> District:
    """Deaths and covariates of the district, 600 months, as they come with the R package pomp.

    :param data_dir: folder of the files, or one that has them in ``pomp``; by default ``NUMPYRO_SMC_DATA``.
    :raises FileNotFoundError: if the files are not there.
    """
    reports = csv.DictReader(find("dhaka_cholera.csv", data_dir).read_text().splitlines())
    deaths = np.array([float(row["cholera.deaths"]) for row in reports])
    table = np.loadtxt(find("dhaka_covariates.csv", data_dir), delimiter=",", skiprows=1)
    steps = len(deaths) * STEPS_A_MONTH
    t = 1891 + np.arange(steps) * STEP
    columns = (np.interp(t, table[:, 0], column).astype(np.float32) for column in table[:, 1:].T)
    trend, growth, population, *season = columns
    reported = np.arange(steps) % STEPS_A_MONTH == STEPS_A_MONTH - 1
    by_step = np.where(reported, np.repeat(deaths, STEPS_A_MONTH), 0.0).astype(np.float32)
    return District(by_step, reported, population, growth, trend, np.stack(season, axis=1))
