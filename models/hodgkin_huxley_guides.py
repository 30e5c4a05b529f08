r"""Guides of the Hodgkin-Huxley neuron: proposals by networks of the observations, and a learned twist [1].

:func:`make_guide` returns a program ``guide(y, params=None)`` for a model of :func:`models.hodgkin_huxley.make_model`
with the same settings. It is the model's own transition, or with networks

.. math:: q(x_t \mid x_{t-1}, y) \propto p(x_t \mid x_{t-1})\, \mathcal N(x_t; m_t, \operatorname{diag}(s_t)^2), \qquad
   (m_t, \log s_t) = \mathrm{MLP}(x_{t-1}, h_{\lfloor t / 50 \rfloor}, e_t),

where :math:`h_k` are states of a recurrent network that reads the observations up to the k-th (filtering) or all of
them (smoothing), and :math:`e_t` encodes the steps left to the next observation. The twist is
:math:`\log r_t = \mathrm{MLP}(x_t, h'_{\lfloor t / 50 \rfloor}, e'_t)`, and :math:`h'_k` summarises the observations
after the k-th.

Everything but :math:`x` is known before the scan: so is its share of the networks' first layer, and a step multiplies
with the rest.

**References**

1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventós, A. Warrington, S. Linderman (2022)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module

import numpyro_smc
from models import hodgkin_huxley as hh
from models.networks import lookahead_features, lstm_cell, xavier_uniform

Residual = Literal["none", "mean", "full"]
#: From the prior's mean and standard deviations, the previous state and the step's inputs to those that propose.
Propose = Callable[[Array, Array, Array, Any], tuple[Array, Array]]


def make_guide(
    proposal: Literal["bootstrap", "filtering", "smoothing"] = "bootstrap",
    twist: Literal["none", "learned"] = "none",
    rng_key: Array | None = None,
    num_steps: int = hh.NUM_STEPS,
    num_compartments: int = 1,
    subsample: int = hh.SUBSAMPLE,
    dt: float = hh.STEP,
    init_current: float = hh.TRUE_CURRENT,
    integrator: hh.Integrator = hh.euler,
    residual: Residual = "full",
    hold_prior: bool = True,
    init_log_scale: float = 0.0,
    width: int = 32,
    hidden_size: int = 32,
) -> Callable[..., None]:
    """A guide ``guide(y, params=None)``; its parameter ``"current"`` is the model's.

    :param proposal: ``"bootstrap"`` proposes from the model, ``"filtering"`` and ``"smoothing"`` by
        :func:`network_proposal`.
    :param twist: ``"learned"`` states :func:`learned_twist` as ``"r"``.
    :param rng_key: key of the initial networks; without any it is not needed.
    :param residual, init_log_scale: see :func:`network_proposal`.
    :param hold_prior: the bound sends no gradient to the model through the proposal: the current then learns from
        transition densities of given paths, and not through chains of 2,000 states, whose gradient is far noisier.
    :param width, hidden_size: units of each layer, and of each recurrent network.
    """
    if proposal not in ("bootstrap", "filtering", "smoothing"):
        raise ValueError(f"hodgkin_huxley: proposal={proposal!r}; expected 'bootstrap', 'filtering' or 'smoothing'.")
    if twist not in ("none", "learned"):
        raise ValueError(f"hodgkin_huxley: twist={twist!r}; expected 'none' or 'learned'.")
    if rng_key is None and (proposal, twist) != ("bootstrap", "none"):
        raise ValueError("hodgkin_huxley: a guide with networks builds them here; pass rng_key.")
    keys = jax.random.split(jax.random.key(0) if rng_key is None else rng_key)
    sizes = (num_steps, num_compartments, subsample, width, hidden_size)
    times = jnp.arange(num_steps)
    build_proposal, build_twist = model_proposal, no_twist
    if proposal != "bootstrap":
        is_smoothing = proposal == "smoothing"
        build_proposal = network_proposal(keys[0], *sizes, is_smoothing, residual, init_log_scale)
    if twist == "learned":
        build_twist = learned_twist(keys[1], *sizes)
    observed = times % subsample == 0

    def guide(y: ArrayLike, params: hh.Params | None = None) -> None:
        current = hh.declare_current(params, init_current)
        dynamics = hh.Dynamics(current, num_compartments, dt, integrator)
        seen = hh.blank(y, observed, num_compartments)[::subsample]
        proposal_inputs, propose = build_proposal(seen, times)
        twist_inputs, log_twist = build_twist(seen, times)

        def step(x: Array, inputs: tuple[Array, Any, Any]) -> tuple[Array, None]:
            t, proposal_t, twist_t = inputs
            prior = dynamics.transition(t, x)
            if hold_prior:
                prior = lax.stop_gradient(prior)
            x = numpyro.sample("x", dist.Normal(*propose(*prior, x, proposal_t)).to_event(1))
            if log_twist is not None:
                numpyro_smc.twist("r", log_twist(x, twist_t))
            return x, None

        scan(step, hh.start(num_compartments)[0], (times, proposal_inputs, twist_inputs))

    return guide


# A builder takes the observations [K, C] and steps [S] and returns the inputs of these steps, [S, ...], and a Propose;
# that of a twist returns inputs, and log r(x, inputs of the step).


def model_proposal(seen: Array, times: Array) -> tuple[None, Propose]:
    """Propose from the model's own transition."""
    return None, lambda loc, scale, x, inputs: (loc, scale)


