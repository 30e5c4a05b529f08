"""Sites that cannot be drawn, or not be moved over the reals, are refused by name, with a remedy."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import MCMC

from numpyro_smc import (
    AIS,
    DSMCS,
    FIVO,
    IWELBO,
    NRE,
    SMC2,
    ParticleFilter,
    ParticleGibbs,
    ParticleMetropolis,
    SMCSampler,
    bootstrap,
    importance,
)

KEY, Y = random.key(0), jnp.array([0.3, -0.2, 0.5])


def improper():
    return dist.ImproperUniform(constraints.real, (), ())


def on_the_circle():
    return dist.ProjectedNormal(jnp.array([1.0, 0.0]))


def static(fn):
    def model(y):
        z = numpyro.sample("z", fn())
        numpyro.sample("y", dist.Normal(jnp.sum(z), 1.0).expand([3]).to_event(1), obs=y)

    return model


def series(fn, of_particle=False):
    def model(y):
        z = jnp.sum(numpyro.sample("z", fn()))

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x + (0.0 if of_particle else z), 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, z if of_particle else 0.0, y)

    return model


def sample(kernel, **options):
    mcmc = MCMC(kernel, num_warmup=2, num_samples=2, progress_bar=False)
    mcmc.run(KEY, Y, **options)
    return mcmc.get_samples()


DRAWING = {
    "importance": lambda f: importance(KEY, static(f), Y, num_samples=100),
    "IWELBO": lambda f: IWELBO(3).loss(KEY, {}, static(f), bootstrap(static(f)), Y),
    "AIS": lambda f: AIS(static(f), num_chains=4, num_temperatures=4).run(KEY, Y),
    "SMCSampler": lambda f: SMCSampler(static(f), 10).run(KEY, Y, progress_bar=False),
    "DSMCS": lambda f: DSMCS(4, 2).loss(KEY, {}, static(f), bootstrap(static(f)), Y),
    "ParticleFilter": lambda f: ParticleFilter(series(f, of_particle=True), 10).run(KEY, Y),
    "FIVO": lambda f: FIVO(10).loss(KEY, {}, series(f), bootstrap(series(f)), Y),
    "SMC2": lambda f: SMC2(series(f), 10, 10).run(KEY, Y),
    "ParticleMetropolis": lambda f: sample(ParticleMetropolis(series(f), 10)),
    "ParticleGibbs": lambda f: sample(ParticleGibbs(series(f), 10)),
    "NRE": lambda f: NRE(lambda: static(f)(None), ["z"], observed="y"),
}
MOVING = ("AIS", "SMCSampler", "DSMCS", "SMC2", "ParticleMetropolis", "ParticleGibbs")


@pytest.mark.parametrize("name", DRAWING)
def test_a_site_that_cannot_be_drawn_is_named(name):
    with pytest.raises(ValueError, match=r"[sS]ite 'z'.*ImproperUniform.*Give it a proper prior"):
        DRAWING[name](improper)


@pytest.mark.parametrize("name", MOVING)
def test_a_site_that_no_bijection_maps_to_the_reals_is_named(name):
    with pytest.raises(ValueError, match=r"site 'z'.*ProjectedNormalReparam"):
        DRAWING[name](on_the_circle)


def test_methods_that_draw_and_weigh_take_any_support():
    assert np.isfinite(importance(KEY, static(on_the_circle), Y, num_samples=100).value)
    assert np.isfinite(ParticleFilter(series(on_the_circle, of_particle=True), 10).run(KEY, Y).log_evidence)


def test_particle_gibbs_takes_a_start_where_there_is_no_prior_to_draw_from():
    draws = sample(ParticleGibbs(series(improper), 10), init_params={"z": jnp.array(0.1)})
    assert np.isfinite(draws["z"]).all()
    with pytest.raises(ValueError, match=r"ParticleGibbs: the support of site 'z'.*ProjectedNormalReparam"):
        sample(ParticleGibbs(series(on_the_circle), 10), init_params={"z": jnp.array([1.0, 0.0])})
