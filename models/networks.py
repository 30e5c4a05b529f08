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


def over_batch(network: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The network of one vector, applied over all leading axes."""
    return jnp.vectorize(network, signature="(i)->(o)")
