"""No two random numbers come from one key, in any public entry; and the smoothers' bits are not the filter's."""

from functools import cache
from tempfile import TemporaryDirectory
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer import HMC, SVI

import numpyro_smc as smc
from numpyro_smc.programs.streams import reported_draws
from numpyro_smc.ratio import diagnostics
from numpyro_smc.ratio.networks import mlp
from numpyro_smc.verify import calibration, unbiased_evidence
from tests.recorded_keys import repeats, uses_of_keys
from tests.verify import conjugate_kernels

Y = jnp.array([0.3, 0.8, 0.6])
KEY = random.key(20)


OTHER = random.key(21)


def series(y):
    """Latents of all kinds: given to the filter, a particle's own before the scan, continuous and discrete."""
    slope = numpyro.sample("slope", dist.Normal(0.5, 0.2))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(slope * x, 0.5))
        jump = numpyro.sample("jump", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(x + jump, 0.3 + scale), obs=y_t)
        return x, None

    scan(step, x_0, y)


def path(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def proposal(y):
    gain = numpyro.param("gain", 0.5)
    curve = numpyro.param("curve", 0.1)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x + gain * (y_t - 0.9 * x), 0.4))
        smc.twist("r", -curve * x**2)
        return x, None

    scan(step, 0.0, y)


def data(y):
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def encoder(y):
    gain = numpyro.param("gain", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("z", dist.Normal(gain * y, 0.6))


def coins(y):
    with numpyro.plate("data", len(y)):
        k = numpyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "none"})
        numpyro.sample("y", dist.Normal(1.0 * k, 0.5), obs=y)


def coins_encoder(y):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", len(y)):
        numpyro.sample("k", dist.Bernoulli(logits=slope * y))


def regression(y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)


def simulator():
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    shift = numpyro.sample("shift", dist.Uniform(-1.0, 1.0))
    noise = numpyro.sample("noise", dist.Normal(0.0, 0.5))
    numpyro.deterministic("x", jnp.stack([mean + noise, mean - shift]))


def filtered(**options):
    return smc.ParticleFilter(path, 4, resample="always", **options).run(KEY, Y)


def of_series(**options):
    return smc.ParticleFilter(series, 4, resample="always", **options).run(KEY, Y, params={"scale": 0.5, "slope": 0.5})


def streamed():
    particle_filter = smc.ParticleFilter(series, 4, resample="always")
    state = particle_filter.init(KEY, Y[:1], params={"scale": 0.5, "slope": 0.5})
    for y_t in Y:
        state = particle_filter.update(state, y_t)


def smoothed_online(backward):
    smoother = smc.OnlineSmoother(
        smc.ParticleFilter(path, 4, resample="always"), lambda t, x, v: v["x"] * x, backward=backward
    )
    state = smoother.init(KEY, Y[:1])
    for y_t in Y:
        state = smoother.update(state, y_t)


def differentiated(loss, model, guide, **params):
    params = {name: jnp.asarray(value) for name, value in params.items()}
    jax.grad(lambda p: loss.loss(KEY, p, model, guide, Y))(params)


def trained(loss):
    svi = SVI(data, loss.wrap(encoder), optax.sgd(0.1), loss)
    params = svi.get_params(svi.update(svi.init(KEY, Y), Y)[0])
    loss.sample_posterior(OTHER, params, data, encoder, Y, num_samples=1)


def mcmc(kernel, *args):
    state = kernel.init(KEY, 2, None, args, {})
    for _ in range(2):
        state = kernel.sample(state, args, {})
    kernel.postprocess_fn(args, {})({n: v for n, v in getattr(state, kernel.sample_field).items()})


def ensemble():
    kernel = smc.SMCKernel(regression, moves="rwmh", num_moves=1)
    state = kernel.init(random.split(KEY, 4), 0, None, (Y,), {})
    kernel.sample(state, (Y,), {})


def sampled(model=regression, **options):
    options = {"moves": "rwmh", "num_moves": 1, "max_stages": 20} | options
    smc.SMCSampler(model, 8, **options).run(KEY, Y, progress_bar=False).get_samples(5)


