"""The drift diffusion's closed forms against its joint covariance, and its programs against the closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.util import log_density

from models import drift_diffusion as dd

T, DRIFT, Y = 10, 1.0, 3.0

PROPOSALS = {"prior": dd.prior_proposal, "optimal": dd.optimal_proposal, "learned": dd.learned_proposal}
TWISTS = {"none": None, "analytic": dd.analytic_twist, "tilt": dd.standard_tilt, "mlp": dd.mlp_tilt(jax.random.key(3))}


def joint_moments(num_steps: int, drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (x_0, ..., x_{T-1}, y): cumulative sums of T + 1 increments N(b, 1)."""
    sums = np.tril(np.ones((num_steps + 1, num_steps + 1)))
    return sums @ np.full(num_steps + 1, drift), sums @ sums.T


def condition(mean, covariance, wanted: int, given: list[int], values: list[float]) -> tuple[float, float]:
    """Mean and variance of one component of a Gaussian given others."""
    gain = np.linalg.solve(covariance[np.ix_(given, given)], covariance[given, wanted])
    return (
        mean[wanted] + gain @ (np.asarray(values) - mean[given]),
        covariance[wanted, wanted] - gain @ covariance[given, wanted],
    )


def normal_log_density(value: float, mean: float, variance: float) -> float:
    return -0.5 * ((value - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def run_guide(guide, y, drift=DRIFT, num_series=None, params=None):
    """Trace of one run of a guide."""
    seeded = handlers.seed(handlers.substitute(guide, data=params or {}), jax.random.key(0))
    return handlers.trace(seeded).get_trace(y, T, num_series, drift)


def log_twists(twist, x, y, drift=DRIFT):
    """The twist's value at each step of a path."""
    with handlers.seed(rng_seed=0):
        log_twist = twist(jnp.asarray(y), T, drift)
    return jnp.stack([log_twist(jnp.asarray(t), x[t]) for t in range(T)])


def test_log_evidence_is_the_published_number():
    assert float(dd.log_evidence(Y, DRIFT, T)) == pytest.approx(-5.026977, abs=2e-6)


@pytest.mark.parametrize("drift", [0.0, 1.0, -0.7])
def test_log_evidence_is_that_of_the_joint_covariance(drift):
    mean, covariance = joint_moments(T, drift)
    expected = normal_log_density(Y, mean[-1], covariance[-1, -1])
    assert float(dd.log_evidence(Y, drift, T)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("t", [0, 4, T - 1])
def test_optimal_twist_is_the_density_of_y_given_the_state(t):
    mean, covariance = joint_moments(T, DRIFT)
    x = 1.7
    expected = normal_log_density(Y, *condition(mean, covariance, T, [t], [x]))
    assert float(dd.lookahead_log_density(Y, x, t, DRIFT, T)) == pytest.approx(expected, rel=1e-5)
    ratio = expected - normal_log_density(Y, mean[-1], covariance[-1, -1])
    assert float(dd.log_density_ratio(Y, x, t, DRIFT, T)) == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("drift", [DRIFT, 0.3])
@pytest.mark.parametrize("t", [1, 5, T - 1])
def test_optimal_proposal_conditions_on_y_and_not_on_the_drift(t, drift):
    mean, covariance = joint_moments(T, drift)
    expected_mean, expected_variance = condition(mean, covariance, t, [t - 1, T], [0.4, Y])
    proposal = dd.smoothing_transition(Y, 0.4, t, T)
    assert float(proposal.mean) == pytest.approx(expected_mean, rel=1e-5)
    assert float(proposal.variance) == pytest.approx(expected_variance, rel=1e-5)


def test_first_optimal_proposal_starts_from_zero():
    mean, covariance = joint_moments(T, DRIFT)
    expected_mean, expected_variance = condition(mean, covariance, 0, [T], [Y])
    proposal = dd.smoothing_transition(Y, 0.0, 0, T)
    assert float(proposal.mean) == pytest.approx(expected_mean, rel=1e-5)
    assert float(proposal.variance) == pytest.approx(expected_variance, rel=1e-5)


def test_maximum_likelihood_drift_has_zero_score():
    y = jnp.array([3.0, 1.0, -2.0, 8.5])
    score = jax.grad(lambda b: dd.log_evidence(y, b, T).sum())(dd.maximum_likelihood_drift(y, T))
    assert abs(float(score)) < 1e-5


def test_model_log_density_counts_the_observation_once():
    x = np.linspace(0.5, 4.0, T)
    previous = np.concatenate([[0.0], x[:-1]])
    expected = sum(normal_log_density(a, b + DRIFT, 1.0) for a, b in zip(x, previous, strict=True))
    expected += normal_log_density(Y, x[-1] + DRIFT, 1.0)
    found, _ = log_density(dd.model, (Y, T, None, DRIFT), {}, {"x": jnp.asarray(x)})
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_batch_log_density_is_the_sum_over_series():
    x = jax.random.normal(jax.random.key(1), (T, 3))
    y = jnp.array([3.0, -1.0, 0.5])
    batched, _ = log_density(dd.model, (y, T, 3, DRIFT), {}, {"x": x})
    single = sum(log_density(dd.model, (y[i], T, None, DRIFT), {}, {"x": x[:, i]})[0] for i in range(3))
    assert float(batched) == pytest.approx(float(single), rel=1e-5)


def test_model_simulates_its_marginal():
    # 20,000 series: standard error of the mean 0.0235, of the variance 0.11; 5 of each (false alarms: 6e-7 per case)
    y = dd.simulate_data(jax.random.key(0), 20_000, T, DRIFT)
    assert y.shape == (20_000,)
    assert abs(float(y.mean()) - (T + 1) * DRIFT) < 5 * 0.0235
    assert abs(float(y.var()) - (T + 1)) < 5 * 0.11


def test_model_runs_under_predictive():
    samples = Predictive(dd.model, num_samples=4)(jax.random.key(0), None, T, 3, DRIFT)
    assert samples["x"].shape == samples["y"].shape == (4, T, 3)


def test_drift_is_a_parameter_starting_at_zero_unless_given():
    trace = handlers.trace(handlers.seed(dd.model, jax.random.key(0))).get_trace(Y, T)
    assert float(trace["drift"]["value"]) == 0.0
    assert "drift" not in handlers.trace(handlers.seed(dd.model, jax.random.key(0))).get_trace(Y, T, None, DRIFT)


@pytest.mark.parametrize(
    ("proposal", "twist"), [("prior", "mlp"), ("optimal", "analytic"), ("learned", "tilt"), ("learned", "none")]
)
@pytest.mark.parametrize("num_series", [None, 3])
def test_every_guide_runs_on_one_series_and_on_many(proposal, twist, num_series):
    guide = dd.make_guide(PROPOSALS[proposal], TWISTS[twist])
    y = jnp.asarray(Y) if num_series is None else jnp.array([3.0, 1.0, -2.0])
    trace = run_guide(guide, y, None, num_series)
    assert trace["x"]["value"].shape == (T, *y.shape)
    twist_params = {name for name, site in trace.items() if site["type"] == "param" and name.startswith("twist")}
    expected = {"tilt": {"twist_bias", "twist_log_variance"}, "mlp": {"twist_mlp$params"}}
    assert twist_params == expected.get(twist, set())


def test_optimal_guide_weighs_every_path_alike():
    guide = dd.make_guide(dd.optimal_proposal, dd.analytic_twist)
    for key in range(3):
        x = run_guide(guide, Y, params={})["x"]["value"] + key  # any path: the identity is pointwise
        model_density, _ = log_density(dd.model, (Y, T, None, DRIFT), {}, {"x": x})
        guide_density, _ = log_density(guide, (Y, T, None, DRIFT), {}, {"x": x})
        assert float(model_density - guide_density) == pytest.approx(-5.026977, abs=1e-4)


def test_optimal_twist_and_proposal_leave_no_incremental_weight():
    # p(x_t | x_{t-1}) r_t(x_t) / (q(x_t | x_{t-1}) r_{t-1}(x_{t-1})) = 1 for 0 < t < T - 1
    x = jax.random.normal(jax.random.key(1), (T,))
    log_r = log_twists(dd.analytic_twist, x, Y)
    with handlers.seed(rng_seed=0):
        prior, optimal = (p(jnp.asarray(Y), T, DRIFT) for p in (dd.prior_proposal, dd.optimal_proposal))
    for t in range(1, T - 1):
        increment = prior(t, x[t - 1]).log_prob(x[t]) - optimal(t, x[t - 1]).log_prob(x[t]) + log_r[t] - log_r[t - 1]
        assert abs(float(increment)) < 1e-5


def test_learned_proposal_can_be_the_optimal_one():
    learned, optimal = (dd.make_guide(p) for p in (dd.learned_proposal, dd.optimal_proposal))
    x = run_guide(learned, Y)["x"]["value"]
    with_params, _ = log_density(learned, (Y, T), {}, {"x": x, **dd.optimal_learned_proposal_params(T)})
    assert float(with_params) == pytest.approx(float(log_density(optimal, (Y, T), {}, {"x": x})[0]), rel=1e-5)


def test_standard_tilt_can_be_the_optimal_twist():
    n = T - jnp.arange(T)
    x = jax.random.normal(jax.random.key(1), (T,))
    with handlers.substitute(data={"twist_bias": n * DRIFT, "twist_log_variance": jnp.log(n)}):
        tilted = log_twists(dd.standard_tilt, x, Y)
    np.testing.assert_allclose(tilted, log_twists(dd.analytic_twist, x, Y), rtol=1e-5)


def test_mlp_tilt_starts_at_zero_and_is_a_quadratic_in_the_state():
    x = jax.random.normal(jax.random.key(1), (T,))
    np.testing.assert_array_equal(log_twists(TWISTS["mlp"], x, Y), jnp.zeros(T))
    network = handlers.trace(handlers.seed(dd.make_guide(dd.prior_proposal, TWISTS["mlp"]), 0)).get_trace(Y, T)
    params = jax.tree.map(lambda leaf: leaf + 0.1, network["twist_mlp$params"]["value"])
    with handlers.substitute(data={"twist_mlp$params": params}):
        at = jnp.stack([log_twists(TWISTS["mlp"], jnp.full(T, value), Y) for value in (0.0, 1.0, 2.0, 3.0)])
    np.testing.assert_allclose(jnp.diff(at, 3, axis=0), jnp.zeros((1, T)), atol=1e-4)
    assert jnp.all(jnp.abs(jnp.diff(at, 2, axis=0)) > 1e-3)
    assert jnp.unique(at[1]).size == T  # the coefficients know the time


def test_analytic_twist_passes_gradient_to_the_drift():
    gradient = jax.grad(lambda b: log_twists(dd.analytic_twist, jnp.zeros(T), Y, b).sum())(0.5)
    n = T - np.arange(T)
    assert float(gradient) == pytest.approx(float(np.sum(Y - n * 0.5)), rel=1e-5)


def test_batch_without_num_series_is_refused():
    with pytest.raises(ValueError, match="num_series"):
        dd.model(jnp.zeros(4), T)
