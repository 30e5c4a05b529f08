"""The neuron against a reference integrator, with the same noise: voltages, spikes, and summaries on the way."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from models import hodgkin_huxley_summaries as hh

REFERENCE = np.load(Path(__file__).parent / "data" / "hodgkin_huxley_reference.npz")
THETA = REFERENCE["theta"]
#: The reference's noise: a legacy generator of NumPy for each neuron.
NOISE = np.stack([np.random.RandomState(seed).randn(hh.NUM_STEPS) for seed in range(len(THETA))])


@pytest.fixture(scope="module")
def traces() -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(hh.voltage))(THETA, NOISE))


@pytest.fixture(scope="module")
def simulations():
    """256 draws of the simulator, in single precision."""

    def simulate(rng_key):
        trace = handlers.trace(handlers.seed(hh.model, rng_key)).get_trace()
        return {name: site["value"] for name, site in trace.items() if name != "noise"}

    return jax.jit(jax.vmap(simulate))(jax.random.split(jax.random.key(0), 256))


def test_voltages_are_the_reference_integrators(traces):
    """All along, spikes included: the reference is stored in single precision."""
    np.testing.assert_allclose(traces[:, ::20], REFERENCE["every_20th_voltage"], rtol=1e-6)
    assert traces.dtype == np.float64 and np.all(traces[:, 0] == -70)


def test_spikes_are_the_references(traces):
    for trace, times in zip(traces, REFERENCE["spike_times"], strict=True):
        np.testing.assert_allclose(hh.spike_times(trace), times[np.isfinite(times)], atol=0.0101)


def test_summaries_of_the_traces_are_the_references(traces):
    with jax.enable_x64(True):
        found = np.stack([hh.summaries_of(trace) for trace in traces])
    np.testing.assert_allclose(found, REFERENCE["summaries"], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-3)])
def test_summaries_on_the_way_are_those_of_the_trace(dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        found = jax.jit(jax.vmap(hh.summaries))(THETA.astype(dtype), NOISE.astype(dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, REFERENCE["summaries"], rtol=tolerance)


@pytest.mark.parametrize(
    ("clipped_rise", "expected"),
    [
        ([-20, 5, 9, 4], 1),  # one peak
        ([-20, 9, 4, 2], 0),  # nothing above the floor before the peak
        ([5, 9, 9, 4], 1),  # a flat top
        ([5, 9, 4, 6, 8, 3], 1),  # two peaks within half a millisecond
    ],
)
def test_spike_rule_on_the_way_is_that_of_the_trace(clipped_rise, expected):
    trace = np.full(hh.NUM_STEPS + 1, -60.0)
    for start in (500, 3000, 3060, 10_980, 11_100):  # before, within, beside, at the end of, and after the stimulus
        trace[start : start + len(clipped_rise)] = clipped_rise
    index = np.arange(len(trace))
    within = (index - 2 > hh.FIRST_STIMULATED) & (index - 2 < hh.END_OF_STIMULUS)
    start = hh.Spikes(jnp.asarray(-10.0), jnp.asarray(False), jnp.asarray(0), jnp.asarray(hh.NUM_STEPS))

    def add(spikes: hh.Spikes, inputs: tuple) -> tuple[hh.Spikes, None]:
        return spikes.add(*inputs), None

    found = jax.lax.scan(add, start, (jnp.asarray(trace), jnp.asarray(within)))[0].count
    assert int(found) == len(hh.spike_times(trace)) == 3 * expected


def test_moments_are_those_of_all_values():
    values = np.random.default_rng(0).gamma(2.0, size=50) - 60
    moments = hh.Moments(*jnp.zeros((4,)))
    for number, value in enumerate([np.nan, *values, -1e3]):
        moments = moments.add(jnp.nan_to_num(value), jnp.asarray(float(number) if number <= 50 else 0.0))
    expected = [values.mean()] + [((values - values.mean()) ** power).sum() for power in (2, 3, 4)]
    np.testing.assert_allclose(np.stack(moments), expected, rtol=1e-4)


def test_simulations_of_the_prior_are_finite_and_within_bounds(simulations):
    assert simulations["x"].shape == (256, 7) and np.all(np.isfinite(simulations["x"]))
    for name, (low, high) in hh.BOUNDS.items():
        values = np.asarray(simulations[name])
        assert low <= values.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < values.max() <= high
    spikes, variance = simulations["x"][:, 0], simulations["x"][:, 4]
    assert 0.1 < np.mean(np.asarray(spikes) == 0) < 0.9 and np.all(np.asarray(variance) > 0)


def test_rates_are_smooth_where_their_formula_divides_by_zero():
    """At u = 13, 15 and 40, where z / (exp(z) - 1) is 0 / 0."""
    theta = jnp.asarray(THETA[0], jnp.float32)
    for u in (13.0, 15.0, 40.0):
        v = u - theta[5]
        at, near = (np.array(hh.gates(theta, v + e)) for e in (0.0, 0.01))
        np.testing.assert_allclose(at, near, rtol=5e-3)
    gradient = jax.jacobian(lambda v: jnp.array(hh.gates(theta, v)))(13.0 - theta[5])
    assert np.all(np.isfinite(gradient))
