"""Diagnostics of an exact ratio pass; those of an overconfident one do not."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_smc.ratio.corner import corner
from numpyro_smc.ratio.diagnostics import calibration
from numpyro_smc.ratio.diagnostics.calibration import coverage, marginal_coverage, sbc, tarp
from numpyro_smc.ratio.diagnostics.consistency import consistency
from numpyro_smc.ratio.diagnostics.local_c2st import LocalTest, local_c2st
from numpyro_smc.ratio.diagnostics.power import mean_ratio, roc
from numpyro_smc.ratio.diagnostics.simulated_posteriors import log_posteriors, simulated_posteriors
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.losses import SoftmaxLoss
from tests.ratio.exact import DESIGN, LOCS, NOISE, SCALES, ExactNetwork, exact_estimator, narrow_estimator, posterior

OPTIONS = {"batch_size": 100, "moves": "rwmh", "num_moves": 5}
_simulate = cache(lambda of, seed: simulated_posteriors(random.key(seed), of(), 200, 100, **OPTIONS))


@pytest.fixture(autouse=True)
def same_posteriors(monkeypatch):
    """All checks look at the same posteriors: sampling them is what costs."""

    def simulated(rng_key, estimator, *_, **__):
        return _simulate(exact_estimator if estimator is exact_estimator() else narrow_estimator, 0)

    monkeypatch.setattr(calibration, "simulated_posteriors", simulated)


def test_posteriors_of_simulations_are_exact():
    found = _simulate(exact_estimator, 0)
    means = np.stack([posterior(x)[0] for x in np.asarray(found.x)])
    _, covariance = posterior(found.x[0])
    errors = (np.asarray(found.samples).mean(1) - means) / np.sqrt(np.diag(covariance) / 40)
    assert (np.abs(errors.mean(0)) < 5 / np.sqrt(200)).all() and (errors.std(0) < 2).all()


@pytest.mark.parametrize("check", [sbc, coverage, tarp])
def test_exact_ratios_pass_and_overconfident_ones_fail(check):
    """False alarms: 1 in 100 for each check, at a fixed seed."""
    assert check(exact_estimator(), random.key(1), 200, 100).is_uniform()
    assert not check(narrow_estimator(), random.key(1), 200, 100).is_uniform(1e-4)


def test_overconfidence_is_read_off_the_coverage():
    (line,) = coverage(narrow_estimator(), random.key(1), 200, 100).table()
    assert line["reading"] == "overconfident" and line["deviation"] < -0.1


def test_ranks_have_a_column_for_each_element_asked_for():
    assert sbc(exact_estimator(), random.key(1), 200, 100, ["b"]).names == ("b[0]", "b[1]")


def test_log_posteriors_are_those_of_the_gaussian_up_to_a_factor():
    found = _simulate(exact_estimator, 0)
    true, sampled = log_posteriors(exact_estimator(), found)
    mean, covariance = posterior(found.x[3])
    precision = np.linalg.inv(covariance)
    expected = [-0.5 * (t - mean) @ precision @ (t - mean) for t in np.asarray(found.samples[3])[:5]]
    np.testing.assert_allclose(np.diff(sampled[3, :5]), np.diff(expected), atol=1e-3)
    assert true.shape == (200,)


def test_mutual_information_and_mean_ratio_of_an_exact_ratio():
    found = roc(exact_estimator(), random.key(2), 20_000)
    signal = (DESIGN * SCALES**2) @ DESIGN.T
    exact = 0.5 * np.log(np.linalg.det(np.eye(2) + np.linalg.solve(np.diag(NOISE**2), signal)))
    value, error = found.mutual_information
    assert abs(value - exact) < 5 * error
    value, error = found.mean_ratio
    assert abs(value - 1) < 5 * error
    assert 0.5 < found.area < 1 and {line["quantity"] for line in found.table()} >= {"area under the ROC curve"}
    assert len(found.plot().lines) == 2 and "1 if the ratio is right" in repr(found)


def test_an_exact_adversary_leaves_nothing_to_tell_apart():
    found = roc(exact_estimator(), random.key(3), 20_000, adversary=exact_estimator())
    assert found.area == pytest.approx(0.5, abs=0.03)


def test_area_counts_ties_half():
    knows_nothing = RatioEstimator(
        exact_estimator().simulator,
        ExactNetwork(lambda theta: jnp.nan_to_num(-jnp.inf)),
        (),
        exact_estimator().loss,
    )
    found = roc(knows_nothing, random.key(4), 500)
    assert found.area == pytest.approx(0.5, abs=1e-6)


def test_mean_ratio_by_observation():
    x = jnp.array([DESIGN @ LOCS, DESIGN @ LOCS + 1.0])
    means, errors = mean_ratio(exact_estimator(), random.key(5), x, 20_000)
    assert (np.abs(means - 1) < 5 * errors).all() and (errors < 0.1).all()
    only_up_to_a_factor = RatioEstimator(exact_estimator().simulator, ExactNetwork(), (), SoftmaxLoss(5))
    with pytest.raises(ValueError, match="means nothing"):
        mean_ratio(only_up_to_a_factor, random.key(0), x)


def test_marginals_of_one_ratio_are_consistent():
    x = jnp.array([[1.0, 0.5]])
    found = consistency(exact_estimator(), x, num=40)
    assert len(found.subsets) == 6 and np.nanmax(found.distances) < 0.01
    assert np.isnan(found.distances[0, 1]) and len(found.table()) == 9
    assert found.plot().images and "Consistency of 6 marginals" in repr(found)


def test_marginals_that_disagree_are_found():
    class Shifted(ExactNetwork):
        def log_ratio_of_features(self, weights, theta, features, mask=None):
            shift = jnp.where(jnp.sum(jnp.asarray(mask)) == 2, 1.0, 0.0)
            return super().log_ratio_of_features(weights, theta + shift, features, mask)

    estimator = RatioEstimator(exact_estimator().simulator, Shifted(), (), exact_estimator().loss)
    found = consistency(estimator, jnp.array([[1.0, 0.5]]), [["a"], ["a", "b[0]"]], num=40)
    assert found.distances[0, 1] > 0.02


def test_local_test_runs_and_counts_its_null():
    assert LocalTest(0.3, np.array([0.1, 0.2, 0.4])).p_value == 0.5
    x = jnp.asarray(DESIGN @ LOCS)
    found = local_c2st(narrow_estimator(), random.key(6), x, 200, 100, 4, **OPTIONS)
    assert 0 <= found.statistic <= 0.25 and found.null.shape == (4,) and "shuffled classes" in repr(found)
    assert found.table()[0]["p-value"] == found.p_value and len(found.plot().lines) == 1


def test_coverage_of_marginals_on_grids():
    assert marginal_coverage(exact_estimator(), random.key(7), 500, num=100).is_uniform()
    found = marginal_coverage(narrow_estimator(), random.key(7), 500, ["b"], num=100)
    assert found.names == ("b[0]", "b[1]") and not found.is_uniform(1e-4)
    assert all(line["reading"] == "overconfident" for line in found.table())


def test_corner_has_a_panel_for_each_pair():
    figure = corner(exact_estimator(), jnp.asarray(DESIGN @ LOCS), ["a", "b[1]"], num=30, truth=[0.5, 2.0])
    assert sum(ax.get_visible() for ax in figure.axes) == 3
    assert figure.axes[2].get_xlabel() == "a" and figure.axes[2].get_ylabel() == "b[1]"
    with pytest.raises(ValueError, match="truth has 1 values"):
        corner(exact_estimator(), jnp.zeros(2), ["a", "b[1]"], truth=[0.5])
