"""Gradients through resampling, against finite differences of the bound with common random numbers.

Mixture of eight Gaussians in two dimensions, none of it symmetric; 8 particles and 8 transitions, double precision.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from benchmarks.annealed_gradients import PARAMETERS, POINTS, finite_differences, gradients, make_bound
from tests.statistics_of_estimates import assert_mean

DIM, NUM_PARTICLES, NUM_TRANSITIONS = SIZE = (2, 8, 8)
SCHEDULE = PARAMETERS.index("schedule")


def draws(method, point, num_runs, seed):
    """The gradient of each run by a method, or by differences where the method is named so: ``[runs, 4]``."""
    with jax.enable_x64(True):
        theta, keys = jnp.array(POINTS[SIZE][point]), random.split(random.key(seed), num_runs)
        name = method.removeprefix("differences of ")
        bound = make_bound(name, NUM_PARTICLES, NUM_TRANSITIONS, DIM)
        if name != method:
            return np.asarray(finite_differences(bound, theta, keys, 0.1))
        return np.asarray(gradients(bound, theta, keys))


@pytest.fixture(scope="module")
def differences():
    return draws("differences of none-always", "small", 8000, seed=0)


def assert_equal_means(values, truth, num_standard_errors=5.0):
    for column, expected in zip(values.T, truth.T, strict=True):
        error = expected.std(ddof=1) / np.sqrt(len(expected))
        assert_mean(column, expected.mean(), num_standard_errors, reference_error=error)


@pytest.mark.parametrize("method", ["score-always", "score_rb-always"])
def test_score_gradients_are_those_of_the_bound(differences, method):
    """4,000 runs against 8,000 differences, five standard errors, four derivatives: a false alarm in 2e-6."""
    assert_equal_means(draws(method, "small", 4000, seed=1), differences)


def test_without_resampling_the_pathwise_gradient_is_that_of_the_bound():
    """4,000 runs each, five standard errors, four derivatives: a false alarm in 2e-6."""
    truth = draws("differences of dais", "good", 4000, seed=0)
    assert_equal_means(draws("dais", "good", 4000, seed=1), truth)


def test_dropping_the_term_of_resampling_turns_the_gradient_of_the_schedule_around(differences):
    """Published finding of the reference table: -0.467 in truth, +0.920 without the term."""
    dropped = draws("none-always", "small", 2000, seed=1)[:, SCHEDULE]
    truth = differences[:, SCHEDULE]
    error = np.hypot(dropped.std(ddof=1) / np.sqrt(len(dropped)), truth.std(ddof=1) / np.sqrt(len(truth)))
    assert truth.mean() < 0.0 < dropped.mean()
    assert dropped.mean() - truth.mean() > 10 * error


@pytest.mark.slow
@pytest.mark.parametrize("point", ["small", "good"])
def test_score_gradients_are_those_of_the_bound_at_the_size_of_the_table(point):
    """40,000 runs each, three standard errors as stated for the table: eight derivatives, a false alarm in 2e-2."""
    truth = draws("differences of none-always", point, 40_000, seed=0)
    assert_equal_means(draws("score-always", point, 40_000, seed=1), truth, num_standard_errors=3.0)
