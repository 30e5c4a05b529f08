"""Questions to results that make no sense are refused by the name of the question and of its argument."""

import jax.numpy as jnp
import pytest

import numpyro_smc as smc
from tests.bad_calls.programs import KEY, Y, flat, parametric, series

LEVELS = [2, -0.1, "median", [0.5, 1.5], float("nan"), None]
COUNTS = [0, -1, 2.5, "3"]


@pytest.fixture(scope="module")
def filtered():
    return smc.ParticleFilter(series, 10).run(KEY, Y)


@pytest.fixture(scope="module")
def sampled():
    return smc.SMCSampler(flat, 20, moves="rwmh", num_moves=1, tempering=[1.0]).run(KEY, Y, progress_bar=False)


def refused(words, call, *args, kind=(TypeError, ValueError), **kwargs):
    with pytest.raises(kind) as raised:
        call(*args, **kwargs)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("q", LEVELS)
def test_quantiles_are_of_levels_between_zero_and_one(filtered, sampled, q):
    for result, site in ((filtered, "level"), (sampled, "z")):
        refused(["quantile: q must be levels in [0, 1]", repr(q)], result.quantile, site, q)


def test_several_levels_may_be_a_list(filtered, sampled):
    assert filtered.quantile("level", [0.1, 0.9]).shape == (2, 8)
    assert sampled.quantile("z", [0.1, 0.9]).shape == (2,)


@pytest.mark.parametrize("number", COUNTS)
def test_numbers_of_draws_are_positive_integers(filtered, sampled, number):
    refused(["sample_posterior: num_samples", repr(number)], filtered.sample_posterior, KEY, number)
    refused(["forecast: steps", repr(number)], filtered.forecast, KEY, number)
    refused(["forecast: num_samples", repr(number)], filtered.forecast, KEY, 2, number)
    refused(["get_samples: num_samples", repr(number)], sampled.get_samples, number)
    refused(["get_samples: num_samples", repr(number)], sampled.to_arviz, number)
    refused(["smooth: num_repeats", repr(number)], filtered.smooth, "level", num_repeats=number)


def test_keys_of_draws_are_keys(filtered, sampled):
    words = ["rng_key must be one random key, got 3", "jax.random.key(0)"]
    refused(["sample_posterior", *words], filtered.sample_posterior, 3)
    refused(["forecast", *words], filtered.forecast, 3, 2)
    refused(["smooth", *words], filtered.smooth, "level", rng_key=3)
    refused(["get_samples", *words], sampled.get_samples, 5, 3)


def test_sites_and_methods_are_those_there_are(filtered, sampled):
    refused(["No site 'levle'", "level"], filtered.mean, "levle", kind=KeyError)
    refused(["No site 'levle'", "level"], filtered.plot, "levle", kind=KeyError)
    refused(["No site 'zz'", "z"], sampled.mean, "zz", kind=KeyError)
    refused(["'genalogy'", "'genealogy'"], filtered.sample_posterior, KEY, 10, "genalogy")
    refused(["smooth", "'paress'", "'paris'"], filtered.smooth, "level", "paress")
    refused(["smooth", "lags", "num_mcmc_steps"], filtered.smooth, "level", lags=3)


def test_probabilities_lie_between_zero_and_one(filtered, sampled):
    evidence = smc.importance(KEY, flat, Y, num_samples=100)
    for probability in (1.5, 0.0, "most"):
        refused(["interval: probability", repr(probability)], evidence.interval, probability)
        refused(["plot: probability", repr(probability)], filtered.plot, "level", probability=probability)
        refused(["print_summary: prob", repr(probability)], sampled.print_summary, probability)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_runs", 1),
        ("num_runs", 2.5),
        ("max_particles", 0),
        ("num_pilot", 0),
        ("target_variance", 0.0),
        ("target_variance", "small"),
        ("rng_key", 3),
    ],
)
def test_tuning_is_refused_before_any_run(option, value):
    kernel = smc.ParticleMetropolis(parametric, 10)
    arguments = {"rng_key": KEY, "y": Y} | {option: value}
    refused(["ParticleMetropolis.tune", option], kernel.tune, **arguments)
    refused(["ParticleMetropolis", "no argument 'numruns'", "'num_runs'"], kernel.tune, KEY, Y, numruns=3)


def test_what_a_stream_is_given_is_an_array(tmp_path):
    particles = smc.ParticleFilter(series, 10)
    state = particles.init(KEY, Y)
    as_list = particles.update(state, 0.3, data=None)
    assert jnp.isfinite(as_list.log_evidence)
    refused(["ParticleFilter.update: state must be"], particles.update, 3, 0.1)
    refused(["ParticleFilter", "'yy'", "no such site"], particles.update, state, 0.1, data={"yy": 1.0})
