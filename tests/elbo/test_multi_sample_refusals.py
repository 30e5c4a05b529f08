"""Programs and arguments that multi-sample estimators cannot honour: each raises an error that names the caller's own
thing and the remedy."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_smc import IWELBO, OVIS, RWS, STL, TVO, VIMCO, DecayingAverage, DReG, Reinforce, log_schedule
from tests.elbo import multi_sample_programs as programs

KEY = random.key(0)
X = jnp.array([0.4, -0.9, 1.3])


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0.5 * x, 0.7))


def refuses(error: type[Exception], *patterns: str):
    """Expect an error whose message matches every pattern."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*(?:{pattern}))" for pattern in patterns))


def trace(loss, model=model, guide=guide, *args, params=None):
    """Trace the loss without computing anything; what is refused is refused here."""
    return jax.eval_shape(lambda key: loss.loss(key, params or {}, model, guide, *(args or (X,))), KEY)


def evaluate(loss, model):
    return programs.quickly_compiled(lambda: loss.loss(KEY, {}, model, guide, X))()


def test_the_programs_of_this_file_are_otherwise_accepted():
    for loss in (IWELBO(2), STL(2), DReG(2), VIMCO(2), OVIS(2), RWS(2, sleep_phi=1.0), TVO(2), Reinforce(2)):
        trace(loss)


# ---- sites of model and guide


@pytest.mark.parametrize("estimator", [IWELBO, STL, DReG])
@pytest.mark.parametrize("program", [programs.COIN, programs.SCAN, programs.CLUSTER], ids=lambda program: program.name)
def test_discrete_sites_are_refused_where_their_gradient_would_be_wrong(estimator, program):
    site = "c" if program is programs.CLUSTER else "z"
    with refuses(ValueError, f"{estimator.__name__}: site '{site}' of the guide", "VIMCO, OVIS or Reinforce"):
        trace(estimator(2), program.model, program.guide, program.data, params=program.params)


def test_svi_warns_of_discrete_sites_only_where_they_are_not_supported():
    program = programs.COIN
    with pytest.warns(UserWarning, match="IWELBO loss does not support"):
        SVI(program.model, program.guide, optax.adam(0.1), IWELBO(2)).init(KEY, program.data)
    for loss in (VIMCO(2), OVIS(2), RWS(2), TVO(2), Reinforce(2)):
        SVI(program.model, program.guide, optax.adam(0.1), loss).init(KEY, program.data)


@pytest.mark.parametrize("loss", [IWELBO(2), VIMCO(2), RWS(2)], ids=lambda loss: type(loss).__name__)
def test_a_latent_that_the_guide_misses(loss):
    def with_global(x):
        numpyro.sample("weight", dist.Normal(0.0, 1.0))
        model(x)

    with refuses(ValueError, "the guide never samples site 'weight'", "Sample it in the guide"):
        trace(loss, with_global)


def test_a_latent_that_the_model_does_not_know():
    def with_extra(x):
        guide(x)
        numpyro.sample("zz", dist.Normal(0.0, 1.0))

    with refuses(ValueError, "the guide samples site 'zz', which the model does not have", "is_auxiliary"):
        trace(VIMCO(2), model, with_extra)


def test_auxiliary_sites_are_accepted_and_free_bits_with_them_are_not():
    automatic = AutoMultivariateNormal(model)
    svi = SVI(model, automatic, optax.adam(0.1), VIMCO(2))
    params = svi.get_params(svi.init(KEY, X))
    trace(VIMCO(2), model, automatic, params=params)
    with refuses(ValueError, "free_bits", "_auto_latent", "samples the model's sites directly"):
        trace(VIMCO(2, free_bits=0.1), model, automatic, params=params)


def test_shapes_that_differ():
    def scalar(x):
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    with refuses(ValueError, r"site 'z' has shape \(3,\) in the model but \(\) in the guide", "to_event"):
        trace(VIMCO(2), model, scalar)


def test_an_enumerated_latent_that_the_guide_misses():
    def enumerated(x):
        numpyro.sample("c", dist.Categorical(logits=jnp.zeros(3)), infer={"enumerate": "parallel"})
        model(x)

    with refuses(ValueError, "site 'c'", "[Ee]numeration", "marginalise"):
        trace(VIMCO(2), enumerated)


# ---- plates


