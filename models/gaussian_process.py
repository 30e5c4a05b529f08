r"""Gaussian-process regression at fixed hyperparameters, on two published data sets, with its exact answers.

.. math::

    f \sim \mathcal N(0, K), \qquad y_n \mid f \sim \mathcal N(f_n, \sigma^2), \qquad
    K_{nm} = e^{-(x_n - x_m)^2 / (2 \rho^2)} + 10^{-5}\,\delta_{nm}, \qquad \sigma = 1/4, \qquad n = 1, \dots, 30.

Unwhitened, the latent site is ``"f"``, whose prior has condition number :math:`10^6`: a test of optimisers more than of
inference. Whitened it is ``"w"``, with :math:`f = L w` and :math:`K = L L^\top`: linear regression on :math:`L`. The
factors and the exact answers are computed with NumPy in double precision; ``model(*problem)`` runs in JAX's.

**References**

1. *Differentiable Annealed Importance Sampling Minimizes The Symmetrized Kullback-Leibler Divergence Between Initial
   and Target Distribution*, J. Zenn, R. Bamler (2024)
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike

from models import linear_regression

Name = Literal["rbf1", "rbf2"]

LENGTH_SCALE: dict[str, float] = {"rbf1": 3.0, "rbf2": 0.8}
NOISE_SCALE = 0.25
JITTER = 1e-5

#: Inputs of both data sets, as indices into 100 equally spaced points on [0, 10].
GRID_INDICES = (
    *(19, 4, 95, 81, 91, 93, 15, 41, 9, 28, 29, 62, 37, 20, 11),
    *(16, 10, 12, 50, 18, 70, 98, 94, 90, 3, 77, 82, 26, 73, 5),
)

#: Observations drawn from the model by the code of [1], with seed 0.
OBSERVATIONS: dict[str, tuple[float, ...]] = {
    "rbf1": (
        *(-2.09252739, -1.30611122, 1.38009512, 0.530323088, 1.89702153, 1.82949162),
        *(-1.35508037, -1.20024848, -1.52172577, -1.15992427, -1.60118854, 0.258450866),
        *(-1.18922782, -1.54353511, -1.33125913, -1.53286529, -1.51980984, -1.68990147),
        *(-0.966817856, -1.63593102, 0.226117224, 1.27941513, 1.27103972, 1.53701735),
        *(-0.906826973, 1.1617223, 1.2308352, -1.41653883, 1.18822336, -0.958512306),
    ),
    "rbf2": (
        *(-1.13717508, -1.58770859, -1.08835471, 0.0521736741, -0.358429909, -0.603248358),
        *(-0.753150463, 0.882856607, -1.51148593, 0.191645682, -0.205481529, 0.58219105),
        *(0.919644713, -0.503693461, -1.11051297, -0.836614609, -1.40435326, -1.37110913),
        *(0.457116932, -0.766586363, 0.926665783, -0.968084514, -1.1994884, -0.591445088),
        *(-1.15049171, 1.52832484, 0.524750054, -0.11260362, 1.92361236, -1.24057662),
    ),
}


class Problem(NamedTuple):
    """The arguments of :func:`model`, and of the exact answers."""

    scale_tril: np.ndarray  # L [N, N]
    y: np.ndarray  # [N]
    noise_scale: float = NOISE_SCALE


class FactorisedOptima(NamedTuple):
    """Variances ``[N]`` of the best Gaussians with independent coordinates, by divergence from the target p."""

    reverse: np.ndarray  # KL(q, p)
    symmetrised: np.ndarray  # KL(q, p) + KL(p, q)
    forward: np.ndarray  # KL(p, q)


def load_problem(name: Name) -> Problem:
    """``"rbf1"``, of length scale 3, or ``"rbf2"``, of 0.8; 30 observations each."""
    if name not in get_args(Name):
        raise ValueError(f"load_problem: name={name!r}; expected one of {', '.join(get_args(Name))}.")
    x = np.linspace(0, 10, 100)[list(GRID_INDICES)]
    return Problem(kernel_scale_tril(x, LENGTH_SCALE[name]), np.array(OBSERVATIONS[name]))


def kernel_scale_tril(x: ArrayLike, length_scale: float, jitter: float = JITTER) -> np.ndarray:
    """The lower Cholesky factor ``[N, N]`` of the kernel matrix of inputs ``[N]``."""
    x = np.asarray(x, np.float64)
    kernel = np.exp(-0.5 * ((x[:, None] - x) / length_scale) ** 2)
    return np.linalg.cholesky(kernel + jitter * np.eye(len(x)))


def model(
    scale_tril: ArrayLike, y: ArrayLike | None = None, noise_scale: ArrayLike = NOISE_SCALE, whiten: bool = False
) -> None:
    """The model, with sites ``"f"`` ``[N]`` and ``"y"``; whitened, ``"f"`` is deterministic, of the site ``"w"``."""
    scale_tril = jnp.asarray(scale_tril, float)
    if whiten:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand(scale_tril.shape[:1]).to_event(1))
        f = numpyro.deterministic("f", scale_tril @ w)
    else:
        f = numpyro.sample("f", dist.MultivariateNormal(0.0, scale_tril=scale_tril))
    with numpyro.plate("data", len(scale_tril)):
        numpyro.sample("y", dist.Normal(f, noise_scale), obs=y)


# The exact answers


def log_evidence(problem: Problem) -> float:
    r""":math:`\log\mathcal N(y; 0, K + \sigma^2 I)`: -13.960 for ``"rbf1"``, -20.681 for ``"rbf2"``."""
    return linear_regression.log_evidence(*problem)


def posterior(problem: Problem, whiten: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[N]`` and covariance ``[N, N]`` of ``"f"``, or of ``"w"``."""
    mean, covariance = linear_regression.posterior(*problem)
    if whiten:
        return mean, covariance
    tril = problem.scale_tril
    return tril @ mean, tril @ covariance @ tril.T


def factorised_optima(covariance: ArrayLike) -> FactorisedOptima:
    r"""The best factorised Gaussians for a Gaussian target of covariance :math:`\Sigma`; all have the target's mean.

    Reverse :math:`1 / (\Sigma^{-1})_{ii}`, forward :math:`\Sigma_{ii}`, symmetrised the geometric mean of the two: what
    a learned start of annealed importance sampling tends to as its transitions grow in number [1].
    """
    covariance = np.asarray(covariance, np.float64)
    reverse, forward = 1 / np.diag(np.linalg.inv(covariance)), np.diag(covariance)
    return FactorisedOptima(reverse, np.sqrt(reverse * forward), forward)


def factorised_bound(problem: Problem, whiten: bool = False) -> float:
    r"""The greatest evidence lower bound of a factorised Gaussian, :math:`\log Z - \min_q KL(q, p)`.

    For ``"f"``, -37.707 on ``"rbf1"`` and -58.409 on ``"rbf2"``; a kernel matrix in single precision, as in the code of
    [1], is off by 0.01, because the jitter is what is left of its smallest eigenvalues.
    """
    covariance = posterior(problem, whiten)[1]
    log_variances = np.log(factorised_optima(covariance).reverse)
    return log_evidence(problem) - 0.5 * float(np.linalg.slogdet(covariance)[1] - log_variances.sum())
