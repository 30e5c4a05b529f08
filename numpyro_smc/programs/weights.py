"""Log-weight arithmetic along the leading (particle) axis, safe at ``-inf`` in values and in gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_FEW_TERMS = 64


def log_mean_exp(log_weights: Array) -> Array:
    r"""Logarithm of the mean weight, :math:`\log \tfrac1N \sum_i e^{\ell_i}`, over the leading axis.

    :param log_weights: shape ``[N, ...]``; ``-inf`` marks a dead particle.
    :return: shape ``[...]``; ``-inf`` (with zero gradient) where every particle is dead.
    """
    return normalise(log_weights)[1]


def normalise(log_weights: Array) -> tuple[Array, Array, Array]:
    r"""Log weights of mean one, the log mean weight, and the effective sample size, from one pass.

    With :math:`m = \max_i \ell_i` and :math:`u_i = e^{\ell_i - m}`: the log mean is
    :math:`m + \log\tfrac1N\sum_i u_i` and the effective sample size :math:`(\sum_i u_i)^2 / \sum_i u_i^2`.

    :param log_weights: shape ``[N, ...]``; ``-inf`` marks a dead particle.
    :return: log weights ``[N, ...]`` of mean one, their former log mean ``[...]``, effective sample size ``[...]``
        (zero where every particle is dead).
    """
    num_particles = log_weights.shape[0]
    peak = jax.lax.stop_gradient(jnp.max(log_weights, axis=0))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    # Dead particles are given a finite value first, so that no gradient of exp(-inf) is ever formed.
    dead = jnp.isneginf(log_weights)
    scaled = jnp.where(dead, 0.0, jnp.exp(jnp.where(dead, 0.0, log_weights - peak)))
    total = jnp.sum(scaled, axis=0)
    extinct = total == 0.0  # false where a weight is not a number: that must show in the result
    log_mean = jnp.where(extinct, -jnp.inf, peak + jnp.log(jnp.where(extinct, 1.0, total) / num_particles))
    normalised = jnp.where(dead, -jnp.inf, log_weights - jnp.where(extinct, 0.0, log_mean))
    fixed = jax.lax.stop_gradient(scaled)
    sum_of_squares = jnp.sum(fixed * fixed, axis=0)
    ess = jnp.sum(fixed, axis=0) ** 2 / jnp.where(extinct, 1.0, sum_of_squares)
    return normalised, log_mean, ess


def effective_sample_size(log_weights: Array) -> Array:
    r"""Effective sample size :math:`(\sum_i w_i)^2 / \sum_i w_i^2` over the leading axis.

    :param log_weights: unnormalised, shape ``[N, ...]``.
    :return: shape ``[...]``, between 1 and N; 0 where every particle is dead.
    """
    return normalise(log_weights)[2]


def add_compensated(total: Array, lost: Array, term: Array) -> tuple[Array, Array]:
    """One more term of a running sum, whose error does not grow with the number of terms (Kahan's summation).

    :param lost: what rounding has added to the total so far; zero to begin with.
    :return: the new total, and what rounding has added to it.
    """
    term = term - lost
    new = total + term
    return new, jnp.where(jnp.isfinite(new), (new - total) - term, 0.0)


def sum_of_steps(terms: Array) -> Array:
    """The sum over the leading axis, of many terms as exact as of a few: in pairs, with the rounding errors kept.

    :param terms: ``[T, ...]``; differentiated as a plain sum.
    """
    plain = jnp.sum(terms, axis=0)
    if terms.shape[0] <= _FEW_TERMS:
        return plain
    terms = jax.lax.stop_gradient(terms)
    lost = jnp.zeros_like(terms)
    while terms.shape[0] > 1:
        half, odd = divmod(terms.shape[0], 2)
        first, second = terms[:half], terms[half : 2 * half]
        both = first + second
        rounded = both - first
        error = (first - (both - rounded)) + (second - rounded)
        lost_of_both = lost[:half] + lost[half : 2 * half] + error
        terms, lost = (
            (jnp.concatenate([both, terms[-1:]]), jnp.concatenate([lost_of_both, lost[-1:]]))
            if odd
            else (both, lost_of_both)
        )
    exact = terms[0] + lost[0]
    is_finite = jnp.isfinite(plain)
    gradient = jnp.where(is_finite, plain - jax.lax.stop_gradient(plain), 0.0)
    return jnp.where(is_finite, exact + gradient, plain)


def impossible_if_nan(log_density: Array) -> Array:
    """Log densities, minus infinity where they are not a number: what cannot be evaluated is never accepted."""
    return jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)


class LeaveOneOut(NamedTuple):
    r"""Each log weight against the others, both relative to the largest (no cancellation at any offset).

    - **own** - :math:`\ell_k - \max_l \ell_l`, ``[K, ...]``.
    - **others** - :math:`\log\sum_{l \ne k} e^{\ell_l} - \max_l \ell_l`; ``-inf`` where all others are dead.
    - **peak** - :math:`\max_l \ell_l` (zero if all are dead), ``[...]``.
    - **log_odds** - :math:`\delta_k`, own minus others: ``-inf`` for a dead particle, ``inf`` for a sole survivor.
    """

    own: Array
    others: Array
    peak: Array

    @property
    def log_odds(self) -> Array:
        return self.odds_of(self.own)

    def odds_of(self, log_weights: Array) -> Array:
        """Log odds of other weights (relative to the largest) in each particle's place."""
        return jnp.where(jnp.isneginf(log_weights), -jnp.inf, log_weights - self.others)


def leave_one_out(log_weights: Array) -> LeaveOneOut:
    r"""Log odds of each particle against the others, :math:`\delta_k = \ell_k - \log\sum_{l \ne k} e^{\ell_l}`.

    The largest weight is left out by summing the others; left out of a sum that contains the largest, any other weight
    is at most half of it, so that neither case loses digits. Cost: O(K).

    :param log_weights: shape ``[K, ...]``; ``-inf`` marks a dead particle.
    """
    is_peak = jnp.arange(log_weights.shape[0]).reshape((-1,) + (1,) * (log_weights.ndim - 1)) == jnp.argmax(
        log_weights, axis=0
    )
    peak = jnp.max(log_weights, axis=0)
    all_dead = jnp.isneginf(peak)
    peak = jnp.where(all_dead, 0.0, peak)
    own = log_weights - peak
    scaled = jnp.exp(own)
    others_of_peak = jax.nn.logsumexp(jnp.where(is_peak, -jnp.inf, own), axis=0)
    remainder = jnp.sum(scaled, axis=0) - scaled
    others = jnp.where(is_peak, others_of_peak, jnp.log(jnp.where(is_peak | (remainder <= 0.0), 1.0, remainder)))
    return LeaveOneOut(own, jnp.where(all_dead, -jnp.inf, others), peak)