def test_a_subsampled_plate_that_does_not_enclose_everything():
    def regression(x):
        loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x), subsample_size=2):
            numpyro.sample("x", dist.Normal(loc, 1.0), obs=numpyro.subsample(x, event_dim=0))

    def of_regression(x):
        numpyro.sample("loc", dist.Normal(0.0, 1.0))

    for loss in (IWELBO(2), VIMCO(2), TVO(2)):
        with refuses(ValueError, "plate 'data' is subsampled", "outside it: 'loc'", "num_particles=1"):
            trace(loss, regression, of_regression)
    trace(IWELBO(1), regression, of_regression)  # one log weight: a sum, which scales


def test_a_subsampled_plate_that_is_lost_to_a_stray_factor_or_by_choice():
    def subsampled(program):
        def run(x):
            with numpyro.plate("data", 30, subsample_size=len(x)):
                program(x)

        return run

    def inner_model(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def inner_guide(x):
        numpyro.sample("z", dist.Normal(0.5 * x, 0.7))

    both = subsampled(inner_model), subsampled(inner_guide)

    def with_factor(x):
        both[0](x)
        numpyro.factor("penalty", 0.0)

    trace(VIMCO(2), *both)
    with refuses(ValueError, "plate 'data' is subsampled", "outside it: 'penalty'"):
        trace(VIMCO(2), with_factor, both[1])
    with refuses(ValueError, "plate 'data' is subsampled", "`plates`"):
        trace(VIMCO(2, plates=None), *both)


def test_names_of_plates_that_do_not_enclose_everything():
    with refuses(ValueError, "plates names 'date', but site 'z' of the model is outside that plate"):
        trace(VIMCO(2, plates=("date",)))

    def unplated(x):
        numpyro.sample("z", dist.Normal(0.5 * x, 0.7).to_event(1))

    with refuses(ValueError, "plates names 'data', but site 'z' of the guide is outside"):
        trace(VIMCO(2, plates=("data",)), model, unplated)


def test_plates_must_be_a_collection_of_names():
    with refuses(ValueError, "plates must be", "'data'"):
        VIMCO(2, plates="data")
    with refuses(ValueError, "plates must be", "3"):
        VIMCO(2, plates=3)


def test_a_plate_subsampled_inside_a_scan_only():
    def subsampled(x):
        def step(z, x_t):
            with numpyro.plate("series", 6, subsample_size=len(x_t)):
                z = numpyro.sample("z", dist.Normal(z, 1.0))
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return z, None

        programs.scan(step, jnp.zeros(x.shape[1]), x)

    def of_subsampled(x):
        def step(z, x_t):
            with numpyro.plate("series", 6, subsample_size=len(x_t)):
                z = numpyro.sample("z", dist.Normal(0.5 * x_t, 1.0))
            return z, None

        programs.scan(step, jnp.zeros(x.shape[1]), x)

    with refuses(ValueError, "'series'", "scan"):
        trace(VIMCO(2), subsampled, of_subsampled, jnp.ones((4, 3)))


# ---- arguments


@pytest.mark.parametrize(
    ("make", "patterns"),
    [
        (lambda: VIMCO(1), ["VIMCO: num_particles must be at least 2"]),
        (lambda: OVIS(1), ["OVIS: num_particles must be at least 2"]),
        (lambda: TVO(1), ["TVO: num_particles must be at least 2"]),
        (lambda: IWELBO(0), ["IWELBO: num_particles must be a positive integer", "got 0"]),
        (lambda: IWELBO(2.5), ["IWELBO: num_particles must be a positive integer", "got 2.5"]),
        (lambda: OVIS(0, num_auxiliary=1), ["OVIS: num_particles must be a positive integer"]),
        (lambda: VIMCO(2, alpha=1.0), ["VIMCO: alpha", r"\[0, 1\)", "got 1", "Trace_ELBO"]),
        (lambda: VIMCO(2, alpha=-0.1), ["VIMCO: alpha", r"\[0, 1\)", "got -0.1"]),
        (lambda: VIMCO(2, alpha=float("nan")), ["VIMCO: alpha", "got nan"]),
        (lambda: VIMCO(2, alpha="linear"), ["alpha", "linear"]),
        (lambda: IWELBO(2, kl_weight=-1.0), ["IWELBO: kl_weight", "got -1"]),
        (lambda: IWELBO(2, free_bits=-0.5), ["IWELBO: free_bits", "got -0.5"]),
        (lambda: IWELBO(2, free_bits=float("nan")), ["free_bits"]),
        (lambda: IWELBO(2, num_mc=0), ["num_mc must be a positive integer"]),
        (lambda: IWELBO(2, batch_size=0), ["batch_size must be a positive integer"]),
        (lambda: VIMCO(2, mean="harmonic"), ["mean must be 'arithmetic' or 'geometric', got 'harmonic'"]),
        (lambda: VIMCO(2, pathwise="z"), ["pathwise", "collection of names"]),
        (lambda: VIMCO(2, clip_log_odds=-1.0), ["VIMCO: clip_log_odds must be positive, got -1.0", "None"]),
        (lambda: OVIS(2, renyi="approximate"), ["renyi must be 'exact' or 'tempered'"]),
        (lambda: OVIS(2, gamma=float("nan")), ["gamma", "nan"]),
        (lambda: OVIS(3, num_auxiliary=1.5), ["num_auxiliary", "1.5"]),
        (lambda: OVIS(3, num_auxiliary=-1), ["OVIS: num_auxiliary", "-1"]),
        (lambda: OVIS(3, num_auxiliary=1, gamma=1.0), ["num_auxiliary=1", "gamma"]),
        (lambda: OVIS(3, exclusive=False), ["exclusive=False", "got 0 of 3"]),
        (lambda: OVIS(3, num_auxiliary=3, exclusive=False), ["exclusive=False", "got 3 of 3"]),
        (lambda: DReG(2, tradeoff=2.0), [r"DReG: tradeoff must lie in \[0, 1\], got 2.0"]),
        (lambda: RWS(2, sleep_phi=-1.0), ["RWS: sleep_phi", "got -1"]),
        (lambda: RWS(2, num_sleep=0), ["num_sleep"]),
        (lambda: RWS(2, pathwise=True), ["RWS", "pathwise"]),
        (lambda: TVO(2, alpha=0.5), ["TVO: it has no alpha"]),
        (lambda: TVO(2, rule="middle"), ["rule must be one of", "'middle'"]),
        (lambda: TVO(2, spacing="cubic"), ["spacing must be 'log' or 'linear'"]),
        (lambda: TVO(2, partitions=0), ["TVO: partitions must be a positive integer, got 0"]),
        (lambda: TVO(2, beta_min=2.0), [r"TVO: beta_min must lie in \(0, 1\), got 2.0"]),
        (lambda: TVO(2, beta_min=[0.5, 0.2, 1.0]), ["must increase from 0 to 1"]),
        (lambda: Reinforce(2, baseline=3.0), ["baseline must be None, a DecayingAverage or a function"]),
        (
            lambda: Reinforce(2, baseline=DecayingAverage(1.0)),
            [r"Reinforce: decay must lie in \[0, 1\), got 1.0", "the baseline's average"],
        ),
        (lambda: log_schedule(1.0, 0.0, 10), [r"log_schedule: start must lie in \(-inf, 1\), got 1.0"]),
        (lambda: log_schedule(0.9, 0.0, 0), ["log_schedule: num_steps must be a positive integer, got 0"]),
    ],
)
def test_arguments_out_of_range(make, patterns):
    with refuses(ValueError, *patterns):
        make()


@pytest.mark.parametrize("name", ["alpha", "kl_weight"])
def test_schedules_need_an_optimiser_that_tells_its_step(name):
    loss = VIMCO(2, **{name: log_schedule(0.9, 0.0, 10)})
    svi = SVI(model, guide, optax.adam(0.1), loss)
    with refuses(ValueError, f"VIMCO: {name} is a schedule", r"StepwiseOptim\(optim\)"):
        svi.run(KEY, 2, X, progress_bar=False)
    with refuses(ValueError, f"VIMCO: {name} is a schedule", f"give {name} a number"):
        trace(loss)


def test_pathwise_names_sites_that_are_there_and_reparameterised():
    with refuses(ValueError, "pathwise names site 'w', which the guide does not have"):
        trace(VIMCO(2, pathwise=("w",)))
    coin = programs.COIN
    with refuses(ValueError, "pathwise names site 'z'", "no reparameterised sampler"):
        trace(VIMCO(2, pathwise=("z",)), coin.model, coin.guide, coin.data, params=coin.params)


def test_baselines_need_the_guide_that_declares_them():
    loss = Reinforce(2, baseline=lambda x: numpyro.param("level", 0.0))
    with refuses(ValueError, r"loss\.with_baseline\(guide\)"):
        trace(loss)
    with refuses(ValueError, "same baseline", r"plain guide if loss\.baseline is None"):
        trace(Reinforce(2), model, loss.with_baseline(guide), params={"level": jnp.zeros(())})


# ---- reweighted wake-sleep


def test_wake_sleep_refuses_parameters_that_both_programs_have():
    def sharing_model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def sharing_guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0) + 0.5 * x, 0.7))

    params = {"loc": jnp.asarray(0.1)}
    with refuses(ValueError, r"RWS: model and guide share the parameters \['loc'\]", "allow_shared=True"):
        trace(RWS(2), sharing_model, sharing_guide, params=params)
    trace(RWS(2, allow_shared=True), sharing_model, sharing_guide, params=params)
    trace(VIMCO(2), sharing_model, sharing_guide, params=params)


