"""Masked latents have density one, or are refused by name; the dummies of ``obs_mask`` belong to no posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from jax import random
from jax.scipy.stats import multivariate_normal
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC

from numpyro_smc import AIS, ParticleFilter, SMCKernel, SMCSampler, importance, log_marginal_likelihood
from tests.statistics_of_estimates import assert_unbiased_evidence

Y = jnp.array([3.3, 3.9, 3.2])


def step(x, y_t):
    x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
    numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
    return x, None


def flat_start(y):
    scan(step, numpyro.sample("x0", dist.Normal(0.0, 1.0).mask(False)), y)


def flat_start_guide(y):
    def propose(x, y_t):
        return numpyro.sample("x", dist.Normal(0.8 * x, 0.5)), None

    scan(propose, numpyro.sample("x0", dist.Normal(4.3, 1.5)), y)


def flat_start_evidence():
    """With a wide normal prior instead of the flat one, times its density at the middle."""
    wide = 1e3
    powers = 0.8 ** np.arange(1, 4)
    covariance = wide**2 * np.outer(powers, powers) + 0.4**2 * np.eye(3)
    for i in range(3):
        for j in range(3):
            covariance[i, j] += sum(0.5**2 * 0.8 ** (i + j - 2 * k) for k in range(min(i, j) + 1))
    log_z = scipy.stats.multivariate_normal.logpdf(np.asarray(Y, np.float64), np.zeros(3), covariance)
    return float(log_z + np.log(wide * np.sqrt(2 * np.pi)))


def test_a_masked_latent_that_the_model_would_draw_is_refused_by_name():
    with pytest.raises(ValueError, match=r"ParticleFilter: the latent site 'x0' is masked.*sample 'x0' in a guide"):
        ParticleFilter(flat_start, 10).run(random.key(0), Y)


def test_a_guides_draws_are_weighed_against_density_one():
    run = ParticleFilter(flat_start, 500, guide=flat_start_guide)
    values = jax.jit(jax.vmap(lambda key: run.log_evidence(key, Y)))(random.split(random.key(0), 100))
    assert abs(np.exp(flat_start_evidence()) - 0.0724) < 2e-4
    assert_unbiased_evidence(values, flat_start_evidence())


def static(y):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def static_guide(y):
    numpyro.sample("z", dist.Normal(0.0, 2.0))


def test_importance_and_annealing_refuse_draws_that_nothing_weighs():
    # The flat prior integrates the likelihood to one.
    found = importance(random.key(0), static, 0.7, guide=static_guide, num_samples=20_000)
    assert abs(found.value) < 5 * found.standard_error
    for run in (
        lambda: importance(random.key(0), static, 0.7, num_samples=100),
        lambda: AIS(static, num_temperatures=4, num_chains=4).run(random.key(0), 0.7),
    ):
        with pytest.raises(ValueError, match=r"latent site 'z' is masked where it is drawn.*sample 'z' in a guide"):
            run()


def padded(y, length):
    def padded_step(carry, inputs):
        t, y_t = inputs
        with handlers.mask(mask=t < length):
            return step(carry, y_t)

    scan(padded_step, 0.0, (jnp.arange(len(y)), y))


def gap(y, is_there):
    def gap_step(x, inputs):
        y_t, there = inputs
        with handlers.mask(mask=there):
            return step(x, y_t)

    scan(gap_step, 0.0, (y, is_there))


def test_padding_changes_nothing_and_a_masked_latent_in_a_gap_gives_no_number():
    whole = ParticleFilter(lambda y: scan(step, 0.0, y) and None, 50)
    longer = jnp.concatenate([Y, jnp.zeros(2)])
    key = random.key(3)
    filtered = ParticleFilter(padded, 50).log_evidence(key, longer, 3)
    np.testing.assert_allclose(filtered, whole.log_evidence(key, Y), rtol=1e-5)
    with pytest.raises(FloatingPointError, match="at step 2"):
        ParticleFilter(gap, 50).run(key, Y, jnp.array([True, False, True]))
    late = ParticleFilter(gap, 50).log_evidence(key, longer, jnp.array([True, True, True, False, False]))
    np.testing.assert_allclose(late, filtered, rtol=1e-6)


DATA, SEEN = jnp.array([0.3, 0.0, 1.1, 0.0]), jnp.array([True, False, True, False])
SEEN_EVIDENCE = float(multivariate_normal.logpdf(jnp.array([0.3, 1.1]), jnp.zeros(2), 0.25 * jnp.eye(2) + 1.0))


def with_missing(data, seen):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("n", 4):
        numpyro.sample("y", dist.Normal(mu, 0.5), obs=data, obs_mask=seen)


def imputing_guide(data, seen):
    numpyro.sample("mu", dist.Normal(0.6, 0.5))
    with numpyro.plate("n", 4):
        numpyro.sample("y_unobserved", dist.Normal(0.6, 0.8))


def test_missing_data_are_integrated_out_by_every_evidence():
    assert abs(SEEN_EVIDENCE + 2.408) < 1e-3
    sampler = SMCSampler(with_missing, 400)
    runs = [sampler.run(random.key(i), DATA, SEEN, progress_bar=False) for i in range(8)]
    assert_unbiased_evidence([run.log_evidence for run in runs], SEEN_EVIDENCE)
    assert "y_unobserved" not in runs[0].samples and runs[0].samples["y"].shape == (400, 4)
    assert (np.asarray(runs[0].samples["y"])[:, SEEN] == DATA[SEEN]).all()
    assert np.asarray(runs[0].samples["y"])[:, 1].std() > 0.3
    for found in (
        log_marginal_likelihood(random.key(1), with_missing, DATA, SEEN, method="smc", options={"num_particles": 400}),
        importance(random.key(1), with_missing, DATA, SEEN, num_samples=20_000),
        importance(random.key(1), with_missing, DATA, SEEN, guide=imputing_guide, num_samples=20_000),
    ):
        assert abs(found.value - SEEN_EVIDENCE) < 5 * found.standard_error, found


def test_the_smc_kernel_takes_missing_data():
    mcmc = MCMC(
        SMCKernel(with_missing),
        num_warmup=0,
        num_samples=1,
        num_chains=200,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), DATA, SEEN, extra_fields=("log_evidence", "log_evidence_se"))
    fields = mcmc.get_extra_fields()
    assert abs(fields["log_evidence"][0] - SEEN_EVIDENCE) < 5 * fields["log_evidence_se"][0]
    assert sorted(mcmc.get_samples()) == ["mu", "y"]


def test_missing_steps_of_a_series_are_drawn_from_their_own_law():
    def series(y, seen):
        def missing_step(x, inputs):
            y_t, seen_t = inputs
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t, obs_mask=seen_t)
            return x, None

        scan(missing_step, 0.0, (y, seen))

    def guide(y, seen):
        def propose(x, inputs):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.7))
            numpyro.sample("y_unobserved", dist.Normal(x, 0.6))
            return x, None

        scan(propose, 0.0, (y, seen))

    y, seen = jnp.array([0.3, 9.0, -0.4]), jnp.array([True, False, True])
    covariance = [[0.25 + 0.16, 0.64 * 0.25], [0.64 * 0.25, 0.25 * (1 + 0.64 + 0.64**2) + 0.16]]
    exact = float(multivariate_normal.logpdf(y[seen], jnp.zeros(2), jnp.array(covariance)))
    for run in (ParticleFilter(series, 200), ParticleFilter(series, 200, guide=guide)):
        values = jax.jit(jax.vmap(lambda key, run=run: run.log_evidence(key, y, seen)))(random.split(random.key(0), 60))
        assert_unbiased_evidence(values, exact)
