"""A stream says at once that no particle explains an observation; its log evidence is that of float64 arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan

from numpyro_smc import OnlineSmoother, ParticleFilter, log_evidence

UNCHANGED = "The state that it was given to is as it was: go on with that one to leave the observation out."
NOT_FINITE = (
    f"{{user}}: non-finite data at site 'y' at step 2. Mask missing values with handlers.mask, or clean the data. "
    f"{UNCHANGED}"
)
IMPOSSIBLE = (
    f"{{user}}: all particles have weight zero at step 2: no particle explains the observation. Use more particles, a "
    f"guide, or check the observation and its support. {UNCHANGED}"
)


def level(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.2))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def bounded(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Beta(2.0, 2.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        numpyro.factor("at most one", jnp.where(y_t > 1.0, -jnp.inf, 0.0))
        return x, None

    scan(step, 0.0, y)


def counts(y):
    def step(k, y_t):
        k = numpyro.sample("k", dist.Categorical(jnp.array([0.5, 0.5])))
        numpyro.sample("y", dist.Bernoulli(1.0 * k), obs=y_t)
        return k, None

    scan(step, 0, y)


def taken_in(streamer, series):
    state = streamer.init(random.key(0), series[:1])
    for y_t in series:
        state = streamer.update(state, y_t)
    return state


CASES = {
    "not a number": (level, [0.0, 0.1, jnp.nan, 0.2], NOT_FINITE),
    "infinite": (level, [0.0, 0.1, jnp.inf, 0.2], NOT_FINITE),
    "of probability zero": (bounded, [0.0, 1.0, 2.0, 1.0], IMPOSSIBLE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("user", ["ParticleFilter.update", "OnlineSmoother"])
def test_an_observation_that_nothing_explains_is_an_error_naming_site_and_step(case, user):
    model, series, message = CASES[case]
    streamer = ParticleFilter(model, 20)
    if user == "OnlineSmoother":
        streamer = OnlineSmoother(streamer, lambda t, x, values: values["x"])
    state = taken_in(streamer, jnp.asarray(series[:2]))
    with pytest.raises(FloatingPointError) as error:
        streamer.update(state, jnp.asarray(series[2]))
    assert str(error.value) == message.format(user=user)
    after = streamer.update(state, jnp.asarray(series[3]))
    assert np.isfinite(after.filter.log_evidence if user == "OnlineSmoother" else after.log_evidence)


def test_possible_series_of_discrete_states_are_exact():
    series = jnp.array([1.0, 0.0, 1.0])
    state = taken_in(ParticleFilter(counts, 2000), series)
    assert abs(state.log_evidence - 3 * np.log(0.5)) < 0.2


def test_one_dead_series_of_a_plate_is_enough():
    def model(y):
        def step(x, y_t):
            with numpyro.plate("series", 2):
                x = numpyro.sample("x", dist.Normal(x, 0.2))
                numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, jnp.zeros(2), y)

    particle_filter = ParticleFilter(model, 20)
    state = particle_filter.init(random.key(0), jnp.zeros((1, 2)))
    with pytest.raises(FloatingPointError, match="site 'y' at step 0"):
        particle_filter.update(state, jnp.array([0.0, jnp.nan]))


def test_what_is_observed_before_the_scan_is_looked_at_first():
    with pytest.raises(FloatingPointError, match="init: all particles have weight zero before the first step"):
        ParticleFilter(before, 20).init(random.key(0), jnp.zeros(1), 0.0)


def before(y, first):
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    numpyro.factor("first", jnp.where(first > 0.0, -((first - x_0) ** 2), -jnp.inf))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 0.2))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, x_0, y)


def test_under_jit_the_log_evidence_stays_impossible_and_the_smoother_has_no_value():
    smoother = OnlineSmoother(ParticleFilter(bounded, 20), lambda t, x, values: values["x"] + 100.0)
    state = smoother.init(random.key(0), jnp.zeros(1))

    @jax.jit
    def end(state, series):
        for y_t in series:
            state = smoother.update(state, y_t)
        return state

    state = end(state, jnp.array([2.0]))
    assert not np.isfinite(state.filter.log_evidence) and np.isnan(state.value)
    with pytest.raises(FloatingPointError, match="no particle was left before step 1"):
        smoother.update(state, jnp.asarray(1.0))


def independent(y):
    """The observations have nothing to do with the states: every filter's log evidence is exact, but for rounding."""

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def streamed(y):
    particle_filter = ParticleFilter(independent, 2)

    @jax.jit
    def run(state, y):
        return jax.lax.scan(lambda state, y_t: (particle_filter.update(state, y_t), None), state, y)[0]

    return run(particle_filter.init(random.key(0), y[:1]), y).log_evidence


ENTRIES = {
    "stream": streamed,
    "run": lambda y: ParticleFilter(independent, 2, history=False).run(random.key(0), y).log_evidence,
    "log_evidence": lambda y: log_evidence(random.key(0), independent, {}, y, num_particles=2),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("length", [50, 20_000])
def test_log_evidences_in_float32_are_those_in_float64_to_the_last_digits(entry, length):
    y = np.asarray(np.random.default_rng(0).normal(size=length), np.float32)
    exact = -0.5 * np.sum(np.asarray(y, np.float64) ** 2 + np.log(2 * np.pi))
    found = ENTRIES[entry](jnp.asarray(y))
    # The terms themselves are rounded, up or down by chance: five standard deviations of that, and two last digits.
    rounding = 5 * 2**-24 * np.sqrt(length) + 2 * np.spacing(np.float32(abs(exact)))
    assert abs(float(found) - exact) < rounding
