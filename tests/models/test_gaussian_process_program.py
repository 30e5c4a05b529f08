"""Gaussian-process regression: the programs against the exact answers, and those against the published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal, norm

from models import gaussian_process as gp


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["rbf1", "rbf2"])
def problem(request):
    return gp.load_problem(request.param)


@pytest.mark.parametrize("whiten", [False, True])
def test_evidence_is_the_joint_over_the_posterior(problem, whiten):
    mean, covariance = gp.posterior(problem, whiten)
    z = np.random.default_rng(0).multivariate_normal(mean, covariance)
    joint = float(log_density(gp.model, problem, {"whiten": whiten}, {"w" if whiten else "f": z})[0])
    expected = joint - multivariate_normal(mean, covariance).logpdf(z)
    assert gp.log_evidence(problem) == pytest.approx(expected, abs=1e-6)


def test_whitened_program_says_what_f_is(problem):
    w = np.random.default_rng(0).normal(size=30)
    trace = log_density(gp.model, problem, {"whiten": True}, {"w": w})[1]
    np.testing.assert_allclose(trace["f"]["value"], problem.scale_tril @ w, rtol=1e-10)


def test_density_keeps_its_precision_in_single_precision(problem):
    w = np.random.default_rng(0).normal(size=30)
    expected = norm.logpdf(w).sum() + norm(problem.scale_tril @ w, 0.25).logpdf(problem.y).sum()
    with jax.enable_x64(False):
        whitened = log_density(gp.model, problem, {"whiten": True}, {"w": jnp.asarray(w)})[0]
    assert float(whitened) == pytest.approx(expected, rel=1e-4)


# Computed with the kernel matrix rounded to single precision.
PUBLISHED = {
    "rbf1": (-13.960442902678636, -37.70188286, (-11.142, -7.918, -4.694), (-1.5693223, -1.1860335), 0.0062330596),
    "rbf2": (-20.68075144166407, -58.39909573, (-9.296, -6.560, -3.823), (-0.7163477, -1.3332711), 0.0156929260),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_exact_answers_are_the_published_ones(name):
    problem = gp.load_problem(name)
    log_evidence, bound, log_variances, mean, variance = PUBLISHED[name]
    found_mean, covariance = gp.posterior(problem)
    assert gp.log_evidence(problem) == pytest.approx(log_evidence, abs=1e-5)
    assert gp.factorised_bound(problem) == pytest.approx(bound, abs=0.011)
    np.testing.assert_allclose([np.log(v).mean() for v in gp.factorised_optima(covariance)], log_variances, atol=2e-3)
    np.testing.assert_allclose(found_mean[:2], mean, atol=2e-6)
    assert covariance[0, 0] == pytest.approx(variance, abs=1e-6)


def test_factorised_optima_are_stationary_points_of_their_divergences(problem):
    covariance = gp.posterior(problem)[1]
    precision = np.linalg.inv(covariance)

    def reverse(log_variances):
        return 0.5 * (jnp.exp(log_variances) @ np.diag(precision) - log_variances.sum())

    def forward(log_variances):
        return 0.5 * (jnp.exp(-log_variances) @ np.diag(covariance) + log_variances.sum())

    divergences = (reverse, lambda v: reverse(v) + forward(v), forward)
    for divergence, optimum in zip(divergences, gp.factorised_optima(covariance), strict=True):
        np.testing.assert_allclose(jax.grad(divergence)(np.log(optimum)), 0.0, atol=1e-6)


@pytest.mark.parametrize("whiten", [False, True])
def test_factorised_bound_is_the_expected_log_joint_and_entropy(problem, whiten):
    mean, covariance = gp.posterior(problem, whiten)
    variances = gp.factorised_optima(covariance).reverse
    design = np.eye(30) if not whiten else problem.scale_tril
    prior = problem.scale_tril @ problem.scale_tril.T if not whiten else np.eye(30)
    # The expectation of a quadratic is its value at the mean and a trace.
    expected_log_likelihood = norm(design @ mean, 0.25).logpdf(problem.y).sum() - 8 * (design**2 @ variances).sum()
    prior_precision = np.linalg.inv(prior)
    expected_log_prior = (
        multivariate_normal(np.zeros(30), prior).logpdf(mean) - 0.5 * np.diag(prior_precision) @ variances
    )
    entropy = 0.5 * np.log(2 * np.pi * np.e * variances).sum()
    bound = expected_log_likelihood + expected_log_prior + entropy
    assert gp.factorised_bound(problem, whiten) == pytest.approx(bound, abs=1e-5)


def test_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="'rbf3'; expected one of rbf1, rbf2"):
        gp.load_problem("rbf3")
