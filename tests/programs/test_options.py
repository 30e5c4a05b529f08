"""An argument of the model that has the name of an option arrives, or the call is refused and says how to bind it."""

import inspect
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO

import numpyro_smc as smc
from numpyro_smc.programs.options import takes

KEY, Y = random.key(0), jnp.array([0.3, 0.8, 0.6])


def program_with(name):
    """A program ``(y, *, name)``."""

    def program(y, **kwargs):
        raise AssertionError("the call is refused before the program runs")

    parameters = [
        inspect.Parameter("y", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None),
    ]
    program.__signature__ = inspect.Signature(parameters)
    return program


class Call(NamedTuple):
    function: object
    make: object  # of the program: a function that calls with keywords


def of_filter(method):
    return Call(
        getattr(smc.ParticleFilter, method), lambda m: partial(getattr(smc.ParticleFilter(m, 2), method), KEY, Y)
    )


def of_guide(method):
    def make(model):
        return partial(getattr(smc.AutoDSMCS(model, num_transitions=2), method), KEY, {}, Y)

    return Call(getattr(smc.AutoDSMCS, method), make)


def svi(model):
    return SVI(model, model, optax.sgd(0.1), Trace_ELBO())


CALLS = {
    "importance": Call(smc.importance, lambda m: partial(smc.importance, KEY, m, Y)),
    "log_marginal_likelihood": Call(
        smc.log_marginal_likelihood, lambda m: partial(smc.log_marginal_likelihood, KEY, m, Y)
    ),
    "log_evidence": Call(smc.log_evidence, lambda m: partial(smc.log_evidence, KEY, m, {}, Y)),
    "AIS.run": Call(smc.AIS.run, lambda m: partial(smc.AIS(m).run, KEY, Y)),
    "bidirectional": Call(smc.bidirectional, lambda m: partial(smc.bidirectional, KEY, smc.AIS(m), Y)),
    "ParticleFilter.run": of_filter("run"),
    "ParticleFilter.log_evidence": of_filter("log_evidence"),
    "ParticleFilter.init": of_filter("init"),
    "OnlineSmoother.init": Call(
        smc.OnlineSmoother.init,
        lambda m: partial(smc.OnlineSmoother(smc.ParticleFilter(m, 2), lambda t, x, v: x).init, KEY, Y),
    ),
    "SMCSampler.run": Call(smc.SMCSampler.run, lambda m: partial(smc.SMCSampler(m, 4).run, KEY, Y)),
    "SMCSampler.run_many": Call(smc.SMCSampler.run_many, lambda m: partial(smc.SMCSampler(m, 4).run_many, KEY, Y)),
    "SMC2.run": Call(smc.SMC2.run, lambda m: partial(smc.SMC2(m, 4, 4).run, KEY, Y)),
    "SMC2.resume": Call(smc.SMC2.resume, lambda m: partial(smc.SMC2(m, 4, 4).resume, "file", Y)),
    "ParticleMetropolis.tune": Call(
        smc.ParticleMetropolis.tune, lambda m: partial(smc.ParticleMetropolis(m, 4).tune, KEY, Y)
    ),
    "LocalOptimizer.run": Call(smc.LocalOptimizer.run, lambda m: partial(smc.LocalOptimizer().run, KEY, m, Y)),
    "inference_gap": Call(smc.inference_gap, lambda m: partial(smc.inference_gap, KEY, m, m, {}, Y)),
    "DSMCS.diagnostics": Call(smc.DSMCS.diagnostics, lambda m: partial(smc.DSMCS(2, 2).diagnostics, KEY, {}, m, m, Y)),
    "DSMCS.sample_posterior": Call(
        smc.DSMCS.sample_posterior, lambda m: partial(smc.DSMCS(2, 2).sample_posterior, KEY, {}, m, m, Y)
    ),
    "AutoDSMCS.log_evidence": of_guide("log_evidence"),
    "AutoDSMCS.diagnostics": of_guide("diagnostics"),
    "fit": Call(smc.fit, lambda m: partial(smc.fit, svi(m), KEY, 2, Y)),
    "gradient_statistics": Call(
        smc.gradient_statistics, lambda m: partial(smc.gradient_statistics, KEY, smc.IWELBO(2), m, m, {}, Y)
    ),
    "kl_q_p": Call(smc.kl_q_p, lambda m: partial(smc.kl_q_p, KEY, m, m, {}, Y)),
    "active_units": Call(smc.active_units, lambda m: partial(smc.active_units, KEY, m, m, {}, Y)),
    "geweke": Call(smc.verify.geweke, lambda m: partial(smc.verify.geweke, KEY, object(), m, Y)),
    "sbc": Call(smc.verify.sbc, lambda m: partial(smc.verify.sbc, KEY, object(), m, Y)),
    "check_unbiased_evidence": Call(
        smc.verify.check_unbiased_evidence, lambda m: partial(smc.verify.check_unbiased_evidence, KEY, m, Y)
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_keyword_that_is_an_option_and_an_argument_of_the_program_is_refused_by_name(call):
    function, make = CALLS[call]
    options = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert options
    for name in options:
        with pytest.raises(TypeError) as error:
            make(program_with(name))(**{name: 3})
        assert str(error.value) == (
            f"{function.__qualname__}: '{name}' is an argument of program and an option here, which it would be taken "
            f"for. Bind the program's with functools.partial(program, {name}=...), or pass it by position."
        )


def test_every_public_function_with_options_and_a_programs_keywords_is_in_the_table():
    """Losses take NumPyro's arguments by position, and a second value for one of these is Python's own error."""
    found = set()
    for name in (*smc.__all__, *(f"verify.{name}" for name in smc.verify.__all__)):
        owner = smc.verify if name.startswith("verify.") else smc
        thing = getattr(owner, name.removeprefix("verify."))
        members = vars(thing).items() if inspect.isclass(thing) else [("", thing)]
        for member, function in members:
            if inspect.isfunction(function) and not member.startswith("_"):
                kinds = [p.kind for p in inspect.signature(function).parameters.values()]
                if set(kinds) >= {
                    inspect.Parameter.VAR_KEYWORD,
                    inspect.Parameter.VAR_POSITIONAL,
                    inspect.Parameter.KEYWORD_ONLY,
                }:
                    found.add(function.__qualname__)
    same = {"ParticleFilter.load", "AutoDSMCS.median", "AutoDSMCS.quantiles", "AutoDSMCS.sample_posterior"}
    assert found - same == {call.function.__qualname__ for call in CALLS.values()} - same


def rows(num_samples, guide=0.0):
    """Independent rows, as many as ``num_samples`` says: an argument with the name of an option."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0).expand([num_samples]).to_event(1), obs=jnp.full(num_samples, 0.7 + guide))


def log_evidence_of_rows(num, value):
    covariance = jnp.eye(num) + jnp.ones((num, num))
    return float(dist.MultivariateNormal(jnp.zeros(num), covariance).log_prob(jnp.full(num, value)))


@pytest.mark.parametrize("num", [2, 5])
def test_arguments_with_the_names_of_options_arrive(num):
    exact, options = log_evidence_of_rows(num, 0.7), {"num_samples": 4000}
    by_option = smc.log_marginal_likelihood(KEY, rows, num_samples=num, options=options)
    bound = smc.importance(KEY, partial(rows, num_samples=num), **options)
    by_position = smc.importance(KEY, rows, num, **options)
    for found in (by_option, bound, by_position):
        assert found.num_samples == 4000 and abs(found.value - exact) < 5 * found.standard_error


def test_a_bound_argument_with_the_name_of_a_filters_option_arrives():
    def model(y, params):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(params * x, 1e-3))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 1.0, y)

    found = [
        smc.ParticleFilter(partial(model, params=slope), 50).run(KEY, Y, params={}).log_evidence for slope in (0.0, 1.0)
    ]
    exact = [dist.Normal(mean, 1.0).log_prob(Y).sum() for mean in (0.0, 1.0)]
    assert jnp.allclose(jnp.array(found), jnp.array(exact), atol=0.01)


def test_an_option_given_as_an_argument_of_the_model_is_refused_with_the_way_to_pass_it():
    with pytest.raises(
        TypeError, match=r"'num_chains' is an option of method='ais' and no argument of the model. Pass"
    ):
        smc.log_marginal_likelihood(KEY, rows, 2, method="ais", num_chains=4)
    with pytest.raises(TypeError, match="method='smc' has no option 'num_chains'"):
        smc.log_marginal_likelihood(KEY, rows, 2, method="smc", options={"num_chains": 4})


def test_what_a_program_takes_is_read_through_handlers_and_partial():
    wrapped = handlers.condition(partial(handlers.seed(rows, 0), 3), data={})
    assert takes(wrapped, "guide") and not takes(wrapped, "params")
    assert takes(lambda **kwargs: None, "anything")
