"""The Hodgkin-Huxley neuron: rates and steps by their formulas, evidence by quadrature, what each network may see."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.util import log_density
from scipy.special import expit, logit, logsumexp
from scipy.stats import norm

from models import hodgkin_huxley as hh
from models import hodgkin_huxley_guides as guides
from models import hodgkin_huxley_rates as rates
from numpyro_smc import FIVO, SIXO
from tests.statistics_of_estimates import assert_unbiased_evidence

T, SUBSAMPLE = 9, 3  # observed at steps 0, 3, 6
SMALL = {"num_steps": T, "subsample": SUBSAMPLE}


def reference_rates(potential):
    """Opening and closing rates of n, m, h as published, in double precision."""
    a_n = 0.01 * (potential + 55) / (1 - np.exp(-(potential + 55) / 10))
    a_m = 0.1 * (potential + 35) / (1 - np.exp(-(potential + 35) / 10))
    b_n, b_m = 0.125 * np.exp(-(potential + 65) / 80), 4 * np.exp(-(potential + 65) / 18)
    a_h, b_h = 0.07 * np.exp(-(potential + 50) / 20), 1 / (np.exp(-(potential + 35) / 10) + 1)
    return (a_n, b_n), (a_m, b_m), (a_h, b_h)


def reference_mean(x, current, dt=0.02):
    """Mean of the next state of one compartment, ``[..., 4]``, in double precision."""
    x = np.asarray(x, np.float64)
    v, gates = x[..., 0], [expit(x[..., i]) for i in (1, 2, 3)]
    n, m, h = gates
    potential = 10 * v
    flow = 120 * m**3 * h * (potential - 50) + 20 * n**4 * (potential + 80) + 0.3 * (potential + 55.4)
    moved = [v + dt * (current - flow) / 10]
    for z, (opening, closing) in zip(gates, reference_rates(potential), strict=True):
        z = z + dt * (opening * (1 - z) - closing * z)
        moved.append(logit(np.clip(z, 1e-5, 1 - 1e-5)))
    return np.stack(moved, -1)


def make_path(num_compartments=1, seed=0):
    rng = np.random.default_rng(seed)
    loc = np.repeat([-5.0, -0.6, -1.5, 0.2], num_compartments)
    x = loc + rng.normal(size=(T, 4 * num_compartments))
    return x.astype(np.float32), rng.normal(-5, 1, (T, num_compartments)).astype(np.float32)


def make_guide(proposal="bootstrap", twist="none", **settings):
    return guides.make_guide(proposal, twist, random.key(5), width=6, hidden_size=4, **SMALL | settings)


def trained_params(guide, y, scale=0.3):
    """The guide's networks as some training might leave them."""
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        guide(y, {"current": 13.0})
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype(np.float32), params)


def seen_by(build, params, y, read):
    """For each step whether ``read(inputs, function)[step]`` depends on each of the observations: ``[T, K]``."""

    def values(y):
        with handlers.substitute(data=params):
            return read(*build(y, jnp.arange(T)))

    jacobian = jax.jacobian(values)(jnp.asarray(y))
    return np.asarray(jnp.any(jacobian != 0, -1))


# Rates and dynamics


@pytest.mark.parametrize("potential", [-90.0, -65.0, -54.2, -34.0, 0.0, 40.0])
def test_rates_are_the_published_ones(potential):
    for found, expected in zip(rates.GATES, reference_rates(potential), strict=True):
        np.testing.assert_allclose(found(jnp.asarray(potential)), expected, rtol=2e-6)


@pytest.mark.parametrize("offset", [0.0, 1e-6, -1e-4, 1e-2, -0.049, 0.051])
def test_ratio_and_its_gradient_are_right_beside_the_singularity(offset):
    value, slope = jax.value_and_grad(rates.exponential_ratio)(offset)
    assert float(value) == pytest.approx(1 - offset / 2 + offset**2 / 12, abs=1e-6)
    assert float(slope) == pytest.approx(-0.5 + offset / 6, abs=2e-5)