def network_proposal(
    rng_key: Array,
    num_steps: int,
    num_compartments: int,
    subsample: int,
    width: int,
    hidden_size: int,
    is_smoothing: bool,
    residual: Residual = "full",
    init_log_scale: float = 0.0,
) -> Callable[[Array, Array], tuple[Array, Propose]]:
    r"""Propose by ``"proposal_mlp"`` of the state, of ``"proposal_rnn"`` forwards (and ``"proposal_backward_rnn"``).

    :param residual: the proposal is the network's :math:`\mathcal N(m, s^2)` (``"none"``), that with the prior's mean
        added to m (``"mean"``), or its product with the prior (``"full"``).
    :param init_log_scale: added to :math:`\log s`. The published networks start at m and log s about 0, and at 3 the
        product starts at the prior.
    """
    if residual not in ("none", "mean", "full"):
        raise ValueError(f"hodgkin_huxley: residual={residual!r}; expected 'none', 'mean' or 'full'.")
    forward_key, backward_key, mlp_key = jax.random.split(rng_key, 3)
    forward_rnn = lstm_cell(forward_key, num_compartments, hidden_size)
    backward_rnn = lstm_cell(backward_key, num_compartments, hidden_size)
    encoding = countdown(num_steps, subsample, 16, 50.0)
    state_size = 4 * num_compartments
    feature_size = hidden_size * (2 if is_smoothing else 1)
    head = network(mlp_key, state_size + feature_size + encoding.shape[-1], width, 2 * state_size)

    def build(seen: Array, times: Array) -> tuple[Array, Propose]:
        features = [hidden_states(eqx_module("proposal_rnn", forward_rnn), seen)]
        if is_smoothing:
            features.append(hidden_states(eqx_module("proposal_backward_rnn", backward_rnn), seen[::-1])[::-1])
        mlp = eqx_module("proposal_mlp", head)

        def propose(loc: Array, scale: Array, x: Array, inputs: Array) -> tuple[Array, Array]:
            own_loc, own_log_scale = jnp.split(rest_of(mlp, x, inputs), 2)
            own_scale = jnp.exp(own_log_scale + init_log_scale)
            if residual == "full":
                total = jnp.hypot(scale, own_scale)
                return loc + (scale / total) ** 2 * (own_loc - loc), scale * own_scale / total
            return (own_loc + loc if residual == "mean" else own_loc), own_scale

        return first_layer(mlp, jnp.concatenate(features, -1), encoding, times, subsample), propose

    return build


