"""SLCP's true ratios: against closed forms, importance sampling, and a reference with Monte Carlo errors."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import t as student

from models import slcp
from models import slcp_true_ratios as ratios

REFERENCE = np.load(Path(__file__).parent / "data" / "slcp_true_ratios.npz")
THETA, X, MASKS = REFERENCE["theta"].astype(float), REFERENCE["x"].astype(float), REFERENCE["masks"]
NONE = np.zeros(5, bool)


def sampled_log_mean_likelihood(theta, x, mask, num_samples=200_000, seed=0) -> tuple[float, float]:
    """By importance sampling around the data, and its standard error."""
    rng, centre = np.random.default_rng(seed), x.mean(0)
    draws, log_weights = np.tile(theta[:, None], num_samples), np.zeros(num_samples)
    for axis in (0, 1):
        if not mask[2 + axis]:
            deviation = x[:, axis] - (theta[axis] if mask[axis] else centre[axis])
            low = np.log(np.mean(deviation**2)) / 4 - 2.6
            node = rng.uniform(low, np.log(3), num_samples)
            draws[2 + axis], log_weights = np.exp(node), log_weights + np.log(np.log(3) - low) + node - np.log(3)
    if not mask[4]:
        draws[4] = rng.uniform(-3, 3, num_samples)
    for axis in (0, 1):
        if not mask[axis]:
            noise, scale = rng.standard_t(5, num_samples), (draws[2 + axis] ** 2 + 1e-8) / 2
            draws[axis] = centre[axis] + scale * noise
            log_weights += np.log(scale) - np.log(6) - student.logpdf(noise, 5)
            log_weights[np.abs(draws[axis]) > 3] = -np.inf
    first, second, rho = draws[2] ** 2 + 1e-8, draws[3] ** 2 + 1e-8, np.tanh(draws[4])
    a, b = (x[:, :1] - draws[0]) / first, (x[:, 1:] - draws[1]) / second
    quadratic = ((a**2 - 2 * rho * a * b + b**2) / (1 - rho**2)).sum(0)
    values = log_weights - 4 * np.log(2 * np.pi * first * second) - 2 * np.log(1 - rho**2) - quadratic / 2
    weights = np.exp(values - values.max())
    error = weights.std() / weights.mean() / np.sqrt(num_samples)
    return float(logsumexp(values) - np.log(num_samples)), float(error)


@pytest.mark.parametrize("number", [0, 3])
def test_all_kept_is_the_likelihood(number):
    found = ratios.log_mean_likelihood(X[number], THETA[number], ~NONE)
    assert found == pytest.approx(float(slcp.log_likelihood(THETA[number], X[number])), rel=1e-4)


@pytest.mark.parametrize("mask", [[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1]])
@pytest.mark.parametrize("number", [0, 91])
def test_quadrature_agrees_with_importance_sampling(mask, number):
    """Five standard errors of 200,000 draws: false alarms 6e-7 per case."""
    mask = np.array(mask, bool)
    expected, error = sampled_log_mean_likelihood(THETA[number], X[number], mask)
    assert error < 0.04
    assert abs(ratios.log_mean_likelihood(X[number], THETA[number], mask) - expected) < 5 * error


@pytest.mark.parametrize("mask", [[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 1, 1, 0, 0]])
@pytest.mark.parametrize("number", [1, 5])
def test_more_nodes_change_nothing(mask, number):
    """Data that are hard: nearly on a line, and cut by the end of the prior."""
    mask = np.array(mask, bool)
    found = [
        ratios.log_mean_likelihood(X[number], THETA[number], mask, r) for r in (ratios.DEFAULT, ratios.Rule(64, 56))
    ]
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_exchanging_the_axes_changes_nothing():
    order, mask = [1, 0, 3, 2, 4], np.array([1, 0, 0, 1, 0], bool)
    found = ratios.log_ratio(THETA[4], X[4], mask)
    assert found == pytest.approx(ratios.log_ratio(THETA[4][order], X[4][:, ::-1], mask[order]), abs=1e-5)


@pytest.mark.parametrize("kept", [0, 4])
def test_ratio_has_mean_one_under_the_prior(kept):
    """Of one parameter at a time, by quadrature over it."""
    node, weight = np.polynomial.legendre.leggauss(24)
    rule, mask = ratios.Rule(32, 32, 24), np.arange(5) == kept
    evidence = ratios.log_mean_likelihood(X[0], THETA[0], NONE, rule)
    values = [ratios.log_mean_likelihood(X[0], np.full(5, 3 * z), mask, rule) for z in node]
    assert np.dot(weight, np.exp(np.array(values) - evidence)) / 2 == pytest.approx(1, abs=1e-4)


def test_ratios_of_all_masks_agree_with_the_reference():
    """Six pairs. The file's errors are those of its evidences; its numerators have errors of their own."""
    for number in range(6):
        mine = [ratios.log_mean_likelihood(X[number], THETA[number], mask) for mask in MASKS]
        difference = np.array(mine) - ratios.log_mean_likelihood(X[number], THETA[number], NONE)
        difference -= REFERENCE["log_ratio"][:, number]
        assert abs(difference[-1]) < 5 * REFERENCE["log_evidence_error"][number]
        assert np.abs(difference).max() < 5 * REFERENCE["log_evidence_error"][number] + 0.05


@pytest.mark.slow
def test_reference_is_reproduced_to_its_errors_and_gives_the_bayes_floor():
    """256 pairs; the loss of the true ratios under uniform masks is 0.393, with a standard error of 0.025 of the pairs.

    Logarithms of Monte Carlo evidences are low by half their variance and skewed: five of 256 exceed three errors.
    """
    rolled = np.roll(THETA, 1, axis=0)
    evidence = np.array([ratios.log_mean_likelihood(x, t, NONE) for x, t in zip(X, THETA, strict=True)])
    joint, marginal = (
        np.array([[ratios.log_mean_likelihood(x, t, m) for x, t in zip(X, thetas, strict=True)] for m in MASKS])
        - evidence
        for thetas in (THETA, rolled)
    )
    difference = joint - REFERENCE["log_ratio"]
    scores = difference[-1] / REFERENCE["log_evidence_error"]
    assert np.abs(scores).max() < 5 and 0.7 < scores.std() < 1.4 and np.abs(np.median(difference)) < 0.03
    assert np.median(np.abs(difference)) < 0.05
    loss = (np.logaddexp(0, -joint) + np.logaddexp(0, marginal)).mean(1)
    sizes = MASKS.sum(1)
    assert loss.mean() == pytest.approx(0.393, abs=0.002)
    by_size = [loss[sizes == size].mean() for size in range(1, 6)]
    np.testing.assert_allclose(by_size, [0.827, 0.470, 0.261, 0.136, 0.060], atol=0.004)
