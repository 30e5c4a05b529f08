"""Simulation-based calibration passes exact samplers, and fails others. False alarms: 1 in 1000, at fixed seeds."""

import csv
from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import HMC

from numpyro_smc.reports.uniformity import levels_of_ranks
from numpyro_smc.verify import sbc
from tests.verify import conjugate_kernels
from tests.verify.conjugate_kernels import PRIOR_MEAN, PRIOR_SCALE, Autoregressive, TooWide, posterior

check = partial(sbc, random.key(0), model=conjugate_kernels.model, observed="y")


def exact(rng_key, data):
    mean, scale = posterior(data["y"])
    return {"z": mean + scale * random.normal(rng_key, (50, 2))}


def overconfident(rng_key, data):
    mean, scale = posterior(data["y"])
    return {"z": mean + 0.8 * scale * random.normal(rng_key, (50, 2))}


def prior(rng_key, data):
    return {"z": PRIOR_MEAN + PRIOR_SCALE * random.normal(rng_key, (50, 2))}


def untraceable(rng_key, data):
    return {name: np.asarray(value) for name, value in exact(rng_key, data).items()}


def test_exact_draws_pass():
    found = check(exact)
    assert found.passed and found.is_independent and found.num_draws == 50
    assert found.names == ("z[0]", "z[1]", "log prior", "log likelihood")
    assert "correlated" not in repr(found)


def test_a_sampler_that_jax_cannot_trace_has_the_same_ranks():
    traced, run = check(exact, num_simulations=8), check(untraceable, num_simulations=8)
    np.testing.assert_allclose(run.values, traced.values, atol=1e-5)


def test_overconfidence_is_found():
    found = check(overconfident)
    assert not found.passed and found.p_values[found.names.index("log likelihood")] < 1e-5


def test_draws_from_the_prior_are_found_by_the_likelihood_alone():
    found = check(prior)
    assert not found.passed
    assert dict(zip(found.names, found.p_values < 1e-3, strict=True)) == {
        "z[0]": False,
        "z[1]": False,
        "log prior": False,
        "log likelihood": True,
    }


def test_kernels_are_run_with_warm_up_and_thinning():
    right = check(Autoregressive, num_warmup=10, thinning=8, num_draws=50)
    wrong = check(TooWide, num_warmup=10, thinning=8, num_draws=50)
    assert right.passed and right.is_independent and right.title.endswith("of Autoregressive")
    assert not wrong.passed


def test_correlated_draws_are_remarked_upon():
    found = check(partial(Autoregressive, correlation=0.9), num_warmup=50, num_draws=50)
    assert not found.is_independent and "Use more thinning" in repr(found)


def test_a_kernel_adapts_in_its_warm_up():
    """A step size at which nothing is accepted; ranks would pile up at the ends."""
    kernel = partial(HMC, step_size=30.0, trajectory_length=2.0)
    assert check(kernel, num_warmup=100, num_draws=20, thinning=2, num_simulations=200).passed


def coin(y=None):
    k = numpyro.sample("k", dist.Binomial(3, 0.4))
    numpyro.sample("y", dist.Bernoulli((k + 0.5) / 4), obs=y)


def coin_posterior(rng_key, data):
    k = jnp.arange(4)
    log_joint = dist.Binomial(3, 0.4).log_prob(k) + dist.Bernoulli((k + 0.5) / 4).log_prob(data["y"])
    return {"k": dist.Categorical(logits=log_joint).sample(rng_key, (50,))}


def test_ranks_of_discrete_latents_are_uniform():
    assert sbc(random.key(1), coin_posterior, coin, observed="y").passed


def test_levels_of_ties_are_uniform():
    """Exactly: of n + 1 exchangeable values, e + 1 equal, the first takes any of the ranks they share."""
    values = np.random.default_rng(0).integers(0, 3, (4000, 8))
    below, equal = (values[:, 1:] < values[:, :1]).sum(1), (values[:, 1:] == values[:, :1]).sum(1)
    levels = levels_of_ranks(np.random.default_rng(1).uniform(size=4000), below, equal, 7)
    assert abs(levels.mean() - 0.5) < 5 / np.sqrt(12 * 4000)
    assert abs((levels**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / 4000)


def test_a_table_is_written(tmp_path):
    found = check(exact, num_simulations=30)
    found.to_csv(tmp_path / "table.csv")
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [line["name"] for line in lines] == list(found.names) and float(lines[0]["ESS"]) > 30


def test_samplers_without_some_latent_and_draws_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"nothing gives no draws of the latent sites \['z'\]"):

        def nothing(rng_key, data):
            return {}

        check(nothing)
    with pytest.raises(FloatingPointError, match=r"broken ended where z\[0\]"):

        def broken(rng_key, data):
            return {"z": jnp.full((10, 2), jnp.nan)}

        check(broken, num_simulations=30)
