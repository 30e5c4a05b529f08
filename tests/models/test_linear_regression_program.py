"""Conjugate linear regression: Bayes' theorem at a point, quadrature, and problems that come from the model."""

import jax
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal

from models import linear_regression
from tests.statistics_of_estimates import assert_mean


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def log_joint(problem: linear_regression.Problem, w) -> float:
    return float(log_density(linear_regression.model, problem, {}, {"w": w})[0])


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (30, 4)])
def test_evidence_is_the_joint_over_the_posterior(size):
    rng = np.random.default_rng(1)
    problem = linear_regression.random_problem(rng, *size)
    w = rng.normal(size=size[1])
    mean, covariance = linear_regression.posterior(*problem)
    expected = log_joint(problem, w) - multivariate_normal(mean, covariance).logpdf(w)
    assert linear_regression.log_evidence(*problem) == pytest.approx(expected, abs=1e-9)


def test_evidence_is_the_integral_of_the_joint():
    problem = linear_regression.random_problem(np.random.default_rng(2), 4, 1)
    w = np.linspace(-8, 8, 1001)
    joint = jax.vmap(lambda w: log_density(linear_regression.model, problem, {}, {"w": w})[0])(w[:, None])
    integral = np.exp(joint).sum() * (w[1] - w[0])
    assert linear_regression.log_evidence(*problem) == pytest.approx(np.log(integral), abs=1e-9)


def test_random_problems_take_turns_in_size_and_come_from_the_model():
    sizes = ((5, 1), (3, 4))
    problems = list(linear_regression.random_problems(0, 401, sizes))
    assert [problem.x.shape for problem in problems[:3]] == [(5, 1), (3, 4), (5, 1)]
    assert len(problems) == 401
    again = next(linear_regression.random_problems(0, 1, sizes))
    np.testing.assert_array_equal(again.y, problems[0].y)
    # y is N(0, C), so its squared length in units of C is chi-squared.
    lengths = [y @ np.linalg.solve(x @ x.T + scale**2 * np.eye(len(y)), y) / len(y) for x, y, scale in problems]
    assert_mean(lengths, 1.0)
    assert min(scale for *_, scale in problems) > 0.3
    assert max(scale for *_, scale in problems) < 2.0
