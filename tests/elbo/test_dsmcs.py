"""DSMCS and DAIS: recorded runs of the published code, exact evidences, and what the bound turns into at its ends."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from jax.scipy.special import logsumexp
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from numpyro_smc import DAIS, DSMCS, IWELBO
from numpyro_smc.elbo import dsmcs
from numpyro_smc.engines.learned_schedule import PREFIX
from numpyro_smc.engines.path import AnnealedPath
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

STEP_SIZE_MAX = 0.25
REFERENCE = json.loads((Path(__file__).parent / "dsmcs_reference.json").read_text())


# A conjugate model: z ~ N(1, 1), x | z ~ N(z, 1/2), so x ~ N(1, sqrt(1.25)); the guide is off in place and width.


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(1.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide(x):
    shift = numpyro.param("shift", 0.3)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(shift, 1.2))


DATA = jnp.array([2.5, -0.4])


def log_evidence(x):
    return dist.Normal(1.0, jnp.sqrt(1.25)).log_prob(x)


def initial_params(loss, x=DATA):
    svi = SVI(model, loss.wrap(guide), optax.sgd(0.1), loss)
    return svi.get_params(svi.init(random.key(0), x))


@pytest.mark.parametrize("name", REFERENCE["fixtures"])
def test_recorded_runs_are_reproduced_in_value_and_gradient(name, monkeypatch):
    with jax.enable_x64(True):
        fixture = REFERENCE["fixtures"][name]
        kernel = name.split("_")[0].lower()
        means, start = jnp.array(fixture["target_means"]), jnp.swapaxes(jnp.array(fixture["z0"]), 0, 1)
        noise = [jnp.swapaxes(jnp.array(x), 0, 1) for x in fixture["noise"]]
        num_particles, num_replicates, dim = start.shape
        momentum_noise = noise.pop(0) if kernel == "uha" else None

        class Recorded(AnnealedPath):
            def inputs(self):
                return super().inputs(), jnp.stack(noise)

            def init(self, rng_key, num_particles):
                self.target.draw = lambda key, index: {"z": start[index]}
                self.now = momentum_noise
                return super().init(rng_key, num_particles)

            def step(self, rng_key, t, inputs, cloud, num_particles):
                inputs, self.now = inputs
                return super().step(rng_key, t, inputs, cloud, num_particles)

            def noise(self, rng_key, like):
                return {"z": self.now}

        def target():
            with numpyro.plate("replicates", num_replicates):
                z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
                log_f = logsumexp(dist.Normal(means, 1.0).log_prob(z[:, None]).sum(-1), axis=-1) - jnp.log(len(means))
                numpyro.factor("target", log_f)

        def base():
            with numpyro.plate("replicates", num_replicates):
                numpyro.sample("z", dist.Normal(0.0, 3.0).expand([dim]).to_event(1))

        monkeypatch.setattr(dsmcs, "AnnealedPath", Recorded)
        loss = DAIS(num_particles, len(fixture["betas"]) - 1, kernel=kernel, step_size_max=STEP_SIZE_MAX)

        def mean_loss(logits, raw_shift, log_mass, refreshment):
            # The last layer of the published network: all raw steps shift together.
            share = jnp.array(fixture["deltas"]) / STEP_SIZE_MAX
            steps = STEP_SIZE_MAX * jax.nn.sigmoid(jnp.log(share / (1 - share)) + raw_shift)
            params = {"betas": logits, "step_size": steps, "mass": jnp.exp(log_mass)}
            params["refreshment"] = 0.98 * jax.nn.sigmoid(refreshment) + 0.01
            params = {PREFIX + name: value for name, value in params.items()}
            return loss.loss(random.key(0), params, target, loss.wrap(base)) / num_replicates

        share = ((fixture["eta"] or 0.5) - 0.01) / 0.98
        arguments = (
            jnp.array(fixture["beta_logits"]),
            jnp.array(0.0),
            jnp.log(fixture["mass"] or 1.0),
            jnp.log(share / (1 - share)),
        )
        value, gradients = jax.value_and_grad(mean_loss, (0, 1, 2, 3))(*arguments)
        np.testing.assert_allclose(value, -np.mean(fixture["elbo"]), atol=1e-10)
        expected = fixture["grad_of_minus_mean_elbo"]
        np.testing.assert_allclose(gradients[0], expected["ais.betas.beta_logits"], atol=1e-10)
        if kernel == "uha":
            np.testing.assert_allclose(gradients[2], expected["ais.mass_matrix._scalar_diagonal"][0], atol=1e-10)
            np.testing.assert_allclose(gradients[3], expected["ais.eta.u"], atol=1e-10)
        np.testing.assert_allclose(gradients[1], expected["output_layer.bias(d loss)"], atol=1e-10)


def estimates(loss, x, num=400, seed=0):
    """Log evidence estimates of the whole data, one a run."""
    params = initial_params(loss, x)
    run = jax.jit(lambda keys: jax.lax.map(lambda k: -loss.loss(k, params, model, guide, x), keys, batch_size=50))
    return run(random.split(random.key(seed), num))


@pytest.mark.parametrize(
    "loss",
    [
        DAIS(4, 3),
        DAIS(4, 3, kernel="ula", step_size_max=0.2),
        DAIS(4, 3, kernel="uha_kdk"),
        DSMCS(4, 4, resample="always"),
        DSMCS(4, 4, resampler="multinomial", ess_threshold=0.9),
    ],
    ids=["uha", "ula", "uha_kdk", "systematic always", "multinomial ess"],
)
def test_the_evidence_estimate_is_unbiased(loss):
    """400 runs, five standard errors: a false alarm in 6e-7 a case."""
    assert_unbiased_evidence(estimates(loss, DATA), float(log_evidence(DATA).sum()))


def test_no_transition_gives_the_importance_weighted_bound_and_one_particle_the_elbo():
    for num_particles, plain in ((6, IWELBO(6)), (1, Trace_ELBO())):
        loss = DSMCS(num_particles, 0)
        keys = random.split(random.key(3), 4000)

        def moments(loss, keys=keys):
            gradient = jax.value_and_grad(lambda p, k: loss.loss(k, p, model, guide, DATA))
            return jax.jit(jax.vmap(partial(gradient, {"shift": jnp.array(0.3)})))(keys)

        (values, gradients), (plain_values, plain_gradients) = moments(loss), moments(plain)
        assert_mean(values - plain_values, 0.0)
        assert_mean(gradients["shift"] - plain_gradients["shift"], 0.0)


def test_without_resampling_both_classes_agree_to_the_bit():
    first, second = DAIS(5, 3), DSMCS(5, 3, resample="never")
    params = initial_params(first)
    results = [
        jax.value_and_grad(lambda p, loss=loss: loss.loss(random.key(1), p, model, guide, DATA))(params)
        for loss in (first, second)
    ]
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_recomputation_changes_no_number():
    params = initial_params(DSMCS(4, 7))
    results = []
    for remat in (None, "step", "sqrt"):
        loss = DSMCS(4, 7, remat=remat)
        results.append(
            jax.jit(jax.value_and_grad(lambda p, loss=loss: loss.loss(random.key(1), p, model, guide, DATA)))(params)
        )
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_each_plate_element_is_a_sampler_of_its_own():
    """The bound of two data is the sum of their bounds; joint weights would give another mean."""
    together = estimates(DAIS(3, 2), DATA, 4000)
    apart = sum(estimates(DAIS(3, 2), DATA[i : i + 1], 4000, seed=i + 1) for i in range(2))
    assert_mean(together - apart, 0.0)


def test_subsampling_scales_the_bound():
    def subsampled(program):
        def run(x):
            with numpyro.plate("data", len(x), subsample_size=1):
                rows = numpyro.subsample(x, event_dim=0)
                program(rows)

        return run

    def rows_model(x):
        z = numpyro.sample("z", dist.Normal(1.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def rows_guide(x):
        numpyro.sample("z", dist.Normal(0.3, 1.2))

    loss = DAIS(3, 2, learn=())
    run = jax.jit(
        jax.vmap(lambda k: -loss.loss(k, {}, subsampled(rows_model), subsampled(rows_guide), DATA)),
    )
    assert_mean(run(random.split(random.key(5), 4000)) - estimates(DAIS(3, 2), DATA, 4000), 0.0)


@pytest.mark.parametrize("make_guide", [pytest.param(AutoNormal, marks=pytest.mark.slow), AutoDiagonalNormal])
def test_constrained_latents_and_autoguides_bound_the_known_evidence(make_guide):
    """The Student-t problem of eight numbers, whose log evidence is -13.987 by quadrature."""
    y = jnp.asarray(np.random.RandomState(0).standard_t(3, 8) * 0.7 + 1)

    def student(y):
        scale = numpyro.sample("s", dist.HalfNormal(2.0))
        loc = numpyro.sample("m", dist.Normal(0.0, 2.0))
        numpyro.sample("y", dist.StudentT(3.0, loc, scale).expand([8]).to_event(1), obs=y)

    loss = DSMCS(8, 6, num_mc=2)
    svi = SVI(student, loss.wrap(make_guide(student, init_scale=0.5)), optax.adam(2e-2), loss)
    result = svi.run(random.key(0), 300, y, progress_bar=False)
    evaluate = jax.jit(jax.vmap(lambda k: -loss.loss(k, result.params, student, svi.guide, y)))
    values = evaluate(random.split(random.key(1), 200))
    assert_unbiased_evidence(values, -13.987)
    assert values.mean() > -14.05
    draws = loss.sample_posterior(random.key(2), result.params, student, svi.guide, y, num_samples=500)
    assert (draws["s"] > 0).all() and abs(float(draws["m"].mean()) - 1.55) < 0.15
    assert "effective sample size" in repr(loss.diagnostics(random.key(3), result.params, student, svi.guide, y))


def test_particles_that_fly_off_die_without_a_trace_in_the_gradient():
    """Where the scale is small the force is huge: some particles are thrown to where densities overflow."""

    def spread(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(0.0, scale).expand([4]).to_event(1), obs=y)

    def log_normal(y):
        loc = numpyro.param("loc", 0.0)
        numpyro.sample("scale", dist.LogNormal(loc, 1.5))

    loss = DAIS(8, 5, step_size=0.2)
    proposal = loss.wrap(log_normal)
    y = jnp.array([3.1, -2.7, 3.4, 2.9])
    svi = SVI(spread, proposal, optax.sgd(0.1), loss)
    params = svi.get_params(svi.init(random.key(0), y))

    gradient = jax.jit(jax.vmap(jax.grad(lambda p, k: loss.loss(k, p, spread, proposal, y)), (None, 0)))
    found = gradient(params, random.split(random.key(1), 200))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_parameters_of_the_model_inside_the_dynamics_are_trained():
    def located(x):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(loc, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    loss = DSMCS(8, 3)
    svi = SVI(located, loss.wrap(guide), optax.adam(5e-2), loss)
    params = svi.run(random.key(0), 300, DATA, progress_bar=False).params
    assert abs(float(params["loc"]) - float(DATA.mean())) < 0.2


def test_what_cannot_be_annealed_is_refused_by_name():
    def discrete(x):
        numpyro.sample("x", dist.Normal(numpyro.sample("k", dist.Bernoulli(0.5)), 1.0), obs=x)

    def discrete_guide(x):
        numpyro.sample("k", dist.Bernoulli(0.5))

    loss = DAIS(2, 2, learn=())
    with pytest.raises(ValueError, match="'k' is discrete"):
        loss.loss(random.key(0), {}, discrete, discrete_guide, 0.3)
    with pytest.raises(ValueError, match="Wrap the guide"):
        DSMCS(2, 2).loss(random.key(0), {"shift": 0.3}, model, guide, DATA)
    for options, message in (
        ({"kernel": "hmc"}, "kernel"),
        ({"learn": ("beta",)}, "learn"),
        ({"remat": True}, "remat"),
        ({"step_size": 0.5}, "step_size"),
        ({"refreshment": 1.0}, "refreshment"),
        ({"ess_threshold": 2.0}, "ess_threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            DSMCS(2, 2, **options)
    with pytest.raises(ValueError, match="does not resample"):
        DAIS(2, 2, ess_threshold=0.3)


def test_densities_that_are_not_finite_are_reported_with_their_site():
    def outside(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.HalfNormal(1.0 + z**2), obs=x)

    def outside_guide(x):
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    loss = DAIS(2, 2, learn=())
    for ask in (loss.diagnostics, loss.sample_posterior):
        with pytest.raises(FloatingPointError, match="'x' of the model"):
            ask(random.key(0), {}, outside, outside_guide, jnp.array(jnp.nan))
