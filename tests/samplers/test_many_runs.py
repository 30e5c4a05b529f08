"""Many problems in one compiled program."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_smc.samplers.smc_sampler import SMCSampler


def two_sided(y):
    """A Gaussian observation of an exponential variable's square root: evidences by quadrature below."""
    z = numpyro.sample("z", dist.Gamma(2.0, 1.0))
    numpyro.sample("y", dist.Normal(z, 0.3), obs=y)


def exact(y):
    z = np.linspace(1e-6, 30, 400_001)
    log_joint = np.log(z) - z - 0.5 * ((y - z) / 0.3) ** 2 - np.log(0.3 * np.sqrt(2 * np.pi))
    weights = np.exp(log_joint)
    return np.log(np.trapezoid(weights, z)), np.trapezoid(weights * z, z) / np.trapezoid(weights, z)


SAMPLER = SMCSampler(two_sided, num_particles=400, moves="rwmh", num_moves=5)


def test_each_of_many_problems_has_its_own_posterior_and_evidence():
    y = jnp.array([0.2, 1.5, 4.0, 9.0])
    results = SAMPLER.run_many(random.key(0), y, progress_bar=False)
    assert len({len(result.betas) for result in results}) > 1  # further data take more temperatures
    for value, result in zip(y, results, strict=True):
        log_evidence, mean = exact(float(value))
        assert abs(result.log_evidence - log_evidence) < 5 * result.log_evidence_se
        assert abs(float(result.mean("z")) - mean) < 5 * float(result.standard_error(result.samples["z"]))
        assert result.betas[-1] == 1.0 and (np.diff(result.betas) > 0).all()


def test_a_problem_of_many_is_the_run_with_its_key():
    y = jnp.array([0.7, 2.5])
    many = SAMPLER.run_many(random.key(3), y, progress_bar=False)
    for key, value, result in zip(random.split(random.key(3), 2), y, many, strict=True):
        alone = SAMPLER.run(key, value, progress_bar=False)
        np.testing.assert_allclose(alone.betas, result.betas, rtol=1e-4)
        assert alone.log_evidence == pytest.approx(result.log_evidence, abs=1e-3)


def test_a_second_batch_compiles_nothing():
    SAMPLER.run_many(random.key(1), jnp.array([1.0, 2.0]), progress_bar=False)
    number = SAMPLER._batch._advance.num_compiled()
    SAMPLER.run_many(random.key(2), jnp.array([3.0, 0.1]), progress_bar=False)
    assert SAMPLER._batch._advance.num_compiled() == number


def test_arguments_without_a_common_leading_axis_are_refused():
    with pytest.raises(ValueError, match=r"leading axis; got shapes \(\)"):
        SAMPLER.run_many(random.key(0), jnp.asarray(1.0))


def test_a_problem_without_likelihood_is_named():
    with pytest.raises(FloatingPointError, match="problem 1 of 2"):
        SAMPLER.run_many(random.key(0), jnp.array([1.0, jnp.nan]), progress_bar=False)


def test_pools_are_refused():
    with pytest.raises(ValueError, match="use run for each problem"):
        SMCSampler(two_sided, num_particles=100, persistent=True).run_many(random.key(0), jnp.ones(2))
