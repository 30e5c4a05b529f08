"""SLCP: the likelihood against SciPy's, in both conventions, at scales that single precision can hardly square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal

from models import slcp

THETA = np.array([0.7, -1.9, -0.9, 1.3, 0.8])
X = np.random.default_rng(0).normal(size=(4, 2))


def covariance(theta, jitter) -> np.ndarray:
    first, second = theta[2] ** 2, theta[3] ** 2
    if jitter == "scale":
        first, second = first + 1e-8, second + 1e-8
    cross = np.tanh(theta[4]) * first * second
    return np.array([[first**2, cross], [cross, second**2]]) + (1e-6 if jitter == "covariance" else 0.0) * np.eye(2)


@pytest.mark.parametrize("jitter", ["scale", "covariance"])
@pytest.mark.parametrize("small", [1.0, 0.02])
def test_log_likelihood_is_that_of_four_gaussian_draws(jitter, small):
    theta = THETA * np.array([1, 1, small, 1, 1])
    x = THETA[:2] + X * np.array([small**2, 1])
    expected = multivariate_normal(theta[:2], covariance(theta, jitter)).logpdf(x).sum()
    assert float(slcp.log_likelihood(theta, x, jitter)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("jitter", ["scale", "covariance"])
def test_program_and_function_have_the_same_likelihood(jitter):
    found = log_density(slcp.model, (X, jitter), {}, {"theta": jnp.asarray(THETA)})[0]
    assert float(found + 5 * jnp.log(6)) == pytest.approx(float(slcp.log_likelihood(THETA, X, jitter)), rel=1e-5)
    assert float(found) == pytest.approx(float(log_density(slcp.model, (X.ravel(), jitter), {}, {"theta": THETA})[0]))


def test_conventions_differ_only_for_small_scales():
    wide, narrow = THETA, THETA * np.array([1, 1, 0.02, 1, 1])
    different = [slcp.log_likelihood(t, X, "scale") - slcp.log_likelihood(t, X, "covariance") for t in (wide, narrow)]
    assert abs(float(different[0])) < 1e-4 < abs(float(different[1]))


def test_signs_of_the_scales_do_not_matter():
    signs = np.array([[1, 1, a, b, 1] for a in (-1, 1) for b in (-1, 1)])
    np.testing.assert_array_equal(slcp.log_likelihood(THETA * signs, X), slcp.log_likelihood(THETA, X) * np.ones(4))


@pytest.mark.parametrize("theta", [np.array([0.1, 0.2, 0.0, 0.0, 3.0]), np.array([0.1, 0.2, 1e-3, 3.0, -3.0])])
def test_vanishing_scales_give_finite_densities_and_gradients(theta):
    value, gradient = jax.value_and_grad(slcp.log_likelihood)(jnp.asarray(theta, jnp.float32), jnp.asarray(X))
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("jitter", ["scale", "covariance"])
def test_simulated_draws_have_the_stated_mean_and_covariance(jitter):
    """20,000 simulations, 80,000 draws; five standard errors of each moment: false alarms 3e-6 per case."""
    fixed = handlers.substitute(lambda: slcp.model(jitter=jitter), {"theta": jnp.asarray(THETA)})
    keys = jax.random.split(jax.random.key(0), 20_000)
    x = np.asarray(jax.jit(jax.vmap(lambda key: handlers.seed(fixed, key)()))(keys), np.float64)
    assert x.shape == (20_000, 4, 2)
    deviation, expected = x.reshape(-1, 2) - THETA[:2], covariance(THETA, jitter)
    assert np.all(np.abs(deviation.mean(0)) < 5 * np.sqrt(np.diag(expected) / len(deviation)))
    products = deviation[:, :, None] * deviation[:, None]
    assert np.all(np.abs(products.mean(0) - expected) < 5 * products.std(0) / np.sqrt(len(deviation)))


def test_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="jitter='both'; expected one of scale, covariance"):
        slcp.log_likelihood(THETA, X, "both")
