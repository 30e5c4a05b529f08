"""Training on a simulator: what a user calls, from simulations to a saved estimator."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_smc.ratio.masks import SizesMask, UniformMask
from numpyro_smc.ratio.networks import mlp
from numpyro_smc.ratio.nre import NRE
from numpyro_smc.ratio.truncation import Box, truncated
from tests.ratio.exact import LOCS, SCALES, ExactNetwork, exact_estimator, posterior, simulator

SMALL = {"batch_size": 128, "progress_bar": False}
X = jnp.array([1.3, 2.4])


def nre(**options):
    return NRE(simulator, ["a", "b"], trunk=mlp(32, 1), **{"loss": "A", **options})


@cache
def trained():
    return nre(masks=UniformMask()).train(random.key(0), 8000, max_epochs=20, learning_rate=5e-3, **SMALL)


def test_training_learns_the_ratio_of_any_subset():
    estimator, exact = trained(), ExactNetwork()
    found = estimator.simulate(random.key(1), 500)
    for names, kept in ((None, [1, 1, 1]), (["a"], [1, 0, 0]), (["b"], [0, 1, 1])):
        learned = estimator.log_ratio(found.theta, found.x, names)
        known = exact.log_ratio_of_features((), found.theta, found.x, np.array(kept, bool))
        assert np.corrcoef(np.asarray(learned), np.asarray(known))[0, 1] > 0.9
    assert len(estimator.training.table) == 20 and "RatioEstimator of a, b" in repr(estimator)


def test_a_saved_estimator_is_the_same_and_no_other_nre_takes_it(tmp_path):
    trained().save(tmp_path / "ratio")
    again = nre(masks=UniformMask()).load(tmp_path / "ratio")
    theta = jnp.array([0.3, -0.5, 1.0])
    np.testing.assert_array_equal(again.log_ratio(theta, X), trained().log_ratio(theta, X))
    assert again.box is None and again.training is None
    with pytest.raises(ValueError, match=r"NRE\.load: .* is of another NRE"):
        nre(masks=SizesMask()).load(tmp_path / "ratio")
    with pytest.raises(ValueError, match=r"NRE\.load: .*Build the NRE with the arguments"):
        nre().load(tmp_path / "ratio")


def test_simulations_on_disk_train_as_well_and_are_continued(tmp_path):
    plain = nre()
    data = plain.simulate_to(tmp_path / "data", random.key(2), 600, part_size=200, progress_bar=False)
    again = plain.simulate_to(tmp_path / "data", random.key(2), 800, part_size=200, progress_bar=False)
    assert (len(data), len(again)) == (600, 800)
    for stored in (again, tmp_path / "data"):
        estimator = plain.train(random.key(3), data=stored, max_epochs=1, validation=0.25, **SMALL)
        assert np.isfinite(estimator.training.table[0]["loss"])


def test_fixed_marginals_by_name():
    estimator = nre(marginals=[["a"], "b", "111"]).train(random.key(4), 600, max_epochs=1, **SMALL)
    assert estimator.network.marginals == ((True, False, False), (False, True, True), (True, True, True))
    assert estimator.marginal(X, "a").grid(20).density.shape == (20,)


def test_a_box_holds_what_the_ratio_leaves_possible():
    mean, covariance = posterior(X)
    box = truncated(random.key(5), exact_estimator(), X, None, epsilon=0.01)
    for i in range(3):
        values = np.linspace(*(LOCS[i] + 4.0 * SCALES[i] * np.array([-1, 1])), 20_001)
        log_ratio = -0.5 * (values - mean[i]) ** 2 / covariance[i, i] + 0.5 * ((values - LOCS[i]) / SCALES[i]) ** 2
        inside = values[log_ratio - log_ratio.max() > np.log(0.01)]
        ends = [float(box.low[i]), float(box.high[i])]
        np.testing.assert_allclose(ends, [inside[0], inside[-1]], atol=0.3 * SCALES[i])
    draws = np.random.default_rng(0).normal(LOCS, SCALES, (100_000, 3))
    inside = ((draws > np.asarray(box.low)) & (draws < np.asarray(box.high))).all(1)
    assert box.log_prior_mass == pytest.approx(np.log(inside.mean()), abs=0.05)


def test_rounds_train_on_the_truncated_prior():
    options = {"epsilon": 0.7, "max_epochs": 2, **SMALL}
    estimator = nre(masks=["=1", "111"]).train_rounds(random.key(5), X, 2, 1000, **options)
    assert estimator.box.log_prior_mass < 0
    theta = nre().simulate(random.key(6), 300, box=estimator.box).theta
    assert np.asarray(estimator.box.contains(theta)).all()


def test_a_tiny_box_is_refused():
    box = Box(jnp.asarray(LOCS) - 1e-3, jnp.asarray(LOCS) + 1e-3)
    with pytest.raises(ValueError, match="truncated region holds less than"):
        nre().simulate(random.key(0), 10, box=box)


def test_a_known_likelihood_is_pointed_out():
    def tractable():
        numpyro.sample("x", dist.Normal(numpyro.sample("mean", dist.Normal(0.0, 1.0)), 1.0))

    with pytest.warns(UserWarning, match="its likelihood is known"):
        NRE(tractable, ["mean"])


def broken():
    scale = numpyro.sample("scale", dist.Normal(0.0, 1.0))
    numpyro.deterministic("x", jnp.log(scale) + random.normal(numpyro.prng_key(), (2,)))


def test_simulations_that_are_not_finite_are_an_error_unless_asked_for():
    with pytest.raises(ValueError, match="of 100 simulations are not finite"):
        NRE(broken, ["scale"]).simulate(random.key(0), 100)
    kept = NRE(broken, ["scale"], nonfinite="drop").simulate(random.key(0), 100)
    assert 0 < len(kept) < 100 and (kept.theta > 0).all()
    clipped = NRE(broken, ["scale"], nonfinite=lambda x: np.nan_to_num(x, nan=-10.0)).simulate(random.key(0), 100)
    assert len(clipped) == 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nre().train(random.key(0)), "either num_simulations or data"),
        (lambda: nre().train(random.key(0), data=(np.zeros((5, 2)), np.zeros((5, 2)))), r"parameters \[n, 3\]"),
        (lambda: nre().data_of((np.zeros((5, 3)), np.zeros((5, 2)), np.zeros((5, 1)))), "needs 0 numbers of context"),
        (lambda: nre(masks=[]), "no subsets of the parameters"),
        (lambda: nre(masks=["000"]), "keeps no parameter"),
        (lambda: nre(masks=[["c"]]), "no parameter 'c'"),
        (lambda: nre(masks=UniformMask(), marginals="=1"), "exclude each other"),
        (lambda: nre(loss="D"), "loss must be one of"),
        (lambda: nre(loss="C", num_classes=200).train(random.key(0), 600, max_epochs=1, **SMALL), "lower num_classes"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
