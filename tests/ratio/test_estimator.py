"""Posteriors of a known ratio: programs, sequential Monte Carlo, grids and importance resampling."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC, NUTS

from numpyro_smc.programs.simulator import Simulator
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.losses import SoftmaxLoss
from numpyro_smc.ratio.ratio_network import RatioNetwork
from numpyro_smc.ratio.truncation import Box
from tests.ratio.exact import LOCS, SCALES, ExactNetwork, exact_estimator, posterior, simulator

X = jnp.array([1.3, 2.4])
MOVES = {"moves": "rwmh", "num_moves": 10}


def vector(samples):
    return exact_estimator().simulator.ravel(samples)


@cache
def many():
    return exact_estimator().sample_many(random.key(0), jnp.stack([X, -X]), num_particles=2000, **MOVES)


def test_posteriors_of_many_observations_are_exact():
    for x, result in zip((X, -X), many(), strict=True):
        mean, covariance = posterior(x)
        draws = np.asarray(vector(result.samples))
        error = result.standard_error(draws)
        assert (np.abs(np.asarray(result._weights) @ draws - mean) < 5 * error).all()
        np.testing.assert_allclose(np.cov(np.asarray(vector(result.get_samples())).T), covariance, atol=0.3)


def test_mean_ratio_of_an_exact_ratio_is_one():
    for result in many():
        log_mean, error = result.calibration
        assert abs(log_mean) < 5 * error < 0.5
    assert "0 if r is right" in repr(many()[0])


def test_nuts_samples_the_posterior_model():
    model = exact_estimator().posterior_model(X)
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(random.key(1))
    mean, covariance = posterior(X)
    draws = np.asarray(vector(mcmc.get_samples()))
    assert (np.abs(draws.mean(0) - mean) < 6 * np.sqrt(np.diag(covariance) / 300)).all()


def test_independent_observations_add_their_log_ratios():
    estimator, both = exact_estimator(), jnp.stack([X, -X])
    theta = jnp.array([[0.1, 0.2, 0.3], [1.0, -1.0, 2.0]])
    found = estimator.log_ratio_given(both, np.ones(3, bool))(theta)
    np.testing.assert_allclose(found, estimator.log_ratio(theta, X) + estimator.log_ratio(theta, -X), rtol=1e-5)
    result = estimator.sample(random.key(2), both, num_particles=100, **MOVES)
    with pytest.raises(ValueError, match="up to a factor"):
        _ = result.calibration


def test_grid_of_a_marginal_is_its_density():
    mean, covariance = posterior(X)
    marginal = exact_estimator().marginal(X, ["a", "b[1]"])
    assert marginal.elements == ("a", "b[1]")
    grid = marginal.grid(120)
    points, density = grid
    first, second = np.meshgrid(*points, indexing="ij")
    both = [0, 2]
    exact = dist.MultivariateNormal(mean[both], covariance[np.ix_(both, both)])
    expected = np.exp(exact.log_prob(np.stack([first, second], -1)))
    np.testing.assert_allclose(density, expected, atol=2e-3 * expected.max())
    assert grid.total_probability == pytest.approx(1.0, abs=2e-3)


def test_rank_and_thresholds_of_a_grid_are_those_of_a_gaussian():
    mean, covariance = posterior(X)
    grid = exact_estimator().marginal(X, "a").grid(2000)
    sd = np.sqrt(covariance[0, 0])
    assert grid.rank(mean[0] + 1.0 * sd) == pytest.approx(0.6827, abs=0.01)
    expected = np.exp(-0.5 * np.array([1.0, 2.0, 3.0]) ** 2) / (sd * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(grid.thresholds(), expected, rtol=0.03)
    assert len(grid.plot().lines) == 1


def test_resampled_and_tempered_draws_of_a_marginal_agree_with_it():
    mean, covariance = posterior(X)
    marginal = exact_estimator().marginal(X, ["b[0]"])
    for draws in (marginal.sir(random.key(3), 4000), marginal.sample(random.key(4), 2000, **MOVES)):
        assert draws.shape[1] == 1
        assert abs(float(draws.mean()) - mean[1]) < 0.1 and abs(float(draws.std()) - covariance[1, 1] ** 0.5) < 0.1


def test_parameters_left_out_follow_their_prior():
    result = exact_estimator().sample(random.key(5), X, params=["b[0]"], num_particles=2000, **MOVES)
    draws = np.asarray(vector(result.get_samples()))
    assert (np.abs(draws.mean(0) - LOCS)[[0, 2]] < 6 * SCALES[[0, 2]] / np.sqrt(500)).all()


def test_too_few_prior_draws_are_said():
    sharp = ExactNetwork(lambda theta: -1e4 * jnp.sum((theta - LOCS) ** 2, -1))
    estimator = RatioEstimator(exact_estimator().simulator, sharp, (), exact_estimator().loss)
    with pytest.warns(UserWarning, match="of 1000 prior draws carry the weight"):
        estimator.marginal(X, ["a"]).sir(random.key(0), 10, num_draws=1000)


def test_a_truncated_posterior_stays_in_its_box():
    box = Box(jnp.array([-jnp.inf, -1.2, -jnp.inf]), jnp.array([jnp.inf, -0.4, jnp.inf]), -0.5)
    estimator = RatioEstimator(exact_estimator().simulator, ExactNetwork(), (), exact_estimator().loss, box=box)
    result = estimator.sample(random.key(6), X, num_particles=500, **MOVES)
    inside = np.asarray(vector(result.get_samples()))[:, 1]
    assert (inside >= -1.2).all() and (inside <= -0.4).all()
    assert result.calibration.log_mean_ratio == pytest.approx(result.log_evidence + 0.5)


def test_a_ratio_known_up_to_a_factor_has_no_calibration():
    estimator = RatioEstimator(exact_estimator().simulator, ExactNetwork(), (), SoftmaxLoss(10))
    result = estimator.sample(random.key(7), X, num_particles=100, **MOVES)
    assert np.isnan(result.log_evidence) and "up to a factor" in repr(result)
    with pytest.raises(ValueError, match="Train with loss='A', 'C' or 'balanced'"):
        _ = result.calibration
    with pytest.raises(ValueError, match="this number means nothing"):
        _ = estimator.marginal(X, "a").grid(20).total_probability


def small(**options):
    reading = Simulator(simulator, ["a", "b"])
    network = RatioNetwork(3, **options)
    draws = jax.vmap(reading.simulate)(random.split(random.key(0), 20))
    weights = network.init(random.key(1), draws.theta, draws.x)
    return RatioEstimator(reading, network, weights, exact_estimator().loss)


def test_fixed_marginals_are_chosen_by_name():
    estimator = small(marginals="=1 011")
    theta = jnp.array([0.3, -0.5, 1.0])
    all_ratios = estimator.network.log_ratio(estimator.weights, theta, X)
    assert float(estimator.log_ratio(theta, X, ["b"])) == pytest.approx(float(all_ratios[3]))
    assert float(estimator.log_ratio(theta, X, ["a"])) == pytest.approx(float(all_ratios[0]))
    with pytest.raises(ValueError, match=r"of a, b\[0\] was not learned\. Known: a; b\[0\]; b\[1\]; b\[0\], b\[1\]"):
        estimator.marginal(X, ["a", "b[0]"])


def test_a_marginal_of_a_plain_ratio_is_refused():
    with pytest.raises(ValueError, match="only the ratio of all parameters was learned, not that of a alone"):
        small().posterior_model(X, ["a"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.posterior_model(jnp.zeros(3)), r"observation has shape \(3,\); expected \(2,\)"),
        (lambda e: e.posterior_model(jnp.zeros((2, 2, 2))), "Use sample_many for separate problems"),
        (lambda e: e.posterior_model(X, context=jnp.ones(1)), "without context sites"),
        (lambda e: e.marginal(X, "c"), "no parameter 'c'"),
        (lambda e: e.marginal(X, ["a", "b"]).grid(1000), "are more than 10,000,000"),
        (lambda e: e.marginal(X, ["a"]).grid(10, [(1.0, 0.0)]), "pairs \\(lower, upper\\)"),
        (lambda e: e.sample_many(random.key(0), jnp.zeros((0, 2))), "there are no observations"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(exact_estimator())


def test_contexts_reach_the_ratio():
    def model():
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.Gamma(2.0, 4.0))
        numpyro.deterministic("x", mean + noise * random.normal(numpyro.prng_key(), (2,)))

    class KnownNoise(ExactNetwork):
        def features(self, weights, x, context=None):
            return jnp.concatenate([x, context], -1)

        def log_ratio_of_features(self, weights, theta, features, mask=None):
            return dist.Normal(theta, features[..., 2:]).log_prob(features[..., :2]).sum(-1)

    estimator = RatioEstimator(Simulator(model, ["mean"], context=["noise"]), KnownNoise(), (), exact_estimator().loss)
    x, noises = jnp.array([[1.0, 1.4], [1.0, 1.4]]), {"noise": jnp.array([0.1, 2.0])}
    sharp, vague = estimator.sample_many(random.key(0), x, context=noises, num_particles=500, **MOVES)
    for result, noise in ((sharp, 0.1), (vague, 2.0)):
        exact = 2.4 / noise**2 / (1 + 2 / noise**2)
        assert abs(float(result.mean("mean")) - exact) < 5 * float(result.standard_error(result.samples["mean"]))
    alone = estimator.sample(random.key(1), x[0], context={"noise": 0.1}, num_particles=500, **MOVES)
    assert abs(float(alone.mean("mean")) - float(sharp.mean("mean"))) < 0.05
    with pytest.raises(ValueError, match=r"pass context={'noise': \.\.\.}"):
        estimator.posterior_model(x[0])
