"""SIXO on the drift diffusion: exact at the optimum, FIVO at a zero twist, unbiased for any twist, trainable."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen
from jax import lax, random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module, flax_module
from numpyro.infer import SVI, Predictive, Trace_ELBO

from models import drift_diffusion as gdd
from numpyro_smc import FIVO, SIXO, ParticleFilter, alternating, bootstrap, gauss_hermite, twist
from numpyro_smc.programs.reading import read_sequence
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

Y = jnp.asarray(3.0)
DRIFT = {"drift": jnp.asarray(1.0)}
LOG_EVIDENCE = -5.026977


def values_of(loss, guide, num_keys, params=DRIFT):
    return jax.jit(jax.vmap(lambda key: -loss.loss(key, params, gdd.model, guide, Y)))(
        random.split(random.key(0), num_keys)
    )


@pytest.mark.parametrize("num_particles", [1, 4, 100])
@pytest.mark.parametrize("resample", ["always", "ess"])
def test_optimal_proposal_and_twist_give_the_evidence_for_every_key(num_particles, resample):
    guide = gdd.make_guide(gdd.optimal_proposal, gdd.analytic_twist)
    np.testing.assert_allclose(values_of(SIXO(num_particles, resample=resample), guide, 100), LOG_EVIDENCE, atol=1e-4)


def zero_twist(y, num_steps, drift):
    return lambda t, x: 0.0 * x


def random_twist(y, num_steps, drift):
    a, b = random.normal(random.key(5), (2, num_steps)) * 0.3
    return lambda t, x: a[t] * x - 0.05 * (1 + b[t] ** 2) * x**2


@pytest.mark.parametrize("resample", ["always", "ess"])
@pytest.mark.parametrize("gradient", ["none", "score_rb"])
def test_a_zero_twist_is_fivo_bit_for_bit(resample, gradient):
    if resample == "ess" and gradient != "none":
        gradient = "stop_gradient"
    options = {"resample": resample, "resampling_gradient": gradient}

    def both(loss, guide):
        fn = jax.value_and_grad(lambda b, k: loss.loss(k, {"drift": b}, gdd.model, guide, Y))
        return jax.jit(jax.vmap(fn, (None, 0)))(1.0, random.split(random.key(0), 20))

    plain = both(FIVO(4, **options), gdd.make_guide(gdd.optimal_proposal))
    twisted = both(SIXO(4, **options), gdd.make_guide(gdd.optimal_proposal, zero_twist))
    np.testing.assert_array_equal(plain[0], twisted[0])
    np.testing.assert_array_equal(plain[1], twisted[1])


@pytest.mark.parametrize("resampler", ["multinomial", "systematic"])
def test_the_evidence_estimate_is_unbiased_for_a_random_twist(resampler):
    guide = gdd.make_guide(gdd.optimal_proposal, random_twist)
    for resample in ("always", "ess"):
        values = values_of(SIXO(64, resampler=resampler, resample=resample), guide, 4000)
        assert_unbiased_evidence(values, LOG_EVIDENCE)


def test_held_proposals_give_the_score_under_the_best_twist_only():
    # 400 gradients, five standard errors and a bias of order 1 / N: 0.05 for N = 1,000, of a score of -8
    def held(program):
        return lambda y, num_steps, drift: program(y, num_steps, lax.stop_gradient(gdd.drift_parameter(drift)))

    def slopes(loss, *guide):
        guide = gdd.make_guide(*map(held, guide))
        slope = jax.grad(lambda drift, key: -loss.loss(key, {"drift": drift}, gdd.model, guide, Y))
        return np.asarray(jax.jit(jax.vmap(slope, (None, 0)))(1.0, random.split(random.key(0), 400)))

    score = jax.grad(lambda drift: gdd.log_evidence(Y, drift))(1.0)
    twisted = slopes(SIXO(1000, resample="always"), gdd.prior_proposal, gdd.analytic_twist)
    assert abs(twisted.mean() - score) < 5 * twisted.std() / 20 + 0.05
    assert slopes(FIVO(1000, resample="always"), gdd.prior_proposal).mean() > score / 2


def test_a_constant_added_to_the_twist_changes_neither_value_nor_gradient():
    def shifted(shift):
        def build(y, num_steps, drift):
            inner = gdd.analytic_twist(y, num_steps, drift)
            return lambda t, x: inner(t, x) + shift * (t + 1.0)

        guide = gdd.make_guide(gdd.prior_proposal, build)
        loss = SIXO(4, resample=lambda log_weights, t: t % 2 == 1)
        return jax.value_and_grad(lambda b: loss.loss(random.key(0), {"drift": b}, gdd.model, guide, Y))(1.0)

    (value, gradient), (other, other_gradient) = shifted(0.0), shifted(3.0)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-4)


def test_a_twist_at_the_last_step_is_ignored_even_where_it_is_not_finite():
    def infinite_at_the_end(y, num_steps, drift):
        inner = gdd.analytic_twist(y, num_steps, drift)
        return lambda t, x: jnp.where(t == num_steps - 1, jnp.inf, inner(t, x))

    guide = gdd.make_guide(gdd.optimal_proposal, infinite_at_the_end)
    np.testing.assert_allclose(values_of(SIXO(4, resample="always"), guide, 10), LOG_EVIDENCE, atol=1e-4)


def local_level(y, present=None):
    present = jnp.ones(y.shape, bool) if present is None else present

    def step(x, inputs):
        y_t, present_t = inputs
        with numpyro.plate("series", y.shape[1]):
            x = numpyro.sample("x", dist.Normal(x, 0.7))
            with handlers.mask(mask=present_t):
                numpyro.sample("y", dist.Normal(x, 0.8), obs=y_t)
        return x, None

    scan(step, jnp.zeros(y.shape[1]), (y, present))


def twisted_level(y, present=None):
    def step(x, next_y):
        with numpyro.plate("series", y.shape[1]):
            x = numpyro.sample("x", dist.Normal(x, 0.7))
            twist("r", dist.Normal(x, 1.0).log_prob(next_y) + 5.0)
        return x, None

    scan(step, jnp.zeros(y.shape[1]), jnp.concatenate([y[1:], y[:1]]))


def test_the_twist_ends_with_each_series_of_a_padded_plate():
    """Series of lengths 4 and 2: steps at and after the last observation have twist one, so padding changes nothing."""
    y = random.normal(random.key(0), (4, 2))
    present = jnp.array([[True, True], [True, True], [True, False], [True, False]])
    sequence = read_sequence(random.key(0), local_level, twisted_level, {}, (y, present), {})
    np.testing.assert_array_equal(sequence.look_ahead, [[True, True], [True, False], [True, False], [False, False]])
    twisted = ParticleFilter(local_level, 64, guide=twisted_level, resample="always")
    plain = ParticleFilter(local_level, 4096)
    estimates = jax.jit(jax.vmap(lambda k: twisted.log_evidence(k, y, present)))(random.split(random.key(1), 3000))
    exact = jax.jit(jax.vmap(lambda k: plain.log_evidence(k, y, present)))(random.split(random.key(2), 300))
    for series in range(2):
        reference = np.log(np.exp(np.asarray(exact[:, series], np.float64)).mean())
        error = np.asarray(exact[:, series]).std() / np.sqrt(300)
        ratios = np.exp(np.asarray(estimates[:, series], np.float64) - reference)
        assert_mean(ratios, 1.0, reference_error=error)


def test_filtering_weights_do_not_contain_the_twist():
    y = random.normal(random.key(0), (6, 1))
    twisted = ParticleFilter(local_level, 20_000, guide=twisted_level).run(random.key(0), y)
    plain = ParticleFilter(local_level, 20_000).run(random.key(1), y)
    np.testing.assert_allclose(twisted.mean("x"), plain.mean("x"), atol=0.05)


def test_the_density_ratio_loss_at_its_optimum_is_the_bayes_risk():
    """1.0790 at b = 1 and 1.0797 at b = 0, in the original's normalisation (T - 1 terms over T)."""

    def optimal_ratio(y, num_steps, drift):
        b = gdd.drift_parameter(drift)
        return lambda t, x: gdd.log_density_ratio(y, x, t, b, num_steps)

    guide = gdd.make_guide(gdd.optimal_proposal, optimal_ratio)
    loss = SIXO(2, twist_training="dre", twist_batch_size=500)
    for drift, expected in ((0.0, 1.0797), (1.0, 1.0790)):
        fn = jax.jit(jax.vmap(lambda k, b=drift: loss.twist_loss(k, {"drift": jnp.asarray(b)}, gdd.model, guide, Y)))
        assert_mean(0.9 * fn(random.split(random.key(0), 200)), expected, reference_error=0.001)


