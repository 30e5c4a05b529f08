"""Programs and arguments that are in order, to be called with one thing wrong."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

KEY = random.key(0)
Y = jnp.sin(jnp.arange(8) / 3.0)
GIVEN = {"a": 0.5, "c": 0.8, "b": 0.0}


def series(y=None, T=8):
    """A local level, whose observations have a scale to be trained."""
    noise = numpyro.param("noise", 0.5, constraint=constraints.positive)

    def step(level, y_t):
        level = numpyro.sample("level", dist.Normal(level, 0.2))
        numpyro.sample("y", dist.Normal(level, noise), obs=y_t)
        return level, level

    scan(step, numpyro.sample("level_0", dist.Normal(0.0, 1.0)), y, length=T if y is None else None)


def series_guide(y=None, T=8):
    width = numpyro.param("width", 0.3, constraint=constraints.positive)

    def step(level, y_t):
        level = numpyro.sample("level", dist.Normal(level, width))
        return level, level

    scan(step, numpyro.sample("level_0", dist.Normal(0.0, 1.0)), y, length=T if y is None else None)


def parametric(y):
    """A local level with a global latent and a parameter."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    slope = numpyro.param("slope", 1.0)

    def step(level, y_t):
        level = numpyro.sample("level", dist.Normal(slope * level, scale))
        numpyro.sample("y", dist.Normal(level, 0.5), obs=y_t)
        return level, level

    scan(step, 0.0, y)


def model(x):
    """A latent for each datum, and nothing to train."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def linear_model(x):
    loc = numpyro.param("b", 0.0)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    slope = numpyro.param("a", 0.5)
    scale = numpyro.param("c", 0.8, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(slope * x, scale))


def flat(x=None):
    """One latent for all data."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 8):
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
