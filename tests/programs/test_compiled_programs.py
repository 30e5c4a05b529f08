"""Compiled answers are those of the program as it is now; numbers among arguments compile nothing."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from numpyro_smc import AIS, ParticleFilter, SMCSampler, fit, log_marginal_likelihood
from numpyro_smc.programs import compiled as module
from numpyro_smc.programs.compiled import Compiled

SD = 0.5
STEP = 1.0
TRACES = []


def euler(x, _):
    return x + STEP, None


def by_lax_scan(x):
    return lax.scan(euler, x, None, length=2)[0]


@jax.jit
def jitted(x):
    return STEP * x


def scaled(x, factor, power=1, *, negative=False):
    TRACES.append(None)
    return (-1 if negative else 1) * factor * x**power


def branches(x, factor):
    return x if factor > 0.5 else -x


ADDS = [(by_lax_scan, 3.0, 11.0), (jitted, 1.0, 5.0), (lambda x: x + STEP, 2.0, 6.0)]


@pytest.mark.parametrize("function, before, after", ADDS)
def test_what_jax_keeps_is_no_staler_than_what_we_keep(function, before, after, monkeypatch):
    compiled = Compiled(function)
    assert compiled(jnp.array(1.0)) == before
    monkeypatch.setitem(globals(), "STEP", 5.0)
    assert compiled(jnp.array(1.0)) == after and Compiled(function)(jnp.array(1.0)) == after
    monkeypatch.setitem(globals(), "STEP", 1.0)
    assert compiled(jnp.array(1.0)) == before and compiled.num_compiled() == 2


def test_floats_are_traced_and_whole_numbers_and_flags_are_not():
    compiled, before = Compiled(scaled), len(TRACES)
    for factor in (0.5, 2.0, 0.0, -0.0):
        assert str(compiled(jnp.array(1.0), factor)) == str(jnp.array(factor))
    assert len(TRACES) == before + 1 and compiled.num_compiled() == 1
    assert compiled(jnp.array(3.0), 2.0, 2) == 18.0 and compiled(jnp.array(3.0), 2, 2) == 18.0
    assert compiled.num_compiled() == 3


def test_a_float_that_a_program_branches_on_stays_static():
    compiled = Compiled(branches)
    assert [float(compiled(jnp.array(2.0), f)) for f in (0.0, 1.0, 0.2, 1.0)] == [-2.0, 2.0, -2.0, 2.0]
    assert compiled.num_compiled() == 3


def test_an_error_of_the_program_is_raised_as_it_is():
    def refuses(x, factor):
        raise ValueError("factor must not be")

    with pytest.raises(ValueError, match="factor must not be"):
        Compiled(refuses)(jnp.array(1.0), 0.5)
    with pytest.raises(TypeError, match=r"type set, which is neither an array nor hashable"):
        Compiled(refuses)(jnp.array(1.0), {1})


def test_static_arguments_are_looked_into():
    table = [1.0]
    compiled = Compiled(lambda function, x: function(x))

    def function(x):
        return table[0] * x

    assert compiled(function, jnp.array(2.0)) == 2.0
    table[0] = 3.0
    assert compiled(function, jnp.array(2.0)) == 6.0


def test_what_a_program_changes_itself_compiles_nothing_anew():
    state, counted = {"calls": 0}, []

    def function(x):
        state["calls"] += 1
        counted.append(None)
        return 2.0 * x

    compiled = Compiled(function)
    assert [float(compiled(jnp.array(x))) for x in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    assert state["calls"] == len(counted) == 1
    compiled(jnp.ones(2)), compiled(jnp.array(1.0))
    assert state["calls"] == 2


def test_few_programs_are_kept():
    constant = [0.0]
    compiled = Compiled(lambda x: x + constant[0])
    assert module._MOST == 64
    for value in range(70):
        constant[0] = float(value)
        assert compiled(0.0) == value
    assert len(compiled._programs) == 64 and len(compiled._known) <= 64


def local_level(y, sd=None, num_copies=1):
    sd = SD if sd is None else sd

    def step(level, y_t):
        level = numpyro.sample("level", dist.Normal(level, 0.2))
        with numpyro.plate("copies", num_copies):
            numpyro.sample("y", dist.Normal(level, sd), obs=y_t)
        return level, None

    scan(step, 0.0, y)


def exact(y, sd):
    covariance = 0.04 * np.minimum.outer(np.arange(1, len(y) + 1), np.arange(1, len(y) + 1)) + sd**2 * np.eye(len(y))
    return float(dist.MultivariateNormal(0.0, covariance).log_prob(y))


def test_a_filter_follows_a_global_and_a_float(monkeypatch):
    y = jnp.array([0.3, -0.1, 0.4])
    particle_filter = ParticleFilter(local_level, 4000)

    def run(*args):
        return float(particle_filter.run(random.key(0), y, *args).log_evidence)

    np.testing.assert_allclose(run(), exact(y, 0.5), atol=0.02)
    monkeypatch.setitem(globals(), "SD", 2.0)
    np.testing.assert_allclose(run(), exact(y, 2.0), atol=0.02)
    found = [run(sd) for sd in (0.4, 0.7, 1.5)]
    np.testing.assert_allclose(found, [exact(y, sd) for sd in (0.4, 0.7, 1.5)], atol=0.02)
    assert particle_filter._compiled_run.num_compiled() == 3


def conjugate(y):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(z, SD), obs=y)


def test_samplers_and_training_follow_a_global(monkeypatch):
    y, key = jnp.array(1.0), random.key(0)
    ais = AIS(conjugate, num_chains=200, num_temperatures=10, num_leapfrog=3)
    sampler = SMCSampler(conjugate, 500, moves="rwmh", num_moves=2)
    svi = SVI(conjugate, AutoDelta(conjugate), numpyro.optim.Adam(0.1), Trace_ELBO())
    for sd in (0.5, 3.0):
        monkeypatch.setitem(globals(), "SD", sd)
        log_evidence = float(dist.Normal(0.0, (1 + sd**2) ** 0.5).log_prob(y))
        np.testing.assert_allclose(ais.run(key, y).value, log_evidence, atol=0.1)
        np.testing.assert_allclose(sampler.run(key, y, progress_bar=False).log_evidence, log_evidence, atol=0.15)
        options = {"num_particles": 500, "moves": "rwmh", "num_moves": 2}
        smc = log_marginal_likelihood(key, conjugate, y, method="smc", options=options)
        np.testing.assert_allclose(smc.value, log_evidence, atol=0.15)
        mode = fit(svi, key, 200, y, progress_bar=False).params["z_auto_loc"]
        np.testing.assert_allclose(mode, 1 / (1 + sd**2), atol=0.02)


def test_a_compiled_filter_is_not_kept_alive():
    particle_filter = ParticleFilter(local_level, 3, history=False)
    particle_filter.run(random.key(0), jnp.zeros(2))
    alive = weakref.ref(particle_filter)
    del particle_filter
    gc.collect()
    assert alive() is None