def test_sleep_refuses_models_with_a_factor():
    def with_factor(x):
        model(x)
        numpyro.factor("penalty", -1.0)

    with refuses(ValueError, "RWS: the model cannot be simulated, because of the factor 'penalty'", "sleep_phi=0"):
        trace(RWS(2, sleep_phi=0.5), with_factor)
    trace(RWS(2), with_factor)


def test_sleep_must_know_which_argument_is_the_data():
    def with_number(num, x):
        model(x)

    def guide_with_number(num, x):
        guide(x)

    with refuses(ValueError, "RWS", "first argument", "simulate="):
        trace(RWS(2, sleep_phi=0.5), with_number, guide_with_number, 3, X)
    loss = RWS(2, sleep_phi=0.5, simulate=lambda values: ((3, values["x"]), {}))
    trace(loss, with_number, guide_with_number, 3, X)


def test_sleep_refuses_guides_with_auxiliary_sites():
    automatic = AutoMultivariateNormal(model)
    svi = SVI(model, automatic, optax.adam(0.1), RWS(2))
    params = svi.get_params(svi.init(KEY, X))
    with refuses(ValueError, "RWS: sleep needs the guide's density", "_auto_latent"):
        trace(RWS(2, sleep_phi=0.5), model, automatic, params=params)