def test_gradients_are_split_between_bound_and_density_ratio_loss():
    guide = gdd.make_guide(gdd.learned_proposal, gdd.standard_tilt)
    svi = SVI(gdd.model, guide, optax.adam(1e-3), SIXO(4))
    params = svi.get_params(svi.init(random.key(0), Y)) | {"drift": jnp.asarray(0.3)}
    key = random.key(1)
    dre = SIXO(4, twist_training="dre", twist_batch_size=8)
    value, both = jax.value_and_grad(lambda p: dre.loss(key, p, gdd.model, guide, Y))(params)

    def bound_with_the_twist_held(p):
        held = {name: jax.lax.stop_gradient(v) if name.startswith("twist") else v for name, v in p.items()}
        return SIXO(4).loss(key, held, gdd.model, guide, Y)

    plain, of_bound = jax.value_and_grad(bound_with_the_twist_held)(params)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    for name in params:
        if name.startswith("twist"):
            assert np.abs(both[name][:-1]).max() > 0 and np.abs(of_bound[name]).max() == 0
        else:
            np.testing.assert_allclose(both[name], of_bound[name], rtol=1e-5)


def test_taking_turns_trains_one_group_at_a_time():
    guide = gdd.make_guide(gdd.learned_proposal, gdd.mlp_tilt(random.key(0), 4))
    optim = alternating(optax.adam(1e-2), optax.adam(1e-2), num_steps=2, num_twist_steps=1)
    svi = SVI(gdd.model, guide, optim, SIXO(2, twist_training="dre", twist_batch_size=4))
    state = svi.init(random.key(0), Y)
    update = jax.jit(svi.update)
    moved = []
    for _ in range(4):
        before = svi.get_params(state)
        state, loss = update(state, Y)
        after = svi.get_params(state)
        assert np.isfinite(loss)
        changed = {
            n: any(np.any(a != b) for a, b in zip(jax.tree.leaves(before[n]), jax.tree.leaves(after[n]), strict=True))
            for n in after
        }
        moved.append((changed["drift"], changed["twist_mlp$params"]))
    assert moved == [(True, False), (True, False), (False, True), (True, False)]
    assert update._cache_size() == 1


