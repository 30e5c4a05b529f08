"""Parameters with elements that do not vary, or not freely; densities of truncated priors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy.stats import truncnorm

from numpyro_smc.programs.simulator import Simulator
from numpyro_smc.ratio.diagnostics import marginal_coverage, sbc, tarp
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.losses import BinaryLoss
from numpyro_smc.ratio.masks import UniformMask
from numpyro_smc.ratio.networks import mlp
from numpyro_smc.ratio.nre import NRE
from numpyro_smc.ratio.ratio_network import RatioNetwork, is_constant
from numpyro_smc.ratio.seen import Seen
from numpyro_smc.ratio.truncation import Box, truncated

SMALL = {"batch_size": 200, "max_epochs": 1, "progress_bar": False}
NOISE = 0.3


def correlation():
    """A Cholesky factor of two normals: one element is one, one zero, two vary along a curve."""
    factor = numpyro.sample("factor", dist.LKJCholesky(2, 1.0))
    numpyro.deterministic("x", factor[1, 0] + NOISE * random.normal(numpyro.prng_key()))


def triangular():
    values = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    law = dist.TransformedDistribution(values, dist.transforms.LowerCholeskyTransform())
    factor = numpyro.sample("factor", law)
    numpyro.deterministic("x", factor[1] + NOISE * random.normal(numpyro.prng_key(), (2,)))


def shares():
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.array([2.0, 1.0, 1.0])))
    numpyro.deterministic("x", weights[:2] + NOISE * random.normal(numpyro.prng_key(), (2,)))


def correlation_matrix():
    matrix = numpyro.sample("matrix", dist.LKJ(2, 1.0))
    numpyro.deterministic("x", matrix[0, 1] + NOISE * random.normal(numpyro.prng_key()))


class ExactCorrelation:
    """log p(x | theta) - log p(x), of the correlation's element."""

    size, has_masks, marginals, log_parameters, constant = 4, False, None, None, None

    def features(self, weights, x, context=None):
        return jnp.asarray(x)[..., None]

    def log_ratio_of_features(self, weights, theta, features, mask=None):
        values = jnp.linspace(-1, 1, 401)  # of a uniform prior
        evidence = jax.nn.logsumexp(dist.Normal(values, NOISE).log_prob(features), axis=-1) - jnp.log(401)
        return dist.Normal(theta[..., 2:3], NOISE).log_prob(features)[..., 0] - evidence


@pytest.mark.parametrize(
    ("simulator", "site", "constant"),
    [
        (correlation, "factor", [1, 1, 0, 0]),
        (triangular, "factor", [0, 1, 0, 0]),
        (shares, "weights", [0, 0, 0]),
        (correlation_matrix, "matrix", [1, 0, 0, 1]),
    ],
)
def test_what_does_not_vary_is_passed_over(simulator, site, constant):
    nre = NRE(simulator, [site], loss="A", trunk=mlp(16, 1), masks=UniformMask())
    assert np.array_equal(nre.simulator.constant(), np.array(constant, bool))
    found = nre.train(random.key(0), 800, **SMALL)
    theta, x, _ = found.simulate(random.key(1), 5)
    changed = theta + np.array(constant) * 7.0
    known, same = (found.network.log_ratio(found.weights, values, x) for values in (theta, changed))
    np.testing.assert_allclose(same, known, rtol=1e-4, atol=1e-5)
    z = found.weights.standardization["theta"](theta)
    assert np.abs(z).max() < 20


def test_the_posterior_of_a_cholesky_factor_is_exact_and_on_its_support():
    estimator = RatioEstimator(Simulator(correlation, ["factor"]), ExactCorrelation(), (), BinaryLoss())
    result = estimator.sample(random.key(0), jnp.array(0.6), num_particles=4000)
    factor = np.asarray(result.get_samples()["factor"])
    assert (factor[:, 0, 1] == 0).all() and (factor[:, 0, 0] == 1).all()
    np.testing.assert_allclose((factor[:, 1] ** 2).sum(-1), 1, atol=1e-5)
    exact = truncnorm((-1 - 0.6) / NOISE, (1 - 0.6) / NOISE, 0.6, NOISE)  # LKJ(1) of two: uniform correlation
    assert abs(factor[:, 1, 0].mean() - exact.mean()) < 5 * exact.std() / np.sqrt(1000)
    assert abs(factor[:, 1, 0].std() - exact.std()) < 5 * exact.std() / np.sqrt(1000)
    log_mean_ratio, error = result.calibration
    assert abs(log_mean_ratio) < 5 * error + 0.01
    copies = np.asarray(estimator.marginal(jnp.array(0.6), ["factor"]).sir(random.key(1), 2000))[:, 2]
    assert abs(copies.mean() - exact.mean()) < 5 * exact.std() / np.sqrt(500)


def test_checks_of_calibration_leave_constant_elements_out():
    estimator = RatioEstimator(Simulator(correlation, ["factor"]), ExactCorrelation(), (), BinaryLoss())
    ranks = sbc(estimator, random.key(2), 60, 50)
    assert "factor[0,0]" not in repr(ranks) and "factor[1,0]" in repr(ranks)
    assert np.isfinite(tarp(estimator, random.key(3), 40, 50).values).all()


def test_a_grid_over_elements_that_cannot_vary_freely_is_refused():
    found = NRE(shares, ["weights"], loss="A", trunk=mlp(8, 0)).train(random.key(0), 600, **SMALL)
    with pytest.raises(
        ValueError, match=r"site 'weights' \(Dirichlet\) has elements that cannot vary\s+freely.* Use sir"
    ):
        found.marginal(jnp.array([0.3, 0.3]), "weights").grid(10)
    with pytest.raises(ValueError, match=r"marginal_coverage: site 'weights'"):
        marginal_coverage(found, random.key(0), 10)


