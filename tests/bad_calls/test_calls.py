"""Every entry, called with one thing wrong: the message names the entry, the thing and the remedy."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, SVI
from numpyro.infer.autoguide import AutoNormal

import numpyro_smc as smc
from tests.bad_calls.programs import GIVEN, KEY, Y, flat, guide, linear_model, parametric, series, series_guide

N = 10
AIS = smc.AIS(linear_model, guide, num_chains=2, num_temperatures=3, num_leapfrog=1, num_pilot_chains=2)
FILTER = smc.ParticleFilter(series, N)


def chain(kernel, key, *args, **kwargs):
    MCMC(kernel, num_warmup=0, num_samples=1, progress_bar=False).run(key, *args, **kwargs)


# Each by its name in messages: what to call, values of its parameters, and what else it is called with.
SERIES = {
    "ParticleFilter": lambda p, key, *a, **k: FILTER.run(key, *a, params=p, **k),
    "ParticleFilter.log_evidence": lambda p, key, *a, **k: FILTER.log_evidence(key, *a, params=p, **k),
    "ParticleFilter.init": lambda p, key, *a, **k: FILTER.init(key, *a, params=p, **k),
    "OnlineSmoother": lambda p, key, *a, **k: smc.OnlineSmoother(FILTER, lambda *_: 0.0).init(key, *a, params=p, **k),
    "log_evidence": lambda p, key, *a, **k: smc.log_evidence(key, series, p, *a, num_particles=N, **k),
    "ConditionalSMC": lambda p, key, *a, **k: chain(smc.ConditionalSMC(series, N, params=p), key, *a, **k),
}
PARAMETRIC = {
    "ParticleMetropolis": lambda p, key, *a, **k: chain(smc.ParticleMetropolis(parametric, N, params=p), key, *a, **k),
    "ParticleGibbs": lambda p, key, *a, **k: chain(smc.ParticleGibbs(parametric, N, params=p), key, *a, **k),
    "SMC2": lambda p, key, *a, **k: smc.SMC2(parametric, N, N, params=p).run(key, *a, progress_bar=False, **k),
}
STATIC = {
    "importance": lambda p, key, *a, **k: smc.importance(key, linear_model, *a, guide=guide, params=p, **k),
    "log_marginal_likelihood": lambda p, key, *a, **k: smc.log_marginal_likelihood(
        key, linear_model, *a, guide=guide, params=p, **k
    ),
    "AIS": lambda p, key, *a, **k: AIS.run(key, *a, params=p, **k),
    "bidirectional": lambda p, key, *a, **k: smc.bidirectional(key, AIS, *a, params=p, **k),
    "kl_q_p": lambda p, key, *a, **k: smc.kl_q_p(key, linear_model, guide, p, *a, **k),
    "active_units": lambda p, key, *a, **k: smc.active_units(key, linear_model, guide, p, *a, **k),
    "gradient_statistics": lambda p, key, *a, **k: smc.gradient_statistics(
        key, smc.IWELBO(3), linear_model, guide, p, *a, **k
    ),
    "LocalOptimizer": lambda p, key, *a, **k: smc.LocalOptimizer().run(
        key, linear_model, *a, guide=guide, params=p, **k
    ),
    "inference_gap": lambda p, key, *a, **k: smc.inference_gap(key, linear_model, guide, p, *a, **k),
    "SMCSampler": lambda p, key, *a, **k: smc.SMCSampler(linear_model, init_guide=(guide, p or {})).run(
        key, *a, progress_bar=False, **k
    ),
}
ENTRIES = (
    [(name, call, {"noise": 0.5}, "noise") for name, call in SERIES.items()]
    + [(name, call, {"slope": 1.0}, "slope") for name, call in PARAMETRIC.items()]
    + [(name, call, GIVEN, "c") for name, call in STATIC.items()]
)
# The word is left to what is called in their place.
SPEAKER = {
    "ParticleFilter.log_evidence": "ParticleFilter",
    "ParticleFilter.init": "ParticleFilter",
    "OnlineSmoother": "ParticleFilter",
    "log_marginal_likelihood": "importance",
}
each = pytest.mark.parametrize("name, call, given, one", [pytest.param(*row, id=row[0]) for row in ENTRIES])


def refused(kind, name, words, call, *args, **kwargs):
    with pytest.raises(kind) as raised:
        call(*args, **kwargs)
    message = str(raised.value)
    assert message.startswith(f"{SPEAKER.get(name, name)}: ")
    for word in words:
        assert word in message
    return message


# ---- parameters --------------------------------------------------------------------------------------------------


@each
def test_a_misspelled_parameter_is_refused_with_the_name_that_is_meant(name, call, given, one):
    misspelled = {key: value for key, value in given.items() if key != one} | {one + one[-1]: given[one]}
    refused(ValueError, name, [f"'{one + one[-1]}'", f"Did you mean '{one}'?"], call, misspelled, KEY, Y)


@pytest.mark.parametrize("name", STATIC)
def test_a_name_of_neither_program_is_refused(name):
    refused(ValueError, name, ["'temperature'", "no such site"], STATIC[name], GIVEN | {"temperature": 1.0}, KEY, Y)


@pytest.mark.parametrize("name", STATIC)
def test_one_parameter_left_out_of_several_is_refused(name):
    words = ["no value for parameter 'c' of the guide", "svi.get_params"]
    refused(ValueError, name, words, STATIC[name], {"a": 0.5, "b": 0.0}, KEY, Y)


@each
def test_a_value_of_another_shape_is_refused(name, call, given, one):
    refused(ValueError, name, [f"'{one}'", "(3,)", "()"], call, given | {one: jnp.full(3, given[one])}, KEY, Y)


@pytest.mark.parametrize(
    "name, call, given, one", [pytest.param(*row, id=row[0]) for row in ENTRIES if row[3] != "slope"]
)
def test_a_value_outside_of_its_constraint_is_refused(name, call, given, one):
    refused(ValueError, name, [f"'{one}'", "-1.", "Positive"], call, given | {one: -1.0}, KEY, Y)
    if name != "gradient_statistics":  # which shows them
        refused(ValueError, name, [f"'{one}'", "nan", "Positive"], call, given | {one: jnp.nan}, KEY, Y)


@each
def test_values_that_are_no_numbers_are_refused(name, call, given, one):
    refused(TypeError, name, [f"'{one}'", "'high'", "not numeric"], call, given | {one: "high"}, KEY, Y)
    if name != "SMCSampler":  # which takes its parameters with its guide
        refused(TypeError, name, ["dict of values by name", "list"], call, [1.0], KEY, Y)


def test_names_of_the_guide_that_a_model_was_trained_with_are_no_error():
    trained = {"noise": 0.5, "width": 0.3}
    alone = FILTER.run(KEY, Y, params={"noise": 0.5}).log_evidence
    assert FILTER.run(KEY, Y, params=trained).log_evidence == alone


def test_a_given_latent_needs_no_values_of_parameters():
    def sloped(y):
        slope, scale = numpyro.sample("slope", dist.Normal(0.0, 1.0)), numpyro.param("scale", 0.5)

        def step(level, y_t):
            level = numpyro.sample("level", dist.Normal(slope * level, scale))
            numpyro.sample("y", dist.Normal(level, 0.5), obs=y_t)
            return level, None

        scan(step, 0.0, y)

    particles = smc.ParticleFilter(sloped, N)
    assert jnp.isfinite(particles.run(KEY, Y, params={"slope": 0.9}).log_evidence)
    refused(ValueError, "ParticleFilter", ["'slope'", "(2,)"], particles.run, KEY, Y, params={"slope": jnp.ones(2)})
    refused(ValueError, "ParticleFilter", ["'sloppe'", "'slope'"], particles.run, KEY, Y, params={"sloppe": 0.9})


def test_what_a_program_closes_over_may_change_its_parameters():
    extra = False

    def changing(y):
        noise = numpyro.param("noise", 0.5) + (numpyro.param("more", 0.0) if extra else 0.0)

        def step(level, y_t):
            level = numpyro.sample("level", dist.Normal(level, 0.2))
            numpyro.sample("y", dist.Normal(level, noise), obs=y_t)
            return level, None

        scan(step, 0.0, y)

    particles = smc.ParticleFilter(changing, N)
    both = {"noise": 0.5, "moree": 0.1}
    assert jnp.isfinite(particles.run(KEY, Y, params=both).log_evidence)  # a guide's, for all that is known
    extra = True
    smc.ParticleFilter(changing, N + 1).run(KEY, Y, params={"noise": 0.5, "more": 0.1})


# ---- keys --------------------------------------------------------------------------------------------------------


# NumPyro's own MCMC takes the key of a kernel, and maps over several.
KEYED = [row for row in ENTRIES if row[0] not in ("ConditionalSMC", "ParticleMetropolis", "ParticleGibbs")]
NO_KEYS = {"integer": 3, "float": 0.5, "None": None, "several": random.split(KEY, 3), "floats": np.zeros(2)}


@pytest.mark.parametrize("name, call, given, one", [pytest.param(*row, id=row[0]) for row in KEYED])
@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_single_key_is_refused(name, call, given, one, key):
    refused(TypeError, name, ["rng_key", "jax.random.key(0)"], call, given, NO_KEYS[key], Y)


def test_keys_of_two_numbers_are_keys():
    typed, numbers = (FILTER.run(key, Y).log_evidence for key in (random.key(0), random.PRNGKey(0)))
    assert typed == numbers


# ---- arguments ---------------------------------------------------------------------------------------------------


@each
def test_missing_surplus_and_misspelled_arguments_are_named_with_the_program(name, call, given, one):
    program = "series(y=None, T=8)" if name in SERIES else "parametric(y)" if name in PARAMETRIC else "linear_model(x)"
    refused(TypeError, name, [program, "too many positional arguments"], call, given, KEY, Y, 1, 2, 3)
    refused(TypeError, name, [program, "no argument 'lengths'"], call, given, KEY, Y, lengths=3)
    if name not in SERIES:
        refused(TypeError, name, [program, "missing a required argument"], call, given, KEY)


@pytest.mark.parametrize(
    "name, call, given, misspelled, meant",
    [
        ("ParticleFilter", SERIES["ParticleFilter"], {}, "num_particels", "num_particles"),
        ("log_evidence", SERIES["log_evidence"], {}, "num_particels", "num_particles"),
        ("importance", STATIC["importance"], GIVEN, "num_sample", "num_samples"),
        ("log_marginal_likelihood", STATIC["log_marginal_likelihood"], GIVEN, "num_sample", "num_samples"),
        ("AIS", STATIC["AIS"], GIVEN, "num_chain", "num_chains"),
        ("bidirectional", STATIC["bidirectional"], GIVEN, "num_simulate", "num_simulated"),
        ("kl_q_p", STATIC["kl_q_p"], GIVEN, "num_particels", "num_particles"),
        ("active_units", STATIC["active_units"], GIVEN, "tresh0ld", "threshold"),
        ("gradient_statistics", STATIC["gradient_statistics"], GIVEN, "num_sample", "num_samples"),
        ("LocalOptimizer", STATIC["LocalOptimizer"], GIVEN, "check_point", "checkpoint"),
        ("inference_gap", STATIC["inference_gap"], GIVEN, "num_sample", "num_samples"),
        ("SMCSampler", STATIC["SMCSampler"], GIVEN, "checkpoint_evry", "checkpoint_every"),
        ("SMC2", PARAMETRIC["SMC2"], {}, "untill", "until"),
    ],
)
def test_a_misspelled_option_is_no_argument_of_the_program(name, call, given, misspelled, meant):
    words = [f"no argument '{misspelled}'", f"Did you mean '{meant}'?"]
    refused(TypeError, name, words, call, given, KEY, Y, **{misspelled: 3})


def test_a_program_that_is_none_is_refused():
    refused(TypeError, "importance", ["model must be a NumPyro program"], smc.importance, KEY, "model", Y)
    refused(TypeError, "kl_q_p", ["guide must be a NumPyro program"], smc.kl_q_p, KEY, linear_model, "q", GIVEN, Y)
    for make in (smc.ParticleFilter, smc.AIS, smc.SMCSampler, smc.ConditionalSMC, smc.ParticleMetropolis, smc.SMC2):
        refused(TypeError, make.__name__, ["model must be a function"], make, 3)


# ---- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[float(y) for y in Y], pd.Series(np.asarray(Y)), np.asarray(Y)], ids=type)
def test_lists_of_reals_and_series_are_the_arrays_that_they_hold(data):
    assert FILTER.run(KEY, data).log_evidence == FILTER.run(KEY, Y).log_evidence
    assert smc.importance(KEY, flat, data).value == smc.importance(KEY, flat, Y).value


def test_tables_are_arrays_and_a_table_of_words_is_refused():
    def regression(table, y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(table @ slope, 1.0), obs=y)

    table = pd.DataFrame({"a": np.asarray(Y), "b": 1.0})
    assert smc.importance(KEY, regression, table, Y).value == smc.importance(KEY, regression, table.to_numpy(), Y).value
    words = ["DataFrame", "not numeric", "Leave out columns of text"]
    refused(TypeError, "importance", words, smc.importance, KEY, regression, table.assign(b="x"), Y)


def test_kernels_whose_parameters_numpyro_moves_ask_for_arrays():
    words = ["Series", "jax.numpy.asarray"]
    refused(TypeError, "ParticleGibbs", words, PARAMETRIC["ParticleGibbs"], {}, KEY, pd.Series(np.asarray(Y)))


def test_lists_of_whole_numbers_stay_what_they_are():
    def network(widths, y):
        assert widths == [2, 3]
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([sum(widths)]).to_event(1))
        numpyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)

    assert jnp.isfinite(smc.importance(KEY, network, [2, 3], 0.5, num_samples=200).value)


@pytest.mark.parametrize("data", [[1, 2, 3], 0.5])
def test_a_series_has_an_axis_of_time(data):
    with pytest.raises(ValueError, match=r"scan's xs hold .*which has no axis of time.*jax\.numpy\.asarray"):
        FILTER.run(KEY, data)


@pytest.mark.parametrize("name", ["ParticleFilter", "ParticleFilter.log_evidence", "log_evidence", "ConditionalSMC"])
def test_a_series_of_which_nothing_is_observed_has_no_evidence(name):
    words = ["nothing is observed", "'y'", "Pass the data"]
    refused(ValueError, name, words, SERIES[name], {"noise": 0.5}, KEY)


@pytest.mark.parametrize(
    "call",
    [
        lambda: smc.importance(KEY, flat),
        lambda: smc.log_marginal_likelihood(KEY, flat),
        lambda: smc.AIS(flat).run(KEY),
        lambda: smc.SMCSampler(flat).run(KEY, progress_bar=False),
        lambda: smc.kl_q_p(KEY, flat, AutoNormal(flat), {}),
        lambda: smc.bidirectional(KEY, smc.AIS(flat)),
    ],
)
def test_a_model_of_which_nothing_is_observed_has_no_evidence(call):
    with pytest.raises(ValueError, match=r"nothing is observed.*'z', 'x'"):
        call()


def test_a_stream_starts_without_observations():
    assert FILTER.init(KEY, params={"noise": 0.5}).log_evidence == 0.0


# ---- shapes of what is observed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERIES)
def test_a_step_with_one_observation_is_given_one(name):
    words = ["'y'", "(3,)", "()", "expand"]
    speaker = "ParticleFilter" if name == "log_evidence" else name
    refused(ValueError, speaker, words, SERIES[name], {"noise": 0.5}, KEY, jnp.tile(Y[:, None], (1, 3)))


@pytest.mark.parametrize("loss", [smc.FIVO(4), smc.IWELBO(4)])
def test_losses_refuse_observations_that_broadcast_their_site(loss):
    programs = (series, series_guide) if isinstance(loss, smc.FIVO) else (flat, flat_guide)
    data = jnp.tile(Y[:, None], (1, 3)) if isinstance(loss, smc.FIVO) else Y[:, None]
    svi = SVI(*programs, optax.adam(0.1), loss)
    words = ["'y'", "(3,)"] if isinstance(loss, smc.FIVO) else ["'x'", "(8, 1)", "(8, 8)"]
    refused(ValueError, type(loss).__name__, words, lambda: svi.update(svi.init(KEY, data), data))


def flat_guide(x):
    numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 1.0))


@pytest.mark.parametrize(
    "name, call",
    [
        ("importance", lambda data: smc.importance(KEY, flat, data)),
        ("AIS", lambda data: smc.AIS(flat).run(KEY, data)),
        ("SMCSampler", lambda data: smc.SMCSampler(flat).run(KEY, data, progress_bar=False)),
    ],
)
def test_a_column_is_not_taken_for_the_rows_of_a_plate(name, call):
    refused(ValueError, name, ["'x'", "(8, 1)", "(8,)", "(8, 8)", "expand"], call, Y[:, None])
    refused(ValueError, name, ["'x'", "(3, 8)", "(8,)"], call, jnp.tile(Y, (3, 1)))


def test_rows_of_data_with_one_distribution_are_left_alone():
    def one_distribution(x):
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    assert smc.importance(KEY, one_distribution, Y).value == pytest.approx(smc.importance(KEY, flat, Y).value, abs=1e-4)


def test_a_single_row_is_one_observation():
    assert FILTER.run(KEY, Y[:, None]).log_evidence == FILTER.run(KEY, Y).log_evidence


def test_data_given_by_a_handler_count_as_observed():
    def unconditioned():
        return series(T=8)

    given = smc.ParticleFilter(handlers.condition(unconditioned, data={"y": Y}), N)
    assert given.run(KEY).log_evidence == pytest.approx(float(FILTER.run(KEY, Y).log_evidence), abs=1e-5)