FILTERS = {
    "run": of_series,
    "run with a guide": lambda: filtered(guide=proposal),
    "run in batches": lambda: filtered(batch_size=2),
    **{
        f"smooth by {method}": lambda method=method: filtered().smooth("x", method, num_repeats=2)
        for method in ("paris", "ffbsm", "backward", "backward_mcmc", "backward_rejection", "fixed_lag", "genealogy")
    },
    "smooth by twist": lambda: filtered(guide=proposal).smooth("x", "twist", num_repeats=2),
    "paris by rejection": lambda: filtered().smooth("x", "paris", num_repeats=1, backward="rejection"),
    "paris by exact draws": lambda: filtered().smooth("x", "paris", num_repeats=1, backward="exact"),
    "score": lambda: of_series().score("slope", num_repeats=2),
    **{
        f"sample_posterior by {method}": lambda method=method: filtered().sample_posterior(OTHER, 3, method)
        for method in ("genealogy", "backward", "backward_mcmc", "backward_rejection")
    },
    "forecast": lambda: of_series().forecast(OTHER, 2, 3),
    "to_arviz": lambda: filtered().to_arviz(num_samples=3),
    "stream": streamed,
    "log_evidence": lambda: smc.log_evidence(KEY, path, {}, Y, num_particles=4, resample="always"),
    **{f"OnlineSmoother by {how}": lambda how=how: smoothed_online(how) for how in ("mcmc", "exact", "rejection")},
    **{
        f"resampling by {scheme}": lambda scheme=scheme: filtered(resampler=scheme)
        for scheme in ("multinomial", "stratified", "residual", "ssp", "killing")
    },
}

BOUNDS = {
    **{
        f"FIVO {how}": lambda how=how: differentiated(
            smc.FIVO(4, resample="always", resampling_gradient=how), path, proposal, gain=0.4, curve=0.1
        )
        for how in ("none", "score", "score_rb", "stop_gradient")
    },
    "SIXO": lambda: differentiated(smc.SIXO(4, resample="always"), path, proposal, gain=0.4, curve=0.1),
    "SIXO by density ratios": lambda: differentiated(
        smc.SIXO(4, twist_training="dre", twist_prefix="curve", twist_batch_size=3), path, proposal, gain=0.4, curve=0.1
    ),
    **{
        type(loss).__name__: lambda loss=loss: differentiated(loss, data, encoder, gain=0.4)
        for loss in (smc.IWELBO(3), smc.STL(3), smc.DReG(3))
    },
    **{
        type(loss).__name__: lambda loss=loss: differentiated(loss, coins, coins_encoder, slope=0.4)
        for loss in (smc.Reinforce(3), smc.VIMCO(3), smc.OVIS(3), smc.RWS(3), smc.TVO(3))
    },
    "DSMCS": lambda: trained(smc.DSMCS(2, 1, num_mc=1, remat=None)),
    "DAIS": lambda: trained(smc.DAIS(2, 1, remat=None)),
    "fit": lambda: smc.fit(
        SVI(data, encoder, optax.sgd(0.1), loss=smc.IWELBO(3)),
        KEY,
        2,
        Y,
        evaluate=lambda params, key: {"bound": smc.IWELBO(3).loss(key, params, data, encoder, Y)},
        evaluate_every=1,
        progress_bar=False,
    ),
    "gradient_statistics": lambda: smc.gradient_statistics(
        KEY, smc.VIMCO(3), coins, coins_encoder, {"slope": 0.4}, Y, num_samples=3
    ),
    "kl_q_p": lambda: smc.kl_q_p(KEY, data, encoder, {"gain": 0.4}, Y, num_particles=100),
    "active_units": lambda: smc.active_units(KEY, data, encoder, {"gain": 0.4}, Y, num_samples=4),
}

EVIDENCES = {
    "importance": lambda: smc.importance(KEY, data, Y, guide=encoder, params={"gain": 0.5}, num_samples=4),
    "AIS": lambda: smc.AIS(data, encoder, num_chains=2, num_temperatures=4, num_leapfrog=2).run(
        KEY, Y, params={"gain": 0.5}
    ),
    "bidirectional": lambda: smc.bidirectional(
        KEY, smc.AIS(data, num_chains=2, num_temperatures=4, num_leapfrog=2), Y, num_simulated=2
    ),
    **{
        f"log_marginal_likelihood by {method}": lambda method=method, options=options: smc.log_marginal_likelihood(
            KEY, regression, Y, method=method, options=options
        )
        for method, options in {
            "smc": {"num_particles": 8, "moves": "rwmh", "num_moves": 1},
            "importance": {"num_samples": 4},
            "ais": {"num_chains": 2, "num_temperatures": 4},
        }.items()
    },
    "SMCSampler": sampled,
    "SMCSampler by Hamiltonian moves": lambda: sampled(moves="hmc"),
    "SMCSampler from a schedule": lambda: sampled(tempering=jnp.array([0.1, 1.0])),
    "SMCSampler over data": lambda: sampled(tempering="data", data_plate="data"),
    "SMCSampler persistent": lambda: sampled(persistent=True),
    "SMCSampler waste-free": lambda: sampled(waste_free=2, num_moves=None),
    "SMCSampler of many": lambda: smc.SMCSampler(regression, 8, moves="rwmh", num_moves=1).run_many(
        KEY, jnp.stack([Y, Y + 1.0])
    ),
    "LocalOptimizer": lambda: smc.LocalOptimizer(
        init=("zeros", 2), num_mc=2, check_every=1, patience=1, max_steps=2, num_eval=4
    ).run(KEY, data, Y),
    "inference_gap": lambda: smc.inference_gap(
        KEY,
        data,
        encoder,
        {"gain": 0.5},
        Y,
        families=[smc.LocalOptimizer(num_mc=2, check_every=1, patience=1, max_steps=2, num_eval=4)],
        evidence_options={"num_chains": 2, "num_temperatures": 4},
        num_samples=4,
        batch_size=2,
        num_simulated=1,
    ),
}