# ---- state


def test_mutable_state_is_refused_for_several_particles_and_kept_for_one():
    def counting_guide(x):
        state = numpyro.primitives.mutable("counter", {"count": jnp.zeros(())})
        state["count"] = state["count"] + 1.0
        guide(x)

    for loss in (IWELBO(2), VIMCO(2), RWS(2)):
        svi = SVI(model, counting_guide, optax.adam(0.1), loss)
        with refuses(NotImplementedError, "mutable site 'counter'", "num_particles=1"):
            jax.eval_shape(svi.update, svi.init(KEY, X), X)
    for loss in (IWELBO(1), DReG(1), RWS(1, sleep_phi=1.0), OVIS(1, num_auxiliary=2)):
        svi = SVI(model, counting_guide, optax.adam(0.1), loss)
        update = programs.quickly_compiled(svi.update)
        state, _ = update(update(svi.init(KEY, X), X)[0], X)
        # SVI.init runs the guide once; then once per step.
        assert state.mutable_state["counter"]["count"] == 3.0, type(loss).__name__


def test_a_density_that_is_nan_is_not_hidden():
    def broken(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.factor("broken", jnp.where(x > 0, z, jnp.nan))

    for loss in (IWELBO(2), VIMCO(2), OVIS(2), RWS(2), TVO(2), Reinforce(2), STL(2), DReG(2)):
        assert jnp.isnan(evaluate(loss, broken)), type(loss).__name__


def test_an_impossible_observation_gives_an_infinite_loss():
    def impossible(x):
        with numpyro.plate("data", len(x)), handlers.mask(mask=True):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            numpyro.factor("never", jnp.full(len(x), -jnp.inf))

    for loss in (IWELBO(2), VIMCO(2), OVIS(2), RWS(2), TVO(2), Reinforce(2), STL(2), DReG(2)):
        assert jnp.isposinf(evaluate(loss, impossible)), type(loss).__name__


@pytest.mark.parametrize("loss", [IWELBO(3), STL(3), DReG(3)], ids=lambda loss: type(loss).__name__)
def test_a_factor_of_the_guide_keeps_its_gradient(loss):
    """It adds 0.3 tilt to log q whatever is drawn, so the loss rises by 0.3 with tilt."""

    def model(x):
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 0.5), obs=x)

    def guide(x):
        numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.4), 1.0))
        numpyro.factor("tilted", 0.3 * numpyro.param("tilt", 1.0))

    params = {"loc": jnp.asarray(0.4), "tilt": jnp.asarray(1.0)}
    gradient = jax.grad(lambda p: loss.loss(random.key(0), p, model, guide, 0.7))(params)
    assert jnp.allclose(gradient["tilt"], 0.3, atol=1e-5)
