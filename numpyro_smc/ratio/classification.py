r"""The formulas of classification losses whose optimum is the likelihood-to-evidence ratio.

All are normalised as the sum of the mean losses of two classes, :math:`2 \log 2` for two classes that are not told
apart. Rows are the first axis of ``joint``; a further one, of fixed marginals, is summed over.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import logsumexp

__all__ = ["PROPER", "SCORES", "balance", "binary", "contrastive", "softmax"]

#: Loss of the right class by its log odds :math:`z`, with :math:`p = \sigma(z)`.
SCORES: dict[str, Callable[[Array], Array]] = {
    "log": lambda z: jax.nn.softplus(-z),
    "quadratic": lambda z: jnp.square(jax.nn.sigmoid(-z)),
    "focal": lambda z: jnp.square(jax.nn.sigmoid(-z)) * jax.nn.softplus(-z),
    "peripheral": lambda z: (1 - jnp.square(jax.nn.sigmoid(z))) * jax.nn.softplus(-z),
}
#: Those whose optimum is the exact ratio.
PROPER = ("log", "quadratic")


def binary(joint: Array, marginal: Array, log_weights: Array | None = None, score: str = "log") -> Array:
    r"""NRE-A: :math:`\mathrm{mean}\, l(\log r(\theta, x)) + \mathrm{mean}\, w\, l(-\log r(\theta', x))`.

    :param joint: log ratios ``[B]`` or ``[B, M]`` of parameters and their own outputs.
    :param marginal: those of parameters and others' outputs, of the same shape.
    :param log_weights: :math:`\log w` of the marginal class, of the same shape: with the log ratio of another
        estimator, the optimum is what that one lacks, and no classifier can do better than chance if it is exact.
    :param score: :math:`l`, one of :data:`SCORES`; :math:`\log(1 + e^{-z})` by default.
    """
    of_marginal = SCORES[score](-marginal)
    if log_weights is not None:
        of_marginal = jnp.exp(log_weights) * of_marginal
    return _per_row(SCORES[score](joint)) + _per_row(of_marginal)


def softmax(joint: Array, contrasts: Array) -> Array:
    r"""NRE-B: :math:`-\mathrm{mean}\,[f_0 - \log \sum_{k < K} e^{f_k}]`, minimised by every :math:`\log r + c(x)`.

    :param joint: log ratios ``f_0``, ``[B]`` or ``[B, M]``.
    :param contrasts: those of :math:`K - 1` other parameters, ``[K - 1, B]`` or ``[K - 1, B, M]``.
    """
    return _per_row(logsumexp(jnp.concatenate([joint[None], contrasts]), axis=0) - joint)


def contrastive(joint: Array, joint_contrasts: Array, marginal: Array, gamma: float = 1.0) -> Array:
    r"""NRE-C: which of K parameters made the output, or none of them.

    .. math:: -\frac{2}{1 + \gamma} \mathrm{mean} \log \frac{K}{K + \gamma \sum_{k} e^{f_k}}
       - \frac{2 \gamma}{1 + \gamma} \mathrm{mean} \log \frac{\gamma e^{g_0}}{K + \gamma \sum_{k} e^{g_k}}

    Twice the published mean of the two classes: :math:`K = \gamma = 1` is NRE-A, :math:`\gamma \to \infty` twice NRE-B.

    :param joint: log ratios :math:`g_0`, ``[B]`` or ``[B, M]``.
    :param joint_contrasts: :math:`g_1, \ldots, g_{K - 1}`, ``[K - 1, B]`` or ``[K - 1, B, M]``.
    :param marginal: :math:`f_0, \ldots, f_{K - 1}`, ``[K, B]`` or ``[K, B, M]``, none of the output's own parameters.
    :param gamma: prior odds that one of the K made the output.
    """
    log_odds, log_none = jnp.log(gamma), jnp.log(float(len(marginal)))

    def log_total(log_ratios: Array) -> Array:
        return jnp.logaddexp(log_none, log_odds + logsumexp(log_ratios, axis=0))

    of_none = _per_row(log_total(marginal) - log_none)
    of_one = _per_row(log_total(jnp.concatenate([joint[None], joint_contrasts])) - log_odds - joint)
    return 2 / (1 + gamma) * of_none + 2 * gamma / (1 + gamma) * of_one


def balance(joint: Array, marginal: Array) -> Array:
    r"""Lack of balance, squared: :math:`(\mathrm{mean}\, \sigma(\log r) + \mathrm{mean}\, \sigma(\log r') - 1)^2`.

    :param joint: log ratios :math:`\log r`, ``[B]`` or ``[B, M]``.
    :param marginal: those of others' parameters, :math:`\log r'`, ``[K, B]`` or ``[K, B, M]``.
    """
    total = jax.nn.sigmoid(joint).mean(axis=0) + jax.nn.sigmoid(marginal).mean(axis=(0, 1))
    return jnp.square(total - 1).sum()


def _per_row(values: Array) -> Array:
    """Mean over the rows, the first axis, and sum over the rest."""
    return values.sum() / len(values)
