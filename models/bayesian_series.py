r"""Two state-space models with priors on their parameters, for joint inference of parameters and paths.

:func:`stochastic_volatility`: log variances of daily returns in percent,

.. math::

    x_t \sim \mathcal N(\mu + \phi (x_{t-1} - \mu), \sigma^2), \quad y_t \sim \mathcal N(0, e^{x_t}), \qquad
    \mu \sim \mathcal N(-1, 2^2), \quad \tfrac12(\phi + 1) \sim \mathrm{Beta}(20, 1.5), \quad
    \sigma \sim \mathrm{HalfNormal}(0.5),

with :math:`x_{-1}` from the stationary law; the priors are close to the usual ones of [1].

:func:`ricker`: a population that overshoots, counted [2],

.. math::

    N_t = r N_{t-1} e^{-N_{t-1} + \sigma e_t}, \quad e_t \sim \mathcal N(0, 1), \quad
    y_t \sim \mathrm{Poisson}(\varphi N_t), \qquad
    \log r \sim \mathcal N(3.5, 1), \quad \sigma \sim \mathrm{HalfNormal}(0.5), \quad
    \log \varphi \sim \mathcal N(\log 10, 0.5^2),

with :math:`N_{-1} = 7` and the state :math:`\log N_t`; its likelihood is chaotic in the parameters for small noise.

**References**

1. *Stochastic volatility: likelihood inference and comparison with ARCH models*, S. Kim, N. Shephard, S. Chib (1998)
2. *Statistical inference for noisy nonlinear ecological dynamic systems*, S. Wood (2010)
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.contrib.control_flow import scan


def stochastic_volatility(y: ArrayLike | None = None, num_steps: int | None = None) -> tuple[Array, Array]:
    """Univariate stochastic volatility, sites ``mu``, ``phi``, ``sigma``, ``x_init``, ``x`` and ``y``.

    :param y: returns ``[T]``, or ``None`` to simulate ``num_steps`` of them.
    :return: log variances and returns, ``[T]``.
    """
    mu = numpyro.sample("mu", dist.Normal(-1.0, 2.0))
    scaled = dist.TransformedDistribution(dist.Beta(20.0, 1.5), dist.transforms.AffineTransform(-1.0, 2.0))
    phi = numpyro.sample("phi", scaled)
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))

    def step(x: Array, y_t: Array | None) -> tuple[Array, tuple[Array, Array]]:
        x = numpyro.sample("x", dist.Normal(mu + phi * (x - mu), sigma))
        y_t = numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, (x, y_t)

    x_init = numpyro.sample("x_init", dist.Normal(mu, sigma / jnp.sqrt(1 - phi**2)))
    _, (x, y) = scan(step, x_init, None if y is None else jnp.asarray(y), length=num_steps if y is None else len(y))  # type: ignore[arg-type]
    return x, y


def ricker(y: ArrayLike | None = None, num_steps: int | None = None) -> tuple[Array, Array]:
    """The Ricker map with noise, sites ``log_r``, ``sigma``, ``log_scale``, ``x`` (log population) and ``y``.

    :param y: counts ``[T]``, or ``None`` to simulate ``num_steps`` of them.
    :return: log populations and counts, ``[T]``.
    """
    log_r = numpyro.sample("log_r", dist.Normal(3.5, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    log_scale = numpyro.sample("log_scale", dist.Normal(jnp.log(10.0), 0.5))

    def step(x: Array, y_t: Array | None) -> tuple[Array, tuple[Array, Array]]:
        x = numpyro.sample("x", dist.Normal(log_r + x - jnp.exp(x), sigma))
        y_t = numpyro.sample("y", dist.Poisson(jnp.exp(log_scale + x)), obs=y_t)
        return x, (x, y_t)

    start = jnp.log(7.0)
    _, (x, y) = scan(step, start, None if y is None else jnp.asarray(y), length=num_steps if y is None else len(y))  # type: ignore[arg-type]
    return x, y
