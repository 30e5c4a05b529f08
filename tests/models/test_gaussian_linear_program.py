"""A Gaussian's mean in ten dimensions: 0.1 is a variance, and both posteriors are the exact ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy.stats import norm, truncnorm

from models import gaussian_linear as gl

THETA = np.linspace(-0.9, 0.6, 10)
X = THETA + np.array([0.3, -0.2, 0.5, 0.0, 0.1, -0.4, 0.2, 0.3, -0.1, 0.6])
SCALE = math.sqrt(0.1)
#: The same for every theta if these are the posteriors: log p(theta) + log p(x | theta) - log p(theta | x).
PROGRAMS = {"gaussian": (gl.model, gl.posterior), "uniform": (gl.uniform_model, gl.uniform_posterior)}


def log_evidence(kind: str) -> float:
    if kind == "gaussian":
        return norm.logpdf(X, 0, math.sqrt(0.2)).sum()
    return np.log((norm.cdf(1, X, SCALE) - norm.cdf(-1, X, SCALE)) / 2).sum()


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_prior_times_likelihood_is_evidence_times_posterior(kind, shift):
    model, posterior = PROGRAMS[kind]
    theta = jnp.asarray(THETA + shift)
    joint = log_density(model, (X,), {}, {"theta": theta})[0]
    assert float(joint - posterior(X).log_prob(theta)) == pytest.approx(log_evidence(kind), rel=1e-4)


def test_log_likelihood_has_variance_one_tenth():
    expected = norm.logpdf(X, THETA, SCALE).sum()
    assert float(gl.log_likelihood(THETA, X)) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gl.log_likelihood(np.stack([THETA, X]), X)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sampler"), [("gaussian", gl.sample_posterior), ("uniform", gl.sample_uniform_posterior)]
)
def test_posterior_draws_have_the_exact_moments(kind, sampler):
    """20,000 draws, ten coordinates; five standard errors: false alarms 1e-5 per case."""
    draws = np.asarray(sampler(jax.random.key(0), X, 20_000), np.float64)
    if kind == "gaussian":
        mean, variance = X / 2, np.full(10, 0.05)
    else:
        laws = truncnorm((-1 - X) / SCALE, (1 - X) / SCALE, X, SCALE)
        mean, variance = laws.mean(), laws.var()
        assert np.abs(draws).max() <= 1
    assert np.all(np.abs(draws.mean(0) - mean) < 5 * np.sqrt(variance / len(draws)))
    assert np.all(np.abs(draws.var(0) / variance - 1) < 5 * math.sqrt(2 / len(draws)))


@pytest.mark.parametrize("kind", PROGRAMS)
def test_simulations_scatter_by_the_stated_variance(kind):
    """2,000 simulations of ten coordinates: the variance's standard error is 0.001."""
    drawn = Predictive(PROGRAMS[kind][0], num_samples=2000)(jax.random.key(0))
    assert float(jnp.var(drawn["x"] - drawn["theta"])) == pytest.approx(0.1, abs=0.005)
    prior_variance = {"gaussian": 0.1, "uniform": 1 / 3}[kind]
    assert float(jnp.var(drawn["theta"])) == pytest.approx(prior_variance, rel=0.06)