def series_model(y, T=5):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None

    scan(step, 0.0, y, length=T)


class Head(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        hidden = linen.relu(linen.Dense(8)(inputs))
        return linen.Dense(1, kernel_init=linen.initializers.zeros)(hidden)


def flax_guide(y, T=5):
    network = flax_module("twist_net", Head(), input_shape=(2,))
    later = jnp.append(y[1:], 0.0)

    def step(x, next_y):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        twist("r", network(jnp.stack([x, next_y]))[0])
        return x, None

    scan(step, 0.0, later)


def equinox_guide(y, T=5):
    network = eqx_module("twist_net", eqx.nn.MLP(2, 1, 8, 1, key=random.key(0)))
    later = jnp.append(y[1:], 0.0)

    def step(x, next_y):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        twist("r", network(jnp.stack([x, next_y]))[0])
        return x, None

    scan(step, 0.0, later)


@pytest.mark.parametrize("guide", [flax_guide, equinox_guide])
def test_networks_of_flax_and_equinox_train_as_twists(guide):
    y = jnp.array([0.4, 0.1, -0.3, -0.2, 0.6])
    svi = SVI(series_model, guide, optax.adam(0.01), SIXO(4, twist_training="dre", twist_batch_size=16))
    first = svi.init(random.key(0), y)
    last = svi.run(random.key(0), 150, y, progress_bar=False).state
    probe = SIXO(1, twist_training="dre", twist_batch_size=4000)
    before, after = (probe.twist_loss(random.key(9), svi.get_params(s), series_model, guide, y) for s in (first, last))
    assert after < before - 0.02
    assert after < 2 * np.log(2) - 0.02


def test_other_losses_and_predictive_ignore_the_twist():
    y = jnp.array([0.4, 0.1, -0.3, -0.2, 0.6])
    svi = SVI(series_model, flax_guide, optax.adam(0.01), Trace_ELBO())
    state = svi.init(random.key(0), y)
    _, loss = svi.update(state, y)
    assert np.isfinite(loss)
    draws = Predictive(flax_guide, params=svi.get_params(state), num_samples=2)(random.key(0), y)
    assert set(draws) == {"x"} and draws["x"].shape == (2, 5)
    params = svi.get_params(state)
    ignored = FIVO(4).loss(random.key(0), params, series_model, flax_guide, y)
    np.testing.assert_array_equal(
        ignored, SIXO(4).loss(random.key(0), params, series_model, flax_guide, y)
    )  # zero twist


def test_quadrature_is_the_gaussian_convolution_for_gaussian_likelihoods():
    loc, scale, y = jnp.array([0.3, -1.0]), jnp.array([0.5, 0.2]), jnp.array([0.7, 0.1])
    value = gauss_hermite(lambda z: dist.Normal(z, 1.0).log_prob(y), loc, scale, degree=20)
    np.testing.assert_allclose(value, dist.Normal(loc, jnp.sqrt(1 + scale**2)).log_prob(y), rtol=1e-4)
    polynomial = gauss_hermite(lambda z: jnp.log(z**4 + 1e-30), jnp.asarray(0.0), jnp.asarray(2.0), degree=3)
    np.testing.assert_allclose(polynomial, np.log(3 * 16), rtol=1e-5)


def test_twisted_guides_need_their_statement_and_their_parameters():
    with pytest.raises(ValueError, match=r"no twist statement.*FIVO"):
        SIXO(4).loss(random.key(0), DRIFT, gdd.model, gdd.make_guide(gdd.optimal_proposal), Y)
    with pytest.raises(ValueError, match="no twist statement"):
        SIXO(4).loss(random.key(0), DRIFT, gdd.model, bootstrap(gdd.model), Y)
    with pytest.raises(ValueError, match=r"twist_prefix='twist'.*'drift'"):
        guide = gdd.make_guide(gdd.optimal_proposal, gdd.analytic_twist)
        SIXO(4, twist_training="dre").loss(random.key(0), DRIFT, gdd.model, guide, Y)
    with pytest.raises(ValueError, match="'bound' or 'dre'"):
        SIXO(4, twist_training="unified")


def autoregressive_on_data(y):
    def step(previous, y_t):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + previous, 1.0), obs=y_t)
        return y_t, None

    scan(step, jnp.asarray(0.0), y)


def test_density_ratio_training_refuses_models_that_read_the_data_past_the_observation():
    def guide(y):
        weight = numpyro.param("twist_weight", 0.0)

        def step(carry, y_t):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            twist("r", weight * x)
            return carry, None

        scan(step, 0.0, y)

    with pytest.raises(ValueError, match=r"reads the data directly.*returns instead"):
        SIXO(2, twist_training="dre").loss(
            random.key(0), {"twist_weight": jnp.asarray(0.0)}, autoregressive_on_data, guide, jnp.ones(3)
        )
