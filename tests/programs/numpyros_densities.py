"""Log weights of a particle filter against the densities that NumPyro's own trace of the program adds up to."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from numpyro_smc import ParticleFilter


def assert_numpyros_densities(model, *args, params=None, guide=None, **kwargs):
    """Two particles that are never resampled: log p(x, y) - log q(x), or log p(y | x) without a guide, by path.

    :return: the filter's result.
    """
    params, args, kwargs = jax.tree.map(jnp.asarray, (params or {}, args, kwargs))
    result = ParticleFilter(model, 2, guide=guide, resample="never").run(
        jax.random.key(0), *args, params=params, **kwargs
    )

    def log_density(program, values, observed_only):
        seeded = handlers.seed(handlers.substitute(program, data=params | values), 0)
        total = 0.0
        for name, site in handlers.trace(seeded).get_trace(*args, **kwargs).items():
            if site["type"] == "sample" and name not in params and (site["is_observed"] or not observed_only):
                log_prob = site["fn"].log_prob(site["value"])
                total = total + jnp.sum(log_prob * (1.0 if site["scale"] is None else site["scale"]))
        return total

    def expected(values):
        joint = log_density(model, values, guide is None)
        return joint if guide is None else joint - log_density(guide, values, False)

    steps = jax.tree.map(lambda value: jnp.moveaxis(value, 0, 1), result.history.steps["values"])
    found = result.log_weights[-1].reshape(2, -1).sum(1) + result.total_log_evidence
    by_path = jax.jit(jax.vmap(expected, axis_size=2))(result.history.initial["values"] | steps)
    np.testing.assert_allclose(found, by_path, rtol=1e-4, atol=1e-3)
    return result
