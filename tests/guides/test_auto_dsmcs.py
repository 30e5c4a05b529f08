"""AutoDSMCS: the sampler's bound through Trace_ELBO, and what a guide must answer."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from numpyro_smc import DSMCS, IWELBO, AutoDSMCS
from numpyro_smc.elbo.annealed_runs import draw
from tests.statistics_of_estimates import assert_unbiased_evidence

# x | z ~ N(z, 1/2) and z ~ N(place, 1) for each of two data.
DATA = jnp.array([2.5, -0.4])
LOG_EVIDENCE = float(dist.Normal(1.0, jnp.sqrt(1.25)).log_prob(DATA).sum())


def model(x):
    place = numpyro.param("place", 1.0)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(place, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def base(x):
    shift = numpyro.param("shift", 0.3)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(shift, 1.2))


def start(guide, x=DATA):
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    return svi.get_params(svi.init(random.key(0), x))


def test_the_loss_of_trace_elbo_is_the_samplers_bound_in_value_and_gradient():
    guide = AutoDSMCS(model, 3, 4, base=base, ess_threshold=0.9)
    params = start(guide)
    assert set(params) == {f"annealing${n}" for n in ("betas", "step_size", "mass", "refreshment")} | {"place", "shift"}

    def elbo(params):
        with handlers.seed(rng_seed=5):
            log_q, trace = log_density(guide, (DATA,), {}, params)
        log_p, _ = log_density(handlers.replay(model, trace=trace), (DATA,), {}, params)
        return log_p - log_q

    def bound(params):
        with handlers.seed(rng_seed=5):
            key = random.split(numpyro.prng_key(), 3)[1]
        run_key, path = guide.sampler.path(key, params, model, base, (DATA,), {})
        return draw(run_key, path, guide.sampler)[1].sum()

    ours, theirs = jax.value_and_grad(elbo)(params), jax.value_and_grad(bound)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
    assert abs(float(theirs[1]["place"])) > 0.1 and abs(float(theirs[1]["shift"])) > 1e-3


@pytest.mark.parametrize("loss", [Trace_ELBO(), IWELBO(2)], ids=["Trace_ELBO", "IWELBO"])
def test_the_evidence_is_unbiased(loss):
    """400 runs, five standard errors: a false alarm in 6e-7 a case."""
    guide = AutoDSMCS(model, 3, 4, base=base)
    params = start(guide)
    run = jax.jit(lambda k: jax.lax.map(lambda k: -loss.loss(k, params, model, guide, DATA), k, batch_size=50))
    assert_unbiased_evidence(run(random.split(random.key(1), 400)), LOG_EVIDENCE)


@pytest.mark.slow
def test_a_trained_guide_has_the_posterior_the_evidence_and_the_models_parameter():
    guide = AutoDSMCS(model, 3, 8, base=AutoNormal(model, init_scale=0.5))
    svi = SVI(model, guide, optax.adam(2e-2), Trace_ELBO(num_particles=4))
    params = svi.run(random.key(0), 400, DATA, progress_bar=False).params
    place = float(params["place"])
    assert abs(place - float(DATA.mean())) < 0.1  # the maximum of the evidence; AutoDAIS would leave it at 1
    truth = float(dist.Normal(place, jnp.sqrt(1.25)).log_prob(DATA).sum())
    evidence = guide.log_evidence(random.key(1), params, DATA, num_replicates=200)
    assert evidence.method == "AutoDSMCS" and evidence.per_datapoint.shape == (2,)
    assert abs(evidence.value - truth) < 5 * evidence.standard_error
    draws = guide.sample_posterior(random.key(2), params, DATA, sample_shape=(40, 50))["z"]
    assert draws.shape == (40, 50, 2)
    # The exact posterior is N((place + 4 x) / 5, 1/5); 2,000 independent draws.
    z = draws.reshape(-1, 2)
    assert np.all(np.abs(z.mean(0) - (place + 4 * DATA) / 5) < 0.05)
    assert np.all(np.abs(z.std(0) - np.sqrt(0.2)) < 0.04)
    levels = guide.quantiles(params, [0.1, 0.9], DATA, rng_key=random.key(3))["z"]
    expected = np.asarray((place + 4 * DATA) / 5) + np.sqrt(0.2) * np.array([[-1.2816], [1.2816]])
    assert np.all(np.abs(levels - expected) < 0.1)
    assert np.allclose(guide.median(params)["z"], guide.quantiles(params, [0.5])["z"][0])
    assert np.all(np.abs(guide.median(params, DATA, rng_key=random.key(4))["z"] - (place + 4 * DATA) / 5) < 0.1)
    assert "effective sample size" in repr(guide.diagnostics(random.key(5), params, DATA))
    predicted = Predictive(model, guide=guide, params=params, num_samples=5)(random.key(6), DATA)
    assert predicted["x"].shape == (5, 2)


def test_auxiliary_sites_are_not_draws_and_scales_and_factors_stay_in():
    def weighted(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with handlers.scale(scale=3.0):
            numpyro.sample("x", dist.Normal(z[0] - z[1], 1.0), obs=x)
        numpyro.factor("extra", -0.7)

    guide = AutoDSMCS(weighted, 2, 64)
    svi = SVI(weighted, guide, optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(random.key(0), 0.4))
    assert set(guide.sample_posterior(random.key(1), params, 0.4, sample_shape=(3,))) == {"z"}
    d, w = np.random.default_rng(0).normal(size=400_000) * np.sqrt(2.0), 3.0
    truth = np.log(np.mean(np.exp(w * (-0.5 * (0.4 - d) ** 2 - 0.5 * np.log(2 * np.pi))))) - 0.7
    evidence = guide.log_evidence(random.key(2), params, 0.4, num_replicates=100)
    assert abs(evidence.value - truth) < 5 * evidence.standard_error + 0.005


def test_what_it_cannot_do_is_refused_by_name():
    def rows(x):
        with numpyro.plate("data", len(x), subsample_size=1):
            row = numpyro.subsample(x, event_dim=0)
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=row)

    def rows_base(x):
        with numpyro.plate("data", len(x), subsample_size=1):
            numpyro.sample("z", dist.Normal(0.0, 1.0))

    def discrete(x):
        numpyro.sample("x", dist.Normal(numpyro.sample("k", dist.Bernoulli(0.5)), 1.0), obs=x)

    def discrete_base(x):
        numpyro.sample("k", dist.Bernoulli(0.4))

    with pytest.raises(ValueError, match=r"under handlers\.seed"):
        AutoDSMCS(model, 2, 2, base=base)(DATA)
    with handlers.seed(rng_seed=0):
        with pytest.raises(ValueError, match="plate 'data' is subsampled"):
            AutoDSMCS(rows, 2, 2, base=rows_base)(DATA)
        with pytest.raises(ValueError, match="'k' is discrete"):
            AutoDSMCS(discrete, 2, 2, base=discrete_base)(0.3)
        with pytest.raises(ValueError, match="never samples site 'z'"):
            AutoDSMCS(model, 2, 2, base=lambda x: None)(DATA)
    with pytest.raises(NotImplementedError, match="rng_key"):
        AutoDSMCS(model, 2, 2, base=base).median({})
    with pytest.raises(ValueError, match="num_particles"):
        AutoDSMCS(model, 2, 0)


def test_a_plate_subsampled_inside_the_dynamics_is_refused_even_for_one_particle():
    def regression(x):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x), subsample_size=1):
            numpyro.sample("x", dist.Normal(slope, 1.0), obs=numpyro.subsample(x, event_dim=0))

    def slope_guide(x):
        numpyro.sample("slope", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="plate 'data' is subsampled inside the dynamics"):
        DSMCS(1, 2, learn=()).loss(random.key(0), {}, regression, slope_guide, DATA)
