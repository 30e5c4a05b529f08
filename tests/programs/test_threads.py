"""Threads get the values of their own programs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.primitives import _PYRO_STACK

from numpyro_smc import IWELBO, ParticleFilter
from numpyro_smc.programs.tracing import TRACING

Y = jnp.array([0.3, -0.2])


def series(y):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))

    def step(level, y_t):
        level = numpyro.sample("level", dist.Normal(level, 0.2))
        numpyro.sample("y", dist.Normal(level, noise), obs=y_t)
        return level, None

    scan(step, 0.0, y)


def static(y):
    noise = numpyro.param("noise", 1.0)
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(z, noise), obs=y)


def filtered(noise):
    return float(ParticleFilter(series, 5).run(random.key(0), Y, params={"noise": noise}).log_evidence)


def bound(noise):
    return float(IWELBO(5).loss(random.key(0), {"noise": jnp.array(noise)}, static, prior, Y))


def prior(y):
    numpyro.sample("z", dist.Normal(0.0, 1.0))


SHARED = ParticleFilter(series, 6)


def shared(noise):
    return float(SHARED.run(random.key(0), Y, params={"noise": noise}).log_evidence)


@pytest.mark.parametrize("jobs", [(filtered,) * 4, (bound,) * 4, (filtered, bound, filtered, bound), (shared,) * 4])
def test_threads_that_compile_at_once_get_their_own_values(jobs):
    noises = [0.3, 3.0, 0.5, 2.0]
    start = threading.Barrier(len(jobs))

    def work(job, noise):
        start.wait(timeout=60)
        return job(noise)

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(work, job, noise) for job, noise in zip(jobs, noises, strict=True)]
        found = [future.result(timeout=300) for future in futures]
    assert found == [job(noise) for job, noise in zip(jobs, noises, strict=True)]
    assert not _PYRO_STACK


def test_a_compiled_program_runs_while_another_thread_compiles():
    want = shared(0.4)
    with TRACING, ThreadPoolExecutor(1) as pool:
        assert pool.submit(shared, 0.4).result(timeout=60) == want