def test_a_box_leaves_constant_elements_alone():
    found = NRE(correlation, ["factor"], loss="A", trunk=mlp(8, 0)).train(random.key(0), 600, **SMALL)
    box = truncated(random.key(1), found, jnp.array(0.5), None, 1e-3)
    assert np.isinf(box.low[:2]).all() and np.isinf(box.high[:2]).all() and box.low[2] > -1.01


def test_a_parameter_of_one_value_is_named():
    def fixed():
        numpyro.sample("level", dist.Normal(0.0, 1.0))
        numpyro.sample("known", dist.Delta(jnp.array([2.0, 2.0])).to_event(1))
        numpyro.deterministic("x", random.normal(numpyro.prng_key()))

    with pytest.raises(ValueError, match=r"NRE\.train: parameter 'known\[0\]' is 2 in all simulations"):
        NRE(fixed, ["level", "known"]).train(random.key(0), 600, **SMALL)


def test_rounding_is_no_variation():
    values = np.full((1000, 3), 0.1, np.float32)
    values[:, 1] += np.tile([0, 1e-8], 500)  # one unit in the last place
    values[:, 2] = 1e4 + np.linspace(0, 1, 1000)
    assert is_constant(values).tolist() == [True, True, False]
    network = RatioNetwork(1, mlp(8, 0))
    x = np.concatenate([values, np.random.default_rng(0).normal(size=(1000, 1))], 1).astype(np.float32)
    weights = network.init(random.key(0), x[:, 3:], x)
    assert np.abs(weights.standardization["x"](x)).max() < 10


# Values outside


def two():
    a, b = numpyro.sample("a", dist.Normal(0.0, 1.0)), numpyro.sample("b", dist.HalfNormal(1.0))
    numpyro.deterministic("x", a + b + NOISE * random.normal(numpyro.prng_key()))


class OfTheFirst:
    """The exact ratio of an output of ``a`` alone, under its prior within [-1, 1]."""

    size, has_masks, marginals, log_parameters, constant = 2, True, None, None, None

    def features(self, weights, x, context=None):
        return jnp.asarray(x)[..., None]

    def log_ratio_of_features(self, weights, theta, features, mask=None):
        values = jnp.linspace(-1, 1, 401)
        law = jax.nn.softmax(-0.5 * values**2)
        evidence = jax.nn.logsumexp(dist.Normal(values, NOISE).log_prob(features), b=law, axis=-1)
        return dist.Normal(theta[..., :1], NOISE).log_prob(features)[..., 0] - evidence


def test_a_truncated_prior_bounds_every_view_of_the_posterior():
    box = Box(jnp.array([-1.0, -jnp.inf]), jnp.array([1.0, jnp.inf]), float(np.log(0.682689)))
    estimator = RatioEstimator(Simulator(two, ["a", "b"]), OfTheFirst(), (), BinaryLoss(), box=box)
    x = jnp.array(1.1)  # most of the posterior under the whole prior lies above the box
    precision = 1 + NOISE**-2
    mean, sd = 1.1 / NOISE**2 / precision, precision**-0.5
    exact = truncnorm((-1 - mean) / sd, (1 - mean) / sd, mean, sd)
    marginal = estimator.marginal(x, "a")
    grid = marginal.grid(400, [(-3.0, 3.0)])
    points, density = grid
    assert density[np.abs(points) > 1].max() == 0
    assert abs((points * density).sum() / density.sum() - exact.mean()) < 0.01
    assert grid.total_probability == pytest.approx(1, abs=0.02)
    copies = np.asarray(marginal.sir(random.key(0), 2000))[:, 0]
    assert np.abs(copies).max() <= 1 and abs(copies.mean() - exact.mean()) < 5 * exact.std() / np.sqrt(500)
    assert float(estimator.log_ratio(jnp.array([1.5, 0.2]), x)) == -np.inf
    assert np.isfinite(estimator.log_ratio(jnp.array([9.0, 0.2]), x, ["b"]))  # a is left out
    assert np.abs(estimator.prior(random.key(1), 500)[:, 0]).max() <= 1


def test_a_grid_outside_the_support_has_no_density():
    estimator = RatioEstimator(Simulator(two, ["a", "b"]), OfTheFirst(), (), BinaryLoss())
    points, density = estimator.marginal(jnp.array(0.1), "b").grid(300, [(-3.0, 3.0)])
    assert density[points < 0].max() == 0 and density[points > 0].min() > 0


def test_what_was_never_seen_is_said():
    reading = Simulator(two, ["a", "b"])
    ends = Seen(jnp.array([[-3.0, 0.0], [3.0, 3.0]]), jnp.array([-4.0, 6.0]), None)
    estimator = RatioEstimator(reading, OfTheFirst(), (), BinaryLoss(), seen=ends)
    with pytest.warns(UserWarning, match=r"x of the observation is 100, but -4 to 6 in the simulations trained on"):
        estimator.posterior_model(jnp.array(100.0))
    with pytest.warns(UserWarning, match=r"a of the parameters is 40, but -3 to 3"):
        estimator.log_ratio(jnp.array([40.0, 1.0]), jnp.array(0.0))
    estimator.log_ratio(jnp.array([4.0, 500.0]), jnp.array(-5.0), ["a"])  # near enough, and b is left out
