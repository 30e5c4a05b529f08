"""Filtered means, forecasts, streams and reports against the Kalman filter; smoothing is in test_smoothing.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from models import linear_gaussian as lg
from numpyro_smc import ParticleFilter, log_evidence

AR1 = {"coefficient": 0.9, "transition_scale": 0.6, "emission_scale": 1.0, "initial_scale": 1.3}
PARAMETERS = lg.ar1_parameters(**AR1)
SERIES = lg.simulate(random.key(42), PARAMETERS, 30)[1][:, 0]
KALMAN = lg.kalman_filter(PARAMETERS, SERIES[:, None])
FILTER = ParticleFilter(lg.ar1_model, 4000)


@pytest.fixture(scope="module")
def result():
    return FILTER.run(random.key(0), SERIES, **AR1)


def test_filtered_means_and_quantiles(result):
    sd = np.sqrt(KALMAN.covariances[:, 0, 0])
    # Five standard errors: the weights' effective sample size, twice over for the error inherited from earlier steps.
    error = sd * np.sqrt(2.0 / result.ess)
    assert (np.abs(result.mean("x") - KALMAN.means[:, 0]) < 5.0 * error).all()
    assert error.max() < 0.05
    low, high = result.quantile("x", jnp.array([0.05, 0.95]))
    np.testing.assert_allclose(low, KALMAN.means[:, 0] - 1.645 * sd, atol=0.2)
    np.testing.assert_allclose(high, KALMAN.means[:, 0] + 1.645 * sd, atol=0.2)
    np.testing.assert_allclose(result.log_evidence, KALMAN.log_evidence.sum(), atol=0.5)
    np.testing.assert_allclose(result.log_evidence_increments.sum(), result.log_evidence, rtol=1e-5)
    assert result.mean("x_0").shape == ()
    assert abs(result.mean("x_0")) < 0.15
    np.testing.assert_allclose(np.exp(result.log_weights).mean(axis=1), 1.0, rtol=1e-4)
    with pytest.raises(KeyError, match=r"No site 'z' in this filter. Known: x, x_0"):
        result.mean("z")


def test_backward_sampling_keeps_many_early_ancestors(result):
    few = ParticleFilter(lg.ar1_model, 50, resample="always").run(random.key(0), SERIES, **AR1)
    distinct = {
        m: len(np.unique(few.sample_posterior(random.key(1), 300, m)["x"][:, 0])) for m in ("genealogy", "backward")
    }
    assert distinct["backward"] > 3 * distinct["genealogy"]


def batched(y):
    with numpyro.plate("series", 2):
        x = numpyro.sample("x_0", dist.Normal(0.0, 1.3))

    def step(x, y_t):
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.6))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, x, y)


@pytest.mark.parametrize("method", ["backward", "backward_mcmc"])
def test_backward_sampling_under_a_plate_smooths_each_series(method):
    y = jnp.stack([SERIES[:10], -SERIES[5:15]], axis=1)
    result = ParticleFilter(batched, 2000).run(random.key(0), y)
    draws = result.sample_posterior(random.key(1), 1000, method)
    assert draws["x"].shape == (1000, 10, 2)
    for s in range(2):
        smoothed = lg.rts_smoother(PARAMETERS, lg.kalman_filter(PARAMETERS, y[:, s : s + 1]))
        np.testing.assert_allclose(draws["x"][..., s].mean(0), smoothed.means[:, 0], atol=0.12)


def test_forecasts_are_those_of_the_kalman_filter(result):
    draws = result.forecast(random.key(2), steps=5, num_samples=4000)
    mean, variance = KALMAN.means[-1, 0], KALMAN.covariances[-1, 0, 0]
    for t in range(5):
        mean, variance = 0.9 * mean, 0.81 * variance + 0.36
        np.testing.assert_allclose(draws["x"][:, t].mean(), mean, atol=0.09)
        np.testing.assert_allclose(draws["y"][:, t].std(), np.sqrt(variance + 1.0), atol=0.08)
    with pytest.raises(ValueError, match="forecast: steps must be a positive integer, got 0"):
        result.forecast(random.key(0), 0)


def with_covariate(y, z):
    def step(x, inputs):
        t, y_t, z_t = inputs
        x = numpyro.sample("x", dist.Normal(0.5 * x + z_t, 0.1))
        numpyro.sample("y", dist.Normal(x, 0.1 + 0.0 * t), obs=y_t)
        return x, None

    scan(step, 0.0, (jnp.arange(len(y)), y, z))


def test_forecasts_ask_for_future_covariates_and_continue_counters():
    y, z = jnp.zeros(4), jnp.ones(4)
    result = ParticleFilter(with_covariate, 100).run(random.key(0), y, z)
    with pytest.raises(ValueError, match=r"covariate.*xs, with 2 steps"):
        result.forecast(random.key(0), 2)
    xs = (jnp.arange(4, 6), jnp.zeros(2), jnp.array([10.0, 10.0]))
    assert result.forecast(random.key(0), 2, xs=xs)["x"].mean() > 9.0


def test_a_stream_equals_the_whole_series_and_survives_a_restart(tmp_path):
    particle_filter = ParticleFilter(lg.ar1_model, 200)
    whole = particle_filter.run(random.key(3), SERIES, **AR1)
    state = particle_filter.init(random.key(3), SERIES[:1], **AR1)
    for t, y_t in enumerate(SERIES[:20]):
        state = particle_filter.update(state, y_t)
        np.testing.assert_allclose(state.increment, whole.log_evidence_increments[t], rtol=2e-4, atol=2e-5)
    particle_filter.save(tmp_path / "state.npz", state)
    other = ParticleFilter(lg.ar1_model, 200)
    state = other.load(tmp_path / "state.npz", SERIES[:1], **AR1)
    for y_t in SERIES[20:]:
        state = other.update(state, y_t)
    np.testing.assert_allclose(state.log_evidence, whole.log_evidence, rtol=1e-4)
    np.testing.assert_allclose(state.values["x"], whole.particles["x"][-1], rtol=1e-3, atol=1e-4)
    assert other._compiled_update.num_compiled() == 1
    with pytest.raises(ValueError, match="one slice of the model's xs"):
        other.update(state, (SERIES[0], SERIES[0]))


def test_a_stream_of_a_conditioned_model_takes_observations_by_name():
    def model(T):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.6))
            numpyro.sample("y", dist.Normal(x, 1.0))
            return x, None

        scan(step, 0.0, None, length=T)

    particle_filter = ParticleFilter(handlers.condition(model, data={"y": SERIES}), 100)
    whole = particle_filter.run(random.key(0), 30)
    stream = ParticleFilter(model, 100)
    state = stream.init(random.key(0), 1)
    for y_t in SERIES:
        state = stream.update(state, data={"y": y_t})
    np.testing.assert_allclose(state.log_evidence, whole.log_evidence, rtol=1e-4)


def test_reports(result, tmp_path):
    text = repr(result)
    assert "log evidence" in text and "30 steps, 4000 particles" in text and "'x'" in text
    data = result.to_arviz(random.key(0), 50)
    assert data["posterior"]["x"].shape == (1, 50, 30)
    assert data["sample_stats"]["ess"].shape == (1, 1, 30)
    np.testing.assert_allclose(data["posterior"].attrs["log_evidence"], result.log_evidence, rtol=1e-6)
    data.to_netcdf(str(tmp_path / "filter.nc"))
    assert (tmp_path / "filter.nc").stat().st_size > 1000
    ax = result.plot("x", SERIES)
    assert len(ax.lines) == 2 and ax.get_xlabel() == "step"
    ax.figure.savefig(tmp_path / "bands.png")


def test_without_history_only_the_evidence_is_kept():
    lean = ParticleFilter(lg.ar1_model, 100, history=False).run(random.key(0), SERIES, **AR1)
    full = ParticleFilter(lg.ar1_model, 100).run(random.key(0), SERIES, **AR1)
    np.testing.assert_array_equal(lean.log_evidence, full.log_evidence)
    for question in (lambda: lean.mean("x"), lambda: lean.ancestors, lambda: lean.sample_posterior(random.key(0))):
        with pytest.raises(ValueError, match="history=True"):
            question()
    assert "not kept" in repr(lean)


def test_evidence_and_filter_agree_and_differentiate():
    def level_model(y, level):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.6))
            numpyro.sample("y", dist.Normal(x + level, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    particle_filter = ParticleFilter(level_model, 2000)
    gradient = jax.grad(lambda level: particle_filter.log_evidence(random.key(0), SERIES, level))(0.2)
    exact = jax.grad(
        lambda level: lg.log_evidence(
            PARAMETERS._replace(initial_covariance=jnp.full((1, 1), 1e-9)), SERIES[:, None] - level
        )
    )(0.2)
    assert abs(gradient - exact) < 0.15 * abs(exact) + 1.0
    first = log_evidence(random.key(0), level_model, {}, SERIES, 0.2, num_particles=64)
    assert first == log_evidence(random.key(0), level_model, {}, SERIES, 0.2, num_particles=64)


def test_impossible_observations_and_bad_data_name_the_step():
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Uniform(0.0, 1.0))
            numpyro.sample("y", dist.Uniform(0.0, x), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(FloatingPointError, match="weight zero at step 2"):
        ParticleFilter(model, 20).run(random.key(0), jnp.array([0.01, 0.02, 5.0, 0.01]))
    with pytest.raises(FloatingPointError, match="non-finite data at site 'y' at step 3"):
        FILTER.run(random.key(0), SERIES.at[3].set(jnp.nan), **AR1)
