r"""Measles in towns of England and Wales, 1950 to 1963: an epidemic in daily Euler steps, reported by the week.

Susceptible, exposed, infectious [1]. With :math:`\Delta` a day, population :math:`N_t` and births :math:`b_t` of four
years before, both from smoothed demography,

.. math::

    \beta_t = R_0 (\gamma + \mu)\, s_t, \quad s_t = 1 + \tfrac{0.2411}{0.7589}\, a \text{ in term}, \; 1 - a
    \text{ in holidays}, \qquad
    d\Gamma_t \sim \mathrm{Gamma}(\Delta / \sigma_{SE}^2, 1 / \sigma_{SE}^2), \quad
    \lambda_t = \beta_t \frac{(I_t + \iota)^\alpha}{N_t} \frac{d\Gamma_t}{\Delta},

births are :math:`\mathrm{Poisson}((1 - c)\, b_t \Delta)`, and :math:`c\, b_t` more on the day on which a cohort goes to
school. Who leaves a class, and whereto, is Euler-multinomial: of :math:`n` each leaves with probability
:math:`1 - e^{-(r_1 + r_2) \Delta}`, by the ways in the proportion of their rates, drawn as two binomials. A week's
cases :math:`C` are the recoveries since the last report; the report is a rounded normal of mean :math:`\rho C` and
variance :math:`\rho (1 - \rho) C + (\psi \rho C)^2`.

**References**

1. *Plug-and-play inference for disease dynamics: measles in large and small populations as a case study*, D. He,
   E. Ionides, A. King (2010)
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from jax.scipy.special import log_ndtr
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from scipy.interpolate import make_smoothing_spline

from models.pomp_files import find

#: A day, in years.
DAY = 1 / 365.25
#: London's series has a zero between 82 and 58, which [1] replaced; with it, the log likelihood is 21 lower.
MISREPORTED = {"London": {"1955-08-26": 76.0}}
#: What a report is worth at least: the published density adds it.
FLOOR = 1e-18


class Parameters(NamedTuple):
    """Rates by the year; ``S_0``, ``E_0``, ``I_0``, ``R_0`` are shares at the start, up to their sum."""

    R0: float
    mu: float
    sigma: float
    gamma: float
    alpha: float
    iota: float
    rho: float
    psi: float
    sigmaSE: float
    cohort: float
    amplitude: float
    S_0: float
    E_0: float
    I_0: float
    R_0: float


class Town(NamedTuple):
    """What is known of a town, by the day: ``[T]`` each.

    - **cases** - of the report on the evening of a day. **reported** - is there one.
    - **ends_week** - is a report due: cases are counted from then on anew.
    - **population** - in the morning. **births** - a year's, of those who now come of age.
    - **in_term** - is there school. **school_starts** - is it the day on which a cohort comes.
    """

    cases: np.ndarray
    reported: np.ndarray
    ends_week: np.ndarray
    population: np.ndarray
    births: np.ndarray
    in_term: np.ndarray
    school_starts: np.ndarray


class Binomial(dist.BinomialProbs):
    """NumPyro's distribution, drawn for all particles at once: NumPyro draws one by one on CPUs, ten times slower."""

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        count = jnp.asarray(self.total_count, float)
        return random.binomial(key, count, self.probs, sample_shape + self.batch_shape).astype(int)


