r"""A spiking neuron's linear filter and offset, seen through their sufficient statistics [1].

.. math::

    \theta \sim \mathcal N(0, \Lambda^{-1}), \qquad y_t \sim \mathrm{Bernoulli}(\sigma((X\theta)_t)), \quad
    t = 1, \dots, 100, \qquad x = X^\top y.

The design :math:`X` has a column of ones, then nine columns of one white-noise stimulus, each delayed by one step more.
The precision :math:`\Lambda` is 0.5 for the offset, and penalises second differences of the filter. The stimulus is
the published one: a fixed draw from NumPy's legacy generator with seed 42.

**References**

1. *Benchmarking Simulation-Based Inference*, J.-M. Lueckmann et al. (2021)
2. *Training deep neural density estimators to identify mechanistic models of neural dynamics*, P. Gonçalves et al.
   (2020)
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

NUM_STEPS, NUM_DELAYS = 100, 9
STIMULUS_SEED = 42
OFFSET_PRECISION = 0.5


@cache
def design_matrix() -> np.ndarray:
    """:math:`X`, ``[100, 10]``, float32."""
    stimulus = np.random.RandomState(STIMULUS_SEED).randn(NUM_STEPS).astype(np.float32)
    delayed = [
        np.concatenate([np.zeros(delay, np.float32), stimulus[: NUM_STEPS - delay]]) for delay in range(NUM_DELAYS)
    ]
    return np.column_stack([np.ones(NUM_STEPS, np.float32), *delayed])


@cache
def prior_precision() -> np.ndarray:
    r""":math:`\Lambda`, ``[10, 10]``: with the difference operator :math:`D`, the filter's block is
    :math:`F^\top F`, where :math:`F = D^2 + \mathrm{diag}(\sqrt{i / 9})`, :math:`i = 0, \dots, 8`."""
    difference = np.eye(NUM_DELAYS) - np.eye(NUM_DELAYS, k=-1)
    root = difference @ difference + np.diag(np.sqrt(np.arange(NUM_DELAYS) / NUM_DELAYS))
    precision = np.zeros((NUM_DELAYS + 1, NUM_DELAYS + 1))
    precision[0, 0] = OFFSET_PRECISION
    precision[1:, 1:] = root.T @ root
    return precision


@cache
def _prior_factor() -> np.ndarray:
    return np.linalg.cholesky(np.linalg.inv(prior_precision()))


def prior() -> Array:
    """Site ``"theta"`` ``[10]``."""
    return numpyro.sample(
        "theta", dist.MultivariateNormal(jnp.zeros(10), scale_tril=jnp.asarray(_prior_factor(), float))
    )


def model() -> Array:
    """The simulator: site ``"theta"`` ``[10]``, nuisance ``"y"`` ``[100]``, deterministic ``"x"`` ``[10]``."""
    design = jnp.asarray(design_matrix())
    y = numpyro.sample("y", dist.Bernoulli(logits=design @ prior()).to_event(1))
    return numpyro.deterministic("x", y @ design)


def log_likelihood(theta: ArrayLike, x: ArrayLike) -> Array:
    r""":math:`\theta^\top x - \sum_t \log(1 + e^{(X\theta)_t})`, which is :math:`\log p(x \mid \theta)` but for the
    logarithm of the number of :math:`y` with :math:`X^\top y = x`, which does not depend on :math:`\theta`. Leading
    axes of ``[..., 10]`` broadcast."""
    theta = jnp.asarray(theta)
    return (theta * jnp.asarray(x)).sum(-1) - jax.nn.softplus(theta @ jnp.asarray(design_matrix()).T).sum(-1)
