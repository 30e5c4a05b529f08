"""Bounds from both sides around evidences that are known exactly."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer.autoguide import AutoDiagonalNormal

from numpyro_smc.evidence.ais import AIS, Problem
from numpyro_smc.evidence.bidirectional import _simulator, bidirectional
from numpyro_smc.programs.guide_target import GuideTarget
from tests.evidence import conjugate
from tests.statistics_of_estimates import assert_unbiased_evidence


@pytest.fixture(scope="module")
def bounds():
    return bidirectional(random.key(5), conjugate.FROM_PRIOR, jnp.zeros((conjugate.NUM, 2)), num_simulated=2)


@pytest.fixture(scope="module")
def truth(bounds):
    return jnp.stack([conjugate.exact(args[0]) for args, _ in bounds.problems])


def test_forward_and_reverse_weights_are_unbiased_for_the_evidence_and_its_inverse(bounds, truth):
    """800 simulated problems; five standard errors. Only the same frozen transitions both ways make both hold."""
    assert_unbiased_evidence((bounds.lower - truth).ravel(), 0.0)
    assert_unbiased_evidence((truth - bounds.upper).ravel(), 0.0)


def test_the_bounds_sandwich_the_truth_with_a_small_gap(bounds, truth):
    assert bounds.gap.shape == (2, conjugate.NUM)
    for below in (truth - bounds.lower, bounds.upper - truth):
        error = float(below.std() / np.sqrt(below.size))
        assert -3 * error < float(below.mean()) < 0.1
    assert 0.0 < bounds.mean_gap < 0.2
    np.testing.assert_allclose(bounds.mean_gap_error, np.std(bounds.gap, ddof=1) / np.sqrt(bounds.gap.size), rtol=1e-3)
    assert bounds.acceptance.shape == bounds.reverse_acceptance.shape
    np.testing.assert_allclose(bounds.acceptance.mean((0, 2)), bounds.reverse_acceptance.mean((0, 2)), atol=0.05)


def test_simulated_data_replace_the_first_argument_and_nothing_is_compiled_twice(bounds):
    assert len(bounds.problems) == 2
    assert all(args[0].shape == (conjugate.NUM, 2) for args, _ in bounds.problems)
    assert not np.allclose(bounds.problems[0][0][0], bounds.problems[1][0][0])
    assert conjugate.FROM_PRIOR._reverse.num_compiled() == 1


def test_the_report_names_the_gap(bounds, truth):
    assert "800 simulated problems" in repr(bounds) and "nats apart" in bounds.verdict
    assert [row["quantity"] for row in bounds.table()] == ["lower", "upper", "gap"]
    assert bounds.plot().get_ylabel() == "log evidence"


def test_static_arguments_stay_static_and_simulate_hands_over_other_data():
    def model(num, data):
        with numpyro.plate("data", num):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=None if data is None else data["x"])

    problem = Problem({}, (4, {"x": jnp.zeros(4)}), {}, random.key(0))
    drawn = _simulator(AIS(model), lambda values: ((4, values), {}))(random.key(1), problem)
    (num, data), kwargs = drawn.arguments()
    assert num == 4 and isinstance(num, int) and data["x"].shape == (4,) and kwargs == {}


def test_an_automatic_guide_is_given_the_exact_latents_of_the_simulation():
    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(weights.sum(), scale), obs=y)

    guide = AutoDiagonalNormal(model)
    ais = AIS(model, guide)
    params = {"auto_loc": jnp.zeros(3), "auto_scale": jnp.ones(3)}
    problem = Problem(params, (jnp.asarray(0.3),), {}, random.key(0))
    with numpyro.handlers.seed(rng_seed=0):
        guide(jnp.asarray(0.3))
    drawn = _simulator(ais, None)(random.key(1), problem)
    pair = ais.pair(problem._replace(args=drawn.arguments()[0]))
    target = GuideTarget(pair, params, random.key(0))
    values = target.values(drawn.exact)
    # The density of the target at the exact latents is that of the model.
    expected = dist.HalfNormal(2.0).log_prob(values["scale"]) + jnp.log(values["scale"])
    expected += dist.Normal(0.0, 1.0).log_prob(values["weights"]).sum()
    expected += dist.Normal(values["weights"].sum(), values["scale"]).log_prob(drawn.arguments()[0][0])
    np.testing.assert_allclose(target.ends(drawn.exact).target, expected, rtol=1e-5)


def test_models_that_cannot_be_simulated_are_refused_by_site():
    def with_factor(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("penalty", -(z**2))

    def other_latent(x):
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            numpyro.sample("z", dist.Normal(v[:, None], 1.0).expand([len(x), 2]).to_event(1))

    with pytest.raises(ValueError, match="factor 'penalty'"):
        bidirectional(random.key(0), AIS(with_factor), jnp.zeros(3))
    with pytest.raises(ValueError, match="site 'v' is not one of the model's"):
        bidirectional(random.key(0), AIS(conjugate.model, other_latent), jnp.zeros((3, 2)))
