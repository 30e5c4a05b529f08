"""The series models with priors: what they simulate, and that filters and NUTS read the same density."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import stats

from models.bayesian_series import ricker, stochastic_volatility

VOLATILITY = {"mu": -1.0, "phi": 0.9, "sigma": 0.3}
RICKER = {"log_r": 3.8, "sigma": 0.3, "log_scale": 2.0}


def simulate(model, values, num_steps, seed=0):
    return handlers.seed(handlers.substitute(model, data=values), random.key(seed))(None, num_steps)


def test_log_variances_have_their_stationary_moments():
    x, y = simulate(stochastic_volatility, VOLATILITY, 20_000)
    variance = 0.09 / (1 - 0.81)
    # The variance of the mean of an autoregression, and five standard errors.
    error = np.sqrt(variance * (1 + 0.9) / (1 - 0.9) / 20_000)
    assert abs(float(x.mean()) + 1.0) < 5 * error
    standardised = np.asarray(y * jnp.exp(-x / 2))
    assert stats.kstest(standardised, "norm").pvalue > 1e-6


def test_populations_follow_the_map_when_there_is_no_noise():
    x, y = simulate(ricker, RICKER | {"sigma": 1e-6}, 10)
    n, expected = 7.0, []
    for _ in range(10):
        n = np.exp(3.8) * n * np.exp(-n)
        expected.append(n)
    np.testing.assert_allclose(np.exp(x), expected, rtol=1e-2)
    assert (np.asarray(y) >= 0).all()


@pytest.mark.parametrize(
    "model, values", [(stochastic_volatility, VOLATILITY | {"x_init": -0.5}), (ricker, RICKER)], ids=["sv", "ricker"]
)
def test_the_joint_density_is_that_of_the_docstring(model, values):
    x, y = (np.asarray(value, float) for value in simulate(model, values, 5))
    found = log_density(model, (jnp.asarray(y),), {}, values | {"x": jnp.asarray(x)})[0]
    if model is stochastic_volatility:
        past = np.concatenate([[-0.5], x[:-1]])
        expected = (
            stats.norm(-1.0 + 0.9 * (past + 1.0), 0.3).logpdf(x).sum() + stats.norm(0, np.exp(x / 2)).logpdf(y).sum()
        )
        expected += stats.norm(-1.0, 2.0).logpdf(-1.0) + stats.beta(20, 1.5).logpdf(0.95) - np.log(2.0)
        expected += stats.halfnorm(scale=0.5).logpdf(0.3) + stats.norm(-1.0, 0.3 / np.sqrt(0.19)).logpdf(-0.5)
    else:
        past = np.concatenate([[np.log(7.0)], x[:-1]])
        expected = stats.norm(3.8 + past - np.exp(past), 0.3).logpdf(x).sum()
        expected += stats.poisson(np.exp(2.0 + x)).logpmf(y).sum() + stats.norm(3.5, 1.0).logpdf(3.8)
        expected += stats.halfnorm(scale=0.5).logpdf(0.3) + stats.norm(np.log(10.0), 0.5).logpdf(2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