def test_ratio_is_right_far_from_zero_in_a_batch_with_zero():
    z = jnp.array([0.0, 0.3, -4.0, 9.0])
    slopes = jax.vmap(jax.grad(rates.exponential_ratio))(z)
    assert np.all(np.isfinite(slopes))
    np.testing.assert_allclose(
        rates.exponential_ratio(z)[1:], np.asarray(z)[1:] / np.expm1(np.asarray(z)[1:]), rtol=1e-6
    )


@pytest.mark.parametrize("current", [1.3, 37.7])
def test_next_state_is_one_euler_step(current):
    x, _ = make_path()
    found = jax.vmap(hh.Dynamics(jnp.asarray(current)).predict)(jnp.asarray(x))
    np.testing.assert_allclose(found, reference_mean(x, current), rtol=2e-5, atol=2e-5)


def test_gates_stay_inside_their_margin():
    x = jnp.array([30.0, 0.0, 30.0, -30.0])  # at 300 mV m stays fully open and h fully closed
    gates = jax.nn.sigmoid(hh.Dynamics(jnp.asarray(13.0)).predict(x)[1:])
    assert float(gates[1]) == pytest.approx(1 - 1e-5, abs=1e-7) and float(gates[2]) == pytest.approx(1e-5, rel=1e-3)


def test_compartments_do_not_interact():
    x, _ = make_path(3)
    together = hh.Dynamics(jnp.asarray(13.0), 3).predict(jnp.asarray(x[0]))
    alone = [hh.Dynamics(jnp.asarray(13.0)).predict(jnp.asarray(x[0, i::3])) for i in range(3)]
    np.testing.assert_allclose(together, jnp.stack(alone, -1).reshape(-1), rtol=1e-6)


def test_neuron_starts_at_rest_with_published_deviations():
    loc, scale = hh.start()
    steady = [a / (a + b) for a, b in reference_rates(-65.0)]
    np.testing.assert_allclose(loc, [-6.5, *logit(steady)], rtol=1e-5)
    np.testing.assert_allclose(scale, [2.5, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(hh.Dynamics(jnp.asarray(0.0)).scale, [0.042426, 0.014142, 0.014142, 0.014142], rtol=1e-4)


@pytest.mark.parametrize("current, spikes", [(1.3, False), (13.0, True)])
def test_neuron_fires_at_the_true_current_and_not_at_a_tenth_of_it(current, spikes):
    dynamics = hh.Dynamics(jnp.asarray(current))
    step = jax.jit(lambda x: jax.lax.scan(lambda x, _: (dynamics.predict(x),) * 2, x, length=2000)[1])
    late = step(hh.start()[0])[500:, 0]
    assert (float(late.max()) > 0.0) == spikes


@pytest.mark.parametrize("solver, tolerance", [("euler", 1e-5), ("dopri5", 2e-3)])
def test_diffrax_integrates_the_same_neuron(solver, tolerance):
    pytest.importorskip("diffrax")
    x, current, dt = jnp.array([-4.0, -0.5, 0.4, 0.2]), jnp.asarray(13.0), 0.2
    expected = np.asarray(x)
    num_steps = 10 if solver == "euler" else 1000
    for _ in range(num_steps):
        expected = reference_mean(expected, 13.0, dt / num_steps)
    integrator = hh.diffrax_integrator(solver)
    found, slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(hh.Dynamics(current, 1, dt, integrator).predict(x))))(x)
    assert float(found) == pytest.approx(expected.sum(), rel=tolerance) and np.all(np.isfinite(slope))


def test_diffrax_is_asked_for_only_where_it_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ModuleNotFoundError, match="pip install diffrax"):
        hh.diffrax_integrator()
    with pytest.raises(ValueError, match="expected 'dopri5' or 'euler'"):
        hh.diffrax_integrator("heun")


# The model


