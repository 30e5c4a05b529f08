"""The evidence estimate is unbiased: linear-Gaussian, discrete, batched, masked, under every resampler and schedule.

Each case compares the mean of exp(log Z - log p) over fixed keys with one; five standard errors,
false alarms 6e-7 a case.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from models import linear_gaussian as lg
from numpyro_smc import ParticleFilter, log_evidence, resampling
from tests.statistics_of_estimates import assert_unbiased_evidence

AR1 = {"coefficient": 0.9, "transition_scale": 0.6, "emission_scale": 1.0, "initial_scale": 1.3}
SERIES = lg.simulate(random.key(42), lg.ar1_parameters(**AR1), 50)[1][:, 0]
EXACT = lg.log_evidence(lg.ar1_parameters(**AR1), SERIES[:, None])


def estimates(particle_filter, num_keys, *args, seed=0, **kwargs):
    evaluate = jax.jit(jax.vmap(lambda key: particle_filter.log_evidence(key, *args, **kwargs)))
    return evaluate(random.split(random.key(seed), num_keys))


@pytest.mark.parametrize("resample", ["always", "ess"])
@pytest.mark.parametrize("resampler", [name for name in resampling.available() if resampling.resolve(name).unbiased])
def test_linear_gaussian_against_the_kalman_filter(resampler, resample):
    """T = 50, N = 64, 400 keys."""
    particle_filter = ParticleFilter(lg.ar1_model, 64, resampler=resampler, resample=resample)
    assert_unbiased_evidence(estimates(particle_filter, 400, SERIES, **AR1), EXACT)


def ar1_guide(y, **kwargs):
    def step(x, y_t):
        return numpyro.sample("x", dist.Normal(0.5 * x + 0.4 * y_t, 0.6)), None

    scan(step, numpyro.sample("x_0", dist.Normal(0.5, 1.5)), y)


def test_a_guide_that_also_proposes_the_initial_state():
    particle_filter = ParticleFilter(lg.ar1_model, 64, guide=ar1_guide)
    assert_unbiased_evidence(estimates(particle_filter, 1000, SERIES, **AR1), EXACT)


def hmm(y, transition, means):
    def step(z, y_t):
        z = numpyro.sample("z", dist.Categorical(transition[z]), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(means[z], 1.0), obs=y_t)
        return z, None

    z = numpyro.sample("z_0", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
    scan(step, z, y)


def test_a_discrete_hidden_markov_model_against_the_forward_algorithm():
    transition = jnp.array([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    means = jnp.array([-1.0, 0.5, 2.0])
    y = jnp.array([-0.9, -1.2, 0.3, 0.8, 2.2, 1.9, 2.4, -0.5])
    forward = jnp.array([0.2, 0.3, 0.5])
    exact = 0.0
    for value in y:
        forward = (forward @ transition) * jnp.exp(dist.Normal(means, 1.0).log_prob(value))
        exact += jnp.log(forward.sum())
        forward = forward / forward.sum()
    particle_filter = ParticleFilter(hmm, 64, resampler="multinomial")
    assert_unbiased_evidence(estimates(particle_filter, 2000, y, transition, means), exact)
    result = ParticleFilter(hmm, 20_000).run(random.key(0), y, transition, means)
    final = np.array([(np.exp(result.log_weights[-1]) * (result.particles["z"][-1] == k)).mean() for k in range(3)])
    np.testing.assert_allclose(final, forward, atol=0.02)


def batch_model(y, lengths, present):
    """Series of different lengths, ``[T, B]``, with missing values."""
    num_series = y.shape[1]
    with numpyro.plate("series", num_series):
        x = numpyro.sample("x_0", dist.Normal(0.0, 1.3))

    def step(x, inputs):
        t, y_t, present_t = inputs
        with numpyro.plate("series", num_series), handlers.mask(mask=t < lengths):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.6))
            with handlers.mask(mask=present_t):
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, x, (jnp.arange(len(y)), y, present))


@pytest.mark.parametrize("resample", ["always", "ess"])
def test_a_plate_of_series_of_different_lengths_with_missing_values(resample):
    """Eight series, lengths 3 to 20, a fifth of the values missing and stored as NaN;
    each against its Kalman filter.
    """
    parameters = lg.ar1_parameters(**AR1)
    y = jnp.stack([lg.simulate(random.key(s), parameters, 20)[1][:, 0] for s in range(8)], axis=1)
    lengths = jnp.array([3, 20, 5, 11, 8, 20, 14, 17])
    present = random.uniform(random.key(7), y.shape) > 0.2
    observed = present & (jnp.arange(20)[:, None] < lengths)
    y = jnp.where(observed, y, jnp.nan)
    particle_filter = ParticleFilter(batch_model, 64, resample=resample)
    values = estimates(particle_filter, 600, y, lengths, present)
    assert values.shape == (600, 8)
    for s in range(8):
        exact = lg.log_evidence(parameters, y[:, s : s + 1], observed[:, s])
        assert_unbiased_evidence(values[:, s], exact)


def test_two_plates_and_a_global_latent_that_is_given():
    """Groups by series, a shared level given in params: the evidence is conditional on it, per group and series."""

    def model(y):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))

        def step(x, y_t):
            with numpyro.plate("groups", 2, dim=-2), numpyro.plate("series", 3, dim=-1):
                x = numpyro.sample("x", dist.Normal(0.9 * x, 0.6))
                numpyro.sample("y", dist.Normal(level + x, 1.0), obs=y_t)
            return x, None

        scan(step, jnp.zeros((2, 3)), y)

    y = random.normal(random.key(0), (6, 2, 3))
    values = estimates(ParticleFilter(model, 64), 600, y, params={"level": jnp.asarray(0.7)})
    assert values.shape == (600, 2, 3)
    parameters = lg.ar1_parameters(**AR1)._replace(initial_covariance=jnp.full((1, 1), 1e-12))
    for group in range(2):
        for s in range(3):
            exact = lg.log_evidence(parameters, y[:, group, s : s + 1] - 0.7)
            assert_unbiased_evidence(values[:, group, s], exact)


def test_chunks_of_particles_give_unbiased_estimates_too():
    def one(key):
        return log_evidence(key, lg.ar1_model, {}, SERIES, num_particles=64, batch_size=16, **AR1)

    assert_unbiased_evidence(jax.jit(jax.vmap(one))(random.split(random.key(0), 400)), EXACT)
    with pytest.raises(ValueError, match="batch_size=30 must be positive and divide num_particles=64"):
        log_evidence(random.key(0), lg.ar1_model, {}, SERIES, num_particles=64, batch_size=30)


def test_a_second_call_does_not_recompile():
    particle_filter = ParticleFilter(lg.ar1_model, 16)
    for seed in range(3):
        particle_filter.run(random.key(seed), SERIES + seed, **AR1)
    assert particle_filter._compiled_run.num_compiled() == 1
    particle_filter.run(random.key(0), SERIES[:20], **AR1)
    assert particle_filter._compiled_run.num_compiled() == 2


def test_a_single_particle_and_a_single_step():
    values = estimates(ParticleFilter(lg.ar1_model, 1), 50, SERIES[:1], **AR1)
    assert np.isfinite(values).all() and len(set(np.asarray(values))) == 50


def test_a_long_float32_series_keeps_its_digits():
    """1,000 deterministic-weight steps: the sum over time of a known increment."""

    def constant(T=1000):
        def step(x, t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.factor("weight", jnp.asarray(2.0))
            return x, None

        scan(step, 0.0, jnp.arange(T))

    result = ParticleFilter(constant, 10, resample="always").run(random.key(0))
    np.testing.assert_allclose(result.log_evidence, 2000.0, rtol=1e-6)


def test_a_static_latent_that_travels_in_the_carry_belongs_to_each_particle():
    """theta ~ N(0, 1) reaches the steps through the carry alone: y is jointly Gaussian with covariance I + 11'."""

    def model(y):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))

        def step(carry, y_t):
            theta, count = carry
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y_t)
            return (theta, count + 1), None

        scan(step, (theta, 0), y)

    y = jnp.array([0.4, 1.1, -0.2, 0.8])
    exact = dist.MultivariateNormal(jnp.zeros(4), jnp.eye(4) + jnp.ones((4, 4))).log_prob(y)
    assert_unbiased_evidence(estimates(ParticleFilter(model, 64, resample="always"), 1000, y), exact)


def test_equal_initial_weights_are_not_resampled():
    result = ParticleFilter(lg.ar1_model, 16, resample="always").run(random.key(0), SERIES, **AR1)
    assert not result.resampled[0] and result.resampled[1:].all()
    np.testing.assert_array_equal(result.ancestors[0], np.arange(16))
    guided = ParticleFilter(lg.ar1_model, 16, guide=ar1_guide, resample="always").run(random.key(0), SERIES, **AR1)
    assert guided.resampled.all()
