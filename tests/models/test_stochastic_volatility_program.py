"""Stochastic volatility: the program, the proposal's algebra, the twists, and the iid limit on the published data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.util import log_density
from numpyro.optim import Adam
from scipy.stats import multivariate_normal, norm

from models import stochastic_volatility as sv

T, D = 7, 3
COVARIANCES = ["diagonal", "full"]
TWISTS = ["none", "quadrature", "learned"]


def make_params(covariance: str = "diagonal") -> dict[str, jnp.ndarray]:
    params = {
        "mu": jnp.array([0.3, -0.5, 0.1]),
        "raw_phi": jnp.arctanh(jnp.array([0.9, 0.5, -0.2])),
        "log_beta": jnp.log(jnp.array([1.0, 0.7, 1.4])),
        "raw_q": jnp.log(jnp.array([0.3, 0.8, 0.5])),
    }
    if covariance == "full":
        params["raw_scale_tril"] = jnp.array([[9.0, 9.0, 9.0], [0.2, 9.0, 9.0], [-0.4, 0.3, 9.0]])  # 9: not used
    return params


def scale_tril(covariance: str) -> np.ndarray:
    lower = np.array([[0, 0, 0], [0.2, 0, 0], [-0.4, 0.3, 0]]) if covariance == "full" else 0.0
    return np.diag([0.3, 0.8, 0.5]) + lower


def make_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(T, D)), rng.normal(size=(T, D))


def make_guide(twist: str = "none", covariance: str = "diagonal", **settings):
    return sv.make_guide(T, D, twist, jax.random.key(5), covariance, hidden_size=4, width=8, **settings)


def seeded_trace(program, *args):
    return handlers.trace(handlers.seed(program, jax.random.key(0))).get_trace(*args)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_density_is_the_formula(covariance):
    x, y = make_data()
    mu, phi, beta = np.array([0.3, -0.5, 0.1]), np.array([0.9, 0.5, -0.2]), np.array([1.0, 0.7, 1.4])
    q = scale_tril(covariance) @ scale_tril(covariance).T
    expected = multivariate_normal(mu, q).logpdf(x[0])  # the first state is N(mu, Q)
    for t in range(1, T):
        expected += multivariate_normal(mu + phi * (x[t - 1] - mu), q).logpdf(x[t])
    expected += norm(0, beta * np.exp(x / 2)).logpdf(y).sum()
    model = sv.make_model(T, D, covariance)
    found, trace = log_density(model, (y, make_params(covariance)), {}, {"x": jnp.asarray(x)})
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert not [name for name, site in trace.items() if site["type"] == "param"]


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_proposal_is_the_normalised_product_of_potential_and_transition(covariance):
    x, y = make_data()
    rng = np.random.default_rng(1)
    loc, log_scale = rng.normal(size=(T, D)), rng.normal(size=(T, D)) * 0.5
    mu, phi = np.array([0.3, -0.5, 0.1]), np.array([0.9, 0.5, -0.2])
    precision = np.linalg.inv(scale_tril(covariance) @ scale_tril(covariance).T)
    expected, previous = 0.0, mu
    for t in range(T):
        potential = np.diag(np.exp(-2 * log_scale[t]))
        variance = np.linalg.inv(precision + potential)
        mean = variance @ (precision @ (mu + phi * (previous - mu)) + potential @ loc[t])
        expected += multivariate_normal(mean, variance).logpdf(x[t])
        previous = x[t]
    values = {"x": jnp.asarray(x), "proposal_loc": loc, "proposal_log_scale": log_scale}
    found, _ = log_density(make_guide(covariance=covariance), (y, make_params(covariance)), {}, values)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_scale_has_a_floor():
    params = make_params() | {"raw_q": jnp.array([-50.0, -2.0, 0.0])}
    dynamics = sv.make_dynamics(D, min_scale=0.1)(params)
    np.testing.assert_allclose(dynamics.scale, [0.1, np.exp(-2.0), 1.0], rtol=1e-6)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_initial_parameters_are_the_published_ones(covariance):
    # 400 components: each mean within 5 standard errors 0.01 / 20, each deviation within 5 of 0.01 / sqrt(800)
    trace = seeded_trace(sv.make_model(2, 400, covariance))
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    means = {"mu": 0.0, "raw_phi": np.arctanh(0.1), "log_beta": 0.0, "raw_q": 0.0}
    assert set(params) == set(means) | ({"raw_scale_tril"} if covariance == "full" else set())
    for name, mean in means.items():
        assert abs(float(params[name].mean()) - mean) < 5 * 0.01 / 20, name
        assert abs(float(params[name].std()) - 0.01) < 5 * 0.01 / np.sqrt(800), name
    assert not np.array_equal(params["mu"], params["log_beta"])


def test_params_fix_what_they_name_and_the_rest_is_learned():
    trace = seeded_trace(sv.make_model(T, D), None, {"mu": 0.5, "raw_q": jnp.zeros(D)})
    assert {name for name, site in trace.items() if site["type"] == "param"} == {"raw_phi", "log_beta"}


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_model_runs_under_predictive(covariance):
    predictive = Predictive(sv.make_model(T, D, covariance), num_samples=4)
    samples = predictive(jax.random.key(0), None, make_params(covariance))
    assert samples["x"].shape == samples["y"].shape == (4, T, D)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("twist", TWISTS)
def test_one_guide_trains_under_an_elbo_that_ignores_its_twist(twist, covariance):
    _, y = make_data()
    svi = SVI(sv.make_model(T, D, covariance), make_guide(twist, covariance), Adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), y)
    params = svi.get_params(state)
    twists = {"twist_rnn$params", "twist_mlp$params"} if twist == "learned" else set()
    assert {name for name in params if name.startswith("twist")} == twists
    assert params["proposal_loc"].shape == params["proposal_log_scale"].shape == (T, D)
    state, loss = jax.jit(svi.update)(state, y)
    assert np.isfinite(loss)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(svi.get_params(state)))


def test_univariate_series_is_the_same_program():
    y = np.random.default_rng(0).normal(size=(T, 1))
    guide = sv.make_guide(T, 1, "quadrature")
    assert seeded_trace(guide, y)["x"]["value"].shape == (T, 1)
    assert seeded_trace(sv.make_model(T, 1), y)["x"]["value"].shape == (T, 1)


def test_quadrature_twist_is_the_density_of_the_next_observation():
    x, y = make_data()
    dynamics = sv.make_dynamics(D)(make_params() | {"raw_q": jnp.log(jnp.array([0.3, 0.4, 0.2]))})
    inputs, log_twist = sv.quadrature_twist()(dynamics, jnp.asarray(y))
    grid = np.linspace(-8, 8, 8001)[:, None]
    for t in range(T - 1):
        next_loc = np.asarray(dynamics.predict(jnp.asarray(x[t])))
        density = norm(next_loc, dynamics.scale).pdf(grid) * norm(0, dynamics.beta * np.exp(grid / 2)).pdf(y[t + 1])
        expected = np.log(np.trapezoid(density, grid, axis=0)).sum()
        assert float(log_twist(jnp.asarray(x[t]), inputs[t])) == pytest.approx(expected, abs=2e-3)


def test_quadrature_twist_passes_gradient_to_the_model_and_is_finite_at_the_end():
    x, y = make_data()

    def last_two(params):
        inputs, log_twist = sv.quadrature_twist()(sv.make_dynamics(D)(params), jnp.asarray(y))
        return jnp.stack([log_twist(jnp.asarray(x[t]), inputs[t]) for t in (T - 2, T - 1)])

    assert jnp.all(jnp.isfinite(last_two(make_params())))
    jacobian = jax.jacobian(last_two)(make_params())
    for name, slopes in jacobian.items():
        assert jnp.all(jnp.isfinite(slopes)), name
        assert jnp.all(slopes[0] != 0), name


def test_learned_twist_starts_at_zero_and_sees_only_the_future():
    x, y = make_data()
    guide = make_guide("learned")
    params = {name: site["value"] for name, site in seeded_trace(guide, y).items() if site["type"] == "param"}
    dynamics = sv.make_dynamics(D)(make_params())
    build = sv.learned_twist(jax.random.key(5), D, 4, 8)

    def values(params, y):
        with handlers.substitute(data=params):
            features, log_twist = build(dynamics, jnp.asarray(y))
        return jnp.stack([log_twist(jnp.asarray(x[t]), features[t]) for t in range(T)])

    np.testing.assert_array_equal(values(params, y), jnp.zeros(T))
    rng = np.random.default_rng(2)
    trained = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)
    jacobian = jax.jacobian(lambda y: values(trained, y))(jnp.asarray(y))  # [T, T, D]
    reads = np.asarray(jnp.any(jacobian != 0, -1))
    np.testing.assert_array_equal(reads, np.triu(np.ones((T, T), bool), 1))


def test_recurrent_cell_starts_as_published():
    cell = sv.lstm_cell(jax.random.key(0), 22, 64)
    np.testing.assert_array_equal(cell.bias, np.repeat([0.0, 1.0, 0.0, 0.0], 64))
    for gate in jnp.split(cell.weight_hh, 4):
        np.testing.assert_allclose(gate @ gate.T, np.eye(64), atol=1e-5)
    # 5,632 weights: the deviation within 5 standard errors, 5 / sqrt(11,264) = 5 %
    assert float(cell.weight_ih.std()) == pytest.approx(np.sqrt(2 / (22 + 64)), rel=0.05)


def test_forget_gate_starts_open():
    cell = sv.lstm_cell(jax.random.key(0), 2, 3)
    _, memory = cell(jnp.zeros(2), (jnp.zeros(3), jnp.ones(3)))  # only the biases act: sigmoid(1) of the memory stays
    np.testing.assert_allclose(memory, jax.nn.sigmoid(1.0), rtol=1e-6)


def test_reference_params_match_the_data_s_scale():
    y = np.random.default_rng(0).normal(size=(200, D)) * np.array([0.1, 1.0, 5.0])
    dynamics = sv.make_dynamics(D)(sv.reference_params(y))
    np.testing.assert_allclose(np.exp(dynamics.mu / 2), np.sqrt((y**2).mean(0)), rtol=1e-5)
    np.testing.assert_allclose(dynamics.phi, 0.9, rtol=1e-5)
    np.testing.assert_allclose(dynamics.scale, 0.3, rtol=1e-5)
    np.testing.assert_allclose(dynamics.beta, 1.0, rtol=1e-5)


def test_iid_log_evidence_is_that_of_a_constant_state():
    _, y = make_data()
    params = make_params()
    x = jnp.broadcast_to(params["mu"], (T, D))
    conditional = handlers.substitute(sv.make_model(T, D), data={"x": x})
    sites = handlers.trace(handlers.seed(conditional, 0)).get_trace(y, params)
    expected = sites["y"]["fn"].log_prob(sites["y"]["value"]).sum()
    assert float(sv.iid_log_evidence(y, params)) == pytest.approx(float(expected), rel=1e-5)


def test_guide_refuses_another_series():
    with pytest.raises(ValueError, match="belong to one series"):
        make_guide()(np.zeros((T + 1, D)))


@pytest.mark.parametrize("settings", [{"twist": "bound"}, {"covariance": "banded"}, {"twist": "learned"}])
def test_unknown_settings_are_refused(settings):
    with pytest.raises(ValueError, match="stochastic_volatility"):
        sv.make_guide(T, D, **settings)
