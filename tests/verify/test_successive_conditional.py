"""Geweke's test passes kernels that leave the posterior invariant, and fails those that do not.

False alarms of the passing cases: 1 in 1000 each, at fixed seeds.
"""

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import HMC, CustomGibbs, Gibbs

from numpyro_smc.verify import geweke
from tests.verify import conjugate_kernels
from tests.verify.conjugate_kernels import (
    Autoregressive,
    CannotRefresh,
    DividesByZero,
    IgnoresData,
    StartsElsewhere,
    TooWide,
    posterior,
)

SIZES = {"num_replicates": 400, "num_steps": 5}
check = partial(geweke, random.key(0), observed="y", **SIZES)


def test_a_right_kernel_passes():
    found = check(Autoregressive, conjugate_kernels.model)
    assert found.passed and found.values.shape == (400, 6)
    assert found.names == ("z[0]", "z[1]", "y[0]", "y[1]", "log prior", "log likelihood")
    assert "Geweke test of Autoregressive: 400 simulations, uniform at level 0.001" in repr(found)


def test_too_much_noise_is_seen_in_the_latents():
    found = check(TooWide, conjugate_kernels.model)
    assert not found.passed and "not uniform" in repr(found)
    assert found.names[found.p_values.argmin()] == "log prior"


def test_a_kernel_that_ignores_the_data_is_seen_in_their_likelihood_alone():
    found = check(IgnoresData, conjugate_kernels.model)
    assert not found.passed
    assert min(p for name, p in zip(found.names, found.p_values, strict=True) if name != "log likelihood") > 1e-3


def test_data_may_be_given_by_argument_or_by_condition_and_their_values_do_not_matter():
    y = jnp.array([3.0, -4.0])
    given = geweke(random.key(0), Autoregressive, conjugate_kernels.model, y, **SIZES)
    conditioned = handlers.condition(conjugate_kernels.model, data={"y": y})
    without = geweke(random.key(0), Autoregressive, conjugate_kernels.model, observed="y", **SIZES)
    outside = geweke(random.key(0), Autoregressive(conditioned), conditioned, **SIZES)
    assert (given.values == without.values).all() and (outside.values == without.values).all()


def test_test_functions_are_checked_too():
    functions = {"product": lambda values: values["z"][0] * values["y"][0]}
    found = check(IgnoresData, conjugate_kernels.model, test_functions=functions)
    assert found.names[-1] == "product" and found.p_values[-1] < 1e-4


def random_walk(y=None, length=3):
    scale = numpyro.sample("scale", dist.Gamma(3.0, 3.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, scale))
        numpyro.sample("y", dist.StudentT(4.0, x, 0.5), obs=y_t)
        return x, None

    scan(step, 0.0, y, length=length)


hmc = partial(HMC, step_size=0.2, num_steps=5, trajectory_length=None)


def test_hmc_passes_on_a_scan_with_a_constrained_parameter():
    assert check(hmc(random_walk), random_walk).passed


def test_blocks_of_a_composite_kernel_see_the_new_data():
    """A block whose siblings never move keeps the energy of old data, unless every block is refreshed."""

    def both(y=None):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def blocks(model):
        still = CustomGibbs(lambda rng_key, gibbs_sites, hmc_sites: gibbs_sites)
        moving = HMC(model, step_size=0.5, num_steps=1, trajectory_length=None)
        return Gibbs([(moving, ["z"]), (still, ["w"])])

    found = geweke(random.key(0), blocks, both, observed="y", num_replicates=1000, num_steps=10)
    assert found.passed, found


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (CannotRefresh, "CannotRefresh does not implement refresh"),
        (StartsElsewhere, r"StartsElsewhere does not start at init_params: the values of \['z'\]"),
        (lambda model: model, "kernel must be an MCMC kernel"),
        (3, "kernel must be an MCMC kernel"),
    ],
)
def test_kernels_that_cannot_be_checked_are_refused(kernel, message):
    with pytest.raises(ValueError, match=message):
        check(kernel, conjugate_kernels.model)


def test_a_kernel_that_ends_nowhere_is_named():
    with pytest.raises(FloatingPointError, match=r"DividesByZero ended where z\[0\], z\[1\], y\[0\]"):
        check(DividesByZero, conjugate_kernels.model)


def factor(y=None):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.factor("penalty", -(z**2))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def scaled(y=None):
    with handlers.scale(scale=2.0):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def subsampled(y=None):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 4, subsample_size=2):
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def two_observed(y=None):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("known", dist.Normal(z, 1.0), obs=0.3)
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "observed", "message"),
    [
        (factor, "y", "because of the factor 'penalty'"),
        (scaled, "y", "the density of site 'z' is scaled"),
        (subsampled, "y", "plate 'rows' is subsampled"),
        (two_observed, "y", "site 'known' is observed in the model"),
        (conjugate_kernels.model, "x", "observed names site 'x', which the model does not sample"),
        (conjugate_kernels.model, None, "which sites are data"),
        (conjugate_kernels.model, ("z", "y"), "all sites of the model are data"),
    ],
)
def test_models_that_cannot_be_simulated_are_refused(model, observed, message):
    with pytest.raises(ValueError, match=message):
        geweke(random.key(0), Autoregressive, model, observed=observed, **SIZES)


def test_the_reference_posterior_is_the_conjugate_one():
    mean, scale = posterior(jnp.array([1.5, 0.5]))
    assert mean[1] == pytest.approx(0.5) and scale[0] == pytest.approx((1 / (1 + 0.7**-2)) ** 0.5)
