"""Options that make no sense are refused by name, when an object is made or a function is called."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.infer import SVI

import numpyro_smc as smc
from numpyro_smc import resampling, verify
from tests.bad_calls.programs import GIVEN, KEY, Y, guide, linear_model, model, parametric, series

resampler_options = {"ess_threshold": [0.0, 1.5, "half"], "resample": ["sometimes"], "resampler": ["none", 3]}
positive = [0, -1, 2.5, "4"]
fraction = [-0.1, 1.5, "half"]
positive_real = [0.0, -1.0, "big", float("nan")]

MADE = {
    "ParticleFilter": (
        lambda **options: smc.ParticleFilter(series, **{"num_particles": 10} | options),
        {"num_particles": positive, "batch_size": [0, 3, "2"]} | resampler_options,
    ),
    "FIVO": (smc.FIVO, {"num_particles": positive, "resampling_gradient": ["scores"]} | resampler_options),
    "SIXO": (
        smc.SIXO,
        {"num_particles": positive, "twist_batch_size": positive, "twist_training": ["dr"], "twist_prefix": [3]}
        | resampler_options,
    ),
    "IWELBO": (
        lambda **options: smc.IWELBO(**{"num_particles": 3} | options),
        {
            "num_particles": positive,
            "alpha": [*fraction, 1.0],
            "num_mc": positive,
            "kl_weight": [-1.0, "x"],
            "free_bits": [-1.0, "x"],
            "plates": ["data", 3],
            "batch_size": positive,
        },
    ),
    "VIMCO": (
        lambda **options: smc.VIMCO(**{"num_particles": 3} | options),
        {"num_particles": [*positive, 1], "mean": ["median"], "clip_log_odds": positive_real},
    ),
    "OVIS": (
        lambda **options: smc.OVIS(**{"num_particles": 3} | options),
        {"gamma": [-1.0, "x"], "num_auxiliary": [-1, 1.5], "clip_log_odds": positive_real, "renyi": ["x"]},
    ),
    "STL": (lambda **options: smc.STL(**{"num_particles": 3} | options), {"num_particles": positive}),
    "DReG": (lambda **options: smc.DReG(**{"num_particles": 3} | options), {"tradeoff": fraction}),
    "Reinforce": (
        lambda **options: smc.Reinforce(**{"num_particles": 3} | options),
        {"num_particles": positive, "baseline": [3, *map(smc.DecayingAverage, [1.0, -0.1, "x"])]},
    ),
    "RWS": (
        lambda **options: smc.RWS(**{"num_particles": 3} | options),
        {"wake_theta": [-1.0, "x"], "num_sleep": positive, "simulate": [3]},
    ),
    "TVO": (
        lambda **options: smc.TVO(**{"num_particles": 3} | options),
        {"partitions": positive, "beta_min": [0.0, 1.0, "x"], "spacing": ["sqrt"], "rule": ["middle"]},
    ),
    "DSMCS": (
        lambda **options: smc.DSMCS(**{"num_particles": 3, "num_transitions": 2} | options),
        {
            "num_particles": positive,
            "num_transitions": [-1, 1.5, "2"],
            "kernel": ["nuts"],
            "learn": [("speed",), "betas"],
            "step_size": positive_real,
            "step_size_max": positive_real,
            "mass": positive_real,
            "refreshment": [0.0, 1.0, "x"],
            "num_mc": positive,
            "remat": ["all"],
        }
        | resampler_options,
    ),
    "DAIS": (
        lambda **options: smc.DAIS(**{"num_particles": 3, "num_transitions": 2} | options),
        {"num_particles": positive, "step_size": positive_real},
    ),
    "AIS": (
        lambda **options: smc.AIS(model, **options),
        {
            "num_chains": positive,
            "num_temperatures": [*positive, 1],
            "num_leapfrog": positive,
            "num_pilot_chains": [*positive, 1],
            "schedule": ["cubic", [0.5, 0.2], 3],
            "target_acceptance": [0.0, 1.0, "high"],
            "batch_size": positive,
            "chain_batch_size": [*positive, 5],
            "plates": ["data", 3],
        },
    ),
    "SMCSampler": (
        lambda **options: smc.SMCSampler(model, **options),
        {
            "num_particles": [*positive, 1],
            "moves": ["gibbs"],
            "num_moves": positive,
            "moves_kwargs": [{"num_step": 3}, 3],
            "tempering": ["linear", [0.5, 0.2, 1.0], "x"],
            "target_ess": [0.0, 1.0, "half"],
            "ess_threshold": [-0.1, 1.5, "half"],
            "waste_free": [*positive, 1, 7],
            "tune": ["step_size", ("mass",), 3],
            "step_size": positive_real,
            "init_guide": [guide],
            "resampler": ["none"],
            "batch_size": positive,
            "max_stages": positive,
        },
    ),
    "SMC2": (
        lambda **options: smc.SMC2(parametric, **options),
        {
            "num_parameter_particles": [*positive, 1],
            "num_state_particles": positive,
            "parameter_ess_threshold": [0.0, 1.5, "half"],
            "num_moves": positive,
            "proposal": ["langevin"],
            "min_acceptance": [-0.1, 1.0, "x"],
            "max_state_particles": [0, 2, "x"],
            "batch_size": positive,
        }
        | resampler_options,
    ),
    "ParticleMetropolis": (
        lambda **options: smc.ParticleMetropolis(parametric, **options),
        {
            "num_particles": positive,
            "step_size": positive_real,
            "target_accept_prob": [0.0, 1.0, "x"],
            "correlation": [-0.1, 1.0, "x"],
            "sort": ["peano"],
            "screen": [3],
        }
        | resampler_options,
    ),
    "ParticleGibbs": (
        lambda **options: smc.ParticleGibbs(parametric, **options),
        {"num_particles": [*positive, 1], "resampler": ["none"], "parameter_kernel": [3]},
    ),
    "ConditionalSMC": (
        lambda **options: smc.ConditionalSMC(series, **options),
        {"num_particles": [*positive, 1]} | resampler_options,
    ),
    "LocalOptimizer": (
        smc.LocalOptimizer,
        {
            "family": ["gaussian", 3],
            "init": ["ones", -1],
            "learning_rate": [*positive_real, []],
            "num_mc": positive,
            "check_every": positive,
            "patience": positive,
            "max_steps": positive,
            "num_eval": positive,
            "batch_size": positive,
        },
    ),
    "AutoDSMCS": (
        lambda **options: smc.AutoDSMCS(model, **options),
        {"num_transitions": [-1, "x"], "num_particles": positive, "step_size": positive_real, "base": [3]},
    ),
    "AuxiliaryFlowGuide": (
        lambda **options: smc.AuxiliaryFlowGuide(**{"encoder": lambda x: [x], "aux_dim": 2} | options),
        {"aux_dim": positive, "num_transforms": positive, "hidden": positive, "encoder": [3]},
    ),
    "FlowGuide": (
        lambda **options: smc.FlowGuide(**{"encoder": lambda x: [x]} | options),
        {"num_transforms": positive, "hidden": positive, "family": ["spline"], "encoder": [3]},
    ),
    "OnlineSmoother": (
        lambda **options: smc.OnlineSmoother(
            **{"particle_filter": smc.ParticleFilter(series, 10), "functional": lambda t, x, values: 0.0} | options
        ),
        {
            "num_backward_draws": [0, 1.5],
            "backward": ["paris"],
            "functional": [3],
            "particle_filter": [series],
            "num_mcmc_steps": positive,
            "max_trials": positive,
            "batch_size": positive,
        },
    ),
    "StepwiseOptim": (smc.StepwiseOptim, {"optim": [3]}),
    "log_schedule": (
        lambda **options: smc.log_schedule(**{"start": 0.9, "stop": 0.0, "num_steps": 10} | options),
        {"start": [1.0, "x"], "stop": [1.0, "x"], "num_steps": positive, "offset": ["x"]},
    ),
    "burda_schedule": (
        lambda **options: smc.burda_schedule(**{"base": 1e-3, "steps_per_epoch": 10} | options),
        {"base": positive_real, "steps_per_epoch": positive, "num_stages": positive},
    ),
    "alternating": (
        lambda **options: smc.alternating(**{"optim": optax.adam(0.1), "twist_optim": optax.adam(0.1)} | options),
        {"num_steps": positive, "num_twist_steps": positive, "twist_prefix": ["", 3], "optim": [3]},
    ),
    "gauss_hermite": (
        lambda **options: smc.gauss_hermite(**{"log_likelihood": jnp.sin, "loc": 0.0, "scale": 1.0} | options),
        {"degree": positive, "scale": [-1.0], "log_likelihood": [3]},
    ),
    "c2st": (
        lambda **options: smc.c2st(
            **{"reference": np.eye(8)[:, :2], "samples": np.eye(8)[:, :2], "num_folds": 2} | options
        ),
        {"num_folds": [*positive, 1, 20], "max_iterations": positive, "reference": ["x", np.zeros((8, 2, 1))]},
    ),
    "soft": (resampling.soft, {"alpha": [0.0, 1.5, "x"]}),
    "optimal_transport": (resampling.optimal_transport, {"epsilon": positive_real, "num_iterations": positive}),
    "gumbel_softmax": (resampling.gumbel_softmax, {"temperature": positive_real}),
    "gapped_straight_through": (resampling.gapped_straight_through, {"temperature": positive_real, "gap": [-1.0, "x"]}),
    "diffusion": (
        resampling.diffusion,
        {
            "time": positive_real,
            "num_steps": positive,
            "integrator": ["euler2"],
            "dynamics": ["sde2"],
            "rate": positive_real,
            "jitter": [-1.0, "x"],
        },
    ),
    "register": (resampling.register, {"scheme": [3, "mine"]}),
    "bootstrap": (smc.bootstrap, {"model": [3, None]}),
    "extend_guide": (smc.extend_guide, {"guide": [3, guide]}),
    "extend_model": (lambda **options: smc.extend_model(model, **options), {"guide": [3, guide]}),
    "bernoulli": (resampling.bernoulli, {"inner": ["none"]}),
}

_SVI = SVI(linear_model, guide, optax.adam(0.01), smc.IWELBO(3))
_GAP = {"families": ("ffg",), "evidence": "iwae"}

CALLED = {
    "log_evidence": (
        lambda **options: smc.log_evidence(KEY, series, {}, Y, **{"num_particles": 10} | options),
        {"num_particles": positive, "batch_size": [0, 3]} | resampler_options,
    ),
    "importance": (
        lambda **options: smc.importance(KEY, model, Y, **options),
        {"num_samples": positive, "batch_size": positive, "plates": ["data", 3]},
    ),
    "log_marginal_likelihood": (
        lambda method="importance", **options: smc.log_marginal_likelihood(
            KEY, model, Y, method=method, options=options
        ),
        {"method": ["exact"], "num_samples": positive},
    ),
    "bidirectional": (
        lambda **options: smc.bidirectional(**{"rng_key": KEY, "ais": smc.AIS(model)} | options),
        {"num_simulated": positive, "ais": [model, 3], "simulate": [3]},
    ),
    "kl_q_p": (
        lambda **options: smc.kl_q_p(KEY, linear_model, guide, GIVEN, Y, **options),
        {"num_particles": positive, "batch_size": positive},
    ),
    "active_units": (
        lambda **options: smc.active_units(KEY, linear_model, guide, GIVEN, Y, **options),
        {"num_samples": positive, "batch_size": positive, "threshold": [-1.0, "x"]},
    ),
    "gradient_statistics": (
        lambda **options: smc.gradient_statistics(
            **{"rng_key": KEY, "loss": smc.IWELBO(3), "model": linear_model, "guide": guide, "params": GIVEN}
            | {"x": Y}
            | options
        ),
        {"num_samples": [*positive, 1], "batch_size": positive, "min_variance": [-1.0, "x"], "names": [("q",), "q"]}
        | {"loss": ["IWELBO", smc.IWELBO], "oracle": [{"q": 1.0}]},
    ),
    "inference_gap": (
        lambda **options: smc.inference_gap(KEY, linear_model, guide, GIVEN, Y, **_GAP | options),
        {"num_samples": positive, "batch_size": positive, "draws_at_once": positive, "evidence": ["exact"]}
        | {"families": [(), ("gaussian",)], "num_simulated": [-1, 1.5]},
    ),
    "fit": (
        lambda **options: smc.fit(**{"svi": _SVI, "rng_key": KEY, "num_steps": 4, "x": Y} | options),
        {"num_steps": positive, "chunk_size": positive, "svi": ["svi"], "rng_key": [3, None]}
        | {"init_params": [{"aa": 0.3}, {"c": -1.0}], "evaluate": [3], "log": [3]},
    ),
    "check_gradient": (
        lambda **options: verify.check_gradient(**{"rng_key": KEY, "value": lambda key, p: p, "params": 1.0} | options),
        {"num_replicates": [*positive, 2], "step_size": [0.0, -1.0, "x"], "level": [0.0, 1.0, "x"]}
        | {"rng_key": [3], "value": [3], "batch_size": positive},
    ),
    "check_unbiased_evidence": (
        lambda **options: verify.check_unbiased_evidence(
            **{"rng_key": KEY, "estimator": lambda key: 0.0, "exact": 0.0} | options
        ),
        {"num_replicates": [*positive, 2], "num_standard_errors": positive_real, "rng_key": [3]}
        | {"estimator": [3], "exact": [None, float("nan"), "x"], "batch_size": positive},
    ),
    "geweke": (
        lambda **options: verify.geweke(
            **{"rng_key": KEY, "kernel": smc.ParticleMetropolis, "model": parametric, "y": Y} | options
        ),
        {"num_replicates": positive, "num_steps": positive, "num_fresh": positive, "level": [-0.1, 1.0, "x"]}
        | {"observed": ["z"], "rng_key": [3], "batch_size": positive},
    ),
    "sbc": (
        lambda **options: verify.sbc(
            **{"rng_key": KEY, "kernel": smc.ParticleMetropolis, "model": parametric, "y": Y} | options
        ),
        {"num_simulations": positive, "num_draws": positive, "num_warmup": [-1, "x"], "thinning": positive}
        | {"level": [-0.1, 1.0, "x"], "observed": ["z"], "rng_key": [3], "batch_size": positive},
    ),
}


# What passes an option on leaves the word to what it is an option of.
SPEAKERS = {("log_marginal_likelihood", "num_samples"): "importance"}


def _shown(value):
    """A value in the name of a test: the same in every process, unlike the address of a function."""
    return getattr(value, "__name__", repr(value))


def rows(table):
    for name, (call, options) in table.items():
        for option, values in options.items():
            for value in values:
                yield pytest.param(name, call, option, value, id=f"{name}-{option}-{_shown(value)}"[:80])


@pytest.mark.parametrize("name, call, option, value", [*rows(MADE), *rows(CALLED)])
def test_an_option_that_makes_no_sense_is_refused_by_name(name, call, option, value):
    with pytest.raises((ValueError, TypeError)) as raised:
        call(**{option: value})
    message = str(raised.value)
    assert option in message
    assert message.startswith(SPEAKERS.get((name, option), name))
