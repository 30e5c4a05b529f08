"""The linear-Gaussian VAE: its densities, and its exact answers against each other and against quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal, norm

from models import linear_gaussian_vae

N, P, D = 5, 4, 2


@pytest.fixture(scope="module")
def case():
    params = linear_gaussian_vae.make_params(jax.random.key(3), P, D)
    return params, linear_gaussian_vae.simulate(jax.random.key(4), params, N)


def log_joint(program, params, z, x) -> float:
    return float(log_density(handlers.seed(program, 0), (x,), {}, params | {"z": jnp.asarray(z, float)})[0])


def test_log_densities_are_the_written_ones(case):
    params, x = case
    z = np.random.default_rng(0).normal(size=(N, D))
    w, b, sigma, a, bias, s = (np.asarray(params[name], np.float64) for name in ("W", "b", "sigma", "A", "a", "s"))
    expected = norm(0, 1).logpdf(z).sum() + norm(z @ w.T + b, sigma).logpdf(x).sum()
    assert log_joint(linear_gaussian_vae.model, params, z, x) == pytest.approx(expected, rel=1e-5)
    expected = norm(np.asarray(x) @ a.T + bias, s).logpdf(z).sum()
    assert log_joint(linear_gaussian_vae.guide, params, z, x) == pytest.approx(expected, rel=1e-5)


def test_log_evidence_is_the_joint_over_the_posterior(case):
    params, x = case
    z = np.random.default_rng(1).normal(size=(N, D))
    means, covariance = linear_gaussian_vae.posterior(params, x)
    log_posterior = sum(multivariate_normal(m, covariance).logpdf(point) for m, point in zip(means, z, strict=True))
    expected = log_joint(linear_gaussian_vae.model, params, z, x) - log_posterior
    assert linear_gaussian_vae.log_evidence(params, x).sum() == pytest.approx(expected, rel=1e-5)


def test_the_bound_of_the_guide_is_its_mean_log_weight(case):
    """By Gauss-Hermite quadrature, exact for the quadratic log weight."""
    params, x = case
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / weights.sum()
    loc = np.asarray(x) @ np.asarray(params["A"]).T + np.asarray(params["a"])
    total = 0.0
    for first, p in zip(nodes, weights, strict=True):
        for second, q in zip(nodes, weights, strict=True):
            z = loc + np.asarray(params["s"]) * np.array([first, second])
            total += p * q * (log_joint(linear_gaussian_vae.model, params, z, x))
            total -= p * q * (log_joint(linear_gaussian_vae.guide, params, z, x))
    assert linear_gaussian_vae.elbo(params, x).sum() == pytest.approx(total, rel=1e-4)


def test_the_best_factorised_bound_is_that_of_the_guide_without_noise(case):
    params, x = case
    best = linear_gaussian_vae.make_params(jax.random.key(3), P, D, noise=0.0)
    optimum = linear_gaussian_vae.optimal_factorised_elbo(best, x)
    np.testing.assert_allclose(linear_gaussian_vae.elbo(best, x), optimum, atol=1e-5)
    assert np.all(linear_gaussian_vae.elbo(params, x) < optimum - 1e-3)
    assert np.all(optimum < linear_gaussian_vae.log_evidence(params, x) - 0.01)


def test_data_come_from_the_model():
    """4,000 data: mean and covariance within five standard errors (false alarms: 1e-5 over all 14 entries)."""
    params = linear_gaussian_vae.make_params(jax.random.key(5), P, D)
    x = np.asarray(linear_gaussian_vae.simulate(jax.random.key(6), params, 4000), np.float64)
    w, sigma = np.asarray(params["W"], np.float64), np.asarray(params["sigma"], np.float64)
    covariance = w @ w.T + np.diag(sigma**2)
    variances = np.diag(covariance)
    assert np.all(np.abs(x.mean(0) - params["b"]) < 5 * np.sqrt(variances / 4000))
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / 4000)
    assert np.all(np.abs(np.cov(x.T) - covariance) < 5 * errors)
