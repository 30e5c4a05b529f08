r"""True likelihood-to-evidence ratios of :mod:`models.slcp`, for any subset of its parameters, by quadrature.

Of kept parameters :math:`\theta_b`, the ratio is :math:`p(x \mid \theta_b) / p(x)`, both means of the likelihood under
the uniform prior of the parameters that are not kept. Means of the draws integrate to Gaussian probabilities of the
prior's square, along one axis in closed form. Scales are integrated in the logarithm of :math:`\theta_3` and
:math:`\theta_4`: the second one given the first and the correlation, where its reciprocal is nearly Gaussian; the first
one given the correlation. That is integrated in :math:`\theta_5`. Everything is smooth, so that Gauss-Legendre rules
converge fast.

**References**

1. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr

from models.slcp import BOUND, NUM_DRAWS, SCALE_JITTER

#: Below and above a scale's centre, in units of log theta: beyond, likelihoods are negligible.
BELOW, ABOVE = 1.5, 3.5
REACH = 8.0  # standard deviations


class Rule(NamedTuple):
    """Numbers of nodes."""

    scale: int = 48
    correlation: int = 48
    mean: int = 32


DEFAULT = Rule()


def log_ratio(theta: ArrayLike, x: ArrayLike, mask: ArrayLike, rule: Rule = DEFAULT) -> float:
    r""":math:`\log p(x \mid \theta_b) - \log p(x)`, with the scales' jitter.

    :param theta: ``[5]``; only the kept ones are used.
    :param x: ``[4, 2]``.
    :param mask: which parameters are kept, ``[5]``.
    """
    return log_mean_likelihood(x, theta, mask, rule) - log_mean_likelihood(x, theta, np.zeros(5, bool), rule)


def log_mean_likelihood(x: ArrayLike, theta: ArrayLike, mask: ArrayLike, rule: Rule = DEFAULT) -> float:
    r""":math:`\log p(x \mid \theta_b)`; with an empty mask the log evidence. Cost: 2.5 million likelihoods at most."""
    theta, x, mask = np.asarray(theta, np.float64), np.asarray(x, np.float64), np.asarray(mask, bool)
    if mask[3] and not mask[2]:  # the second scale is integrated given the first: exchange the axes
        order = [1, 0, 3, 2, 4]
        theta, mask, x = theta[order], mask[order], x[:, ::-1]
    centre = x.mean(0)
    offset = np.where(mask[:2], theta[:2] - centre, 0.0)
    scatter = (x - centre).T @ (x - centre)
    fifth, log_fifth = _nodes(-BOUND, BOUND, rule.correlation, 2 * BOUND)
    if mask[4]:
        fifth, log_fifth = theta[4:], np.zeros(1)
    rho = np.tanh(fifth)[:, None, None]
    first, second, cross = _of_reciprocals(scatter, offset, mask, rho)
    if mask[2]:
        s1, log_first = np.full((1, 1, 1), theta[2] ** 2 + SCALE_JITTER), np.zeros(1)
    else:
        spread = (first - cross**2 / second) / NUM_DRAWS
        s1, log_first = _scales(np.log(spread) / 4 - BELOW, np.log(spread) / 4 + ABOVE, rule.scale)
    s1, log_first = np.swapaxes(s1, 1, 2), np.swapaxes(np.atleast_3d(log_first), 1, 2)
    if mask[3]:
        s2, log_second = np.full((1, 1, 1), theta[3] ** 2 + SCALE_JITTER), np.zeros(1)
    else:
        # The reciprocal of the second scale is Gaussian but for its power in front.
        likely, reach = cross / (second * s1), REACH / np.sqrt(second)
        largest = np.maximum(likely, 0) + reach
        smallest = np.maximum(likely - reach, largest * math.exp(-2 * (BELOW + ABOVE + 1)))
        s2, log_second = _scales(-np.log(largest) / 2, -np.log(smallest) / 2, rule.scale)
    rest = 1 - rho**2
    within = (scatter[0, 0] / s1**2 - 2 * rho * scatter[0, 1] / (s1 * s2) + scatter[1, 1] / s2**2) / rest
    values = -NUM_DRAWS * np.log(2 * math.pi * s1 * s2) - NUM_DRAWS / 2 * np.log(rest) - within / 2
    values = values + _log_mean_factor(offset, mask, centre, s1, s2, rho, rule)
    values = values + log_first + log_second + log_fifth[:, None, None]
    peak = values.max()
    return float(peak + np.log(np.exp(values - peak).sum())) if np.isfinite(peak) else -math.inf


def _of_reciprocals(
    scatter: np.ndarray, offset: np.ndarray, mask: np.ndarray, rho: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minus twice the exponent is a quadratic form in the scales' reciprocals, but for the ends of the prior: the
    coefficients of both squares, and minus half that of the product."""
    if mask[0] and mask[1]:
        form, alone = scatter + NUM_DRAWS * np.outer(offset, offset), np.zeros(2)
    else:  # with one mean integrated, the offset of the other one stands alone
        form, alone = scatter, NUM_DRAWS * offset**2
    rest = 1 - rho**2
    return form[0, 0] / rest + alone[0], form[1, 1] / rest + alone[1], rho * form[0, 1] / rest


