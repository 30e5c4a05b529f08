"""FIVO on the drift diffusion, whose optimal proposal, evidence and gradients are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

from models import drift_diffusion as gdd
from numpyro_smc import FIVO, ParticleFilter, bootstrap
from numpyro_smc.programs.reading import read_sequence
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

Y = jnp.asarray(3.0)
DRIFT = {"drift": jnp.asarray(1.0)}
LOG_EVIDENCE = -5.026977
OPTIMAL = gdd.make_guide(gdd.optimal_proposal)
PRIOR = gdd.make_guide(gdd.prior_proposal)


def bounds(loss, guide, num_keys, params=DRIFT, seed=0):
    evaluate = jax.jit(jax.vmap(lambda key: -loss.loss(key, params, gdd.model, guide, Y)))
    return evaluate(random.split(random.key(seed), num_keys))


@pytest.mark.parametrize("num_particles", [1, 4, 100])
def test_never_resampling_with_the_optimal_proposal_gives_the_evidence_for_every_key(num_particles):
    values = bounds(FIVO(num_particles, resample="never"), OPTIMAL, 100)
    np.testing.assert_allclose(values, LOG_EVIDENCE, atol=1e-4)


def test_fivo_with_the_optimal_proposal_has_its_known_mean():
    """4,000 keys; the original gives -6.588 +/- 0.033."""
    values = bounds(FIVO(4, resample="always"), OPTIMAL, 4000)
    assert abs(float(values.mean()) + 6.59) < 0.1
    assert_mean(values, -6.588, reference_error=0.033)


@pytest.mark.parametrize("resample", ["always", "ess", lambda log_weights, t: t % 3 == 1])
def test_the_evidence_estimate_is_unbiased_for_every_schedule(resample):
    values = bounds(FIVO(32, resample=resample, resampler="systematic"), OPTIMAL, 4000)
    assert_unbiased_evidence(values, LOG_EVIDENCE)


@pytest.mark.parametrize(
    ("gradient", "expected", "error"), [("none", -7.210, 0.012), ("score", -11.32, 0.18), ("score_rb", -11.32, 0.17)]
)
def test_gradient_triple_of_the_bound_in_the_drift(gradient, expected, error):
    """20,000 draws against the original's 20,000: four combined standard errors, false alarm 6e-5 each."""
    loss = FIVO(4, resample="always", resampling_gradient=gradient)

    def bound(drift, key):
        return -loss.loss(key, {"drift": drift}, gdd.model, OPTIMAL, Y)

    gradients = jax.jit(jax.vmap(jax.grad(bound), (None, 0)))(jnp.asarray(1.0), random.split(random.key(1), 20_000))
    assert_mean(gradients, expected, num_standard_errors=4.0, reference_error=error)


def test_stop_gradient_targets_the_gradient_of_the_log_evidence():
    """d/db log p(y) = -8 at b = 1; with many particles the estimator's bias is below the tolerance."""
    loss = FIVO(256, resample="always", resampling_gradient="stop_gradient")

    def bound(drift, key):
        return -loss.loss(key, {"drift": drift}, gdd.model, OPTIMAL, Y)

    gradients = jax.jit(jax.vmap(jax.grad(bound), (None, 0)))(jnp.asarray(1.0), random.split(random.key(1), 2000))
    assert_mean(gradients, -8.0)


def two_state_hmm(y):
    logit = numpyro.param("logit", 0.3)
    stay = jax.nn.sigmoid(logit)

    def step(z, y_t):
        z = numpyro.sample("z", dist.Bernoulli(probs=jnp.where(z == 1, stay, 1 - stay)))
        numpyro.sample("y", dist.Normal(3.0 * z, 1.0), obs=y_t)
        return z, None

    scan(step, jnp.asarray(1), y)


def bound_by_enumeration(logit, y):
    """The exact FIVO bound for T = 2, N = 2, always multinomial: a sum over all draws and ancestors."""
    stay = jax.nn.sigmoid(logit)

    def transition(z, previous):
        return jnp.where(z == previous, stay, 1 - stay)

    def likelihood(z, y_t):
        return jnp.exp(-0.5 * (y_t - 3.0 * z) ** 2) / jnp.sqrt(2 * jnp.pi)

    total = 0.0
    states = [(a, b) for a in (0, 1) for b in (0, 1)]
    for first in states:
        p_first = transition(first[0], 1) * transition(first[1], 1)
        w = jnp.array([likelihood(z, y[0]) for z in first])
        for ancestors in states:
            p_ancestors = (w / w.sum())[ancestors[0]] * (w / w.sum())[ancestors[1]]
            for second in states:
                p_second = transition(second[0], first[ancestors[0]]) * transition(second[1], first[ancestors[1]])
                v = jnp.array([likelihood(z, y[1]) for z in second])
                total += p_first * p_ancestors * p_second * (jnp.log(w.mean()) + jnp.log(v.mean()))
    return total


