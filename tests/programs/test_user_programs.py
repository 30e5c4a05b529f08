"""Programs as users write them: they run under NumPyro unchanged, and under particle methods with the exact answers.

Statistical tests: the mean over independent runs of ``exp(log Z - exact)`` within 5 standard errors of 1, the
reference's own error included; false alarms 6e-7 per program and problem.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import MCMC, NUTS, SVI, Predictive
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.optim import Adam

from numpyro_smc import FIVO, ParticleFilter, bootstrap
from tests.programs import user_programs
from tests.programs.user_programs import PROGRAMS, Exact, UserProgram

NUM_RUNS = 400

every_program = pytest.mark.parametrize("name", PROGRAMS)

# NumPyro's scan, when replayed, asks every site of the guide's trace for its shape, a network's weights included.
replayed_modules = pytest.mark.filterwarnings("ignore:shape requires ndarray or scalar arguments:DeprecationWarning")


def log_density(model, program: UserProgram, values, observed_only: bool, given=()):
    """The log density that NumPyro's own trace of a program adds up to, for one set of values."""
    seeded = handlers.seed(handlers.substitute(model, data=program.params | values), 0)
    total = 0.0
    for name, site in handlers.trace(seeded).get_trace(*program.args, **program.kwargs).items():
        if site["type"] != "sample" or name in given or (observed_only and not site["is_observed"]):
            continue
        if name.endswith("_unobserved"):  # the model's own draw of a missing observation
            continue
        log_prob = site["fn"].log_prob(site["value"])
        if site["is_observed"] and name in program.num_observed:
            log_prob = log_prob[: program.num_observed[name]]
        total = total + jnp.sum(log_prob * (1.0 if site["scale"] is None else site["scale"]))
    return total


def paths(result):
    """Values of all sites by particle, for a filter that never resampled."""
    return result.history.initial["values"] | jax.tree.map(
        lambda v: jnp.moveaxis(v, 0, 1), result.history.steps["values"]
    )


def assert_unbiased(log_z, exact, standard_error=0.0):
    ratio = np.exp(np.asarray(log_z, float) - exact)
    assert np.all(ratio.max(0) < 0.05 * ratio.sum(0)), "too noisy for the normal approximation"
    # 1e-4 for single precision
    error = np.sqrt(ratio.var(0, ddof=1) / len(ratio) + np.square(standard_error)) + 1e-4
    assert np.all(np.abs(ratio.mean(0) - 1) < 5 * error), (ratio.mean(0), error)


# ---- under NumPyro itself


@every_program
def test_runs_under_predictive_unchanged(name):
    program = PROGRAMS[name]
    samples = Predictive(program.model, num_samples=2)(jax.random.key(0), *program.args, **program.kwargs)
    assert samples
    for value in samples.values():
        assert value.shape[0] == 2


@pytest.mark.parametrize("name", ["AR(2) of observations", "Holt-Winters with a horizon"])
def test_runs_under_nuts_unchanged(name):
    program = PROGRAMS[name]
    mcmc = MCMC(NUTS(program.model, max_tree_depth=3), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0), *program.args)
    assert all(np.all(np.isfinite(draws)) for draws in mcmc.get_samples().values())


# ---- under the particle filter


@pytest.mark.parametrize("name", [*PROGRAMS, *user_programs.LIKELIHOODS_AFTER])
def test_log_weights_are_numpyros_own_densities(name):
    """Two particles that are never resampled: log p(x, y) - log q(x), or log p(y | x) without a guide, by path."""
    program = (PROGRAMS | user_programs.LIKELIHOODS_AFTER)[name]
    particle_filter = ParticleFilter(program.model, 2, guide=program.guide, resample="never")
    result = particle_filter.run(jax.random.key(0), *program.args, params=program.params, **program.kwargs)

    def expected(values):
        joint = log_density(program.model, program, values, program.guide is None, program.params)
        if program.guide is None:
            return joint
        return joint - log_density(program.guide, program, values, False, program.params)

    found = (result.log_weights[-1] + result.log_evidence).reshape(2, -1).sum(1)
    np.testing.assert_allclose(
        program.scale * found, jax.jit(jax.vmap(expected, axis_size=2))(paths(result)), rtol=1e-4, atol=1e-3
    )
    assert float(result.history.bound) == pytest.approx(program.scale * float(result.log_evidence.sum()), rel=1e-5)