def _log_mean_factor(
    offset: np.ndarray,
    mask: np.ndarray,
    centre: np.ndarray,
    s1: np.ndarray,
    s2: np.ndarray,
    rho: np.ndarray,
    rule: Rule,
) -> np.ndarray:
    """Of the factor that the offset of the centre from the mean contributes, the mean over means that are not kept."""
    root = np.sqrt(NUM_DRAWS)
    cut = np.abs(centre)
    if mask[0] and mask[1]:
        a, b = offset[0] / s1, offset[1] / s2
        return -NUM_DRAWS / 2 * (a**2 - 2 * rho * a * b + b**2) / (1 - rho**2)
    # The axis that is integrated last has a smooth integrand if the prior's ends cut the other one.
    if mask[1] or (not mask[0] and cut[1] > cut[0]):  # the same with the axes exchanged
        offset, centre, mask, s1, s2 = offset[[1, 0]], centre[::-1], mask[[1, 0]], s2, s1
    # The second mean, given the first, is in the prior's interval with a Gaussian probability.
    width = np.sqrt(1 - rho**2) / root

    def given_first(a: np.ndarray) -> np.ndarray:
        low, high = (((end - centre[1]) / s2 - rho * a) / width for end in (-BOUND, BOUND))
        flip = low > 0
        low, high = np.where(flip, -high, low), np.where(flip, -low, high)
        with np.errstate(divide="ignore"):
            inside = np.log(ndtr(high) - ndtr(low))
        return inside + np.log(math.sqrt(2 * math.pi) * width * s2 / (2 * BOUND)) - NUM_DRAWS / 2 * a**2

    if mask[0]:
        return given_first(offset[0] / s1)
    low, high = (root * (end - centre[0]) / s1 for end in (-BOUND, BOUND))  # in standard errors
    low, high = np.maximum(low, np.minimum(-REACH, high - REACH)), np.minimum(high, np.maximum(REACH, low + REACH))
    node, log_weight = _nodes(-1.0, 1.0, rule.mean, 2.0)
    terms = [given_first((low + (high - low) * (1 + z) / 2) / root) + w for z, w in zip(node, log_weight, strict=True)]
    return np.logaddexp.reduce(terms) + np.log((high - low) * s1 / (2 * BOUND * root))


def _scales(low: np.ndarray, high: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales whose log theta lies between limits ``[..., 1]``, and the logarithms of their weights under the prior."""
    highest = math.log(BOUND)
    low = np.minimum(low, highest - BELOW)
    node, log_weight = _nodes(low, np.minimum(high, highest), number, BOUND)
    return np.exp(2 * node) + SCALE_JITTER, log_weight + node


def _nodes(low: ArrayLike, high: ArrayLike, number: int, volume: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the Gauss-Legendre rule between limits, the last axis; logarithms of the weights divided by ``volume``."""
    node, weight = np.polynomial.legendre.leggauss(number)
    width = np.subtract(high, low)
    return low + width * (1 + node) / 2, np.log(weight) + np.log(width / (2 * volume))
