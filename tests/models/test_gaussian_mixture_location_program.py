"""The common location of two Gaussians: density, simulations, and the posterior where the prior cuts it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy.stats import norm

from models import gaussian_mixture_location as gml

THETA, X = np.array([1.5, -3.0]), np.array([1.7, -2.4])


def written_density(theta, x) -> np.ndarray:
    parts = [0.5 * norm.pdf(x, theta, scale).prod(-1) for scale in (1.0, 0.1)]
    return np.log(parts[0] + parts[1])


def test_log_likelihood_is_the_written_one_and_the_programs():
    assert float(gml.log_likelihood(THETA, X)) == pytest.approx(written_density(THETA, X), rel=1e-5)
    found = log_density(gml.model, (X,), {}, {"theta": jnp.asarray(THETA)})[0]
    assert float(found) == pytest.approx(written_density(THETA, X) - 2 * np.log(20), rel=1e-5)
    batch = np.stack([THETA, THETA + 0.1, THETA + 3])
    np.testing.assert_allclose(gml.log_likelihood(batch, X), written_density(batch, X), rtol=1e-5)


def test_simulations_share_one_component_between_the_coordinates():
    """10,000 simulations: the share of both offsets below 0.2; five standard errors, false alarms 6e-7."""
    drawn = Predictive(gml.model, num_samples=10_000)(jax.random.key(0))
    near = np.all(np.abs(np.asarray(drawn["x"] - drawn["theta"])) < 0.2, -1).mean()
    expected = sum(0.5 * (2 * norm.cdf(0.2 / scale) - 1) ** 2 for scale in (1.0, 0.1))
    assert abs(near - expected) < 5 * 0.005


@pytest.mark.parametrize("x", [np.array([1.0, 2.0]), np.array([9.8, -9.3])])
def test_posterior_draws_have_the_moments_of_the_cut_mixture(x):
    """20,000 draws against quadrature; five standard errors of each moment: false alarms 2e-6 per case."""
    draws = gml.sample_posterior(jax.random.key(1), x, 20_000)
    assert np.abs(draws).max() <= 10
    axis = (np.arange(8000) + 0.5) / 400 - 10  # cells a quarter of the narrow scale wide, an axis at a time
    for i in (0, 1):
        inside = [np.diff(norm.cdf([-10, 10], x[1 - i], scale))[0] for scale in (1.0, 0.1)]
        weights = sum(p * norm.pdf(axis, x[i], scale) for p, scale in zip(inside, (1.0, 0.1), strict=True))
        weights /= weights.sum()
        mean = weights @ axis
        variance, fourth = (weights @ (axis - mean) ** power for power in (2, 4))
        assert abs(draws[:, i].mean() - mean) < 5 * np.sqrt(variance / len(draws))
        assert abs(draws[:, i].var() - variance) < 5 * np.sqrt((fourth - variance**2) / len(draws)) + 1e-3