@every_program
def test_evidence_estimate_is_unbiased(name):
    program = PROGRAMS[name]
    exact = program.exact()
    particle_filter = ParticleFilter(program.model, program.num_particles, guide=program.guide)

    def run(key):
        return particle_filter.log_evidence(key, *program.args, params=program.params, **program.kwargs)

    log_z = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), NUM_RUNS))
    assert_unbiased(log_z, exact.log_evidence, exact.standard_error)


@pytest.mark.parametrize(
    "name",
    [
        "structural series with a horizon",
        "Poisson counts with exposure",
        "stochastic volatility with leverage",
        "hierarchy over series",
        "missing data by obs_mask",
        "regression indexed by time",
        "likelihood after the scan in a plate",
        "innovations",
        "trend in a dict",
        "factor behind a plate of assets",
    ],
)
def test_filtered_means_are_exact(name):
    # 20,000 particles: standard errors are below 0.01.
    program = PROGRAMS[name]
    result = ParticleFilter(program.model, 20_000, guide=program.guide).run(
        jax.random.key(2), *program.args, params=program.params, **program.kwargs
    )
    means = program.exact().means
    assert means
    for site, mean in means.items():
        np.testing.assert_allclose(result.mean(site)[: len(mean)], mean, atol=0.05, err_msg=site)


def test_steps_beyond_the_data_are_the_forecast():
    # 20,000 particles; standard errors are below 0.01.
    program = PROGRAMS["structural series with a horizon"]
    result = ParticleFilter(program.model, 20_000).run(
        jax.random.key(3), *program.args, params=program.params, **program.kwargs
    )
    np.testing.assert_allclose(result.mean("y")[:10], user_programs.LEVEL_DATA, rtol=1e-5)
    np.testing.assert_allclose(result.mean("level")[10:], np.repeat(result.mean("level")[9], 3), atol=0.05)
    np.testing.assert_allclose(result.mean("effect")[10:], user_programs.forecast_of_effects(), atol=0.05)
    np.testing.assert_allclose(result.mean("y")[10:], result.mean("level")[10:] + result.mean("effect")[10:], atol=0.05)
    np.testing.assert_allclose(result.log_evidence_increments[10:], 0.0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["AR(2) of observations", "HMM of tones with lengths", "stochastic volatility with leverage", "local level"]
)
def test_forecasts_carry_the_forecast_observations_on(name):
    program = PROGRAMS[name]
    result = ParticleFilter(program.model, 500, guide=program.guide).run(
        jax.random.key(3), *program.args, params=program.params, **program.kwargs
    )
    forecast = result.forecast(jax.random.key(4), 3, 2000)
    assert forecast["y"].shape[:2] == (2000, 3)
    assert np.all(np.isfinite(forecast["y"]))
    if name == "AR(2) of observations":
        # 2000 draws; standard errors are 0.022 at most.
        y, params = [float(v) for v in program.args[0][-2:]], jax.tree.map(float, program.params)
        for mean in np.asarray(forecast["y"]).mean(0):
            y.append(params["const"] + params["alpha_1"] * y[-1] + params["alpha_2"] * y[-2])
            assert mean == pytest.approx(y[-1], abs=0.1)


def test_python_numbers_as_parameters_do_not_recompile():
    particle_filter = ParticleFilter(user_programs.local_level, 4)
    for drift in (0.3, 0.4):
        particle_filter.run(jax.random.key(0), user_programs.LEVEL_DATA, params={"drift": drift, "noise": 0.5})
    assert particle_filter._compiled_run.num_compiled() == 1


def test_numpy_parameters_are_taken_by_every_entry_point():
    program = PROGRAMS["HMM with lengths"]
    params = {"probs_x": user_programs.PROBS_X, "probs_y": user_programs.PROBS_Y}
    particle_filter = ParticleFilter(program.model, 4)
    whole = particle_filter.run(jax.random.key(0), *program.args, params=params)
    pure = particle_filter.log_evidence(jax.random.key(0), *program.args, params=params)
    np.testing.assert_allclose(pure, whole.log_evidence, rtol=1e-5)


