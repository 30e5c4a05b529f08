"""Importance sampling, its Pareto shapes, and the numbers that every estimate states."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy import stats

from numpyro_smc.evidence.estimate import Evidence, _student_quantile, log_mean_and_error, smoothed
from numpyro_smc.evidence.importance import _compiled, importance
from numpyro_smc.programs.pareto import pareto_k
from numpyro_smc.programs.sites import BatchPlates
from tests.evidence import conjugate
from tests.statistics_of_estimates import assert_unbiased_evidence


def test_a_good_guide_gives_the_evidence_of_every_data_point():
    """400 data points, 200 draws each; five standard errors."""
    x = conjugate.data(3, 400)
    found = importance(random.key(0), conjugate.model, x, guide=conjugate.guide, num_samples=200, batch_size=50)
    assert_unbiased_evidence(found.per_datapoint - conjugate.exact(x), 0.0)
    assert found.pareto_k.shape == found.ess.shape == (400,)
    assert found.verdict.startswith("Trustworthy")


def test_discrete_latents_are_welcome():
    def mixture(x):
        with numpyro.plate("data", len(x)):
            component = numpyro.sample("component", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(2.0 * component, 1.0), obs=x)

    x = jnp.array([0.3, 2.5, 1.0])
    found = importance(random.key(0), mixture, x, num_samples=4000)
    exact = jnp.log(0.7 * jnp.exp(dist.Normal(0.0, 1.0).log_prob(x)) + 0.3 * jnp.exp(dist.Normal(2.0, 1.0).log_prob(x)))
    np.testing.assert_array_less(jnp.abs(found.per_datapoint - exact), 5 * found.per_datapoint_error)


def test_a_guide_that_is_too_narrow_is_warned_of_by_its_pareto_k():
    def narrow(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.0, 0.1).expand([len(x), 2]).to_event(1))

    x = conjugate.data(3, 5)
    with pytest.warns(UserWarning, match="Pareto k above 0.7"):
        found = importance(random.key(0), conjugate.model, x, guide=narrow, num_samples=1000)
    assert float(found.pareto_k.min()) > 0.7
    assert found.verdict.startswith("Not to be trusted") and "Pareto k" in found.verdict


def test_a_second_call_compiles_nothing():
    x = conjugate.data(3, 5)
    for i in range(2):
        importance(random.key(i), conjugate.model, x + i, guide=conjugate.guide, num_samples=100)
    assert _compiled(conjugate.model, conjugate.guide, 100, None, "auto").num_compiled() == 1


def test_pareto_k_is_the_shape_of_the_tail():
    """Weights of a Pareto law with shape k: 20,000 of them give k to 0.1 (five standard errors)."""
    for shape in (0.3, 0.9):
        log_weights = shape * random.exponential(random.key(1), (20_000, 2))
        np.testing.assert_allclose(pareto_k(log_weights), shape, atol=0.2)
    assert pareto_k(jnp.zeros((100, 3))).tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(pareto_k(jnp.arange(10.0)))


def test_weights_that_all_vanish_are_an_error_that_names_the_site():
    def model(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(FloatingPointError, match=r"importance: 1 of 1 elements.*site 'x' of the model"):
        importance(random.key(0), model, jnp.asarray(jnp.inf), num_samples=10)


def test_the_jackknife_error_is_that_of_leaving_each_weight_out():
    log_weights = 300.0 + 2.0 * random.normal(random.key(0), (12, 3))
    value, error, ess = log_mean_and_error(log_weights)
    weights = np.exp(np.asarray(log_weights, np.float64) - 300.0)
    left_out = np.log(np.stack([np.delete(weights, i, axis=0).mean(0) for i in range(12)]))
    np.testing.assert_allclose(error, np.sqrt(11 / 12 * np.sum((left_out - left_out.mean(0)) ** 2, axis=0)), rtol=1e-4)
    np.testing.assert_allclose(value, 300.0 + np.log(weights.mean(0)), rtol=1e-6)
    np.testing.assert_allclose(ess, weights.sum(0) ** 2 / (weights**2).sum(0), rtol=1e-4)


def test_a_sole_surviving_weight_has_an_infinite_error_and_one_weight_none():
    sole = jnp.array([-jnp.inf, 0.0, -jnp.inf])
    value, error, ess = log_mean_and_error(sole)
    np.testing.assert_allclose([value, error, ess], [-np.log(3.0), np.inf, 1.0], rtol=1e-6)
    assert np.isnan(log_mean_and_error(jnp.zeros(1))[1])


@pytest.mark.parametrize("degrees", [5, 15, 200])
def test_quantiles_of_student_t(degrees):
    np.testing.assert_allclose(_student_quantile(0.95, degrees), stats.t.ppf(0.975, degrees), rtol=5e-3)


def made_up(**changes):
    fields = {
        "method": "ais",
        "num_samples": 16,
        "per_datapoint": jnp.array([-3.0, -5.0, -4.0]),
        "per_datapoint_error": jnp.array([0.1, 0.2, 0.2]),
        "ess": jnp.array([12.0, 9.0, 10.0]),
        "plates": BatchPlates(("data",), (-1,), (3,), 1.0),
        "mean_log_weight": jnp.array([-3.2, -5.1, -4.4]),
        "acceptance": jnp.full((20, 3), 0.7),
    }
    return Evidence(**(fields | changes))


def test_the_verdict_counts_what_speaks_against_the_value():
    assert made_up().verdict.startswith("No sign of trouble")
    assert "1 of 3 elements have a standard error" in made_up(per_datapoint_error=jnp.array([0.1, 0.9, 0.2])).verdict
    assert "1 of 3 elements hang on" in made_up(ess=jnp.array([12.0, 1.1, 9.0])).verdict
    assert "3 of 3 elements have chains that accept" in made_up(acceptance=jnp.full((20, 3), 0.05)).verdict
    assert "single weight" in made_up(num_samples=1).verdict


def test_a_few_bad_elements_of_many_are_mentioned_but_do_not_condemn():
    errors = jnp.full(200, 0.1).at[7].set(2.0)
    found = made_up(per_datapoint=jnp.zeros(200), per_datapoint_error=errors, ess=jnp.full(200, 9.0), acceptance=None)
    assert found.verdict.startswith("No sign of trouble") and "But 1 of 200 elements" in found.verdict


def test_totals_table_and_plots():
    found = made_up()
    assert found.value == -12.0 and found.mean == -4.0
    np.testing.assert_allclose([found.standard_error, found.shortfall], [0.3, 0.045], rtol=1e-5)
    low, high = found.interval(0.95)
    np.testing.assert_allclose([low, high], [-12 - 0.3 * 2.1314, -12 + 0.3 * 2.1314 + 0.045], rtol=1e-3)
    assert [row["quantity"] for row in found.table()] == ["log evidence", "per element", "mean log weight"]
    assert "data 3" in repr(found)
    assert found.plot().get_xlabel() == "element, sorted"
    assert found.plot_acceptance().get_ylabel() == "acceptance"
    with pytest.raises(ValueError, match="no annealed chains"):
        made_up(acceptance=None).plot_acceptance()


def test_a_subsample_is_scaled_to_the_full_data_and_its_own_error_added():
    found = made_up(plates=BatchPlates(("data",), (-1,), (3,), 10.0))
    assert found.value == -120.0
    expected = 10.0 * np.sqrt(0.09 + 0.9 * 3 * 1.0)
    np.testing.assert_allclose(found.standard_error, expected, rtol=1e-5)


def test_acceptance_is_smoothed_over_neighbours():
    np.testing.assert_allclose(smoothed(jnp.arange(10.0)), [4.0, 5.0])
    np.testing.assert_allclose(smoothed(jnp.array([[1.0], [3.0]])), [[2.0]])
