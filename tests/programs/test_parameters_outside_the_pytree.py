"""Draws of a cloud are those of NumPyro's distributions, whatever their parameters are held in."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.scipy.stats import binom, multinomial
from numpyro.contrib.control_flow import scan

from numpyro_smc import ParticleFilter
from numpyro_smc.programs.draws import draw
from tests.statistics_of_estimates import assert_unbiased_evidence

P, POPULATION = jnp.array([0.3, 0.2, 0.5]), 4
OBSERVED = jnp.array([1, 0, 1])

COUNTED = {
    "probs": lambda count: dist.Multinomial(count, probs=P, total_count_max=POPULATION),
    "logits": lambda count: dist.Multinomial(count, logits=jnp.log(P), total_count_max=POPULATION),
    "dirichlet": lambda count: dist.DirichletMultinomial(10.0 * P, count, total_count_max=POPULATION),
}


def compartments(make):
    def model(y):
        def step(susceptible, y_t):
            flows = numpyro.sample("flows", make(susceptible))
            numpyro.sample("y", dist.Binomial(flows[0], probs=0.7), obs=y_t)
            return susceptible - flows[0] - flows[1], None

        scan(step, jnp.array(POPULATION), y)

    return model


def exact_evidence(kind):
    law, log_evidence = {POPULATION: 1.0}, 0.0
    for y in OBSERVED:
        after: dict[int, float] = {}
        for n, weight in law.items():
            for a in range(n + 1):
                for b in range(n - a + 1):
                    flows = jnp.array([a, b, n - a - b])
                    density = multinomial.pmf(flows, n, P)
                    if kind == "dirichlet":
                        density = jnp.exp(dist.DirichletMultinomial(10.0 * P, n).log_prob(flows))
                    value = weight * float(density) * float(binom.pmf(y, a, 0.7))
                    after[n - a - b] = after.get(n - a - b, 0.0) + value
        total = sum(after.values())
        log_evidence, law = log_evidence + np.log(total), {n: value / total for n, value in after.items()}
    return log_evidence


@pytest.mark.parametrize("kind", COUNTED)
def test_a_count_from_the_carry_is_filtered_exactly(kind):
    run = ParticleFilter(compartments(COUNTED[kind]), 100)
    values = jax.jit(jax.vmap(lambda key: run.log_evidence(key, OBSERVED)))(random.split(random.key(0), 300))
    assert_unbiased_evidence(values, exact_evidence(kind))
    flows = run.run(random.key(1), OBSERVED).particles["flows"]
    assert flows.dtype == jnp.int32 and (flows >= 0).all() and (flows[0].sum(-1) == POPULATION).all()


def test_counts_of_a_plate_from_the_carry():
    def model(y):
        def step(left, y_t):
            with numpyro.plate("town", 2):
                flows = numpyro.sample("flows", dist.Multinomial(left, probs=P, total_count_max=POPULATION))
                numpyro.sample("y", dist.Binomial(flows[:, 0].astype(int), probs=0.7), obs=y_t)
            return left - flows[:, 0].astype(int) - flows[:, 1].astype(int), None

        scan(step, jnp.array([POPULATION, POPULATION]), y)

    y = jnp.stack([OBSERVED, OBSERVED], axis=1)
    values = jax.jit(jax.vmap(lambda key: ParticleFilter(model, 100).log_evidence(key, y)))(
        random.split(random.key(0), 200)
    )
    for town in range(2):
        assert_unbiased_evidence(values[:, town], exact_evidence("probs"))


MADE = {
    "normal": lambda s: dist.Normal(s, 1.0),
    "gamma": lambda s: dist.Gamma(s, 1.0),
    "truncated normal": lambda s: dist.TruncatedNormal(s, 1.0, low=0.0),
    "levy": lambda s: dist.Levy(s, 1.0),
    "inverse gamma": lambda s: dist.InverseGamma(s, 1.0),
    "log normal": lambda s: dist.LogNormal(s, 1.0),
    "pareto": lambda s: dist.Pareto(s, 3.0),
    "mixture": lambda s: dist.MixtureSameFamily(
        dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.stack([s, -s]), 1.0)
    ),
    "zero-inflated": lambda s: dist.ZeroInflatedPoisson(0.3, s),
    "dirichlet": lambda s: dist.Dirichlet(jnp.stack([s, s + 1.0])),
    "multivariate normal": lambda s: dist.MultivariateNormal(jnp.stack([s, s]), jnp.eye(2)),
    "random walk": lambda s: dist.GaussianRandomWalk(s, 3),
    "lkj": lambda s: dist.LKJCholesky(3, s),
    "bernoulli": lambda s: dist.Bernoulli(s / 3.0),
    "binomial": lambda s: dist.Binomial(4, s / 3.0),
    "categorical": lambda s: dist.Categorical(logits=jnp.stack([s, 0.0 * s])),
    "poisson": lambda s: dist.Poisson(s),
    "geometric": lambda s: dist.Geometric(s / 3.0),
    "negative binomial": lambda s: dist.NegativeBinomial2(s, 2.0),
    "multinomial": lambda s: dist.Multinomial(4, jnp.stack([s, 3.0 - s]) / 3.0),
    "multinomial, logits": lambda s: dist.Multinomial(4, logits=jnp.stack([s, 0.0 * s])),
    "dirichlet multinomial": lambda s: dist.DirichletMultinomial(jnp.stack([s, s + 1.0]), 4),
}


@pytest.mark.parametrize("name", MADE)
def test_clouds_have_numpyros_shapes_and_types_and_differ(name):
    make = MADE[name]
    one = make(jnp.asarray(1.2)).sample(random.key(0))
    cloud = jax.vmap(lambda index, s: draw(random.key(0), make(s), index)[0])(
        jnp.arange(64), jnp.linspace(1.0, 2.0, 64)
    )
    assert cloud.shape == (64, *one.shape) and cloud.dtype == one.dtype
    assert len(np.unique(np.asarray(cloud), axis=0)) > 1