@pytest.mark.parametrize("num_compartments", [1, 2])
def test_log_density_is_the_sum_over_transitions_and_seen_observations(num_compartments):
    x, y = make_path(num_compartments)
    loc, scale = (np.asarray(part) for part in hh.start(num_compartments))
    expected = norm(loc, scale).logpdf(x[0]).sum()
    noise = np.sqrt(0.02) * np.repeat([0.3, 0.1, 0.1, 0.1], num_compartments)
    for t in range(1, T):
        alone = [reference_mean(x[t - 1, i::num_compartments], 13.0) for i in range(num_compartments)]
        expected += norm(np.stack(alone, -1).ravel(), noise).logpdf(x[t]).sum()
    expected += sum(norm(x[t, :num_compartments], 0.4).logpdf(y[t]).sum() for t in (0, 3, 6))
    model = hh.make_model(num_compartments=num_compartments, noise=4.0, **SMALL)
    found, _ = log_density(model, (y, {"current": 13.0}), {}, {"x": jnp.asarray(x)})
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_rows_between_observations_may_hold_anything():
    x, y = make_path()
    model = hh.make_model(**SMALL)
    run = jax.value_and_grad(lambda x, y: log_density(model, (y, {"current": 13.0}), {}, {"x": x})[0])
    with_gaps = np.where(np.arange(T)[:, None] % SUBSAMPLE == 0, y, np.nan)
    (value, slope), (of_gaps, slope_of_gaps) = run(jnp.asarray(x), jnp.asarray(y)), run(jnp.asarray(x), with_gaps)
    assert float(value) == float(of_gaps)
    np.testing.assert_array_equal(slope, slope_of_gaps)


def test_current_is_learned_unless_it_is_given():
    model = hh.make_model(init_current=1.3, **SMALL)
    free = handlers.trace(handlers.seed(model, 0)).get_trace()
    assert {name: float(site["value"]) for name, site in free.items() if site["type"] == "param"} == {
        "current": pytest.approx(1.3)
    }
    given = handlers.trace(handlers.seed(model, 0)).get_trace(None, {"current": 2.0})
    assert not [name for name, site in given.items() if site["type"] == "param"]


def test_model_runs_under_predictive():
    samples = Predictive(hh.make_model(num_compartments=2, **SMALL), num_samples=3)(random.key(0))
    assert samples["x"].shape == (3, T, 8) and samples["y"].shape == (3, T, 2)


def test_simulated_series_stay_within_the_range_of_a_neuron(monkeypatch):
    model = hh.make_model(num_compartments=2, **SMALL)
    x, y = hh.simulate(random.key(0), 6, model)
    assert x.shape == (6, T, 8) and y.shape == (6, T, 2) and np.abs(y).max() > 5.0
    limit = float(np.abs(y[0]).max())  # of the first series, which must go
    monkeypatch.setattr(hh, "LARGEST_OBSERVATION", limit - 0.01)
    _, narrow = hh.simulate(random.key(0), 6, model)
    assert np.abs(narrow).max() < limit and not np.array_equal(narrow[0], y[0])


def test_series_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"y has shape \(3,\); expected \(9, 1\)"):
        hh.make_model(**SMALL)(np.zeros(3))


# The guides


def test_countdown_reaches_zero_before_each_observation():
    found = guides.countdown(7, 3, 4, 4.0)
    left = np.array([2, 1, 0, 2, 1, 0, 2])
    frequencies = 4.0 ** (-2 * np.arange(4) / 4)
    angles = left[:, None] * frequencies
    np.testing.assert_allclose(found, np.concatenate([np.sin(angles), np.cos(angles)], -1), atol=1e-6)