def nre(**options):
    return smc.NRE(simulator, ["mean", "shift"], trunk=mlp(4, 1), num_classes=3, **options)


TRAINING = {"batch_size": 4, "max_epochs": 2, "progress_bar": False, "validation": 0.5}


@cache
def estimator():
    return nre(masks=smc.UniformMask()).train(KEY, 24, **TRAINING)


def stored():
    with TemporaryDirectory() as folder:
        data = nre().simulate_to(folder, KEY, 24, part_size=12, progress_bar=False)
        nre().train(OTHER, data=data, **TRAINING)


MOVES = {"moves": "rwmh", "num_moves": 1, "batch_size": 2}
X = jnp.array([0.4, 0.9])

RATIOS = {
    **{f"NRE {loss}": lambda loss=loss: nre(loss=loss).train(KEY, 24, **TRAINING) for loss in "ABC"},
    "NRE with masks": lambda: nre(masks=smc.PoissonMask()).train(KEY, 24, **TRAINING),
    "NRE in rounds": lambda: nre().train_rounds(KEY, X, 2, 24, **TRAINING),
    "NRE of stored data": stored,
    "sample": lambda: estimator().sample(OTHER, X, num_particles=8, moves="rwmh", num_moves=1),
    "sample_many": lambda: estimator().sample_many(
        OTHER, jnp.stack([X, -X]), num_particles=8, moves="rwmh", num_moves=1
    ),
    "sir": lambda: estimator().marginal(X, "mean").sir(OTHER, 4, 8),
    "sbc": lambda: diagnostics.sbc(estimator(), OTHER, 3, 4, **MOVES),
    "coverage": lambda: diagnostics.coverage(estimator(), OTHER, 3, 4, **MOVES),
    "marginal_coverage": lambda: diagnostics.marginal_coverage(estimator(), OTHER, 3, num=5),
    "tarp": lambda: diagnostics.tarp(estimator(), OTHER, 3, 4, **MOVES),
    "local_c2st": lambda: diagnostics.local_c2st(estimator(), OTHER, X, 8, 8, 3, **MOVES),
    "roc": lambda: diagnostics.roc(estimator(), OTHER, 8),
    "mean_ratio": lambda: diagnostics.mean_ratio(estimator(), OTHER, jnp.stack([X]), 8),
}


