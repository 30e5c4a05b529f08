"""Three state-space models with parameters, for tests of kernels that hold for any number of particles.

Short series and noisy data, so that eight particles make every mistake visible; nothing is symmetric.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

NUM_STEPS = 5


def linear_gaussian(y=None):
    """Two parameters, and a state before the scan."""
    slope = numpyro.sample("slope", dist.Uniform(-0.5, 1.0))
    scale = numpyro.sample("scale", dist.Gamma(4.0, 4.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(slope * x + 0.3, scale))
        numpyro.sample("y", dist.Normal(x, 0.6), obs=y_t)
        return x, None

    x_0 = numpyro.sample("x_0", dist.Normal(1.0, 0.5))
    scan(step, x_0, y, length=NUM_STEPS)


def random_path(y=None):
    """The same with its parameters given, for kernels of the path alone."""

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x + 0.3, 0.7))
        numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
        return x, None

    x_0 = numpyro.sample("x_0", dist.Normal(1.0, 0.5))
    scan(step, x_0, y, length=NUM_STEPS)


def hidden_markov(y=None):
    """Three states that never follow each other alike, and how persistent they are."""
    stay = numpyro.sample("stay", dist.Beta(3.0, 2.0))
    leave = jnp.array([[0.0, 0.8, 0.2], [0.3, 0.0, 0.7], [0.9, 0.1, 0.0]])
    transition = stay * jnp.eye(3) + (1.0 - stay) * leave

    def step(k, y_t):
        k = numpyro.sample("k", dist.Categorical(transition[k]))
        numpyro.sample("y", dist.Normal(jnp.array([-1.0, 0.2, 1.5])[k], 0.7), obs=y_t)
        return k, None

    scan(step, 0, y, length=NUM_STEPS)


def stochastic_volatility(y=None):
    """Level and persistence of the log variance."""
    level = numpyro.sample("level", dist.Normal(-0.5, 0.7))
    persistence = numpyro.sample("persistence", dist.Beta(6.0, 2.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(level + persistence * (x - level), 0.8))
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(x / 2)), obs=y_t)
        return x, None

    scan(step, level, y, length=NUM_STEPS)


MODELS = {
    "linear-Gaussian": linear_gaussian,
    "hidden Markov": hidden_markov,
    "stochastic volatility": stochastic_volatility,
}