def test_split_network_is_the_whole_one():
    module = guides.network(random.key(0), 4 + 5, 6, 3)
    rng = np.random.default_rng(0)
    x, features, encoding = (jnp.asarray(rng.normal(size=size)) for size in (4, (2, 3), (6, 2)))
    module = eqx.tree_at(lambda m: m.layers[0].bias, module, jnp.arange(6.0))
    times = np.array([0, 2, 3, 5, 2])
    parts = guides.first_layer(module, features, encoding, times, 3)
    for t, known in zip(times, parts, strict=True):
        whole = module(jnp.concatenate([x, features[t // 3], encoding[t]]))
        np.testing.assert_allclose(guides.rest_of(module, x, known), whole, rtol=1e-5)


def test_networks_start_as_published():
    module = guides.network(random.key(0), 40, 32, 8)
    limits = [np.sqrt(6 / sum(layer.weight.shape)) for layer in module.layers]
    for layer, limit in zip(module.layers, limits, strict=True):
        assert 0.9 * limit < float(jnp.abs(layer.weight).max()) <= limit and not np.any(layer.bias)


@pytest.mark.parametrize("residual", ["none", "mean", "full"])
def test_proposal_combines_the_network_with_the_prior(residual):
    build = guides.network_proposal(random.key(0), T, 1, SUBSAMPLE, 6, 4, False, residual, init_log_scale=0.5)
    _, y = make_path()
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        inputs, propose = build(jnp.asarray(y[::SUBSAMPLE]), jnp.arange(T))
    loc, scale = jnp.array([1.0, -2.0, 0.5, 0.0]), jnp.array([0.5, 0.1, 2.0, 1.0])
    x = jnp.array([0.3, -0.1, 0.2, 0.5])
    found_loc, found_scale = propose(loc, scale, x, inputs[4])
    mlp = trace["proposal_mlp$params"]["value"]
    own_loc, own_log_scale = np.split(np.asarray(guides.rest_of(mlp, x, inputs[4])), 2)
    own_scale = np.exp(own_log_scale + 0.5)
    if residual == "full":
        precision = 1 / np.asarray(scale) ** 2 + 1 / own_scale**2
        expected = (np.asarray(loc) / np.asarray(scale) ** 2 + own_loc / own_scale**2) / precision, precision**-0.5
    else:
        expected = own_loc + (np.asarray(loc) if residual == "mean" else 0), own_scale
    np.testing.assert_allclose(found_loc, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_scale, expected[1], rtol=1e-5)


@pytest.mark.parametrize("proposal", ["bootstrap", "filtering"])
@pytest.mark.parametrize("hold_prior", [True, False])
def test_held_prior_sends_no_gradient_to_the_model(proposal, hold_prior):
    guide = make_guide(proposal, hold_prior=hold_prior, init_log_scale=3.0)
    _, y = make_path()

    def density(current):
        with handlers.seed(rng_seed=0), handlers.trace() as trace:
            guide(y, {"current": current})
        return trace["x"]["fn"].log_prob(jax.lax.stop_gradient(trace["x"]["value"])).sum()

    assert bool(jax.grad(density)(13.0) == 0) == hold_prior


@pytest.mark.parametrize("proposal", ["filtering", "smoothing"])
def test_filtering_proposal_sees_the_past_and_smoothing_all(proposal):
    build = guides.network_proposal(random.key(0), T, 1, SUBSAMPLE, 6, 4, proposal == "smoothing")
    _, y = make_path()
    params = trained_params(make_guide(proposal), y)
    reads = seen_by(build, params, y[::SUBSAMPLE], lambda inputs, propose: inputs.sum(-1))
    past = np.arange(3)[None] * SUBSAMPLE <= np.arange(T)[:, None]
    np.testing.assert_array_equal(reads, past if proposal == "filtering" else np.ones_like(past))


def test_twist_starts_at_zero_and_sees_only_the_future():
    build = guides.learned_twist(random.key(0), T, 1, SUBSAMPLE, 6, 4)
    x, y = make_path()
    read = lambda inputs, log_twist: jax.vmap(log_twist)(jnp.asarray(x), inputs)  # noqa: E731
    with handlers.seed(rng_seed=0):
        np.testing.assert_array_equal(read(*build(jnp.asarray(y[::SUBSAMPLE]), jnp.arange(T))), np.zeros(T))
    params = trained_params(make_guide("bootstrap", "learned"), y)
    reads = seen_by(build, params, y[::SUBSAMPLE], read)
    np.testing.assert_array_equal(reads, np.arange(3)[None] * SUBSAMPLE >= (np.arange(T)[:, None] // 3 + 1) * 3)


def test_fresh_twist_is_fivo_bit_for_bit_and_a_trained_one_is_not():
    _, y = make_path()
    model, guide = hh.make_model(**SMALL), make_guide("smoothing", "learned")
    fresh = SVI(model, guide, optax.adam(0.1), FIVO(3))
    params = fresh.get_params(fresh.init(random.key(0), y))
    assert {"current", "proposal_rnn$params", "twist_rnn$params", "twist_mlp$params"} <= set(params)
    values = jax.jit(lambda params: [loss.loss(random.key(1), params, model, guide, y) for loss in (FIVO(3), SIXO(3))])
    fivo, sixo = values(params)
    assert float(fivo) == float(sixo)
    fivo, sixo = values(params | trained_params(guide, y))
    assert float(fivo) != float(sixo)


@pytest.mark.parametrize("proposal, twist", [("filtering", "none"), ("smoothing", "learned")])
def test_evidence_of_two_observations_is_that_of_quadrature(proposal, twist):
    # Given the gates, two successive potentials are jointly Gaussian: three dimensions of Gauss-Hermite are left.
    # 4,000 keys of 32 particles, networks at random; five standard errors: false alarms 6e-7 per case
    dt, y = 0.1, np.array([-5.2, -5.9])
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    loc = np.asarray(hh.start()[0], np.float64)
    grid = np.stack(np.meshgrid(*(nodes + loc[i] for i in (1, 2, 3)), indexing="ij"), -1).reshape(-1, 3)
    log_weights = np.log(np.stack(np.meshgrid(weights, weights, weights), -1)).sum(-1).ravel() - 1.5 * np.log(2 * np.pi)
    ends = [reference_mean(np.concatenate([np.full((len(grid), 1), v), grid], -1), 13.0, dt)[:, 0] for v in (0.0, 1.0)]
    slope, offset = ends[1] - ends[0], ends[0]
    start_variance, noise_variance = 2.5**2, 0.09 * dt
    total = start_variance + 0.25
    first = norm(-6.5, np.sqrt(total)).logpdf(y[0])
    posterior = -6.5 + start_variance / total * (y[0] + 6.5)
    variance = slope**2 * start_variance * 0.25 / total + noise_variance + 0.25
    second = norm(offset + slope * posterior, np.sqrt(variance)).logpdf(y[1])
    exact = first + logsumexp(log_weights + second)

    settings = {"num_steps": 2, "subsample": 1, "dt": dt}
    model, guide = hh.make_model(**settings), make_guide(proposal, twist, init_log_scale=1.0, **settings)
    series = y.astype(np.float32)[:, None]
    params = {"current": jnp.asarray(13.0)} | trained_params(guide, series)
    loss = SIXO(32) if twist == "learned" else FIVO(32)
    run = jax.jit(jax.vmap(lambda key: -loss.loss(key, params, model, guide, series)))
    assert_unbiased_evidence(run(random.split(random.key(0), 4000)), exact)


def test_an_elbo_ignores_the_twist():
    _, y = make_path(2)
    settings = {"num_compartments": 2, **SMALL}
    model, guide = hh.make_model(**settings), make_guide("smoothing", "learned", **settings)
    params = trained_params(guide, y) | {"current": jnp.asarray(13.0)}
    without = params | {"twist_mlp$params": jax.tree.map(jnp.zeros_like, params["twist_mlp$params"])}
    loss = jax.jit(lambda params: Trace_ELBO().loss(random.key(0), params, model, guide, y))
    assert np.isfinite(loss(params)) and float(loss(params)) == float(loss(without))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"proposal": "backward"}, "expected 'bootstrap', 'filtering' or 'smoothing'"),
        ({"twist": "dre"}, "expected 'none' or 'learned'"),
        ({"proposal": "smoothing"}, "pass rng_key"),
        ({"proposal": "smoothing", "rng_key": random.key(0), "residual": "half"}, "expected 'none', 'mean' or 'full'"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        guides.make_guide(**settings)