def test_subsampled_plate_filters_the_series_it_drew_and_scales_the_bound():
    # 4000 particles: the standard error of log Z is below 0.05; evidences of different series differ by more than 1.
    y = user_programs.SUBSAMPLED_DATA
    particle_filter = ParticleFilter(user_programs.subsampled, 4000)
    seen = set()
    for seed in range(4):
        result = particle_filter.run(jax.random.key(seed), jnp.asarray(y), 2, params={"noise": 0.5})
        rows = np.asarray(result.particles["rows"][0])
        seen |= set(rows.tolist())
        np.testing.assert_allclose(result.log_evidence, user_programs.exact_subsampled(rows), atol=0.25)
        assert float(result.history.bound) == pytest.approx(5 / 2 * float(result.log_evidence.sum()), rel=1e-5)
    assert len(seen) > 2


# ---- under FIVO


def fivo(program: UserProgram, num_particles: int, **options) -> FIVO:
    """Discrete draws need a gradient of their own; the score reaches the parameters of a guide, too."""
    if program.discrete and program.guide is not None:
        options = {"resampling_gradient": "score_rb", "resample": "always"} | options
    elif program.discrete:
        options = {"resampling_gradient": "stop_gradient"} | options
    return FIVO(num_particles, **options)


def loss_and_gradient(program: UserProgram, **options):
    """The objective with four particles and fixed random numbers, as a compiled function of the parameters."""
    guide = bootstrap(program.model) if program.guide is None else program.guide
    objective = fivo(program, 4, **options)

    def loss(params):
        return objective.loss(jax.random.key(4), params, program.model, guide, *program.args, **program.kwargs)

    return jax.jit(jax.value_and_grad(loss))


def assert_finite_and_somewhere_not_zero(gradient):
    for parameter, part in gradient.items():
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(part)]
        assert all(np.all(np.isfinite(leaf)) for leaf in leaves), parameter
        if parameter != "tau":  # the scale of offsets that are given themselves
            assert any(np.any(leaf != 0) for leaf in leaves), parameter


@pytest.mark.parametrize("name", [name for name in PROGRAMS if PROGRAMS[name].params and not PROGRAMS[name].discrete])
def test_fivo_gradient_is_the_slope_of_the_loss(name):
    """Without resampling; the slope is a central difference in one random direction."""
    program = PROGRAMS[name]
    loss = loss_and_gradient(program, resample="never")
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.choice([-1.0, 1.0], leaf.shape), leaf.dtype), program.params)

    def shifted(step):
        return jax.tree.map(lambda leaf, d: leaf + step * d, program.params, direction)

    _, gradient = loss(program.params)
    assert_finite_and_somewhere_not_zero(gradient)
    if name == "heavy tails":  # draws by rejection: implicit gradients that no difference quotient of the draws shows
        return
    slope = (float(loss(shifted(2e-3))[0]) - float(loss(shifted(-2e-3))[0])) / 4e-3
    along = jax.tree.map(lambda part, d: float(jnp.sum(part * d)), gradient, direction)
    assert sum(jax.tree.leaves(along)) == pytest.approx(slope, rel=0.02, abs=0.05)


@pytest.mark.parametrize(
    "name",
    [name for name in PROGRAMS if PROGRAMS[name].params and PROGRAMS[name].discrete]
    + [
        "local level, guided",
        "structural series with a horizon",
        "variational recurrent network, guided",
        "missing data as NaN, guided",
        "likelihood after the scan in a plate",
        "panel of two plates, path guide",
    ],
)
def test_fivo_gradient_is_finite_under_resampling(name):
    value, gradient = loss_and_gradient(PROGRAMS[name])(PROGRAMS[name].params)
    assert np.isfinite(value)
    assert_finite_and_somewhere_not_zero(gradient)


@replayed_modules
@pytest.mark.parametrize(
    "name",
    [
        "local level, guided",
        "HMM with lengths",
        "likelihood after the scan, path guide",
        "variational recurrent network, guided",
        "Holt-Winters with a horizon",
    ],
)
def test_svi_takes_steps(name):
    program = PROGRAMS[name]
    guide = bootstrap(program.model) if program.guide is None else program.guide
    svi = SVI(program.model, guide, Adam(1e-3), fivo(program, 4), **program.kwargs)
    state = svi.init(jax.random.key(5), *program.args)
    before = svi.get_params(state)
    state, loss = jax.jit(lambda state: svi.update(state, *program.args))(state)
    after = svi.get_params(state)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert not before or any(np.any(a != b) for a, b in leaves)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if PROGRAMS[name].guide is not None])
