"""Draws of a filter as functions of noise: their laws, the order of particles, and what correlation is good for."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy import stats

from models import linear_gaussian
from numpyro_smc.kernels.correlated_noise import from_noise, move_noise, noise_shape
from numpyro_smc.kernels.estimated_likelihood import EstimatedLikelihood
from numpyro_smc.kernels.sorted_resampling import along_the_curve, hilbert_index, sorted_systematic
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

TRIL = np.array([[1.0, 0.0], [-0.7, 0.4]])
LAWS = {
    "normal": dist.Normal(1.0, 2.0),
    "transformed": dist.LogNormal(0.3, 0.5),
    "independent": dist.Normal(np.array([1.0, -1.0]), np.array([0.5, 2.0])).to_event(1),
    "expanded": dist.Exponential(np.array([[2.0]])).expand([3, 2]).to_event(2),
    "expanded transformed": dist.LogNormal(0.3, 0.5).expand([2]),
    "masked": dist.Uniform(-1.0, 3.0).mask(False),
    "multivariate": dist.MultivariateNormal(np.array([0.5, -0.5]), scale_tril=TRIL),
    "expanded multivariate": dist.MultivariateNormal(np.zeros(2), scale_tril=TRIL).expand([3]),
    "bernoulli": dist.Bernoulli(0.3),
}


@pytest.mark.parametrize("name", list(LAWS))
def test_noise_gives_draws_of_the_distribution(name):
    """Mean and variance of 4000 draws, five standard errors, against NumPyro's own."""
    fn = LAWS[name]
    draws = jax.jit(from_noise)(fn, random.normal(random.key(0), (4000, *noise_shape(fn))))
    assert draws.shape == (4000, *fn.shape())
    base = fn.base_dist if name in ("independent", "expanded", "masked") else fn
    mean, variance = (np.broadcast_to(moment, fn.shape()).astype(np.float64) for moment in (base.mean, base.variance))
    columns = np.asarray(draws, np.float64).reshape(4000, -1)
    for column, m, v in zip(columns.T, mean.ravel(), variance.ravel(), strict=True):
        assert_mean(column, m)
        assert_mean((column - m) ** 2, v)


def test_noise_is_used_element_by_element_and_jointly():
    """Every element of a draw follows its own noise, and a normal with a covariance has that covariance."""
    noise = jnp.array([0.4, -1.2])
    np.testing.assert_allclose(from_noise(LAWS["independent"], noise), [1.0 + 0.5 * 0.4, -1.0 - 2.0 * 1.2], rtol=1e-6)
    expected = np.array([0.5, -0.5]) + TRIL @ np.array([0.4, -1.2])
    np.testing.assert_allclose(from_noise(LAWS["multivariate"], noise), expected, rtol=1e-6)
    probs = np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
    below = stats.norm.cdf([0.4, -1.2])
    expected = [
        np.searchsorted(np.cumsum(p), u) for p, u in zip([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], below, strict=True)
    ]
    np.testing.assert_array_equal(from_noise(dist.Categorical(probs), noise), expected)


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dimension", "bits"), [(1, 6), (2, 4), (3, 3)])
def test_neighbours_on_the_hilbert_curve_are_neighbours_in_space(dimension, bits):
    """It visits every cell of a grid once, and each step changes one coordinate by one."""
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*[np.arange(2**bits)] * dimension, indexing="ij")], 1)
    index = np.asarray(jax.jit(along_the_curve, static_argnums=1)(jnp.asarray(grid, jnp.uint32), bits), np.int64)
    np.testing.assert_array_equal(np.sort(index), np.arange(len(grid)))
    assert (np.abs(np.diff(grid[np.argsort(index)], axis=0)).sum(1) == 1).all()


def test_near_states_are_near_on_the_curve_whatever_their_scale():
    """Three numbers whose units differ by a factor of a million."""
    states = random.normal(random.key(0), (200, 3)) * jnp.array([1e-3, 1.0, 1e3]) + jnp.array([5.0, 0.0, -1e4])
    order = np.argsort(hilbert_index(states))
    scaled = np.asarray((states - states.mean(0)) / states.std(0))[order]
    along = np.linalg.norm(np.diff(scaled, axis=0), axis=1).mean()
    anyhow = np.linalg.norm(np.diff(scaled[np.random.default_rng(0).permutation(200)], axis=0), axis=1).mean()
    assert along < 0.5 * anyhow