def no_twist(seen: Array, times: Array) -> tuple[None, None]:
    """No statement at all."""
    return None, None


def learned_twist(
    rng_key: Array, num_steps: int, num_compartments: int, subsample: int, width: int, hidden_size: int
) -> Callable[[Array, Array], tuple[Array, Callable[[Array, Array], Array]]]:
    """A network of the state and of the future: ``"twist_rnn"`` reads observations backwards, ``"twist_mlp"`` scores.

    The twist starts at 1.
    """
    rnn_key, mlp_key = jax.random.split(rng_key)
    rnn = lstm_cell(rnn_key, num_compartments, hidden_size)
    encoding = countdown(num_steps, subsample, 4, 4.0)
    state_size = 4 * num_compartments
    head = network(mlp_key, state_size + hidden_size + encoding.shape[-1], width, 1)
    last = head.layers[-1]
    head = eqx.tree_at(lambda module: module.layers[-1].weight, head, jnp.zeros_like(last.weight))

    def build(seen: Array, times: Array) -> tuple[Array, Callable[[Array, Array], Array]]:
        features = lookahead_features(eqx_module("twist_rnn", rnn), seen)
        mlp = eqx_module("twist_mlp", head)
        inputs = first_layer(mlp, features, encoding, times, subsample)
        return inputs, lambda x, inputs: rest_of(mlp, x, inputs)[0]

    return build


# The networks


def network(rng_key: Array, in_size: int, width: int, out_size: int) -> eqx.nn.MLP:
    """Two hidden layers of rectified linear units, Glorot-uniform weights, zero biases."""
    make_key, init_key = jax.random.split(rng_key)
    module = eqx.nn.MLP(in_size, out_size, width, depth=2, activation=jax.nn.relu, key=make_key)
    return xavier_uniform(init_key, module)


def first_layer(mlp: eqx.nn.MLP, features: Array, encoding: Array, times: Array, subsample: int) -> Array:
    """What the first layer makes of the inputs that follow the state, at each of ``times``: ``[S, width]``.

    :param features: of each observation, for the steps from it to the next, ``[K, ...]``.
    :param encoding: of each step, ``[T, ...]``.
    """
    layer = mlp.layers[0]
    feature_size, encoding_size = features.shape[-1], encoding.shape[-1]
    of_features, of_encoding = jnp.split(layer.weight[:, -feature_size - encoding_size :], [feature_size], 1)
    return (features @ of_features.T)[times // subsample] + (encoding @ of_encoding.T + layer.bias)[times]


def rest_of(mlp: eqx.nn.MLP, x: Array, inputs: Array) -> Array:
    """The network's output for a state, given what :func:`first_layer` made of the other inputs."""
    value = mlp.layers[0].weight[:, : x.shape[-1]] @ x + inputs
    for layer in mlp.layers[1:]:
        value = layer(jax.nn.relu(value))
    return value


def hidden_states(cell: eqx.nn.LSTMCell, seen: Array) -> Array:
    """States of the recurrent network after each observation, ``[K, hidden_size]``."""

    def step(state: tuple[Array, Array], y_k: Array) -> tuple[tuple[Array, Array], Array]:
        state = cell(y_k, state)
        return state, state[0]

    zeros = jnp.zeros(cell.hidden_size)
    return lax.scan(step, (zeros, zeros), seen)[1]


def countdown(num_steps: int, period: int, num_frequencies: int, base: float) -> Array:
    r"""The steps left to the next observation, :math:`c_t = P - 1 - t \bmod P`, as sines and cosines.

    :return: :math:`\sin(c_t b^{-2 i / d})` and the cosines, :math:`i < d`: ``[num_steps, 2 num_frequencies]``.
    """
    left = period - 1 - jnp.arange(num_steps) % period
    angles = left[:, None] / base ** (2 * jnp.arange(num_frequencies) / num_frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
