"""A simulator whose ratios are known, of all parameters and of any of them."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from numpyro_smc.programs.simulator import Simulator
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.losses import BinaryLoss

LOCS, SCALES = np.array([0.5, -1.0, 2.0]), np.array([2.0, 0.7, 1.5])
DESIGN = np.array([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8]])
NOISE = np.array([0.8, 0.5])


def simulator():
    a = numpyro.sample("a", dist.Normal(LOCS[0], SCALES[0]))
    b = numpyro.sample("b", dist.Normal(jnp.asarray(LOCS[1:]), jnp.asarray(SCALES[1:])).to_event(1))
    hidden = numpyro.sample("hidden", dist.Normal(0.0, 1.0).expand([2]))
    numpyro.deterministic("x", jnp.asarray(DESIGN) @ jnp.concatenate([a[None], b]) + jnp.asarray(NOISE) * hidden)


class ExactNetwork:
    """Stands for a trained network: the exact log ratio, plus ``error(theta)``."""

    has_masks, marginals = True, None

    def __init__(self, error=lambda theta: 0.0):
        self.error = error

    def features(self, weights, x, context=None):
        return jnp.asarray(x)

    def log_ratio_of_features(self, weights, theta, features, mask=None):
        kept = jnp.ones(3, bool) if mask is None else jnp.asarray(mask)
        mean = DESIGN @ LOCS
        shift = (jnp.asarray(theta) - LOCS) @ (DESIGN * kept).T
        given = _log_density(features - mean - shift, jnp.sum(kept * jnp.array([1, 2, 4])))
        return given - _log_density(features - mean, 0) + self.error(theta)


#: Of the output given the parameters that are kept, by the number whose binary digits they are.
COVARIANCES = [
    (DESIGN * [not number >> i & 1 for i in range(3)] * SCALES**2) @ DESIGN.T + np.diag(NOISE**2) for number in range(8)
]


def _log_density(residual, number):
    precision = jnp.asarray(np.linalg.inv(COVARIANCES))[number]
    log_det = jnp.asarray(np.linalg.slogdet(COVARIANCES)[1])[number]
    return -0.5 * jnp.sum((residual @ precision) * residual, -1) - 0.5 * log_det


def posterior(x):
    """Mean and covariance of the parameters."""
    gain = (SCALES**2)[:, None] * DESIGN.T @ np.linalg.inv((DESIGN * SCALES**2) @ DESIGN.T + np.diag(NOISE**2))
    return LOCS + gain @ (np.asarray(x) - DESIGN @ LOCS), np.diag(SCALES**2) - gain @ (DESIGN * SCALES**2)


@cache
def exact_estimator():
    return RatioEstimator(Simulator(simulator, ["a", "b"]), ExactNetwork(), (), BinaryLoss())


@cache
def narrow_estimator():
    """Overconfident: its posteriors have too little variance."""
    sharper = ExactNetwork(lambda theta: -jnp.sum((theta - LOCS) ** 2, -1))
    return RatioEstimator(Simulator(simulator, ["a", "b"]), sharper, (), BinaryLoss())