class RoundedNormal(dist.Distribution):
    r"""Normal, rounded to a count: the probability of :math:`[y - \tfrac12, y + \tfrac12]`, of all below for zero.

    :param floor: added to the probability, so that a report that nobody expects does not kill every particle.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.nonnegative_integer
    pytree_data_fields = ("loc", "scale")
    pytree_aux_fields = ("floor",)

    def __init__(self, loc: Array, scale: Array, floor: float = FLOOR, *, validate_args: bool | None = None) -> None:
        self.loc, self.scale, self.floor = loc, scale, floor
        shape = jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale))
        super().__init__(batch_shape=shape, validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        normal = dist.Normal(self.loc, self.scale).sample(key, sample_shape)
        return jnp.maximum(jnp.round(normal), 0.0)

    def log_prob(self, value: Array) -> Array:
        low, high = (jnp.clip((value + x - self.loc) / self.scale, -1e6, 1e6) for x in (-0.5, 0.5))
        whole = log_ndtr(high)
        # In the lower tail, where logarithms of the normal integral keep their digits.
        upper = low > 0.0
        high, low = jnp.where(upper, -low, high), jnp.where(upper, -high, low)
        within = log_ndtr(high) + jnp.log(-jnp.expm1(jnp.minimum(log_ndtr(low) - log_ndtr(high), -1e-30)))
        return jnp.logaddexp(jnp.where(value > 0.0, within, whole), jnp.log(self.floor))


def model(town: Town, theta: Parameters) -> tuple[Array, Array]:
    """The epidemic of a town, sites ``noise``, ``births``, two flows out of each class and ``cases``.

    :return: susceptible and infectious of each evening, ``[T]``.
    """
    shares = jnp.array([theta.S_0, theta.E_0, theta.I_0])
    start = jnp.round(town.population[0] * shares / (shares.sum() + theta.R_0)).astype(int)

    def leave(name: str, count: Array, rate: Array, other: Array) -> tuple[Array, Array]:
        """Those of a class who leave it within a day, by ``rate`` and by the ``other``."""
        total = rate + other
        gone = numpyro.sample(f"{name}_gone", Binomial(-jnp.expm1(-total * DAY), count))
        died = numpyro.sample(f"{name}_died", Binomial(other / total, gone))
        return gone - died, died

    def step(carry: tuple[Array, ...], today: Town) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        susceptible, exposed, infectious, cases = carry
        season = jnp.where(today.in_term, 1.0 + 0.2411 / 0.7589 * theta.amplitude, 1.0 - theta.amplitude)
        beta = theta.R0 * (theta.gamma + theta.mu) * season
        noise = numpyro.sample("noise", dist.Gamma(DAY / theta.sigmaSE**2, 1.0 / theta.sigmaSE**2)) / DAY
        infection = beta * (infectious + theta.iota) ** theta.alpha / today.population * noise
        expected = today.births * ((1.0 - theta.cohort) * DAY + theta.cohort * today.school_starts)
        births = numpyro.sample("births", dist.Poisson(expected))
        infected, s_died = leave("S", susceptible, infection, theta.mu)
        onset, e_died = leave("E", exposed, theta.sigma, theta.mu)
        recovered, i_died = leave("I", infectious, theta.gamma, theta.mu)
        susceptible = susceptible + births - infected - s_died
        exposed = exposed + infected - onset - e_died
        infectious = infectious + onset - recovered - i_died
        cases = cases + recovered
        mean = theta.rho * cases
        scale = jnp.sqrt(mean * (1.0 - theta.rho + theta.psi**2 * mean)) + FLOOR
        with handlers.mask(mask=today.reported):
            numpyro.sample("cases", RoundedNormal(mean, scale), obs=today.cases)
        carry = susceptible, exposed, infectious, jnp.where(today.ends_week, 0, cases)
        return carry, (susceptible, infectious)

    return scan(step, (*start, jnp.zeros((), int)), town)[1]  # type: ignore[arg-type]


# The data


def load(town: str, data_dir: str | os.PathLike | None = None, replace: dict[str, float] | None = None) -> Town:
    """Weekly reports and smoothed demography of a town, 1950 to 1963, as [1] used them.

    Population and births come by the month from ``measles_covariates.csv`` where that has the town, and are smoothed
    likewise by :func:`smooth` where it has not; a year's births come of age four years later.

    :param town: a column of ``measles_cases.csv``.
    :param data_dir: folder of the files, or one that has them in ``pomp``; by default ``NUMPYRO_SMC_DATA``.
    :param replace: reports to use instead, by date (``"1955-08-26"``); not a number for none.
    :raises FileNotFoundError: if the files are not there.
    """
    rows = [row for row in _rows("measles_cases.csv", data_dir) if "1950" <= row["date"] < "1964"]
    cases = {row["date"]: float(row[town]) for row in rows}
    days = np.array([(date.fromisoformat(day) - date(1950, 1, 1)).days for day in cases])
    if np.any(np.diff(days) != 7):
        raise ValueError(f"measles.load: reports of {town} are not a week apart; use those of pomp's twenty towns.")
    t = 1950 + ((days - 7)[:, None] + np.arange(7)).ravel() / 365.25
    months, population, births = covariates(town, data_dir)
    reports = np.array(list((cases | (replace or {})).values()))
    return _by_the_day(reports, t, np.interp(t, months, population), np.interp(t, months, births))


def covariates(
    town: str, data_dir: str | os.PathLike | None = None, smoothed: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Years by the month, population, and births of four years before.

    :param smoothed: from the demography, even where there are the published ones.
    """
    given = [row for row in _rows("measles_covariates.csv", data_dir) if row["unit"] == town]
    if given and not smoothed:
        months, population, births = (np.array([float(r[x]) for r in given]) for x in ("time", "pop", "birthrate"))
        return months, population, births
    known = [row for row in _rows("measles_demography.csv", data_dir) if row["town"] == town]
    year, population, births = (np.array([float(row[x]) for row in known]) for x in ("year", "population", "births"))
    months = np.arange(year[0], year[-1] + 1 / 24, 1 / 12)
    return months, smooth(year, population)(months), smooth(year + 0.5, births)(months - 4)


def _by_the_day(cases: np.ndarray, t: np.ndarray, population: np.ndarray, births: np.ndarray) -> Town:
    ends_week = np.arange(len(t)) % 7 == 6
    reports = np.where(ends_week, np.repeat(cases, 7), 0.0)
    day = np.round((t % 1) * 365.25, 6)  # whole days in every fourth year: terms include their first and last
    terms = (7, 100), (115, 199), (252, 300), (308, 356)
    return Town(
        np.nan_to_num(reports).astype(np.float32),
        ends_week & ~np.isnan(reports),
        ends_week,
        population.astype(np.float32),
        births.astype(np.float32),
        np.any([(day >= first) & (day <= last) for first, last in terms], axis=0),
        (np.abs(t % 1 - 251 / 365) < 0.5 * DAY).astype(np.float32),
    )


def smooth(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The natural cubic smoothing spline, its smoothness by generalised cross-validation; straight beyond the ends."""
    spline = make_smoothing_spline(x, y)
    slope = spline.derivative()

    def evaluate(at: np.ndarray) -> np.ndarray:
        inside = np.clip(at, x[0], x[-1])
        return spline(inside) + slope(inside) * (at - inside)

    return evaluate


def load_parameters(town: str, data_dir: str | os.PathLike | None = None) -> tuple[Parameters, float, float]:
    """The published estimates of a town, the log likelihood there and its Monte Carlo error."""
    row = next(row for row in _rows("measles_parameters.csv", data_dir) if row["town"] == town)
    theta = Parameters(*(float(row[name]) for name in Parameters._fields))
    return theta, float(row["loglik"]), float(row["loglik.sd"])


def _rows(name: str, data_dir: str | os.PathLike | None) -> list[dict[str, str]]:
    return list(csv.DictReader(find(name, data_dir).read_text().splitlines()))
