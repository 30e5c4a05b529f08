r"""A mixture of 20 fixed Gaussians whose proportions are learned, with a network for the cluster of an observation.

.. math::

    z_n \sim \mathrm{Cat}(\mathrm{softmax}(\theta)), \qquad x_n \mid z_n = c \sim \mathcal N(10 c, 5^2), \qquad
    q(z_n \mid x_n) = \mathrm{Cat}(\mathrm{softmax}(\mathrm{MLP}(x_n))), \qquad c = 0, \dots, 19.

The true proportions are proportional to :math:`5 + c`. :math:`\theta` is the parameter ``"prior_logits"``, which starts
at 0; the network, which reads ``x`` as it is, is the module ``"encoder"``. Model and guide are called as
``program(x, subsample_size)`` with ``x`` of shape ``[N]``; all sites are in the plate ``"data"``. The published
experiments draw a fresh ``x`` for every step: :func:`simulate`.

**References**

1. *Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow*, T. A. Le et al. (2019)
2. *Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds*, V. Liévin,
   A. Dittadi, A. Christensen, O. Winther (2020)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.contrib.module import eqx_module

from models.networks import over_batch

NUM_CLUSTERS = 20


def model(x: ArrayLike, subsample_size: int | None = None) -> None:
    """The mixture, with sites ``"z"`` and ``"x"``."""
    x = jnp.asarray(x)
    logits = numpyro.param("prior_logits", jnp.zeros(NUM_CLUSTERS))
    with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
        x = numpyro.subsample(x, event_dim=0)
        z = numpyro.sample("z", dist.Categorical(logits=logits))
        numpyro.sample("x", emission(z), obs=x)


def make_guide(rng_key: Array, hidden_size: int = 16) -> Callable[..., None]:
    """A guide whose module ``"encoder"`` starts at weights drawn with ``rng_key``."""
    module = encoder(rng_key, hidden_size)

    def guide(x: ArrayLike, subsample_size: int | None = None) -> None:
        x = jnp.asarray(x)
        network = eqx_module("encoder", module)
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            inputs = numpyro.subsample(x[:, None], event_dim=1)
            numpyro.sample("z", dist.Categorical(logits=over_batch(network)(inputs)))

    return guide


def encoder(rng_key: Array, hidden_size: int = 16) -> eqx.nn.MLP:
    r"""The network, one tanh layer; weights and biases are uniform on :math:`\pm 1 / \sqrt{\text{fan-in}}`."""
    return eqx.nn.MLP(1, NUM_CLUSTERS, hidden_size, depth=1, activation=jnp.tanh, key=rng_key)


def emission(cluster: ArrayLike) -> dist.Normal:
    """The distribution of an observation from ``cluster``."""
    return dist.Normal(10.0 * jnp.asarray(cluster), 5.0)


# The truth, and distances from it


def true_probabilities() -> Array:
    """The proportions the data are drawn with, shape ``[20]``."""
    weights = 5.0 + jnp.arange(NUM_CLUSTERS)
    return weights / weights.sum()


def simulate(rng_key: Array, num_data: int = 100) -> Array:
    """Fresh data ``[num_data]`` at :func:`true_probabilities`."""
    z_key, x_key = jax.random.split(rng_key)
    return emission(dist.Categorical(true_probabilities()).sample(z_key, (num_data,))).sample(x_key)


def exact_posterior(x: ArrayLike, probabilities: ArrayLike) -> Array:
    """The posterior over clusters under proportions ``[20]``: ``[N, 20]`` for ``x`` of shape ``[N]``."""
    log_likelihood = emission(jnp.arange(NUM_CLUSTERS)).log_prob(jnp.asarray(x)[..., None])
    return jax.nn.softmax(jnp.log(probabilities) + log_likelihood)


def prior_error(params: Mapping[str, Any]) -> Array:
    r""":math:`\lVert \mathrm{softmax}(\theta) - \pi^* \rVert_2`."""
    return jnp.linalg.norm(jax.nn.softmax(params["prior_logits"]) - true_probabilities())


def posterior_error(params: Mapping[str, Any], x: ArrayLike) -> Array:
    r"""The mean over ``x`` of :math:`\lVert q(\cdot \mid x) - p_{\theta^*}(\cdot \mid x) \rVert_2`."""
    network = eqx.combine(params["encoder$params"], encoder(jax.random.key(0)))
    x = jnp.asarray(x)
    q = jax.nn.softmax(over_batch(network)(x[..., None]))
    return jnp.linalg.norm(q - exact_posterior(x, true_probabilities()), axis=-1).mean()
