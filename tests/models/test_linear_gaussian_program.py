"""Kalman filter and smoother against the dense joint Gaussian, and the programs against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal

from models import linear_gaussian as lg

T, D, K = 6, 2, 3
MASKS = {"complete": None, "gaps": np.array([True, False, True, True, False, True])}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def make_parameters() -> lg.LinearGaussian:
    """Asymmetric, non-stationary, correlated: nothing that a transposed matrix could survive."""
    return lg.LinearGaussian(
        initial_mean=jnp.array([0.5, -1.0]),
        initial_covariance=jnp.array([[1.0, 0.3], [0.3, 0.5]]),
        transition_matrix=jnp.array([[0.9, 0.4], [-0.2, 0.7]]),
        transition_offset=jnp.array([0.1, -0.3]),
        transition_covariance=jnp.array([[0.4, -0.1], [-0.1, 0.2]]),
        emission_matrix=jnp.array([[1.0, 0.0], [0.5, -1.0], [0.2, 0.8]]),
        emission_covariance=jnp.array([[0.5, 0.1, 0.0], [0.1, 0.3, 0.05], [0.0, 0.05, 0.8]]),
    )


def make_data() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(T, K)) * 1.5


def dense(parameters: lg.LinearGaussian) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (x_0, ..., x_T, y_1, ..., y_T), pushed through the recursion as one linear map."""
    m0, p0, a, b, q, c, r = (np.asarray(leaf) for leaf in parameters)
    blocks = [p0] + [q] * T + [r] * T
    sizes = [block.shape[0] for block in blocks]
    noise = np.zeros((sum(sizes), sum(sizes)))
    starts = np.cumsum([0, *sizes])
    for start, size, block in zip(starts, sizes, blocks, strict=False):
        noise[start : start + size, start : start + size] = block
    select = np.eye(sum(sizes))
    means, maps = [m0], [select[: sizes[0]]]
    for t in range(1, T + 1):
        means.append(a @ means[-1] + b)
        maps.append(a @ maps[-1] + select[starts[t] : starts[t + 1]])
    y_means = [c @ mean for mean in means[1:]]
    y_maps = [c @ maps[t] + select[starts[T + t] : starts[T + t + 1]] for t in range(1, T + 1)]
    linear = np.concatenate(maps + y_maps)
    return np.concatenate(means + y_means), linear @ noise @ linear.T


