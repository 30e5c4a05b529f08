r"""The linear-Gaussian variational autoencoder: its evidence and its inference gaps are known exactly.

.. math::

    z_n \sim \mathcal N(0, I_D), \qquad x_n \mid z_n \sim \mathcal N(W z_n + b, \operatorname{diag}(\sigma)^2), \qquad
    q(z_n \mid x_n) = \mathcal N(A x_n + a, \operatorname{diag}(s)^2), \qquad n = 1, \dots, N.

The parameters are ``"W"`` ``[P, D]``, ``"b"`` ``[P]`` and ``"sigma"`` ``[P]`` of the model, ``"A"`` ``[D, P]``, ``"a"``
``[D]`` and ``"s"`` ``[D]`` of the guide. Both programs are called as ``program(x, subsample_size)`` with ``x`` of shape
``[N, P]``; sites ``"z"`` and ``"x"`` are in the plate ``"data"``. The posterior of a datum is Gaussian with precision
:math:`\Lambda = I + W^\top \operatorname{diag}(\sigma)^{-2} W` whatever the datum, so that the best factorised Gaussian
has the posterior's mean and the variances :math:`1 / \Lambda_{ii}`, and

.. math:: L[q^*] = \log p(x_n) - \tfrac12 \Big(\sum_i \log \Lambda_{ii} - \log |\Lambda|\Big).

The exact answers are computed with NumPy in double precision.

**References**

1. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

#: Of the programs here: constrained values by name.
Params = dict[str, Any]


class Gaussians(NamedTuple):
    """One Gaussian per datum, all of one covariance."""

    means: np.ndarray  # [N, D]
    covariance: np.ndarray  # [D, D]


def model(x: ArrayLike, subsample_size: int | None = None, *, latent_size: int = 2) -> None:
    """The model, with sites ``"z"`` and ``"x"``."""
    x = jnp.asarray(x)
    data_size = x.shape[-1]
    loadings = numpyro.param("W", jnp.zeros((data_size, latent_size)))
    offset = numpyro.param("b", jnp.zeros(data_size))
    noise = numpyro.param("sigma", jnp.ones(data_size), constraint=constraints.positive)
    prior = dist.Normal(jnp.zeros(loadings.shape[1]), 1.0).to_event(1)
    with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
        x = numpyro.subsample(x, event_dim=1)
        z = numpyro.sample("z", prior)
        numpyro.sample("x", dist.Normal(z @ loadings.T + offset, noise).to_event(1), obs=x)


def guide(x: ArrayLike, subsample_size: int | None = None, *, latent_size: int = 2) -> None:
    """The amortised guide, a linear encoder."""
    x = jnp.asarray(x)
    weights = numpyro.param("A", jnp.zeros((latent_size, x.shape[-1])))
    bias = numpyro.param("a", jnp.zeros(latent_size))
    scale = numpyro.param("s", jnp.ones(latent_size), constraint=constraints.positive)
    with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
        x = numpyro.subsample(x, event_dim=1)
        numpyro.sample("z", dist.Normal(x @ weights.T + bias, scale).to_event(1))


def make_params(rng_key: Array, data_size: int = 4, latent_size: int = 2, noise: float = 0.05) -> Params:
    """A random model, and a guide that is the best one but for ``noise`` in its weights, bias and log scales."""
    keys = iter(jax.random.split(rng_key, 6))
    params = {
        "W": jax.random.normal(next(keys), (data_size, latent_size)),
        "b": 0.5 * jax.random.normal(next(keys), (data_size,)),
        "sigma": jnp.exp(0.3 * jax.random.normal(next(keys), (data_size,))),
    }
    loadings, offset, _, precision = _terms(params)
    gain = np.linalg.solve(precision, loadings.T / np.asarray(params["sigma"], np.float64) ** 2)
    best = {"A": gain, "a": -gain @ offset, "s": -0.5 * np.log(np.diag(precision))}
    noisy = {name: value + noise * jax.random.normal(next(keys), value.shape) for name, value in best.items()}
    return params | noisy | {"s": jnp.exp(noisy["s"])}


def simulate(rng_key: Array, params: Params, num_data: int) -> Array:
    """Data ``[num_data, P]`` drawn from the model."""
    z_key, x_key = jax.random.split(rng_key)
    data_size, latent_size = params["W"].shape
    noise = params["sigma"] * jax.random.normal(x_key, (num_data, data_size))
    return jax.random.normal(z_key, (num_data, latent_size)) @ params["W"].T + params["b"] + noise


# The exact answers


def log_evidence(params: Params, x: ArrayLike) -> np.ndarray:
    r""":math:`\log p(x_n) = \log\mathcal N(x_n; b, W W^\top + \operatorname{diag}(\sigma)^2)`, ``[N]``."""
    loadings, offset, noise, _ = _terms(params)
    covariance = loadings @ loadings.T + np.diag(noise**2)
    return _log_normal(np.asarray(x, np.float64) - offset, covariance)


def posterior(params: Params, x: ArrayLike) -> Gaussians:
    r"""The posterior of every latent, :math:`\mathcal N(\Lambda^{-1} W^\top \sigma^{-2} (x_n - b), \Lambda^{-1})`."""
    loadings, offset, noise, precision = _terms(params)
    residuals = (np.asarray(x, np.float64) - offset) / noise**2
    return Gaussians(np.linalg.solve(precision, loadings.T @ residuals.T).T, np.linalg.inv(precision))


def elbo(params: Params, x: ArrayLike) -> np.ndarray:
    r""":math:`L[q]` of the guide, ``[N]``: the log evidence less KL(guide, posterior)."""
    exact = posterior(params, x)
    weights, bias, scale = (np.asarray(params[name], np.float64) for name in ("A", "a", "s"))
    shift = np.asarray(x, np.float64) @ weights.T + bias - exact.means
    precision = np.linalg.inv(exact.covariance)
    kl = np.sum(np.diag(precision) * scale**2) - len(scale) - np.linalg.slogdet(precision)[1] - 2 * np.log(scale).sum()
    return log_evidence(params, x) - 0.5 * (kl + np.einsum("ni,ij,nj->n", shift, precision, shift))


def optimal_factorised_elbo(params: Params, x: ArrayLike) -> np.ndarray:
    r""":math:`L[q^*]` of the best factorised Gaussian of each datum, ``[N]``."""
    precision = _terms(params)[3]
    return log_evidence(params, x) - 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])


def _terms(params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    loadings, offset, noise = (np.asarray(params[name], np.float64) for name in ("W", "b", "sigma"))
    return loadings, offset, noise, np.eye(loadings.shape[1]) + (loadings.T / noise**2) @ loadings


def _log_normal(residuals: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), residuals.T)
    log_determinant = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return -0.5 * (np.sum(whitened**2, axis=0) + log_determinant)
