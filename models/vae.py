r"""Variational autoencoders of binary images, with a Gaussian or a categorical code.

.. math::

    z_n \sim p_\theta(z), \qquad x_n \mid z_n \sim \mathrm{Bern}(\sigma(\mathrm{decoder}_\theta(z_n))), \qquad
    q(z_n \mid x_n) = q(z_n; \mathrm{encoder}_\phi(x_n)).

An encoder and a decoder are :mod:`equinox` modules that map one vector to one vector; those of :func:`mlp_networks`
(published in [2]), :func:`elu_networks` and :func:`convolutional_networks` (in [3]), or any others, go to
:func:`gaussian_programs` or :func:`categorical_programs`. They stand in the programs as the modules ``"encoder"`` (the
guide's) and ``"decoder"`` (the model's). Model and guide are called as ``program(x, subsample_size)`` with ``x`` of
shape ``[N, D]``; sites ``"z"`` and ``"x"`` are in the plate ``"data"``. Other guides of the Gaussian code take the
encoder as :func:`gaussian_encoder`:

.. code-block:: python

    encoder, decoder = elu_networks(random.key(0), context_size=50)
    model = gaussian_model(decoder, 50)
    guide = AuxiliaryFlowGuide(gaussian_encoder(encoder, 50), aux_dim=50)

**References**

1. *Auto-Encoding Variational Bayes*, D. Kingma, M. Welling (2014)
2. *Optimal Variance Control of the Score Function Gradient Estimator for Importance Weighted Bounds*, V. Liévin,
   A. Dittadi, A. Christensen, O. Winther (2020)
3. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.contrib.module import eqx_module

from models.networks import convolutional_decoder, convolutional_encoder, elu_network, over_batch
from numpyro_smc.guides.flow import FlowGuide

#: A model and its guide.
Programs = tuple[Callable[..., None], Callable[..., None]]

#: Hidden layers of encoder and decoder in the experiments of [3], for :func:`elu_networks`.
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "standard": ((200, 200), (200, 200)),
    "large encoder": ((500, 500), (200, 200)),
    "linear encoder": ((), (200, 200)),
    "large decoder": ((200, 200), (500, 500)),
    "small decoder": ((200, 200), ()),
    "deep decoder": ((200, 200), (200, 200, 200, 200)),
    "overtrained, large encoder": ((500, 500, 500), (200, 200)),
    "overtrained, large decoder": ((200, 200), (500, 500, 500)),
}


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
    return gaussian_model(decoder, latent_size), FlowGuide(gaussian_encoder(encoder, latent_size), "affine")


def gaussian_model(decoder: eqx.Module, latent_size: int) -> Callable[..., None]:
    """The model of :func:`gaussian_programs`."""
    return _model(lambda: dist.Normal(jnp.zeros(latent_size), 1.0).to_event(1), decoder)


def gaussian_encoder(encoder: eqx.Module, latent_size: int) -> Callable[[Array], tuple[Array, ...]]:
    r"""An encoder program for :class:`~numpyro_smc.FlowGuide` and :class:`~numpyro_smc.AuxiliaryFlowGuide`.

    :param encoder: from ``[D]`` to :math:`\mu`, :math:`\log\sigma` and, if there are more than ``2 * latent_size``
        numbers, a context before its exponential linear units.
    :return: a program from rows to :math:`\mu`, :math:`\sigma` and, if any, the context.
    """

    def encode(rows: Array) -> tuple[Array, ...]:
        code = over_batch(eqx_module("encoder", encoder))(rows)
        loc, log_scale, context = jnp.split(code, [latent_size, 2 * latent_size], -1)
        return (loc, jnp.exp(log_scale), jax.nn.elu(context)) if context.shape[-1] else (loc, jnp.exp(log_scale))

    return encode


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

    def guide(x: ArrayLike, subsample_size: int | None = None) -> None:
        x = jnp.asarray(x)
        encode = over_batch(eqx_module("encoder", encoder))
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            numpyro.sample("z", posterior(encode(numpyro.subsample(x, event_dim=1))))

    return _model(prior, decoder, one_hot), guide


def mlp_networks(
    rng_key: Array, data_size: int, latent_size: int, code_size: int, hidden_size: int = 200, depth: int = 2
) -> tuple[eqx.nn.MLP, eqx.nn.MLP]:
    r"""An encoder from ``data_size`` to ``code_size`` and a decoder from ``latent_size`` to ``data_size``.

    Both have ``depth`` tanh layers; weights and biases start uniform on :math:`\pm 1 / \sqrt{\text{fan-in}}`.
    """
    encoder_key, decoder_key = jax.random.split(rng_key)
    encoder = eqx.nn.MLP(data_size, code_size, hidden_size, depth, activation=jnp.tanh, key=encoder_key)
    return encoder, eqx.nn.MLP(latent_size, data_size, hidden_size, depth, activation=jnp.tanh, key=decoder_key)


def elu_networks(
    rng_key: Array,
    data_size: int = 784,
    latent_size: int = 50,
    context_size: int = 0,
    encoder: Sequence[int] = (200, 200),
    decoder: Sequence[int] = (200, 200),
) -> tuple[eqx.nn.Sequential, eqx.nn.Sequential]:
    """An encoder and a decoder for a Gaussian code, with exponential linear units, as in [3].

    Weights start Glorot-uniform, biases at zero. The encoder's last affine layer gives the log variance, of which the
    encoder returns the half.

    :param context_size: numbers that the encoder returns beside mean and log standard deviation.
    :param encoder: sizes of its hidden layers; **decoder** - likewise; see :data:`LAYERS`.
    """
    encoder_key, decoder_key = jax.random.split(rng_key)
    network = elu_network(encoder_key, (data_size, *encoder, 2 * latent_size + context_size))
    return (
        _with_half_log_variances(network, latent_size),
        elu_network(decoder_key, (latent_size, *decoder, data_size)),
    )


def convolutional_networks(
    rng_key: Array,
    latent_size: int = 50,
    context_size: int = 0,
    encoder_channels: Sequence[int] = (64, 128, 256),
    decoder_channels: Sequence[int] = (256, 128, 64),
) -> tuple[eqx.nn.Sequential, eqx.nn.Sequential]:
    """The same for images of 3 x 32 x 32 pixels, as vectors of 3072, with convolutions."""
    encoder_key, decoder_key = jax.random.split(rng_key)
    encoder = convolutional_encoder(encoder_key, 2 * latent_size + context_size, encoder_channels)
    decoder = convolutional_decoder(decoder_key, latent_size, decoder_channels)
    return _with_half_log_variances(encoder, latent_size), decoder


def _with_half_log_variances(encoder: eqx.nn.Sequential, latent_size: int) -> eqx.nn.Sequential:
    """The encoder, of whose log variances the halves are taken: log standard deviations."""

    def halve(code: Array) -> Array:
        return code.at[latent_size : 2 * latent_size].multiply(0.5)

    return eqx.nn.Sequential([*encoder.layers, eqx.nn.Lambda(halve)])


def _model(
    prior: Callable[[], dist.Distribution], decoder: eqx.Module, embed: Callable[[Array], Array] = lambda z: z
) -> Callable[..., None]:
    def model(x: ArrayLike, subsample_size: int | None = None) -> None:
        x = jnp.asarray(x)
        decode = over_batch(eqx_module("decoder", decoder))
        z_prior = prior()
        with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
            x = numpyro.subsample(x, event_dim=1)
            logits = decode(embed(numpyro.sample("z", z_prior)))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    return model
