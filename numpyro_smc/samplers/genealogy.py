"""How far a run's estimates can be trusted, from which particles descend from whom."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def genealogical_variance(weights: Array, families: Array, num_families: int, exponent: Array | int) -> Array:
    r"""Estimate of :math:`\operatorname{Var}(\hat Z) / Z^2` from one run, by its genealogy [1, 2].

    With :math:`S_e` the weight of family :math:`e` of M, :math:`1 - (M / (M - 1))^k (1 - \sum_e S_e^2)`. Under
    multinomial resampling :math:`k` is one more than the number of resamplings, and the estimate consistent; schemes
    with less noise lose fewer families to chance, and :math:`k = 1` errs on the large side.

    :param weights: ``[N]``, sum to one, before any resampling. **families** - ``[N]``, in ``0..num_families - 1``.

    **References**

    1. *Variance estimation in the particle filter*, A. Lee, N. Whiteley (2018)
    2. *A general theory of particle filters in hidden Markov models and some applications*, H. Chan, T. Lai (2013)
    """
    shares = jax.ops.segment_sum(weights, families, num_families)
    factor = (num_families / max(num_families - 1, 1)) ** exponent
    return 1.0 - factor * (1.0 - jnp.sum(shares**2))


def mean_error(values: np.ndarray, weights: np.ndarray, families: np.ndarray) -> np.ndarray:
    r"""Standard error of a weighted mean: root of :math:`\sum_e (\sum_{i \in e} w_i (\phi_i - \bar\phi))^2`.

    :param values: ``[N, ...]``. **weights** - ``[N]``, sum to one. **families** - ``[N]``.
    """
    influence = weights.reshape(-1, *(1,) * (values.ndim - 1)) * (values - np.tensordot(weights, values, 1))
    sums = np.zeros((int(families.max()) + 1, *values.shape[1:]))
    np.add.at(sums, families, influence)
    return np.sqrt((sums**2).sum(0))


def log_scale_error(relative_variance: float) -> float:
    """Standard error of a log from the relative variance: its root if small, infinite where nothing is known."""
    return math.sqrt(-math.log1p(-max(relative_variance, 0.0))) if relative_variance < 1.0 else math.inf


class Moments(NamedTuple):
    """**mean** and **variance** of a weighted cloud, with the particles' **weights** and distances from the mean."""

    mean: Array
    variance: Array
    weights: Array
    centred: Array


def moments(values: Array, log_weights: Array) -> Moments:
    """What has no weight does not count, whatever its value.

    :param values, log_weights: ``[N]``.
    """
    weights = jnp.exp(log_weights) / jnp.sum(jnp.exp(log_weights))
    mean = jnp.sum(jnp.where(weights > 0.0, weights * values, 0.0))
    centred = jnp.where(weights > 0.0, values - mean, 0.0)
    return Moments(mean, jnp.sum(weights * centred**2), weights, centred)


def quadrature_error(of: Moments, families: Array, num_families: int, step: Array, *, upper: bool) -> Array:
    r"""What each family adds to the noise of one end of a step of :meth:`SMCResult.path_sampling`, ``[M]``.

    A step :math:`\Delta` contributes :math:`\tfrac\Delta2 (m_0 + m_1) - \tfrac{\Delta^2}{12} (v_1 - v_0)`, with mean
    and variance of the log likelihood at both ends. Families are independent to first order, over all temperatures:
    the squares of their sums add up to the variance of the integral.

    :param of: the cloud at that end. **families** - ``[N]``, in ``0..num_families - 1``.
    """
    second_order = (step**2 / 12.0) * (of.centred**2 - of.variance)
    influence = 0.5 * step * of.centred + (-second_order if upper else second_order)
    return jax.ops.segment_sum(of.weights * influence, families, num_families)
