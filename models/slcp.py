r"""Simple likelihood, complex posterior: four draws from a Gaussian in the plane, five parameters [1].

.. math::

    \theta \sim \mathcal U(-3, 3)^5, \qquad x_i \sim \mathcal N\big((\theta_1, \theta_2), \Sigma\big), \quad
    i = 1, \dots, 4, \qquad \Sigma = \begin{pmatrix} s_1^2 & \rho s_1 s_2 \\ \rho s_1 s_2 & s_2^2 \end{pmatrix}, \quad
    \rho = \tanh\theta_5.

Scales are squares of :math:`\theta_3` and :math:`\theta_4`, so that the posterior has four modes of equal weight. Two
conventions keep them from vanishing: ``"scale"``, :math:`s_1 = \theta_3^2 + 10^{-8}` as in the experiments of [2], and
``"covariance"``, :math:`s_1 = \theta_3^2` and :math:`10^{-6}` added to the diagonal of :math:`\Sigma`, as in the
benchmark [3].

**References**

1. *Sequential Neural Likelihood*, G. Papamakarios, D. Sterratt, I. Murray (2019)
2. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
3. *Benchmarking Simulation-Based Inference*, J.-M. Lueckmann et al. (2021)
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

Jitter = Literal["scale", "covariance"]

BOUND = 3.0  # of the prior, either side
NUM_DRAWS = 4
SCALE_JITTER, COVARIANCE_JITTER = 1e-8, 1e-6


def prior() -> Array:
    """Site ``"theta"`` ``[5]``."""
    return numpyro.sample("theta", dist.Uniform(-BOUND, BOUND).expand([5]).to_event(1))


def model(x: ArrayLike | None = None, jitter: Jitter = "scale") -> Array:
    """The simulator, with sites ``"theta"`` ``[5]`` and ``"x"`` ``[4, 2]``.

    :param x: condition on this; simulated if ``None``.
    :param jitter: the convention, see above.
    :raises ValueError: for an unknown convention.
    """
    theta = prior()
    first, second, rho = scales(theta, jitter)
    factor = jnp.array([[first, 0.0], [rho * second, jnp.sqrt(1 - rho**2) * second]])
    draws = dist.MultivariateNormal(theta[:2], scale_tril=factor).expand([NUM_DRAWS]).to_event(1)
    return numpyro.sample("x", draws, obs=None if x is None else jnp.reshape(jnp.asarray(x), (NUM_DRAWS, 2)))


def log_likelihood(theta: ArrayLike, x: ArrayLike, jitter: Jitter = "scale") -> Array:
    r""":math:`\log p(x \mid \theta)`, exactly; leading axes broadcast.

    :param theta: ``[..., 5]``.
    :param x: ``[..., 4, 2]``.
    """
    theta, x = jnp.asarray(theta), jnp.asarray(x)
    first, second, rho = scales(theta, jitter)
    # Both coordinates in units of their scales before anything is squared: scales of 1e-8 stay far from underflow.
    standardised = (x - theta[..., None, :2]) / jnp.stack([first, second], -1)[..., None, :]
    a, b = standardised[..., 0], standardised[..., 1]
    quadratic = ((a - rho[..., None] * b) ** 2).sum(-1) / (1 - rho**2) + (b**2).sum(-1)
    log_scales = jnp.log(first) + jnp.log(second) + jnp.log1p(-(rho**2)) / 2
    return -NUM_DRAWS * (math.log(2 * math.pi) + log_scales) - quadratic / 2


def scales(theta: Array, jitter: Jitter) -> tuple[Array, Array, Array]:
    r"""Scales and correlation of one draw: what is left of :math:`(s_1, s_2, \rho)` with the jitter in it."""
    if jitter not in get_args(Jitter):
        raise ValueError(f"slcp: jitter={jitter!r}; expected one of {', '.join(get_args(Jitter))}.")
    first, second, rho = theta[..., 2] ** 2, theta[..., 3] ** 2, jnp.tanh(theta[..., 4])
    if jitter == "scale":
        return first + SCALE_JITTER, second + SCALE_JITTER, rho
    wide_first, wide_second = (jnp.sqrt(scale**2 + COVARIANCE_JITTER) for scale in (first, second))
    return wide_first, wide_second, rho * (first / wide_first) * (second / wide_second)