def test_fivo_without_resampling_is_the_importance_weighted_bound(name):
    """With the same key the filter has the same particles; NumPyro's own densities give the bound."""
    program = PROGRAMS[name]
    key = jax.random.key(9)
    result = ParticleFilter(program.model, 2, guide=program.guide, resample="never").run(
        key, *program.args, params=program.params, **program.kwargs
    )

    @jax.jit
    def loss(params):
        objective = fivo(program, 2, resample="never")
        return objective.loss(key, params, program.model, program.guide, *program.args, **program.kwargs)

    assert float(loss(program.params)) == pytest.approx(-float(result.log_evidence.sum()), rel=1e-4)


@pytest.mark.parametrize("proposal", ["guide", "bootstrap"])
def test_global_latents_and_their_hyperparameters_integrate_to_the_evidence(proposal):
    """1000 runs of the whole bound, with its draws of mu, tau and the offsets."""
    y = user_programs.SERIES_DATA[:3]
    model, params = user_programs.hierarchical, {}
    guide = bootstrap(model)
    if proposal == "guide":
        guide, params = user_programs.hierarchical_guide, {"mu_loc": jnp.asarray(0.1)}

    def run(key):
        return -FIVO(64).loss(key, params, model, guide, y)

    log_z = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(6), 1000))
    assert_unbiased(log_z, user_programs.exact_hierarchy(y))


@pytest.mark.parametrize(
    "guide",
    [
        user_programs.hierarchical_guide,
        user_programs.hierarchical_path_guide,
        user_programs.with_autoguide(AutoNormal),
        user_programs.with_autoguide(AutoMultivariateNormal),
    ],
    ids=["scan", "path", "AutoNormal", "AutoMultivariateNormal"],
)
def test_single_particle_bound_with_global_latents_is_the_density_ratio(guide):
    y = jnp.asarray(user_programs.SERIES_DATA)
    model = user_programs.hierarchical
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(y)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    program = UserProgram(model, Exact, (y,), params=params, guide=guide)
    result = ParticleFilter(model, 1, guide=guide, resample="never").run(jax.random.key(8), y, params=params)
    values = jax.tree.map(lambda v: v[0], paths(result)) | result.history.global_values
    assert set(result.history.global_values) >= {"mu", "tau", "offset"}
    expected = log_density(model, program, values, False) - log_density(guide, program, values, False)
    assert float(result.history.bound) == pytest.approx(float(expected), rel=1e-4)
    loss = FIVO(1, resample="never").loss(jax.random.key(8), params, model, guide, y)
    assert float(loss) == pytest.approx(-float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["local level", "local level, guided"])
def test_a_given_initial_state_is_conditioned_on(name):
    # 20,000 particles: the standard error of log Z is below 0.01.
    program = PROGRAMS[name]
    given = program.params | {"level_0": jnp.asarray(0.3)}
    result = ParticleFilter(program.model, 20_000, guide=program.guide).run(
        jax.random.key(10), *program.args, params=given
    )
    exact, _ = user_programs.kalman(user_programs.LEVEL_DATA, 0.3, 0, 1, 0.4**2, 1, 0.6**2)
    assert float(result.log_evidence) == pytest.approx(exact, abs=0.05)
    assert float(result.history.bound) == pytest.approx(exact, abs=0.05)


def test_cond_without_sites_works_around_and_in_the_scan():
    def branching(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            loc = cond(x > 0, lambda x: x, lambda x: 2 * x, x)
            numpyro.sample("y", dist.Normal(loc, 0.5), obs=y_t)
            return x, x

        start = cond(y[0] > 0, lambda y: y, lambda y: 0.0 * y, y[0])
        _, path = scan(step, start, y)
        numpyro.deterministic("end", cond(path[-1] > 0, lambda x: x, lambda x: -x, path[-1]))

    program = UserProgram(branching, Exact, (jnp.asarray(user_programs.LEVEL_DATA),))
    result = ParticleFilter(branching, 1, resample="never").run(jax.random.key(11), *program.args)
    expected = log_density(branching, program, {"x": result.particles["x"][:, 0]}, observed_only=True)
    assert float(result.log_evidence) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("method", ["genealogy", "backward", "backward_mcmc"])
def test_a_program_without_latents_has_no_paths(method):
    program = PROGRAMS["AR(2) of observations"]
    result = ParticleFilter(program.model, 4).run(jax.random.key(12), *program.args, params=program.params)
    assert result.sample_posterior(jax.random.key(13), 3, method) == {}
