"""``az.from_numpyro`` of chains by every kernel: draws, and the likelihoods that the draws determine, no others."""

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, log_likelihood

from numpyro_smc import ConditionalSMC, ParticleGibbs, ParticleMetropolis, SMCKernel

Y = jnp.array([0.3, 0.8, 0.6, 0.1])


def model(y):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.2))
        numpyro.sample("y", dist.Normal(x, noise), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def rows(y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def chains(kernel, num_warmup=2, num_samples=3, num_chains=2):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), Y)
    return mcmc


def exact(posterior, noise=None):
    noise = np.asarray(posterior["noise"])[..., None] if noise is None else noise
    return dist.Normal(np.asarray(posterior["x"]), noise).log_prob(Y)


def test_parameters_alone_have_no_likelihood_of_single_observations():
    found = az.from_numpyro(chains(ParticleMetropolis(model, 5)))
    assert list(found.posterior.data_vars) == ["noise"] and found.posterior["noise"].shape == (2, 3)
    assert "log_likelihood" not in found.groups()


@pytest.mark.parametrize(
    "kernel", [ParticleMetropolis(model, 5, keep_paths=True), ParticleGibbs(model, 5)], ids=["Metropolis", "Gibbs"]
)
def test_paths_and_parameters_have_the_likelihoods_they_determine(kernel):
    found = az.from_numpyro(chains(kernel))
    np.testing.assert_allclose(found.log_likelihood["y"], exact(found.posterior), rtol=1e-4)
    np.testing.assert_array_equal(found.observed_data["y"], Y)


def test_values_that_the_kernel_holds_stand_in_the_likelihood():
    found = az.from_numpyro(chains(ConditionalSMC(model, 5, params={"noise": 0.5})))
    np.testing.assert_allclose(found.log_likelihood["y"], exact(found.posterior, 0.5), rtol=1e-4)


def test_tempered_chains():
    mcmc = chains(SMCKernel(rows, moves="rwmh", num_moves=2), num_warmup=0, num_samples=4, num_chains=3)
    found = az.from_numpyro(mcmc)
    means = np.asarray(found.posterior["mean"])[..., None]
    np.testing.assert_allclose(found.log_likelihood["y"], dist.Normal(means, 0.5).log_prob(Y), rtol=1e-4)


def test_the_program_of_a_kernel_is_the_users_program():
    program = ParticleMetropolis(model, 5, params={"x_0": 0.3}).model
    assert program == model and hash(program) == hash(model) and program != rows and program.__name__ == "model"
    traced = handlers.trace(handlers.seed(program, 0)).get_trace(Y)
    assert traced["x"]["value"].shape == (4,) and traced["y"]["is_observed"]
    given = {"noise": jnp.array([0.4]), "x": jnp.zeros((1, 4))}
    np.testing.assert_allclose(log_likelihood(program, given, Y)["y"][0], dist.Normal(0.0, 0.4).log_prob(Y), rtol=1e-5)
