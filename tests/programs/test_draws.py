"""One draw for the whole cloud has the law of independent draws per particle, for every kind of distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import transforms

from numpyro_smc.programs.draws import draw

NUM = 4000
SHIFT = jnp.linspace(0.0, 3.0, NUM)

BATCHED = {
    "normal": lambda s: dist.Normal(s, 1.0 + 0.5 * s),
    "gamma": lambda s: dist.Gamma(1.0 + s, 2.0),
    "beta": lambda s: dist.Beta(1.0 + s, 2.0),
    "student": lambda s: dist.StudentT(9.0, s, 0.5),
    "categorical": lambda s: dist.Categorical(logits=jnp.stack([0.0 * s, s, -s])),
    "poisson": lambda s: dist.Poisson(1.0 + s),
    "bernoulli": lambda s: dist.Bernoulli(logits=s - 1.0),
    "lognormal": lambda s: dist.LogNormal(0.3 * s, 0.2),
    "half normal": lambda s: dist.HalfNormal(1.0 + s),
    "event": lambda s: dist.Normal(jnp.stack([s, -s]), 1.0).to_event(1),
    "expanded": lambda s: dist.Normal(s, 1.0).expand([3]).to_event(1),
    "interstitial": lambda s: dist.Normal(jnp.reshape(s, (1, 1)) + jnp.zeros((2, 1)), 1.0).expand([2, 3]),
    "multivariate": lambda s: dist.MultivariateNormal(jnp.stack([s, -s]), scale_tril=jnp.eye(2) * (1.0 + s)),
    "truncated": lambda s: dist.TruncatedNormal(s, 1.0, low=0.0),
    "transformed": lambda s: dist.TransformedDistribution(dist.Normal(s, 1.0), transforms.AffineTransform(1.0, 2.0)),
    "masked": lambda s: dist.Normal(s, 1.0).mask(s > 1.0),
    "mixture": lambda s: dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.stack([s, s + 4.0]), 1.0)
    ),
    "unbatched": lambda s: dist.Normal(jnp.asarray(1.5), 2.0),
    "delta": lambda s: dist.Delta(s),
}


@pytest.mark.parametrize("name", sorted(BATCHED))
def test_cloud_draws_have_the_law_of_independent_draws(name):
    """Regression of the draws on their exact conditional means, and the variance around them: five standard errors."""
    fn = BATCHED[name]
    together = jax.jit(jax.vmap(lambda i, s: draw(random.key(1), fn(s), i)[0]))(jnp.arange(NUM), SHIFT)
    apart = jax.jit(jax.vmap(lambda k, s: fn(s)(rng_key=k)))(random.split(random.key(2), NUM), SHIFT)
    assert together.shape == apart.shape and together.dtype == apart.dtype
    a, b = (np.asarray(x, np.float64).reshape(NUM, -1) for x in (together, apart))
    halves = np.asarray(SHIFT) > 1.5
    for part in (halves, ~halves):
        for power in (1, 2):
            difference = (a[part] ** power).mean(0) - (b[part] ** power).mean(0)
            error = np.sqrt(((a[part] ** power).var(0) + (b[part] ** power).var(0)) / part.sum())
            assert (np.abs(difference) <= 5.0 * error + 1e-6).all(), (name, power, difference / error)
    if name != "delta":
        assert len(np.unique(a[:, 0])) > (1 if together.dtype in (jnp.int32, jnp.int64) else NUM // 2)
    centred = a[:, 0] - a[:, 0].mean() - np.polyval(np.polyfit(SHIFT, a[:, 0] - a[:, 0].mean(), 2), SHIFT)
    if name not in ("delta",):
        neighbours = (centred[1:] * centred[:-1]).mean() / centred.var()
        assert abs(neighbours) < 5.0 / np.sqrt(NUM)


def test_draws_follow_gradients_and_a_key_per_chain():
    def total(loc):
        return jnp.sum(jax.vmap(lambda i: draw(random.key(0), dist.Normal(loc, 2.0), i)[0])(jnp.arange(5)))

    assert jax.grad(total)(0.3) == 5.0 and jax.jacfwd(total)(0.3) == 5.0
    keys = random.split(random.key(0), 3)
    per_chain = jax.vmap(lambda k: jax.vmap(lambda i: draw(k, dist.Normal(0.0, 1.0), i)[0])(jnp.arange(4)))(keys)
    assert len(np.unique(per_chain)) == 12
    one_level = jax.vmap(lambda k, i: draw(k, dist.Normal(0.0, 1.0), i)[0])(keys, jnp.arange(3))
    assert len(np.unique(one_level)) == 3


def test_intermediates_of_transforms_give_the_same_density():
    fn = dist.TransformedDistribution(
        dist.Normal(0.3, 1.2), [transforms.AffineTransform(1.0, 2.0), transforms.ExpTransform()]
    )
    value, intermediates = draw(random.key(0), fn, jnp.asarray(0))
    np.testing.assert_allclose(fn.log_prob(value, intermediates), fn.log_prob(value), rtol=1e-5)