@pytest.mark.parametrize("gradient", ["score", "score_rb"])
def test_score_gradients_are_unbiased_for_the_bound_with_discrete_states(gradient):
    """Value and gradient against full enumeration; 20,000 replicates, five standard errors."""
    y = jnp.array([1.2, -1.5])
    loss = FIVO(2, resample="always", resampling_gradient=gradient)

    def bound(logit, key):
        return -loss.loss(key, {"logit": logit}, two_state_hmm, bootstrap(two_state_hmm), y)

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(bound), (None, 0)))(
        jnp.asarray(0.3), random.split(random.key(2), 20_000)
    )
    exact, exact_gradient = jax.value_and_grad(bound_by_enumeration)(0.3, y)
    assert_mean(values, exact)
    assert_mean(gradients, exact_gradient)


def test_discrete_states_are_refused_where_their_gradient_would_be_dropped():
    with pytest.raises(ValueError, match=r"'z' has no reparameterised sampler.*score_rb"):
        FIVO(2).loss(random.key(0), {"logit": 0.3}, two_state_hmm, bootstrap(two_state_hmm), jnp.zeros(2))
    assert FIVO(2, resample="always", resampling_gradient="score_rb").can_infer_discrete


def learned(y):
    return gdd.make_guide(gdd.learned_proposal)(y)


def test_one_particle_is_trace_elbo_on_the_same_draws():
    """The bound of one particle is log p - log q of its path, as NumPyro's own densities give it."""
    params = gdd.optimal_learned_proposal_params() | DRIFT
    key = random.key(3)
    value = -FIVO(1).loss(key, params, gdd.model, learned, Y)
    path = ParticleFilter(gdd.model, 1, guide=learned, resampler="multinomial").run(key, Y, params=params)
    latents = {"x": path.particles["x"][:, 0]}
    log_p, _ = log_density(gdd.model, (Y,), {}, params | latents)
    log_q, _ = log_density(learned, (Y,), {}, params | latents)
    np.testing.assert_allclose(value, log_p - log_q, rtol=1e-5)
    elbo = -Trace_ELBO().loss(key, params, gdd.model, learned, Y)
    np.testing.assert_allclose(elbo, LOG_EVIDENCE, atol=1e-4)  # the optimal proposal: every draw gives the evidence


def test_forward_and_reverse_mode_agree_and_svi_runs_in_both():
    loss = FIVO(3, resampler="systematic")

    def bound(p):
        return loss.loss(random.key(0), p, gdd.model, learned, Y)

    params = {name: jnp.zeros(10) for name in gdd.LEARNED_PROPOSAL_PARAMS} | {"drift": jnp.asarray(0.2)}
    reverse, forward = jax.jit(jax.grad(bound))(params), jax.jit(jax.jacfwd(bound))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), reverse, forward)
    svi = SVI(gdd.model, learned, numpyro.optim.Adam(0.01), loss)
    state = svi.init(random.key(0), Y)
    state, value = jax.jit(lambda s: svi.update(s, Y, forward_mode_differentiation=True))(state)
    assert np.isfinite(value)


def test_vmap_over_keys_agrees_with_a_loop():
    loss = FIVO(5, resample="always")
    keys = random.split(random.key(4), 3)
    together = jax.vmap(lambda k: loss.loss(k, DRIFT, gdd.model, PRIOR, Y))(keys)
    one_by_one = jnp.stack([loss.loss(k, DRIFT, gdd.model, PRIOR, Y) for k in keys])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5)


def test_rematerialised_gradients_are_the_same():
    def gradient(loss):
        return jax.jit(jax.grad(lambda b: loss.loss(random.key(0), {"drift": b}, gdd.model, PRIOR, Y)))(0.5)

    np.testing.assert_allclose(gradient(FIVO(6, remat=True)), gradient(FIVO(6)), rtol=1e-5)


def test_update_steps_compile_once():
    svi = SVI(gdd.model, learned, numpyro.optim.Adam(0.01), FIVO(3))
    state = svi.init(random.key(0), Y)
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state, Y)
    assert update._cache_size() == 1


def truncated(y, bad):
    """A likelihood that is impossible for some particles: weights of -inf."""
    scale = numpyro.param("scale", 1.0)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, scale))
        numpyro.factor("support", jnp.where(x > bad, 0.0, -jnp.inf))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


@pytest.mark.parametrize("gradient", ["none", "score_rb", "stop_gradient"])
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("num_particles", [1, 16])
def test_gradients_are_finite_with_dead_particles(gradient, num_steps, num_particles):
    loss = FIVO(num_particles, resample="always", resampling_gradient=gradient)
    bad = -jnp.inf if num_particles == 1 else 0.0

    def bound(scale, key):
        return loss.loss(key, {"scale": scale}, truncated, bootstrap(truncated), jnp.ones(num_steps), bad)

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(bound), (None, 0)))(1.0, random.split(random.key(0), 20))
    assert np.isfinite(gradients).all()
    assert (values[np.isfinite(values)] > 0).all() and np.isfinite(values).mean() > 0.5