def dense_posterior(parameters, y, mask, num_observed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means [T + 1, D] and covariances [T + 1, D, D] of x_0, ..., x_T given the first observations."""
    mean, covariance = dense(parameters)
    states = np.arange((T + 1) * D)
    keep = np.arange(T) < num_observed
    keep = keep if mask is None else keep & mask
    given = len(states) + np.flatnonzero(np.repeat(keep, K))
    gain = np.linalg.solve(covariance[np.ix_(given, given)], covariance[np.ix_(given, states)]).T
    posterior_mean = mean[states] + gain @ (y[keep].ravel() - mean[given])
    posterior = covariance[np.ix_(states, states)] - gain @ covariance[np.ix_(given, states)]
    blocks = [posterior[t * D : (t + 1) * D, t * D : (t + 1) * D] for t in range(T + 1)]
    return posterior_mean.reshape(T + 1, D), np.stack(blocks)


def dense_log_evidence(parameters, y, mask=None) -> float:
    mean, covariance = dense(parameters)
    keep = np.ones(T, bool) if mask is None else mask
    given = (T + 1) * D + np.flatnonzero(np.repeat(keep, K))
    return multivariate_normal(mean[given], covariance[np.ix_(given, given)]).logpdf(y[keep].ravel())


@pytest.mark.parametrize("mask", MASKS)
def test_log_evidence_is_that_of_the_dense_gaussian(mask):
    parameters, y = make_parameters(), make_data()
    found = lg.log_evidence(parameters, y, MASKS[mask])
    assert float(found) == pytest.approx(dense_log_evidence(parameters, y, MASKS[mask]), rel=1e-11)


@pytest.mark.parametrize("mask", MASKS)
def test_filtered_moments_are_those_of_the_dense_gaussian(mask):
    parameters, y = make_parameters(), make_data()
    filtered = lg.kalman_filter(parameters, y, MASKS[mask])
    for t in range(1, T + 1):
        means, covariances = dense_posterior(parameters, y, MASKS[mask], t)
        np.testing.assert_allclose(filtered.means[t - 1], means[t], rtol=1e-9)
        np.testing.assert_allclose(filtered.covariances[t - 1], covariances[t], rtol=1e-9, atol=1e-12)
        means, covariances = dense_posterior(parameters, y, MASKS[mask], t - 1)
        np.testing.assert_allclose(filtered.predicted_means[t - 1], means[t], rtol=1e-9)
        np.testing.assert_allclose(filtered.predicted_covariances[t - 1], covariances[t], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_smoothed_moments_are_those_of_the_dense_gaussian(mask):
    parameters, y = make_parameters(), make_data()
    smoothed = lg.rts_smoother(parameters, lg.kalman_filter(parameters, y, MASKS[mask]))
    means, covariances = dense_posterior(parameters, y, MASKS[mask], T)
    np.testing.assert_allclose(smoothed.means, means[1:], rtol=1e-9)
    np.testing.assert_allclose(smoothed.covariances, covariances[1:], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(smoothed.initial_mean, means[0], rtol=1e-9)
    np.testing.assert_allclose(smoothed.initial_covariance, covariances[0], rtol=1e-9, atol=1e-12)


def test_score_is_the_slope_of_the_dense_log_evidence():
    parameters, y = make_parameters(), make_data()
    score = jax.jit(lg.score)(parameters, y)
    for name in ("initial_mean", "transition_matrix", "transition_offset", "emission_matrix"):
        value = np.asarray(getattr(parameters, name))
        for index in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[index] = 1e-5
            up, down = (dense_log_evidence(parameters._replace(**{name: value + s * step}), y) for s in (1, -1))
            assert float(getattr(score, name)[index]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-6), name


def test_missing_values_are_never_read():
    parameters, mask = make_parameters(), MASKS["gaps"]
    y = make_data()
    hidden = np.where(mask[:, None], y, np.nan)
    score = jax.jit(lg.score)
    for a, b in zip(score(parameters, hidden, mask), score(parameters, y, mask), strict=True):
        np.testing.assert_array_equal(a, b)

    @jax.jit
    @jax.grad
    def gradient_of_joint(p):
        return log_density(lg.model, (hidden, p, None, mask), {}, {"x_0": jnp.zeros(D), "x": jnp.ones((T, D))})[0]

    gradient = gradient_of_joint(parameters)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in gradient)


@pytest.mark.parametrize("mask", MASKS)
def test_log_density_of_the_program_is_the_dense_joint(mask):
    parameters, y = make_parameters(), make_data()
    x = np.random.default_rng(1).normal(size=(T + 1, D))
    mean, covariance = dense(parameters)
    keep = np.ones(T, bool) if MASKS[mask] is None else MASKS[mask]
    index = np.concatenate([np.arange((T + 1) * D), (T + 1) * D + np.flatnonzero(np.repeat(keep, K))])
    joint = multivariate_normal(mean[index], covariance[np.ix_(index, index)])
    expected = joint.logpdf(np.concatenate([x.ravel(), y[keep].ravel()]))
    arguments = (y, parameters, None, MASKS[mask])
    found, _ = log_density(lg.model, arguments, {}, {"x_0": jnp.asarray(x[0]), "x": jnp.asarray(x[1:])})
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_simulation_has_the_moments_of_the_dense_gaussian():
    # 20,000 draws; each mean within 5 standard errors (26 means; false alarms: 1.5e-5 in all)
    parameters = make_parameters()
    x, y = jax.vmap(lambda key: lg.simulate(key, parameters, T))(jax.random.split(jax.random.key(0), 20_000))
    draws = np.concatenate([x.reshape(20_000, -1), y.reshape(20_000, -1)], 1)
    mean, covariance = dense(parameters)
    mean, covariance = mean[D:], covariance[D:, D:]
    standard_errors = np.sqrt(np.diag(covariance) / 20_000)
    assert np.all(np.abs(draws.mean(0) - mean) < 5 * standard_errors)
    # entries of a sample covariance: standard error at most sqrt(2 c_ii c_jj / n); 6 of those over 900 entries
    bound = 6 * np.sqrt(2 * np.outer(np.diag(covariance), np.diag(covariance)) / 20_000)
    assert np.all(np.abs(np.cov(draws.T) - covariance) < bound)


def test_scalar_program_is_the_general_one():
    settings = (0.8, 0.7, 1.3, 2.0)
    parameters = lg.ar1_parameters(*settings)
    y = jnp.array([0.3, -1.0, 2.0, 0.1])
    x_0, x = jnp.array(0.4), jnp.array([0.2, -0.5, 0.9, 1.1])
    scalar, _ = log_density(lg.ar1_model, (y, None, *settings), {}, {"x_0": x_0, "x": x})
    general, _ = log_density(lg.model, (y[:, None], parameters), {}, {"x_0": x_0[None], "x": x[:, None]})
    assert float(scalar) == pytest.approx(float(general), rel=1e-10)
    assert all(leaf.dtype == jnp.float64 for leaf in parameters)


def test_programs_run_under_predictive():
    samples = Predictive(lg.model, num_samples=4)(jax.random.key(0), None, make_parameters(), T)
    assert samples["x_0"].shape == (4, D)
    assert samples["x"].shape == (4, T, D)
    assert samples["y"].shape == (4, T, K)
    samples = Predictive(lg.ar1_model, num_samples=4)(jax.random.key(0), None, T)
    assert samples["x"].shape == samples["y"].shape == (4, T)


def test_everything_keeps_double_precision():
    parameters, y = make_parameters(), make_data()
    filtered = lg.kalman_filter(parameters, y)
    results = [*filtered, *lg.rts_smoother(parameters, filtered), *jax.jit(lg.score)(parameters, y)]
    results += handlers.seed(lg.model, jax.random.key(0))(None, parameters, T)
    assert {leaf.dtype for leaf in results} == {jnp.dtype("float64")}
