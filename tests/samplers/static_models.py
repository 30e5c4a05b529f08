"""Static models with known evidence, and samplers that are compiled once for all tests of a session."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.scipy.stats import norm

from numpyro_smc.samplers.smc_sampler import SMCSampler

STUDENT_T_DATA = jnp.asarray(np.random.RandomState(0).standard_t(3, 8) * 0.7 + 1, jnp.float32)
SCHOOLS = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]), jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])
SCHEDULE = np.linspace(0.0, 1.0, 11) ** 3


def conjugate(y, prior_scale, noise):
    """Two Gaussian locations, each observed once."""
    with numpyro.plate("dimension", 2):
        x = numpyro.sample("x", dist.Normal(0.5, prior_scale))
        numpyro.sample("y", dist.Normal(x, noise), obs=y)


CONJUGATE = (jnp.array([1.5, -2.0]), jnp.array([1.0, 2.0]), jnp.array([0.2, 0.5]))


def conjugate_evidence(y, prior_scale, noise):
    return float(dist.Normal(0.5, jnp.sqrt(prior_scale**2 + noise**2)).log_prob(y).sum())


def conjugate_posterior(y, prior_scale, noise):
    variance = 1.0 / (prior_scale**-2 + noise**-2)
    return variance * (0.5 * prior_scale**-2 + y * noise**-2), variance**0.5


def student_t(y):
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", 8):
        numpyro.sample("y", dist.StudentT(3.0, m, s), obs=y)


def student_t_guide(y):
    numpyro.sample("s", dist.LogNormal(numpyro.param("log_scale", 0.0), 0.5))
    numpyro.sample("m", dist.Normal(numpyro.param("centre", 0.0), 0.6))


def counts(categories, numbers):
    """A point of the simplex and three rates, observed by counts."""
    p = numpyro.sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 0.7])))
    numpyro.sample("categories", dist.Multinomial(categories.sum(), p, total_count_max=20), obs=categories)
    with numpyro.plate("group", 3):
        rate = numpyro.sample("rate", dist.Exponential(0.5))
        numpyro.sample("numbers", dist.Poisson(rate), obs=numbers)


COUNTS = (jnp.array([1, 7, 2]), jnp.array([1, 9, 4]))


def counts_evidence(categories, numbers):
    a = jnp.array([1.0, 2.0, 0.7])
    simplex = dist.DirichletMultinomial(a, categories.sum()).log_prob(categories)
    return float(simplex + jnp.sum(jnp.log(0.5) - (1.0 + numbers) * jnp.log(1.5)))


def schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(10.0))
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_by_quadrature(y, sigma):
    """Log evidence and posterior mean of tau: theta and mu integrated in closed form, tau on a grid."""
    tau = np.linspace(1e-4, 80.0, 20_001)
    y, sigma = np.asarray(y, float), np.asarray(sigma, float)
    variance = tau[:, None] ** 2 + sigma**2
    precision = (1.0 / variance).sum(1)
    mean = (y / variance).sum(1) / precision
    within = -0.5 * (np.log(2 * np.pi * variance) + (y - mean[:, None]) ** 2 / variance).sum(1)
    spread = 1.0 / precision + 25.0
    between = 0.5 * np.log(2 * np.pi / precision) - 0.5 * np.log(2 * np.pi * spread) - 0.5 * mean**2 / spread
    log_joint = within + between + np.log(2.0) - 0.5 * np.log(2 * np.pi * 100.0) - 0.5 * (tau / 10.0) ** 2
    density = np.exp(log_joint - log_joint.max())
    return log_joint.max() + np.log(np.trapezoid(density, tau)), np.trapezoid(tau * density, tau) / np.trapezoid(
        density, tau
    )


def two_modes():
    """Nine tenths of the mass near -1.5, one tenth near 1.5, in every one of ten dimensions."""
    z = numpyro.sample("z", dist.Normal(jnp.zeros(10), 2.0).to_event(1))
    low, high = (dist.Normal(centre, 0.3).log_prob(z).sum() for centre in (-1.5, 1.5))
    numpyro.factor("modes", jnp.logaddexp(jnp.log(0.9) + low, jnp.log(0.1) + high))


def two_modes_evidence():
    return float(dist.Normal(0.0, jnp.sqrt(4.0 + 0.09)).log_prob(1.5)) * 10


def truncated(y):
    """Half the prior has no likelihood."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("positive", jnp.where(x > 0.0, 0.0, -jnp.inf))
    numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def truncated_evidence(y):
    variance = 1.0 / (1.0 + 4.0)
    return float(dist.Normal(0.0, 1.25**0.5).log_prob(y) + norm.logcdf(4.0 * y * variance / variance**0.5))


def random_walk(rng_key, position, log_density, step_size):
    """A user's own kernel."""
    propose_key, accept_key = random.split(rng_key)
    proposal = position + step_size * random.normal(propose_key, position.shape)
    ratio = jnp.minimum(jnp.exp(log_density(proposal) - log_density(position)), 1.0)
    return jnp.where(random.uniform(accept_key) < ratio, proposal, position), ratio


@cache
def sampler(model, num_particles, schedule=False, **options):
    """One sampler per set of options, so that its programs are compiled once."""
    if schedule:
        options["tempering"] = SCHEDULE
    return SMCSampler(model, num_particles, **options)


def replicates(chosen, num_runs, *args):
    return [chosen.run(random.key(seed), *args, progress_bar=False) for seed in range(num_runs)]