def test_sorted_resampling_is_systematic_in_the_order_of_the_states():
    size = 50
    log_weights = jnp.log(random.dirichlet(random.key(0), jnp.ones(size)) * size)
    states = random.normal(random.key(1), (size,))
    decide = lambda log_weights, t: jnp.asarray(True)  # noqa: E731
    resample = sorted_systematic(jnp.array([0.3, 0.8]), decide, None, "Test")
    particles = {"model": [states], "log twist": jnp.arange(float(size))}
    counts = []
    for t in range(2):
        found = resample(random.key(9), log_weights, particles, jnp.asarray(t), jnp.asarray(True))
        np.testing.assert_array_equal(found.particles["model"][0], states[found.ancestors])
        np.testing.assert_array_equal(found.particles["log twist"], found.ancestors)
        assert (np.diff(states[found.ancestors]) >= 0).all() and (found.log_weights == 0).all() and found.resampled
        counts.append(np.bincount(found.ancestors, minlength=size))
        assert (np.abs(counts[-1] - np.exp(log_weights)) < 1.0 + 1e-4).all()
    assert (counts[0] != counts[1]).any()
    kept = resample(random.key(9), log_weights, particles, jnp.asarray(0), jnp.asarray(False))
    np.testing.assert_array_equal(kept.ancestors, np.arange(size))
    np.testing.assert_array_equal(kept.log_weights, log_weights)


def test_states_of_several_numbers_have_no_order_of_their_own():
    particles = {"model": [jnp.zeros((4, 2))]}
    resample = sorted_systematic(jnp.array([0.3]), lambda log_weights, t: jnp.asarray(True), "state", "Test")
    with pytest.raises(ValueError, match=r"Test: sort='state' needs states of one number.*carries 2.*sort='hilbert'"):
        resample(random.key(0), jnp.zeros(4), particles, jnp.asarray(0), jnp.asarray(True))


# ---- estimates ------------------------------------------------------------------------------------------------------

DATA = np.sin(np.arange(12))[:, None] * np.array([1.0, -0.5]) + 0.3
RATE = 0.8
PARAMETERS = linear_gaussian.LinearGaussian(
    np.zeros(2), np.eye(2), RATE * np.eye(2), np.zeros(2), TRIL @ TRIL.T, np.eye(2), 0.16 * np.eye(2)
)


