"""Smoothing by lineages: of the final particles, of the particles a fixed lag later, or of twisted particles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_smc.filtering.smoothing.genealogy import take, trace_back
from numpyro_smc.filtering.smoothing.pairs import Pairs


def of_final_particles(history: Any) -> Pairs:
    """The lineages of all final particles, by their weights: O(NT); few distinct particles early on."""
    log_weights = history.steps["log_weights"]
    first, path = trace_back(history.ancestors, _everyone(log_weights[0]))
    past = jnp.concatenate([first[None], path[:-1]])
    weights = jax.nn.softmax(log_weights[-1], axis=0)
    return Pairs(past, path, jnp.broadcast_to(weights, path.shape))


def fixed_lag(history: Any, lag: int) -> Pairs:
    r"""The pair at step t by the lineages of the particles at step t + lag: O(N T lag) [1].

    The expectation is that of :math:`p(x_{t-1}, x_t \mid y_{0:t+L})`: biased by what later observations tell about
    :math:`x_t`, at any N.

    **References**

    1. *Sequential Monte Carlo smoothing with application to parameter estimation in nonlinear state space models*,
       J. Olsson, O. Cappé, R. Douc, E. Moulines (2008)
    """
    ancestors, log_weights = history.ancestors, history.steps["log_weights"]
    length, rank = ancestors.shape[0], ancestors.ndim - 2
    times = jnp.arange(length)

    def one(t: Array) -> Pairs:
        def back(number: Array, index: Array) -> Array:
            later = t + lag - number
            parents = take(ancestors[jnp.minimum(later, length - 1)], index, rank)
            return jnp.where(later < length, parents, index)

        present = lax.fori_loop(0, lag, back, _everyone(log_weights[0]))
        weights = jax.nn.softmax(log_weights[jnp.minimum(t + lag, length - 1)], axis=0)
        return Pairs(take(ancestors[t], present, rank), present, weights)

    return lax.map(one, times)


def by_twist(history: Any) -> Pairs:
    r"""Each step's particles by :math:`W_t r_t(x_t)`, with their ancestors: O(NT).

    With :math:`r_t(x_t) \propto p(y_{t+1:T-1} \mid x_t)` this is the two-filter formula
    :math:`p(x_t \mid y_{0:T-1}) \propto p(x_t \mid y_{0:t})\, p(y_{t+1:T-1} \mid x_t)`, consistent in N; with any other
    twist it is biased at every N.
    """
    log_weights = history.steps["log_weights"] + history.steps["cloud"].particles["log twist"]
    present = jnp.broadcast_to(_everyone(log_weights[0]), log_weights.shape)
    return Pairs(history.ancestors, present, jax.nn.softmax(log_weights, axis=1))


def _everyone(log_weights: Array) -> Array:
    """Indices of all particles, ``[N, *batch]``."""
    numbers = jnp.arange(log_weights.shape[0], dtype=jnp.int32)
    return jnp.broadcast_to(numbers.reshape((-1,) + (1,) * (log_weights.ndim - 1)), log_weights.shape)
