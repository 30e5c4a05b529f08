"""What users keep of a run travels by pickle and by copy: samplers, kernels, losses and results."""

import copy
import pickle

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC

import numpyro_smc as smc

Y = jnp.array([0.3, 0.8, 0.6])
BY = {"pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "copy": copy.deepcopy}


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


def functional(t, carry, values):
    return values["x"]


SETTINGS = {
    "ParticleFilter": lambda: smc.ParticleFilter(model, 5),
    "OnlineSmoother": lambda: smc.OnlineSmoother(smc.ParticleFilter(model, 5), functional),
    "SMCSampler": lambda: smc.SMCSampler(rows, 8, moves="hmc", tempering="data", data_plate="data"),
    "SMC2": lambda: smc.SMC2(model, 4, 4),
    "AIS": lambda: smc.AIS(rows),
    "FIVO": lambda: smc.FIVO(4, resampling_gradient="score", resample="always"),
    "SIXO": lambda: smc.SIXO(4),
    "DSMCS": lambda: smc.DSMCS(4, 2),
    "DAIS": lambda: smc.DAIS(4, 2),
    "AutoDSMCS": lambda: smc.AutoDSMCS(rows, num_transitions=2),
    "VIMCO": lambda: smc.VIMCO(4),
    "LocalOptimizer": lambda: smc.LocalOptimizer(),
    "ConditionalSMC": lambda: smc.ConditionalSMC(model, 5, params={"noise": 0.5}),
    "ParticleGibbs": lambda: smc.ParticleGibbs(model, 5),
    "ParticleMetropolis": lambda: smc.ParticleMetropolis(model, 5, correlation=0.9),
    "SMCKernel": lambda: smc.SMCKernel(rows),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("how", BY)
def test_samplers_kernels_and_losses_travel(name, how):
    made = SETTINGS[name]()
    arrived = BY[how](made)
    assert type(arrived) is type(made) and repr(arrived).split(" at 0x")[0] == repr(made).split(" at 0x")[0]


def test_a_filter_and_its_result_give_the_same_numbers_where_they_arrive():
    particle_filter = smc.ParticleFilter(model, 20)
    result = particle_filter.run(random.key(0), Y, params={"noise": 0.5})
    for by in BY.values():
        arrived = by(result)
        assert by(particle_filter).run(random.key(0), Y, params={"noise": 0.5}).log_evidence == result.log_evidence
        paths = (r.sample_posterior(random.key(1), 4)["x"] for r in (result, arrived))
        np.testing.assert_array_equal(*paths)


def test_a_tempered_sampler_and_its_result_travel():
    sampler = smc.SMCSampler(rows, 16, moves="rwmh", num_moves=1)
    result = sampler.run(random.key(0), Y, progress_bar=False)
    for by in BY.values():
        assert by(sampler).run(random.key(0), Y, progress_bar=False).log_evidence == result.log_evidence
        np.testing.assert_array_equal(by(result).get_samples()["mean"], result.get_samples()["mean"])


@pytest.mark.parametrize("name", ["ParticleGibbs", "ParticleMetropolis", "ConditionalSMC"])
def test_chains_travel_after_a_run(name):
    mcmc = MCMC(SETTINGS[name](), num_warmup=1, num_samples=2, progress_bar=False)
    mcmc.run(random.key(0), Y)
    for by in BY.values():
        for site, values in by(mcmc).get_samples().items():
            np.testing.assert_array_equal(values, mcmc.get_samples()[site])