def by_loop(function, rng_key, number, *, batch_size=None):
    """Replicates without ahead-of-time compilation, which there is none of without ``jit``."""
    found = [function(key) for key in random.split(rng_key, number)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def checked(module, check, *args, **kwargs):
    with mock.patch.object(module, "replicates", by_loop):
        getattr(module, check)(KEY, *args, **kwargs)


#: ``check_gradient`` is not among them: it takes differences at common keys on purpose.
CHECKS = {
    "check_unbiased_evidence": lambda: checked(
        unbiased_evidence,
        "check_unbiased_evidence",
        lambda key: smc.IWELBO(2).loss(key, {"gain": 0.4}, data, encoder, Y),
        reference=lambda key: smc.IWELBO(4).loss(key, {"gain": 0.4}, data, encoder, Y),
        num_replicates=25,
    ),
    "geweke": lambda: smc.verify.geweke(
        KEY,
        conjugate_kernels.Autoregressive,
        conjugate_kernels.model,
        observed="y",
        num_replicates=30,
        num_steps=2,
        num_fresh=5,
    ),
    "verify.sbc": lambda: checked(
        calibration,
        "sbc",
        lambda key, values: {"z": values["y"] + random.normal(key, (4, 2))},
        conjugate_kernels.model,
        observed="y",
        num_simulations=8,
    ),
}

KERNELS = {
    "SMCKernel": ensemble,
    "ConditionalSMC": lambda: mcmc(smc.ConditionalSMC(path, 4), Y),
    "ConditionalSMC backward": lambda: mcmc(smc.ConditionalSMC(path, 4, backward_sampling=True), Y),
    "ConditionalSMC ancestors": lambda: mcmc(smc.ConditionalSMC(path, 4, ancestor_sampling=True), Y),
    "ParticleGibbs": lambda: mcmc(smc.ParticleGibbs(series, 4, parameter_kernel=HMC), Y),
    "ParticleMetropolis": lambda: mcmc(smc.ParticleMetropolis(series, 4), Y),
    "ParticleMetropolis with paths": lambda: mcmc(smc.ParticleMetropolis(series, 4, keep_paths=True), Y),
    "ParticleMetropolis correlated": lambda: mcmc(smc.ParticleMetropolis(series, 4, correlation=0.9), Y),
    "ParticleMetropolis in two stages": lambda: mcmc(
        smc.ParticleMetropolis(series, 4, screen=lambda params, y: -(params["slope"] ** 2)), Y
    ),
    "ParticleMetropolis.tune": lambda: smc.ParticleMetropolis(series, 2).tune(
        KEY, Y, target_variance=1e3, num_runs=2, num_pilot=2
    ),
    "SMC2": lambda: (
        smc.SMC2(series, 4, 4, max_state_particles=16, min_acceptance=0.99, parameter_ess_threshold=1.0)
        .run(KEY, Y, progress_bar=False)
        .get_samples(3)
    ),
}

#: Places that use a key anew on purpose: all that lies within them is the same computation on the same numbers.
REPLAYS = {
    "ratio/masks.py:sample": "of JAX's two ways to a Poisson number one is taken",
    "ratio/steps.py:validate": "held-out losses of all epochs are of the same draws, to be compared",
    "guides/local_search.py:bound_on_common_draws": "starts and ends are compared on the same draws",
    "programs/reading.py:read_sequence": "a program is read once more, for another question to the same run",
    "filtering/filter.py:_run": "the first of the repeats is the run itself",
}


def is_replay(uses):
    """Whether the uses of a key are one use inside a place of :data:`REPLAYS`, reached from different callers."""
    if all(use.places[:1] == ("kernels/particle_gibbs.py:one",) for use in uses):
        return True  # NumPyro's own search for a start
    for place in REPLAYS:
        if all(place in use.places for use in uses):
            inside = {(use.how, use.what, use.places[: use.places.index(place)]) for use in uses}
            return len(inside) == 1
    return False


def shown(uses):
    return [f"{use.how} {use.what} in {' < '.join(use.places[:9])}" for use in sorted(uses, key=str)]


ENTRIES = FILTERS | BOUNDS | EVIDENCES | RATIOS | CHECKS | KERNELS
SLOW = ("AIS", "bidirectional", "LocalOptimizer", "inference_gap", "log_marginal_likelihood by ais", "NRE in rounds")


@pytest.mark.parametrize("entry", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ENTRIES])
def test_no_key_is_used_twice(entry):
    found = uses_of_keys(ENTRIES[entry])
    assert found
    assert [shown(uses) for uses in repeats(found) if not is_replay(uses)] == []


def test_folds_that_meet_the_parts_of_a_split_are_found():
    """The recorder sees the three ways to use a key twice, and not those that are none."""

    def split_and_folded():
        random.split(KEY), random.fold_in(KEY, 1)

    def drawn_and_split():
        random.normal(KEY), random.split(KEY)

    def drawn_twice():
        random.normal(KEY), random.uniform(KEY)

    def independent():
        random.split(KEY, 3), random.fold_in(KEY, 3), random.fold_in(KEY, 0x736D6F6F)

    assert (random.key_data(random.split(KEY)[1]) == random.key_data(random.fold_in(KEY, 1))).all()
    assert [len(repeats(uses_of_keys(call))) for call in (split_and_folded, drawn_and_split, drawn_twice)] == [1, 1, 1]
    assert not repeats(uses_of_keys(independent))


def test_draws_from_a_finished_run_are_not_those_of_a_run_from_key_zero():
    result = smc.ParticleFilter(path, 4, resample="always").run(random.key(0), Y)
    ours = uses_of_keys(lambda: result.to_arviz(num_samples=2))
    assert not ours  # of keys that stem from random.key(0), as the run's do, none is counted: compared one by one below
    run, reported = random.split(random.key(0)), random.split(reported_draws())
    assert not np.isin(random.key_data(reported), random.key_data(run)).any()
