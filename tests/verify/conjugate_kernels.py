"""Two Gaussian locations with conjugate data, and kernels for them: right ones, and each wrong in one way."""

from typing import NamedTuple

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from numpyro import handlers
from numpyro.infer.mcmc import MCMCKernel

PRIOR_MEAN, PRIOR_SCALE, NOISE = 0.5, jnp.array([1.0, 2.0]), jnp.array([0.7, 1.5])


def model(y=None):
    with numpyro.plate("dimension", 2):
        z = numpyro.sample("z", dist.Normal(PRIOR_MEAN, PRIOR_SCALE))
        numpyro.sample("y", dist.Normal(z, NOISE), obs=y)


def posterior(y):
    variance = 1.0 / (PRIOR_SCALE**-2 + NOISE**-2)
    return variance * (PRIOR_MEAN * PRIOR_SCALE**-2 + y * NOISE**-2), jnp.sqrt(variance)


class State(NamedTuple):
    z: dict[str, Array]
    rng_key: Array


class Autoregressive(MCMCKernel):
    """Leaves the posterior invariant: ``z' = m + c (z - m) + sqrt(1 - c^2) s e``."""

    sample_field = "z"

    def __init__(self, model, correlation=0.5):
        self.model, self.correlation = model, correlation

    def data(self, args, kwargs):
        trace = handlers.trace(handlers.seed(self.model, random.key(0))).get_trace(*args, **kwargs)
        assert trace["y"]["is_observed"]
        return trace["y"]["value"]

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        z = {"z": jnp.zeros(2)} if init_params is None else dict(init_params)
        return State(z, rng_key)

    def moved(self, rng_key, z, y):
        mean, scale = posterior(y)
        noise = jnp.sqrt(1 - self.correlation**2) * scale * random.normal(rng_key, (2,))
        return mean + self.correlation * (z - mean) + noise

    def sample(self, state, model_args, model_kwargs):
        rng_key, key = random.split(state.rng_key)
        y = self.data(model_args, model_kwargs)
        return State({"z": self.moved(key, state.z["z"], y)}, rng_key)

    def refresh(self, state, model_args, model_kwargs):
        return state

    def wrap_model(self, wrapper):
        return type(self)(wrapper(self.model), self.correlation)


class TooWide(Autoregressive):
    """The variance of the noise as if the square were forgotten."""

    def moved(self, rng_key, z, y):
        mean, scale = posterior(y)
        return (
            mean + self.correlation * (z - mean) + jnp.sqrt(1 - self.correlation) * scale * random.normal(rng_key, (2,))
        )


class IgnoresData(Autoregressive):
    """Leaves the prior invariant."""

    def moved(self, rng_key, z, y):
        return PRIOR_MEAN + PRIOR_SCALE * random.normal(rng_key, (2,))


class StartsElsewhere(Autoregressive):
    """Deaf to ``init_params``, and its position is not what its state holds."""

    def get_constrain_fn(self, model_args, model_kwargs):
        return lambda z: {"z": z["z"] + 1.0}


class DividesByZero(Autoregressive):
    def moved(self, rng_key, z, y):
        return z / 0.0 * 0.0


class CannotRefresh(Autoregressive):
    refresh = MCMCKernel.refresh
