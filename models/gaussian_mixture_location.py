r"""The common location of a wide and a narrow Gaussian in the plane, in equal shares [1].

.. math::

    \theta \sim \mathcal U(-10, 10)^2, \qquad
    x \sim \tfrac12 \mathcal N(\theta, I) + \tfrac12 \mathcal N(\theta, 0.1^2 I).

The posterior is the same mixture around :math:`x`, cut off by the prior's square.

**References**

1. *Benchmarking Simulation-Based Inference*, J.-M. Lueckmann et al. (2021): the task ``gaussian_mixture``
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from models.rejection import sample_accepted

BOUND = 10.0  # of the prior, either side
SCALES = (1.0, 0.1)


def prior() -> Array:
    """Site ``"theta"`` ``[2]``."""
    return numpyro.sample("theta", dist.Uniform(-BOUND, BOUND).expand([2]).to_event(1))


def noise(centre: ArrayLike) -> dist.MixtureSameFamily:
    """The mixture around ``centre`` ``[..., 2]``."""
    components = dist.Normal(jnp.asarray(centre)[..., None, :], jnp.array(SCALES)[:, None]).to_event(1)
    shares = jnp.full(components.batch_shape, 1 / len(SCALES))
    return dist.MixtureSameFamily(dist.Categorical(probs=shares), components)


def model(x: ArrayLike | None = None) -> Array:
    """The simulator, with sites ``"theta"`` ``[2]`` and ``"x"`` ``[2]``; ``x`` conditions it."""
    return numpyro.sample("x", noise(prior()), obs=None if x is None else jnp.asarray(x))


def log_likelihood(theta: ArrayLike, x: ArrayLike) -> Array:
    r""":math:`\log p(x \mid \theta)`, exactly; leading axes of ``[..., 2]`` broadcast."""
    return noise(theta).log_prob(jnp.asarray(x))


def sample_posterior(rng_key: Array, x: ArrayLike, num_samples: int) -> np.ndarray:
    """Independent draws from the exact posterior, ``[num_samples, 2]``."""

    def propose(rng_key: Array, number: int) -> tuple[Array, Array]:
        theta = noise(x).sample(rng_key, (number,))
        return theta, jnp.all(jnp.abs(theta) <= BOUND, -1)

    return sample_accepted(rng_key, propose, num_samples)
