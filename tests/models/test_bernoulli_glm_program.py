"""The Bernoulli GLM: published design and precision, and a likelihood that counts the spike trains with the same x."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from models import bernoulli_glm as glm


def test_design_is_one_delayed_stimulus_beside_ones():
    design = glm.design_matrix()
    assert design.shape == (100, 10) and design.dtype == np.float32
    np.testing.assert_array_equal(design[:, 0], 1)
    np.testing.assert_allclose(design[:3, 1], [0.49671414, -0.1382643, 0.64768857], rtol=1e-6)  # NumPy's seed 42
    for delay in range(9):
        np.testing.assert_array_equal(design[delay:, 1 + delay], design[: 100 - delay, 1])
        np.testing.assert_array_equal(design[:delay, 1 + delay], 0)


def test_precision_penalises_second_differences():
    precision, filter_ = glm.prior_precision(), np.random.default_rng(0).normal(size=9)
    before = np.concatenate([[0, 0], filter_])
    second = filter_ - 2 * before[1:-1] + before[:-2] + np.sqrt(np.arange(9) / 9) * filter_
    assert filter_ @ precision[1:, 1:] @ filter_ == pytest.approx((second**2).sum())
    assert precision[0, 0] == 0.5 and not np.any(precision[0, 1:]) and not np.any(precision[1:, 0])


def test_prior_has_the_precision():
    site = handlers.trace(handlers.seed(glm.prior, jax.random.key(0))).get_trace()["theta"]["fn"]
    theta = np.random.default_rng(1).normal(size=10)
    difference = site.log_prob(jnp.zeros(10)) - site.log_prob(jnp.asarray(theta))
    assert float(difference) == pytest.approx(theta @ glm.prior_precision() @ theta / 2, rel=1e-4)


def test_data_are_the_sufficient_statistics_of_a_hidden_spike_train():
    trace = handlers.trace(handlers.seed(glm.model, jax.random.key(0))).get_trace()
    y, x = np.asarray(trace["y"]["value"]), np.asarray(trace["x"]["value"])
    assert y.shape == (100,) and set(np.unique(y)) == {0, 1} and trace["x"]["type"] == "deterministic"
    np.testing.assert_allclose(x, glm.design_matrix().T @ y, rtol=1e-5, atol=1e-5)
    assert x[0] == y.sum()


def test_log_likelihood_is_that_of_the_spike_train():
    trace = handlers.trace(handlers.seed(glm.model, jax.random.key(1))).get_trace()
    found = glm.log_likelihood(trace["theta"]["value"], trace["x"]["value"])
    assert float(found) == pytest.approx(float(trace["y"]["fn"].log_prob(trace["y"]["value"])), rel=1e-4)


def test_likelihoods_of_all_spike_trains_add_up_to_one(monkeypatch):
    """Eight steps: 256 spike trains, each with statistics of its own."""
    design = glm.design_matrix()[20:28]
    monkeypatch.setattr(glm, "design_matrix", lambda: design)
    trains = np.array(list(itertools.product((0, 1), repeat=8)), np.float32)
    theta = jnp.asarray(np.random.default_rng(2).normal(size=10), jnp.float32)
    assert float(jnp.exp(glm.log_likelihood(theta, trains @ design)).sum()) == pytest.approx(1, abs=1e-4)