def test_all_particles_dead_gives_minus_infinity_and_finite_gradients():
    def bound(scale):
        return -FIVO(4, resample="always").loss(
            random.key(0), {"scale": scale}, truncated, bootstrap(truncated), jnp.ones(3), 1e9
        )

    value, gradient = jax.value_and_grad(bound)(1.0)
    assert value == -jnp.inf and np.isfinite(gradient)


def masked(y, present):
    level = numpyro.param("level", 0.5)

    def step(x, inputs):
        y_t, present_t = inputs
        x = numpyro.sample("x", dist.Normal(0.5 * x + level, 1.0))
        with handlers.mask(mask=present_t):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, (y, present))


def test_missing_values_that_are_not_numbers_leave_finite_gradients():
    y = jnp.array([0.2, jnp.nan, jnp.nan, 1.0])

    def bound(level):
        return FIVO(8).loss(random.key(0), {"level": level}, masked, bootstrap(masked), y, ~jnp.isnan(y))

    value, gradient = jax.value_and_grad(bound)(0.5)
    filled = FIVO(8).loss(random.key(0), {"level": 0.5}, masked, bootstrap(masked), jnp.nan_to_num(y), ~jnp.isnan(y))
    assert np.isfinite(gradient)
    np.testing.assert_allclose(value, filled, rtol=1e-6)


def with_global(y):
    rate = numpyro.sample("rate", dist.Beta(2.0, 2.0))
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(rate * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, x0, y)


def guide_with_global(y):
    a = numpyro.param("a", 3.0, constraint=dist.constraints.positive)
    rate = numpyro.sample("rate", dist.Beta(a, 2.0))
    x0 = numpyro.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        return numpyro.sample("x", dist.Normal(rate * x, 0.5)), None

    scan(step, x0, y)


def test_global_latents_are_drawn_once_and_weighed_outside_the_filter():
    y = jnp.array([0.3, -0.2, 0.5])
    sequence = read_sequence(
        random.key(0), with_global, guide_with_global, {"a": jnp.asarray(3.0)}, (y,), {}, user="FIVO"
    )
    assert set(sequence.global_values) == {"rate"} and sequence.model.particle_latents == {"x0"}
    rate = sequence.global_values["rate"]
    expected = dist.Beta(2.0, 2.0).log_prob(rate) - dist.Beta(3.0, 2.0).log_prob(rate)
    np.testing.assert_allclose(sequence.log_global_weight, expected, rtol=1e-5)
    value, gradient = jax.value_and_grad(
        lambda a: FIVO(64).loss(random.key(0), {"a": a}, with_global, guide_with_global, y)
    )(3.0)
    assert np.isfinite(value) and np.isfinite(gradient) and gradient != 0.0


def test_a_plate_of_series_is_a_sum_of_independent_bounds_and_subsampling_scales_it():
    y = jnp.array([3.0, -1.0, 0.5])
    params = {"drift": jnp.asarray(0.4)}
    value = -FIVO(4, resample="never").loss(random.key(0), params, gdd.model, OPTIMAL, y, 10, 3)
    np.testing.assert_allclose(value, gdd.log_evidence(y, 0.4).sum(), rtol=1e-5)

    def model(y):
        series = numpyro.plate("series", 6, subsample_size=3)

        def step(x, t):
            with series:
                x = numpyro.sample("x", dist.Normal(x, 1.0))
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
            return x, None

        scan(step, jnp.zeros(3), jnp.arange(1))

    sequence = read_sequence(random.key(0), model, None, {}, (y,), {})
    assert sequence.plates.scale == 2.0 and sequence.batch_shape == (3,)
    estimates = jax.vmap(lambda k: -FIVO(2000, resample="never").loss(k, {}, model, bootstrap(model), y))(
        random.split(random.key(0), 20)
    )
    exact = 2.0 * dist.Normal(0.0, jnp.sqrt(2.0)).log_prob(y).sum()
    assert abs(float(estimates.mean() - exact)) < 0.2


@pytest.mark.parametrize("num_particles", [0, -1, 2.5, True])
def test_a_bad_number_of_particles_is_refused(num_particles):
    with pytest.raises(ValueError, match="num_particles must be a positive integer"):
        FIVO(num_particles)


def test_score_terms_are_refused_where_they_are_wrong():
    with pytest.raises(ValueError, match=r"systematic.*multinomial"):
        FIVO(4, resampler="systematic", resample="always", resampling_gradient="score")
    with pytest.raises(ValueError, match="biased under resample='ess'"):
        FIVO(4, resampling_gradient="score_rb")
    with pytest.raises(ValueError, match="Known: none, score"):
        FIVO(4, resampling_gradient="scibior")
