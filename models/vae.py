r"""Variational autoencoders of binary images, with a Gaussian or a categorical code.

.. math::

    z_n \sim p_\theta(z), \qquad x_n \mid z_n \sim \mathrm{Bern}(\sigma(\mathrm{decoder}_\theta(z_n))), \qquad
    q(z_n \mid x_n) = q(z_n; \mathrm{encoder}_\phi(x_n)).

An encoder and a decoder are :mod:`equinox` modules that map one vector to one vector; those of :func:`mlp_networks` are
the published ones, and any others go to :func:`gaussian_programs` or :func:`categorical_programs`. They stand in the
programs as the modules ``"encoder"`` (guide) and ``"decoder"`` (model). Model and guide are called as
``program(x, subsample_size)`` with ``x`` of shape ``[N, D]``; sites ``"z"`` and ``"x"`` are in the plate ``"data"``.

**References**

1. *Auto-Encoding Variational Bayes*, D. Kingma, M. Welling (2014)
2. *Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds*, V. Liévin,
   A. Dittadi, A. Christensen, O. Winther (2020)
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.contrib.module import eqx_module

from models.networks import over_batch

#: A model and its guide.
Programs = tuple[Callable[..., None], Callable[..., None]]


def make_gaussian_vae(
    rng_key: Array, data_size: int = 784, latent_size: int = 200, hidden_size: int = 200, depth: int = 2
) -> Programs:
    """A Gaussian code ``z`` of shape ``[latent_size]`` and :func:`mlp_networks`."""
    networks = mlp_networks(rng_key, data_size, latent_size, 2 * latent_size, hidden_size, depth)
    return gaussian_programs(*networks, latent_size)


def make_categorical_vae(
    rng_key: Array,
    data_size: int,
    num_variables: int = 32,
    num_categories: int = 8,
    hidden_size: int = 128,
    depth: int = 2,
) -> Programs:
    """A code ``z`` of ``[num_variables]`` categories and :func:`mlp_networks`."""
    code_size = num_variables * num_categories
    networks = mlp_networks(rng_key, data_size, code_size, code_size, hidden_size, depth)
    return categorical_programs(*networks, num_variables, num_categories)


def gaussian_programs(encoder: eqx.Module, decoder: eqx.Module, latent_size: int) -> Programs:
    r"""Prior :math:`\mathcal N(0, I)`, guide :math:`\mathcal N(\mu, \operatorname{diag}(\sigma)^2)`.

    :param encoder: from ``[D]`` to :math:`\mu` and :math:`\log\sigma` in one vector ``[2 * latent_size]``.
    :param decoder: from ``[latent_size]`` to logits ``[D]``.
    """

    def prior() -> dist.Distribution:
        return dist.Normal(jnp.zeros(latent_size), 1.0).to_event(1)

    def posterior(code: Array) -> dist.Distribution:
        loc, log_scale = jnp.split(code, 2, -1)
        return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    return _programs(prior, posterior, encoder, decoder)


def categorical_programs(encoder: eqx.Module, decoder: eqx.Module, num_variables: int, num_categories: int) -> Programs:
    """Categorical variables, whose prior is the parameter ``"prior_logits"``, which starts at 0.

    :param encoder: from ``[D]`` to logits ``[num_variables * num_categories]``, a variable's own side by side.
    :param decoder: from the one-hot code, laid out likewise, to logits ``[D]``.
    """
    shape = (num_variables, num_categories)

    def prior() -> dist.Distribution:
        return dist.Categorical(logits=numpyro.param("prior_logits", jnp.zeros(shape))).to_event(1)

    def posterior(code: Array) -> dist.Distribution:
        return dist.Categorical(logits=code.reshape(*code.shape[:-1], *shape)).to_event(1)

    def one_hot(z: Array) -> Array:
        return jax.nn.one_hot(z, num_categories).reshape(*z.shape[:-1], -1)

    return _programs(prior, posterior, encoder, decoder, one_hot)


def mlp_networks(
    rng_key: Array, data_size: int, latent_size: int, code_size: int, hidden_size: int = 200, depth: int = 2
) -> tuple[eqx.nn.MLP, eqx.nn.MLP]:
    r"""An encoder from ``data_size`` to ``code_size`` and a decoder from ``latent_size`` to ``data_size``.

    Both have ``depth`` tanh layers; weights and biases start uniform on :math:`\pm 1 / \sqrt{\text{fan-in}}`.
    """
    encoder_key, decoder_key = jax.random.split(rng_key)
    encoder = eqx.nn.MLP(data_size, code_size, hidden_size, depth, activation=jnp.tanh, key=encoder_key)
    return encoder, eqx.nn.MLP(latent_size, data_size, hidden_size, depth, activation=jnp.tanh, key=decoder_key)


def _programs(
    prior: Callable[[], dist.Distribution],
    posterior: Callable[[Array], dist.Distribution],
    encoder: eqx.Module,
    decoder: eqx.Module,
    embed: Callable[[Array], Array] = lambda z: z,
) -> Programs:
    def model(x: ArrayLike, subsample_size: int | None = None) -> None:
        x = jnp.asarray(x)
        decode = over_batch(eqx_module("decoder", decoder))
        z_prior = prior()
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x = numpyro.subsample(x, event_dim=1)
            logits = decode(embed(numpyro.sample("z", z_prior)))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: ArrayLike, subsample_size: int | None = None) -> None:
        x = jnp.asarray(x)
        encode = over_batch(eqx_module("encoder", encoder))
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            numpyro.sample("z", posterior(encode(numpyro.subsample(x, event_dim=1))))

    return model, guide
