r"""The Gaussian toy on which importance-weighted gradient estimators are compared: everything has a closed form.

.. math::

    z_n \sim \mathcal N(\mu, I), \qquad x_n \mid z_n \sim \mathcal N(z_n, I), \qquad
    q(z_n \mid x_n) = \mathcal N(x_n A + b, (2/3)^2 I), \qquad n = 1, \dots, N.

:math:`2/3` is a standard deviation; the exact posterior's is :math:`1/\sqrt 2`. The parameters are ``"mu"`` ``[D]`` of
the model, ``"A"`` ``[D, D]`` and ``"b"`` ``[D]`` of the guide; they start uniform on :math:`[1.5, 2.5]`. Both programs
are called as ``program(x, subsample_size)`` with ``x`` of shape ``[N, D]``; all sites are in the plate ``"data"``.

**References**

1. *Tighter Variational Bounds are Not Necessarily Better*, T. Rainforth et al. (2018)
2. *Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds*, V. Liévin,
   A. Dittadi, A. Christensen, O. Winther (2020)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

#: Standard deviation of the guide.
GUIDE_SCALE = 2 / 3


def model(x: ArrayLike, subsample_size: int | None = None) -> None:
    """The model, with sites ``"z"`` and ``"x"``."""
    x = jnp.asarray(x)
    mu = numpyro.param("mu", uniform_init(x.shape[1:]))
    with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
        x = numpyro.subsample(x, event_dim=1)
        z = numpyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x: ArrayLike, subsample_size: int | None = None) -> None:
    """The amortised Gaussian guide."""
    x = jnp.asarray(x)
    a = numpyro.param("A", uniform_init(x.shape[1:] * 2))
    b = numpyro.param("b", uniform_init(x.shape[1:]))
    with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
        x = numpyro.subsample(x, event_dim=1)
        numpyro.sample("z", dist.Normal(x @ a + b, GUIDE_SCALE).to_event(1))


def uniform_init(shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """An initial value for :func:`numpyro.param`: uniform on ``[1.5, 2.5]``."""
    return lambda rng_key: jax.random.uniform(rng_key, shape, minval=1.5, maxval=2.5)


def log_evidence(x: ArrayLike, mu: ArrayLike) -> Array:
    r""":math:`\log p(x_n) = \log\mathcal N(x_n; \mu, 2 I)`, shape ``[N]``."""
    return dist.Normal(mu, jnp.sqrt(2.0)).log_prob(jnp.asarray(x)).sum(-1)


def optimum(x: ArrayLike) -> dict[str, Array]:
    r""":math:`\mu^* = \bar x`, of maximum likelihood, :math:`A^* = I / 2` and :math:`b^* = \mu^* / 2`.

    The guide's mean is then the posterior's.
    """
    mu = jnp.mean(jnp.asarray(x), 0)
    return {"mu": mu, "A": jnp.eye(mu.size, dtype=mu.dtype) / 2, "b": mu / 2}


def perturbed_optimum(rng_key: Array, x: ArrayLike, noise: float = 0.01) -> dict[str, Array]:
    """The :func:`optimum` with independent Gaussian noise of standard deviation ``noise`` on every parameter."""
    params = optimum(x)
    keys = jax.random.split(rng_key, len(params))
    return {
        name: value + noise * jax.random.normal(key, value.shape, value.dtype)
        for (name, value), key in zip(params.items(), keys, strict=True)
    }


def simulate(rng_key: Array, num_data: int = 1024, dim: int = 20) -> Array:
    r"""Data ``[num_data, dim]`` of the model at a :math:`\mu \sim \mathcal N(0, I)`."""
    mu_key, x_key = jax.random.split(rng_key)
    noise = jnp.sqrt(2.0) * jax.random.normal(x_key, (num_data, dim))
    return jax.random.normal(mu_key, (dim,)) + noise
