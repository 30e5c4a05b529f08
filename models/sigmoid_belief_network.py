r"""Sigmoid belief network: layers of binary units over a binary image, linear maps between them.

With :math:`z_0` the deepest of :math:`L` layers, :math:`f_i, g_i` affine maps and :math:`\bar x` the training mean,

.. math::

    z_0 &\sim \mathrm{Bern}(\sigma(\theta_0)), \qquad
    z_i \sim \mathrm{Bern}(\sigma(f_i(2 z_{i-1} - 1))), \qquad
    x \sim \mathrm{Bern}(\sigma(f_L(2 z_{L-1} - 1))), \\
    q:\quad z_{L-1} &\sim \mathrm{Bern}(\sigma(g_L((x - \bar x + 1) / 2))), \qquad
    z_{i-1} \sim \mathrm{Bern}(\sigma(g_i(2 z_i - 1))).

The model's parameters are ``"prior_logits"`` (:math:`\theta_0`, which starts at 0) and ``"generative$params"``, the
guide's are ``"inference$params"``; both are lists of affine layers in the order in which they are applied.

**References**

1. *Neural Variational Inference and Learning in Belief Networks*, A. Mnih, K. Gregor (2014)
2. *Variational Inference for Monte Carlo Objectives*, A. Mnih, D. Rezende (2016)
3. *The Thermodynamic Variational Objective*, V. Masrani, T. A. Le, F. Wood (2019)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import logit, logsumexp
from jax.typing import ArrayLike
from numpyro.contrib.module import eqx_module

from models.networks import affine_layers, over_batch


def make_programs(
    rng_key: Array, train_mean: ArrayLike, num_layers: int = 3, width: int = 200
) -> tuple[Callable[..., None], Callable[..., None]]:
    r"""The model and its guide, called as ``program(x, subsample_size)`` with ``x`` of shape ``[N, D]``.

    Sites are ``"z_0"``, ..., ``"x"``, all in the plate ``"data"``. Weights and biases start uniform on
    :math:`\pm 1 / \sqrt{\text{fan-in}}`, except that the pixels' biases start at the training mean's logits.

    :param train_mean: mean of the training images, ``[D]``; clipped to ``[1e-4, 1 - 1e-4]`` for the biases.
    """
    generative_key, inference_key = jax.random.split(rng_key)
    train_mean = jnp.asarray(train_mean, jnp.result_type(float))
    generative = affine_layers(generative_key, [*[width] * num_layers, train_mean.size])
    inference = affine_layers(inference_key, [train_mean.size, *[width] * num_layers])
    pixel_bias = logit(jnp.clip(train_mean, 1e-4, 1 - 1e-4))
    generative[-1] = eqx.tree_at(lambda layer: layer.bias, generative[-1], pixel_bias)

    def model(x: ArrayLike, subsample_size: int | None = None) -> None:
        x = jnp.asarray(x)
        logits = numpyro.param("prior_logits", jnp.zeros(width))
        layers = eqx_module("generative", generative)
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x = numpyro.subsample(x, event_dim=1)
            for i, layer in enumerate(layers):
                z = numpyro.sample(f"z_{i}", units(logits).to_event(1))
                logits = over_batch(layer)(2.0 * z - 1)
            numpyro.sample("x", units(logits).to_event(1), obs=x)

    def guide(x: ArrayLike, subsample_size: int | None = None) -> None:
        x = jnp.asarray(x)
        layers = eqx_module("inference", inference)
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            inputs = (numpyro.subsample(x, event_dim=1) - train_mean + 1) / 2
            for i, layer in zip(reversed(range(num_layers)), layers, strict=True):
                z = numpyro.sample(f"z_{i}", units(over_batch(layer)(inputs)).to_event(1))
                inputs = 2.0 * z - 1

    return model, guide


def units(logits: Array) -> dist.Distribution:
    """Independent binary units."""
    return dist.Bernoulli(logits=logits)


def log_evidence(params: Mapping[str, Any], x: ArrayLike) -> Array:
    r"""The exact :math:`\log p(x_n)`, shape ``[N]``, by summing over the states of one layer after the other.

    Time and memory grow as :math:`4^{\text{width}}`: for small networks.

    :param params: of the model.
    :param x: ``[N, D]``.
    """
    layers = params["generative$params"]
    states = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=params["prior_logits"].size)))  # [S, width]
    log_marginal = units(params["prior_logits"]).log_prob(states).sum(-1)
    for layer, values in zip(layers, [states] * (len(layers) - 1) + [jnp.asarray(x)], strict=True):
        log_conditional = units(over_batch(layer)(2 * states - 1)[:, None]).log_prob(values).sum(-1)
        log_marginal = logsumexp(log_marginal[:, None] + log_conditional, 0)
    return log_marginal
