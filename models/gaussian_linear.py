r"""The mean of a Gaussian in ten dimensions, under a Gaussian or a uniform prior [1].

.. math::

    \theta \sim \mathcal N(0, 0.1\, I) \text{ or } \mathcal U(-1, 1)^{10}, \qquad x \sim \mathcal N(\theta, 0.1\, I).

0.1 is a variance. The posterior is :math:`\mathcal N(x / 2, 0.05\, I)`, or a product of truncated Gaussians.

**References**

1. *Benchmarking Simulation-Based Inference*, J.-M. Lueckmann et al. (2021): ``gaussian_linear`` and
   ``gaussian_linear_uniform``
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

DIM = 10
VARIANCE = 0.1
BOUND = 1.0  # of the uniform prior, either side


def prior() -> Array:
    """Site ``"theta"`` ``[10]``, Gaussian."""
    return numpyro.sample("theta", dist.Normal(0.0, math.sqrt(VARIANCE)).expand([DIM]).to_event(1))


def uniform_prior() -> Array:
    """Site ``"theta"`` ``[10]``, uniform."""
    return numpyro.sample("theta", dist.Uniform(-BOUND, BOUND).expand([DIM]).to_event(1))


def noise(centre: ArrayLike) -> dist.Distribution:
    """The Gaussian around ``centre`` ``[..., 10]``."""
    return dist.Normal(jnp.asarray(centre), math.sqrt(VARIANCE)).to_event(1)


def model(x: ArrayLike | None = None) -> Array:
    """The simulator, with sites ``"theta"`` ``[10]`` and ``"x"`` ``[10]``; ``x`` conditions it."""
    return numpyro.sample("x", noise(prior()), obs=None if x is None else jnp.asarray(x))


def uniform_model(x: ArrayLike | None = None) -> Array:
    """:func:`model` with the uniform prior."""
    return numpyro.sample("x", noise(uniform_prior()), obs=None if x is None else jnp.asarray(x))


def log_likelihood(theta: ArrayLike, x: ArrayLike) -> Array:
    r""":math:`\log p(x \mid \theta)`, exactly; leading axes of ``[..., 10]`` broadcast."""
    return noise(theta).log_prob(jnp.asarray(x))


def posterior(x: ArrayLike) -> dist.Distribution:
    """The exact posterior under the Gaussian prior."""
    return dist.Normal(jnp.asarray(x) / 2, math.sqrt(VARIANCE / 2)).to_event(1)


def uniform_posterior(x: ArrayLike) -> dist.Distribution:
    """The exact posterior under the uniform prior."""
    return dist.TruncatedNormal(jnp.asarray(x), math.sqrt(VARIANCE), low=-BOUND, high=BOUND).to_event(1)


def sample_posterior(rng_key: Array, x: ArrayLike, num_samples: int) -> Array:
    """Independent draws from :func:`posterior`, ``[num_samples, 10]``."""
    return posterior(x).sample(rng_key, (num_samples,))


def sample_uniform_posterior(rng_key: Array, x: ArrayLike, num_samples: int) -> Array:
    """Independent draws from :func:`uniform_posterior`, ``[num_samples, 10]``."""
    return uniform_posterior(x).sample(rng_key, (num_samples,))