def model(y):
    x_0 = numpyro.sample("x_0", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def step(x, y_t):
        x = numpyro.sample("x", dist.MultivariateNormal(RATE * x, scale_tril=jnp.asarray(TRIL)))
        numpyro.sample("y", dist.Normal(x, 0.4).to_event(1), obs=y_t)
        return x, None

    scan(step, x_0, y)


def likelihood_of(program=model, num_particles=64, guide=None, **options):
    options = {"resampler": "systematic", "resample": "always", "ess_threshold": 0.5, "sort": None, **options}
    return EstimatedLikelihood(
        program, num_particles, guide, None, keep_paths=False, correlated=True, user="Test", **options
    )


@pytest.fixture(scope="module")
def pairs():
    """By correlation, log evidences of 400 pairs of runs."""
    likelihood = likelihood_of()

    @jax.jit
    @jax.vmap
    def estimates(rng_key, correlation):
        keys = random.split(rng_key, 3)
        noise = likelihood.noise(keys[0], likelihood.read({}, (DATA,), {}))
        moved = move_noise(keys[1], noise, correlation)

        def estimate(noise):
            return likelihood(keys[2], likelihood.read({}, (DATA,), {}), noise).log_evidence

        return jax.lax.map(estimate, jax.tree.map(lambda *leaves: jnp.stack(leaves), noise, moved))

    correlations = (0.0, 0.9, 0.99, 0.999)
    keys = random.split(random.key(0), 400 * len(correlations))
    found = np.asarray(estimates(keys, jnp.repeat(jnp.array(correlations), 400)), np.float64)
    return dict(zip(correlations, found.reshape(len(correlations), 400, 2), strict=True))


def test_evidence_of_given_noise_is_unbiased(pairs):
    """400 runs, before the noise moved and after, against the Kalman filter: five standard errors."""
    exact = jax.jit(linear_gaussian.log_evidence)(PARAMETERS, DATA)
    for correlation in (0.0, 0.99):
        for run in range(2):
            assert_unbiased_evidence(pairs[correlation][:, run], exact)


def test_correlation_lowers_the_variance_of_ratios(pairs):
    """In two dimensions along a Hilbert curve; a variance of 400 differences is known to 7 %."""
    variance = {rho: np.var(np.diff(values, axis=1)) / 2 for rho, values in pairs.items()}
    plain = np.var(pairs[0.0])
    assert abs(variance[0.0] / plain - 1.0) < 0.3
    assert variance[0.9] < 0.8 * plain and variance[0.99] < 0.4 * plain and variance[0.999] < 0.3 * plain


def proposal(y):
    """A guide with its own start, and a site of another name for what it draws in a step."""
    x_0 = numpyro.sample("x_0", dist.Normal(jnp.ones(2), 0.9).to_event(1))

    def step(x, y_t):
        kick = numpyro.sample("kick", dist.Laplace(0.0, 0.3), infer={"is_auxiliary": True})
        numpyro.sample("x", dist.Normal(0.5 * (RATE * x + y_t) + kick, 1.0).to_event(1))
        return 0.5 * (x + y_t), None

    scan(step, x_0, y)


@pytest.mark.parametrize("guide", [None, proposal])
def test_an_estimate_depends_on_its_noise_alone(guide):
    likelihood = likelihood_of(num_particles=5, guide=guide)
    noise = likelihood.noise(random.key(0), likelihood.read({}, (DATA,), {}))
    assert noise.initial["x_0"].shape == (5, 2) and noise.steps["x"].shape == (12, 5, 2)
    assert sorted(noise.steps) == (["x"] if guide is None else ["kick", "x"]) and noise.resampling.shape == (12,)
    estimate = jax.jit(lambda key, noise: likelihood(key, likelihood.read({}, (DATA,), {}), noise).log_evidence)
    first = estimate(random.key(1), noise)
    assert first == estimate(random.key(2), noise) and jnp.isfinite(first)
    for field in noise._fields:
        other = jax.tree.map(lambda leaf: -leaf, getattr(noise, field))
        assert first != estimate(random.key(1), noise._replace(**{field: other})), field


def test_moved_noise_is_standard_normal_and_correlated():
    noise = {"initial": random.normal(random.key(0), (20_000,)), "steps": random.normal(random.key(1), (100, 200))}
    moved = move_noise(random.key(2), noise, 0.9)
    for name in noise:
        old, new = np.ravel(noise[name]).astype(np.float64), np.ravel(moved[name]).astype(np.float64)
        assert_mean(new**2, 1.0)
        assert_mean(old * new, 0.9)
    assert abs(np.corrcoef(np.ravel(moved["initial"]), np.ravel(moved["steps"]))[0, 1]) < 5 / np.sqrt(20_000)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [dist.VonMises, dist.StudentT])
def test_draws_that_are_not_functions_of_noise_are_refused_by_name(law):
    def program(y):
        def step(x, y_t):
            x = numpyro.sample("x", law(x, 2.0) if law is dist.VonMises else law(4.0, x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    likelihood = likelihood_of(program)
    with pytest.raises(NotImplementedError, match=rf"Test: draws of site 'x' \({law.__name__}\).*correlation=0\.0"):
        likelihood.noise(random.key(0), likelihood.read({}, (DATA[:, 0],), {}))


def test_independent_problems_cannot_be_correlated():
    def batch(y):
        with numpyro.plate("series", 2):
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

        def step(x, y_t):
            with numpyro.plate("series", 2):
                x = numpyro.sample("x", dist.Normal(x, 1.0))
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, x_0, y)

    likelihood = likelihood_of(batch)
    with pytest.raises(ValueError, match=r"Test: plates \['series'\] enclose the whole program.*correlation=0\.0"):
        likelihood.noise(random.key(0), likelihood.read({}, (DATA,), {}))


def test_scaled_likelihoods_are_refused():
    likelihood = likelihood_of(handlers.scale(model, scale=2.0))
    with pytest.raises(ValueError, match=r"Test: the whole program stands under handlers\.scale"):
        likelihood.read({}, (DATA,), {})
