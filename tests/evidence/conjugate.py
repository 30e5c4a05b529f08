"""A linear-Gaussian model of independent data points, whose log evidence is known, and a guide that is nearly right."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random

from numpyro_smc.evidence.ais import AIS

NUM = 400
SETTINGS = {"num_chains": 16, "num_temperatures": 12, "num_leapfrog": 3}
LOADINGS = jnp.array([[1.0, 0.5], [0.3, -0.8]])
PRIOR_SCALE = jnp.array([1.0, 0.5])
NOISE = 0.6
COVARIANCE = LOADINGS.T @ jnp.diag(PRIOR_SCALE**2) @ LOADINGS + NOISE**2 * jnp.eye(2)


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, PRIOR_SCALE).to_event(1))
        numpyro.sample("x", dist.Normal(z @ LOADINGS, NOISE).to_event(1), obs=x)


def guide(x):
    """The posterior's mean, and a scale that is too wide in one direction."""
    gain = jnp.diag(PRIOR_SCALE**2) @ LOADINGS @ jnp.linalg.inv(COVARIANCE)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(x @ gain.T, jnp.array([0.6, 0.45])).to_event(1))


def exact(x):
    return dist.MultivariateNormal(jnp.zeros(2), COVARIANCE).log_prob(x)


def data(seed, num):
    return dist.MultivariateNormal(jnp.zeros(2), COVARIANCE).sample(random.key(seed), (num,))


FROM_PRIOR = AIS(model, **SETTINGS)  # compiled once for all tests
