"""The small networks that the guides share, initialised as the papers initialise them.

All are plain :mod:`equinox` modules; a program registers one with :func:`numpyro.contrib.module.eqx_module`, outside
its scan. A module carries its own initial weights, so it is built once, with a key, before the program runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers


def mlp(rng_key: Array, in_size: int, hidden_size: int, out_size: int, zero_last: bool = False) -> eqx.nn.MLP:
    """A network with one hidden layer of rectified linear units, Glorot-normal weights and zero biases.

    :param zero_last: start the last layer at zero, so that the network is the constant zero until it is trained.
    """
    weights_key, init_key = jax.random.split(rng_key)
    network = eqx.nn.MLP(in_size, out_size, hidden_size, depth=1, activation=jax.nn.relu, key=init_key)
    first_key, last_key = jax.random.split(weights_key)
    glorot = initializers.glorot_normal()
    shapes = [layer.weight.shape for layer in network.layers]
    weights = [glorot(first_key, shapes[0]), jnp.zeros(shapes[1]) if zero_last else glorot(last_key, shapes[1])]
    biases = [jnp.zeros(shape[0]) for shape in shapes]

    def parameters(module: eqx.nn.MLP) -> list[Array]:
        return [layer.weight for layer in module.layers] + [layer.bias for layer in module.layers]

    return eqx.tree_at(parameters, network, weights + biases)


def lstm_cell(rng_key: Array, in_size: int, hidden_size: int) -> eqx.nn.LSTMCell:
    """A long short-term memory cell: per gate, Glorot-normal input weights and orthogonal recurrent weights.

    Biases start at zero, the forget gate's at one.
    """
    input_key, recurrent_key, init_key = jax.random.split(rng_key, 3)
    cell = eqx.nn.LSTMCell(in_size, hidden_size, key=init_key)
    glorot, orthogonal = initializers.glorot_normal(), initializers.orthogonal()
    weight_ih = jnp.concatenate([glorot(k, (hidden_size, in_size)) for k in jax.random.split(input_key, 4)])
    weight_hh = jnp.concatenate([orthogonal(k, (hidden_size, hidden_size)) for k in jax.random.split(recurrent_key, 4)])
    zeros, ones = jnp.zeros(hidden_size), jnp.ones(hidden_size)
    bias = jnp.concatenate([zeros, ones, zeros, zeros])  # equinox orders the gates: input, forget, cell, output
    return eqx.tree_at(lambda c: (c.weight_ih, c.weight_hh, c.bias), cell, (weight_ih, weight_hh, bias))


def lookahead_features(cell: eqx.nn.LSTMCell, y: Array) -> Array:
    """What the future holds: row ``t`` summarises ``y[t + 1:]`` and nothing else; the last row is zero.

    :param y: observations, shape ``[T, D]``.
    :return: hidden states of the cell run backwards in time and shifted by one, shape ``[T, hidden_size]``.
    """

    def step(state: tuple[Array, Array], y_t: Array) -> tuple[tuple[Array, Array], Array]:
        state = cell(y_t, state)
        return state, state[0]

    zeros = jnp.zeros(cell.hidden_size)
    _, hidden = jax.lax.scan(step, (zeros, zeros), y, reverse=True)
    return jnp.concatenate([hidden[1:], zeros[None]])


def affine_layers(rng_key: Array, sizes: Sequence[int]) -> list[eqx.nn.Linear]:
    r"""Affine maps between consecutive sizes, weights and biases uniform on :math:`\pm 1 / \sqrt{\text{fan-in}}`."""
    keys = jax.random.split(rng_key, len(sizes) - 1)
    return [eqx.nn.Linear(*pair, key=key) for pair, key in zip(itertools.pairwise(sizes), keys, strict=True)]


def elu_network(rng_key: Array, sizes: Sequence[int]) -> eqx.nn.Sequential:
    """Affine layers of these sizes with exponential linear units in between, :func:`xavier_uniform`."""
    make_key, init_key = jax.random.split(rng_key)
    layers = affine_layers(make_key, sizes)
    between = [part for layer in layers[:-1] for part in (layer, eqx.nn.Lambda(jax.nn.elu))]
    return xavier_uniform(init_key, eqx.nn.Sequential([*between, layers[-1]]))


def convolutional_encoder(
    rng_key: Array, code_size: int, channels: Sequence[int] = (64, 128, 256)
) -> eqx.nn.Sequential:
    """From an image of 3 x 32 x 32 numbers in one vector to a code: three convolutions and an affine layer.

    The convolutions are 4 wide with stride 2, without padding. After each, all its numbers are normalised together
    (layer normalisation) where [1] normalises over the batch: batch normalisation ties the images of a batch and has
    state. :func:`xavier_uniform`.

    1. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
    """
    make_key, init_key = jax.random.split(rng_key)
    keys = jax.random.split(make_key, 4)
    parts: list[eqx.Module] = [eqx.nn.Lambda(lambda x: x.reshape(3, 32, 32))]
    for (before, after), key in zip(itertools.pairwise((3, *channels)), keys, strict=False):
        parts += [eqx.nn.Conv2d(before, after, 4, 2, key=key), eqx.nn.GroupNorm(1, after), eqx.nn.Lambda(jax.nn.elu)]
    parts += [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(4 * channels[-1], code_size, key=keys[-1])]
    return xavier_uniform(init_key, eqx.nn.Sequential(parts))


def convolutional_decoder(
    rng_key: Array, latent_size: int, channels: Sequence[int] = (256, 128, 64)
) -> eqx.nn.Sequential:
    """From a code to 3 x 32 x 32 numbers in one vector, :func:`convolutional_encoder` in reverse."""
    make_key, init_key = jax.random.split(rng_key)
    keys = jax.random.split(make_key, 4)
    first, second, third = channels
    parts: list[eqx.Module] = [
        eqx.nn.Linear(latent_size, 4 * first, key=keys[0]),
        eqx.nn.Lambda(jax.nn.elu),
        eqx.nn.Lambda(lambda x: x.reshape(first, 2, 2)),
    ]
    for before, after, more, key in ((first, second, 0, keys[1]), (second, third, 1, keys[2])):
        widen = eqx.nn.ConvTranspose2d(before, after, 4, 2, output_padding=more, key=key)
        parts += [widen, eqx.nn.GroupNorm(1, after), eqx.nn.Lambda(jax.nn.elu)]
    parts += [eqx.nn.ConvTranspose2d(third, 3, 4, 2, key=keys[3]), eqx.nn.Lambda(jnp.ravel)]
    return xavier_uniform(init_key, eqx.nn.Sequential(parts))


def xavier_uniform(rng_key: Array, network: eqx.Module) -> eqx.Module:
    """The network with Glorot-uniform weights and zero biases in its affine and convolutional layers."""

    def is_affine(part: object) -> bool:
        return isinstance(part, eqx.nn.Linear | eqx.nn.Conv | eqx.nn.ConvTranspose)

    def parameters(network: eqx.Module) -> list[Array]:
        layers = [part for part in jax.tree.leaves(network, is_leaf=is_affine) if is_affine(part)]
        return [layer.weight for layer in layers] + [layer.bias for layer in layers]

    found = parameters(network)
    num_layers = len(found) // 2
    glorot = initializers.glorot_uniform(in_axis=1, out_axis=0)
    keys = jax.random.split(rng_key, num_layers)
    weights = [glorot(key, weight.shape) for key, weight in zip(keys, found[:num_layers], strict=True)]
    return eqx.tree_at(parameters, network, weights + [jnp.zeros(bias.shape) for bias in found[num_layers:]])


def over_batch(network: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The network of one vector, applied over all leading axes."""
    return jnp.vectorize(network, signature="(i)->(o)")
