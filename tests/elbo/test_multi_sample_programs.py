"""Multi-sample estimators on programs as users write them, against exact enumeration.

Statistical tests use fixed seeds and 20,000 draws unless they say otherwise; every coordinate of a gradient must lie
within five standard errors of its exact value: about 6e-7 false alarms per coordinate.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module, flax_module
from numpyro.distributions import constraints
from numpyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from numpyro_smc import (
    IWELBO,
    OVIS,
    RWS,
    STL,
    TVO,
    VIMCO,
    DecayingAverage,
    DReG,
    Reinforce,
    StepwiseOptim,
    fit,
    log_schedule,
)
from tests.elbo import multi_sample_programs as programs
from tests.elbo.multi_sample_programs import (
    COIN,
    Program,
    exact_bound,
    exact_direction,
    exact_expectation,
    quickly_compiled,
)
from tests.statistics_of_estimates import assert_mean

NUM_DRAWS = 20_000


def draws(loss, program: Program, *, num_draws: int = NUM_DRAWS, seed: int = 0, kwargs: dict | None = None):
    """Bounds ``[R]`` and their gradient estimates, each leaf ``[R, ...]``, in the direction of ascent."""

    def one(rng_key):
        def bound(params):
            return -loss.loss(rng_key, params, program.model, program.guide, program.data, **(kwargs or {}))

        return jax.value_and_grad(bound)(program.params)

    return quickly_compiled(jax.vmap(one))(random.split(random.key(seed), num_draws))


def worst_coordinate(gradients: dict, expected: dict) -> tuple[float, str]:
    """The largest difference, in standard errors (plus single-precision rounding), and where it is."""
    worst = (0.0, "none")
    for name, exact in expected.items():
        values = np.asarray(gradients[name], np.float64).reshape(len(gradients[name]), -1)
        assert np.isfinite(values).all(), f"gradients of {name} are not finite"
        difference = values.mean(0) - np.asarray(exact, np.float64).ravel()
        error = values.std(0, ddof=1) / np.sqrt(len(values)) + 1e-6 * (1 + np.abs(values).max(0))
        for i, z in enumerate(np.abs(difference) / error):
            worst = max(worst, (float(z), f"{name}[{i}]"))
    return worst


def assert_gradients(gradients: dict, expected: dict, num_standard_errors: float = 5.0) -> None:
    assert set(gradients) == set(expected)
    size, where = worst_coordinate(gradients, expected)
    assert size <= num_standard_errors, f"{where} is {size:.1f} standard errors from its exact value"


def assert_exact(loss, program: Program, value: float, gradient: dict, **options) -> None:
    values, gradients = draws(loss, program, **options)
    assert_mean(values, value)
    assert_gradients(gradients, gradient)


# ---- the check itself: it accepts NumPyro's estimators where they are right, and sees where they are wrong


def test_the_references_agree_with_numpyro_where_numpyro_is_right():
    assert_exact(TraceGraph_ELBO(), programs.SIGMOID, *exact_bound(programs.SIGMOID, 1))
    assert_exact(RenyiELBO(num_particles=2), programs.GAUSSIAN, *exact_bound(programs.GAUSSIAN, 2))
    assert_exact(
        RenyiELBO(num_particles=2, alpha=0.5), programs.GAUSSIAN, *exact_bound(programs.GAUSSIAN, 2, alpha=0.5)
    )


@pytest.mark.filterwarnings("ignore:Currently, SVI")
def test_numpyro_renyi_elbo_has_the_wrong_guide_gradient_for_discrete_latents():
    """Value and model gradient are right; the guide gets minus the wake direction instead of the bound's gradient."""
    value, exact = exact_bound(COIN, 3)
    values, gradients = draws(RenyiELBO(num_particles=3), COIN)
    assert_mean(values, value)
    size, where = worst_coordinate(gradients, exact)
    assert size > 20 and where.split("[")[0] in COIN.guide_params
    wake = exact_direction(COIN, 3, programs.wake_phi)
    assert_gradients(gradients, {k: -v if k in COIN.guide_params else exact[k] for k, v in wake.items()})


# ---- unbiased estimators: value and gradient of every coordinate, by enumeration of all assignments of K particles


def data_baseline(x):
    """A baseline with parameters, one value for each datapoint (the last axis of every program's plates)."""
    return numpyro.param("baseline_level", -1.5) + numpyro.param("baseline_slope", 0.2) * jnp.mean(x)


# Names, and factories (K, options) of estimators that are unbiased for the K-sample bound, at every alpha.
UNBIASED: dict[str, Callable] = {
    "reinforce": Reinforce,
    "vimco-arithmetic": VIMCO,
    "vimco-geometric": partial(VIMCO, mean="geometric"),
    "ovis": partial(OVIS, clip_log_odds=None),
    "ovis-geometric": partial(OVIS, mean="geometric", clip_log_odds=None),
    "ovis-auxiliary": partial(OVIS, num_auxiliary=2, clip_log_odds=None),
}
# The first program meets every estimator in one of these settings, each other program half the estimators; the slow
# test below goes through all.
SETTINGS = [(2, 0.0), (3, 0.5), (3, 0.0), (2, 0.5)]
CASES = [
    pytest.param(program, name, *setting, id=f"{identifier}-{name}-K{setting[0]}-alpha{setting[1]}")
    for i, (program, identifier) in enumerate(zip(programs.DISCRETE, programs.names(programs.DISCRETE), strict=True))
    for j, name in enumerate(UNBIASED)
    for setting in ([SETTINGS[j % 2]] if program is COIN else [SETTINGS[(i + j // 2) % 4]] if (i + j) % 2 else [])
]


@pytest.mark.parametrize(("program", "estimator", "num_particles", "alpha"), CASES)
def test_value_and_gradient_of_discrete_programs_are_unbiased(program, estimator, num_particles, alpha):
    loss = UNBIASED[estimator](num_particles, alpha=alpha)
    assert_exact(loss, program, *exact_bound(program, num_particles, alpha))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("estimator", UNBIASED)
@pytest.mark.parametrize("program", programs.DISCRETE, ids=programs.names(programs.DISCRETE))
def test_value_and_gradient_of_discrete_programs_are_unbiased_in_every_setting(program, estimator, setting):
    """200,000 draws."""
    num_particles, alpha = setting
    loss = UNBIASED[estimator](num_particles, alpha=alpha)
    assert_exact(loss, program, *exact_bound(program, num_particles, alpha), num_draws=10 * NUM_DRAWS, seed=1)


@pytest.mark.parametrize(
    ("estimator", "pathwise", "alpha"),
    [("vimco-geometric", True, 0.5), ("ovis-auxiliary", True, 0.0), ("vimco-geometric", False, 0.0)],
)
@pytest.mark.parametrize("program", programs.HYBRID, ids=programs.names(programs.HYBRID))
def test_hybrid_programs_are_unbiased_with_and_without_pathwise_gradients(program, alpha, pathwise, estimator):
    loss = UNBIASED[estimator](2, alpha=alpha, pathwise=pathwise)
    assert_exact(loss, program, *exact_bound(program, 2, alpha))


def test_pathwise_sites_can_be_named():
    loss, same = OVIS(3, clip_log_odds=None, pathwise=("z",)), OVIS(3, clip_log_odds=None, pathwise=True)
    assert_exact(loss, programs.CLUSTER, *exact_bound(programs.CLUSTER, 3))
    for a, b in zip(
        draws(loss, programs.SWITCH, num_draws=10), draws(same, programs.SWITCH, num_draws=10), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("num_particles", "alpha"), SETTINGS[:2])
@pytest.mark.parametrize("program", [COIN, programs.NESTED, programs.SCAN], ids=lambda program: program.name)
def test_reinforce_is_unbiased_with_a_baseline_and_the_baseline_descends_its_squared_error(
    program, num_particles, alpha
):
    loss = Reinforce(num_particles, alpha=alpha, baseline=data_baseline)
    level, slope = jnp.asarray(-1.5), jnp.asarray(0.2)
    with_baseline = dataclasses.replace(
        program,
        guide=loss.with_baseline(program.guide),
        params=program.params | {"baseline_level": level, "baseline_slope": slope},
    )
    values, gradients = draws(loss, with_baseline)
    value, expected = exact_bound(program, num_particles, alpha)

    def squared_error(level, slope):
        """Mean over particles of the squared difference to the learning signal, summed over elements."""
        baseline = level + slope * jnp.mean(program.data)

        def statistic(log_weights):
            v = jax.nn.softmax((1 - alpha) * log_weights, axis=-1)
            mean = jax.nn.logsumexp((1 - alpha) * log_weights, axis=-1) - jnp.log(num_particles)
            return jnp.mean((baseline - mean[..., None] / (1 - alpha) + v) ** 2, axis=-1)

        return programs.expectation(program.table[0], num_particles, statistic)

    of_level, of_slope = jax.grad(squared_error, (0, 1))(level, slope)
    assert_mean(values, value)
    assert_gradients(gradients, expected | {"baseline_level": -of_level, "baseline_slope": -of_slope})


@pytest.mark.parametrize("program", programs.CONTINUOUS, ids=programs.names(programs.CONTINUOUS))
@pytest.mark.parametrize(
    ("estimator", "alpha"),
    [(IWELBO, 0.0), (DReG, 0.0), (DReG, 0.5), (VIMCO, 0.5), (partial(OVIS, pathwise=True, clip_log_odds=None), 0.0)],
)
def test_value_and_gradient_of_gaussian_programs_are_unbiased(program, alpha, estimator):
    assert_exact(estimator(2, alpha=alpha), program, *exact_bound(program, 2, alpha))


# ---- biased estimators: the bias is the known one


def at_fixed_draws(program: Program) -> Program:
    """The same, with assignments that do not move with the parameters: for scores of reparameterised sites."""

    def assignments(params, element):
        return program.assignments(jax.lax.stop_gradient(params), element)

    return dataclasses.replace(program, assignments=assignments)


def mixed(program: Program, of_model: dict, of_guide: dict) -> dict:
    return {name: (of_guide if name in program.guide_params else of_model)[name] for name in of_model}


def plus_wake(program: Program, num_particles: int, alpha: float, factor: float) -> tuple[float, dict]:
    """Value of the bound; its gradient, plus ``factor`` times the wake direction for the guide."""
    value, gradient = exact_bound(program, num_particles, alpha)
    wake = exact_direction(at_fixed_draws(program), num_particles, partial(programs.wake_phi, alpha=alpha))
    return value, mixed(program, gradient, {k: gradient[k] + factor * wake[k] for k in gradient})


@pytest.mark.parametrize(
    ("program", "gamma", "alpha"), [(COIN, 1.0, 0.0), (programs.SIGMOID, 1.0, 0.0), (programs.SCAN, 0.4, 0.5)]
)
def test_ovis_adds_gamma_times_the_wake_direction(program, gamma, alpha):
    loss = OVIS(3, gamma=gamma, alpha=alpha, clip_log_odds=None)
    assert_exact(loss, program, *plus_wake(program, 3, alpha, gamma))


def test_tempered_ovis_is_the_published_form_at_positive_alpha():
    """E = (1 - alpha) grad L + (gamma - alpha) wake."""
    alpha, gamma = 0.5, 1.0
    value, gradient = exact_bound(COIN, 3, alpha)
    wake = exact_direction(COIN, 3, partial(programs.wake_phi, alpha=alpha))
    guide = {k: (1 - alpha) * gradient[k] + (gamma - alpha) * wake[k] for k in gradient}
    loss = OVIS(3, gamma=gamma, alpha=alpha, renyi="tempered", clip_log_odds=None)
    assert_exact(loss, COIN, value, mixed(COIN, gradient, guide))


@pytest.mark.parametrize("program", [COIN, programs.MIXTURE], ids=lambda program: program.name)
def test_auxiliary_draws_out_of_the_budget_give_the_guide_the_gradient_of_the_smaller_bound(program):
    value, gradient = exact_bound(program, 3)
    guide = exact_bound(program, 2)[1]
    loss = OVIS(3, num_auxiliary=1, exclusive=False, clip_log_odds=None)
    assert_exact(loss, program, value, mixed(program, gradient, guide))


def test_the_default_clip_changes_nothing_where_weights_are_moderate():
    for loss in (partial(OVIS, 3), partial(OVIS, 3, num_auxiliary=1)):
        clipped, exact = draws(loss(), COIN, num_draws=100), draws(loss(clip_log_odds=None), COIN, num_draws=100)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), clipped, exact)


@pytest.mark.parametrize(("program", "alpha"), [(programs.GAUSSIAN, 0.5), (programs.WALK, 0.0)])
def test_sticking_the_landing_adds_the_wake_direction(program, alpha):
    assert_exact(STL(2, alpha=alpha), program, *plus_wake(program, 2, alpha, 1.0))


def test_sticking_the_landing_is_unbiased_for_one_particle():
    assert_exact(STL(1), programs.GAUSSIAN, *exact_bound(programs.GAUSSIAN, 1))


@pytest.mark.parametrize("tradeoff", [0.5, 1.0])
def test_dreg_mixes_the_bound_and_the_wake_direction(tradeoff):
    program = programs.GAUSSIAN
    value, gradient = exact_bound(program, 2)
    wake = exact_direction(at_fixed_draws(program), 2, programs.wake_phi)
    guide = {k: (1 - tradeoff) * gradient[k] + tradeoff * wake[k] for k in gradient}
    assert_exact(DReG(2, tradeoff=tradeoff), program, value, mixed(program, gradient, guide))


@pytest.mark.parametrize(("program", "alpha"), [(COIN, 0.5), (programs.SIGMOID, 0.0), (programs.SCAN, 0.5)])
def test_reweighted_wake_sleep_follows_the_wake_directions(program, alpha):
    value, gradient = exact_bound(program, 3, alpha)
    wake = exact_direction(program, 3, partial(programs.wake_phi, alpha=alpha))
    assert_exact(RWS(3, alpha=alpha), program, value, mixed(program, gradient, wake))


@pytest.mark.parametrize("program", [programs.GAUSSIAN, programs.CLUSTER], ids=lambda program: program.name)
def test_wake_directions_of_reparameterised_sites_are_taken_at_fixed_draws(program):
    value, gradient = exact_bound(program, 2)
    wake = exact_direction(at_fixed_draws(program), 2, programs.wake_phi)
    loss = RWS(2, wake_theta=0.5, wake_phi=2.0)
    scaled = mixed(program, {k: 0.5 * v for k, v in gradient.items()}, {k: 2.0 * v for k, v in wake.items()})
    assert_exact(loss, program, value, scaled)


PARTITIONS = {
    "default": ({}, [0.0, 1e-10, 1.0], "left"),
    "three-right": ({"partitions": 3, "beta_min": 0.05, "rule": "right"}, [0.0, 0.05, 0.05**0.5, 1.0], "right"),
    "linear-trapz": ({"partitions": 2, "spacing": "linear", "rule": "trapz"}, [0.0, 0.5, 1.0], "trapz"),
    "one": ({"partitions": 1}, [0.0, 1.0], "left"),
}


@pytest.mark.parametrize(
    ("program", "partition"),
    [(COIN, "default"), (COIN, "one"), (programs.SIGMOID, "three-right"), (programs.SIGMOID, "linear-trapz")],
)
def test_thermodynamic_objective_and_its_covariance_gradient(program, partition):
    options, betas, rule = PARTITIONS[partition]
    coefficients, value = programs.thermodynamic(betas, rule)
    expected = exact_direction(program, 3, coefficients)
    assert_exact(TVO(3, **options), program, exact_expectation(program, 3, value)[0], expected)


# ---- plates: which elements get weights of their own


def whole_model(program: Program, **sizes) -> Program:
    """The same program with one weight for the whole model, whose latents are enumerated together."""
    return dataclasses.replace(program, axis=None, assignments=programs.grid(**sizes))


JOINT_MIXTURE = whole_model(programs.MIXTURE, c=(3, (4,)))


def test_weights_of_the_whole_model_give_a_looser_bound_than_weights_of_plate_elements():
    """The references themselves: what the tests below tell apart is far more than their tolerance."""
    per_element, joint = exact_bound(programs.MIXTURE, 2)[0], exact_bound(JOINT_MIXTURE, 2)[0]
    assert joint + 0.3 < per_element
    assert abs(exact_bound(programs.MIXTURE, 1)[0] - exact_bound(JOINT_MIXTURE, 1)[0]) < 1e-4


def test_plates_none_means_weights_of_the_whole_model():
    assert_exact(VIMCO(2, plates=None), JOINT_MIXTURE, *exact_bound(JOINT_MIXTURE, 2))


def test_plates_can_be_named():
    assert_exact(VIMCO(2, plates=("data",)), programs.MIXTURE, *exact_bound(programs.MIXTURE, 2))
    # Of two enclosing plates, only the one named has weights of its own.
    assert_exact(VIMCO(2, plates=["rows"]), CELLS_BY_ROW, *exact_bound(CELLS_BY_ROW, 2))


def cell_model(x, row_dim=-2, column_dim=-1, subsample=(None, None)):
    """Two plates that both enclose everything."""
    logit = numpyro.param("prior_logit", 0.4)
    rows = numpyro.plate("rows", x.shape[row_dim], dim=row_dim, subsample_size=subsample[0])
    columns = numpyro.plate("columns", x.shape[column_dim], dim=column_dim, subsample_size=subsample[1])
    with rows, columns:
        x = numpyro.subsample(x, event_dim=0)
        z = numpyro.sample("z", dist.Bernoulli(logits=logit))
        numpyro.sample("x", dist.Normal(2.0 * z, 0.8), obs=x)


def cell_guide(x, row_dim=-2, column_dim=-1, subsample=(None, None)):
    slope = numpyro.param("slope", 0.5)
    rows = numpyro.plate("rows", x.shape[row_dim], dim=row_dim, subsample_size=subsample[0])
    columns = numpyro.plate("columns", x.shape[column_dim], dim=column_dim, subsample_size=subsample[1])
    with columns, rows:
        x = numpyro.subsample(x, event_dim=0)
        numpyro.sample("z", dist.Bernoulli(logits=slope * x))


CELLS = Program(
    "cells",
    cell_model,
    cell_guide,
    jnp.array([[0.3, 1.8, -0.5], [1.1, -0.9, 2.4]]),
    {"prior_logit": jnp.asarray(0.4), "slope": jnp.asarray(0.5)},
    programs.grid(z=(2, (1, 1))),
)
CELLS_BY_ROW = dataclasses.replace(CELLS, assignments=programs.grid(z=(2, (1, 3))))
# For the reference of weights per cell, every cell is a row of one column.
SINGLE_CELLS = dataclasses.replace(CELLS, data=CELLS.data.reshape(-1, 1))


@pytest.mark.parametrize("dims", [(-2, -1), (-1, -2)])
def test_two_enclosing_plates_give_weights_of_each_cell_in_either_nesting(dims):
    data = CELLS.data if dims[0] == -2 else CELLS.data.T
    program = dataclasses.replace(CELLS, data=data)
    kwargs = {"row_dim": dims[0], "column_dim": dims[1]}
    assert_exact(VIMCO(2), program, *exact_bound(SINGLE_CELLS, 2), kwargs=kwargs)


def test_both_of_two_enclosing_plates_can_be_subsampled():
    assert_exact(VIMCO(2), CELLS, *exact_bound(SINGLE_CELLS, 2), kwargs={"subsample": (1, 2)})


SUBSAMPLED = {"num_data": 3, "batch_size": 1}


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_bound_and_gradient_keep_their_means_under_subsampling(alpha):
    program = programs.SIGMOID
    assert_exact(VIMCO(2, alpha=alpha), program, *exact_bound(program, 2, alpha), kwargs=SUBSAMPLED)


def test_numpyro_trace_graph_elbo_scales_the_guide_gradient_twice_under_subsampling():
    """Documented comparison: with one of three rows its guide gradient is three times the full one."""
    program = programs.SIGMOID
    value, exact = exact_bound(program, 1)
    values, gradients = draws(TraceGraph_ELBO(), program, kwargs=SUBSAMPLED)
    assert_mean(values, value)
    assert worst_coordinate(gradients, exact)[0] > 20
    assert_gradients(gradients, {k: 3 * v if k in program.guide_params else v for k, v in exact.items()})


def batch_model(x, num_data):
    """A minibatch is handed in, and the plate knows how many rows there are."""
    logit = numpyro.param("prior_logit", 0.4)
    with numpyro.plate("data", num_data, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Bernoulli(logits=logit))
        numpyro.sample("x", dist.Normal(2.0 * z, 0.8), obs=x)


def batch_guide(x, num_data):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", num_data, subsample_size=len(x)):
        numpyro.sample("z", dist.Bernoulli(logits=slope * x))


def test_a_minibatch_handed_in_is_scaled_to_all_rows():
    """Two of six rows: three times the bound of the two."""
    params = {"prior_logit": jnp.asarray(0.4), "slope": jnp.asarray(0.5)}
    program = Program("batch", batch_model, batch_guide, jnp.array([0.3, 1.8]), params, programs.grid(z=(2, (1,))))
    value, gradient = exact_bound(dataclasses.replace(SINGLE_CELLS, data=program.data[:, None]), 2)
    assert_exact(VIMCO(2), program, 3 * value, {k: 3 * v for k, v in gradient.items()}, kwargs={"num_data": 6})


def autoguide_model(x):
    loc = numpyro.param("loc", 0.4)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.8), obs=x)


def joint_normal_guide(x):
    """What AutoMultivariateNormal is, written out."""
    loc = numpyro.param("auto_loc")
    scale_tril = numpyro.param("auto_scale_tril")
    numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


def _joint_normal_assignments(params, element):
    nodes, log_weights = programs.gauss_hermite(12)
    noise = jnp.stack([n.ravel() for n in jnp.meshgrid(nodes, nodes)], -1)
    log_measure = sum(w.ravel() for w in jnp.meshgrid(log_weights, log_weights))
    return {"z": params["auto_loc"] + noise @ params["auto_scale_tril"].T}, log_measure


JOINT_NORMAL = Program(
    "joint Normal",
    autoguide_model,
    joint_normal_guide,
    jnp.array([0.7, -1.2]),
    {
        "loc": jnp.asarray(0.4),
        "auto_loc": jnp.array([0.2, -0.5]),
        "auto_scale_tril": jnp.array([[0.8, 0.0], [0.3, 0.6]]),
    },
    _joint_normal_assignments,
    axis=None,
)


@pytest.mark.parametrize("estimator", [IWELBO, DReG, VIMCO])
def test_a_guide_outside_the_data_plate_gets_weights_of_the_whole_model(estimator):
    program = dataclasses.replace(JOINT_NORMAL, guide=initialised(AutoMultivariateNormal(autoguide_model)))
    value, gradient = exact_bound(JOINT_NORMAL, 2)
    values, gradients = draws(estimator(2), program)
    assert_mean(values, value)
    gradients["auto_scale_tril"] = jnp.tril(gradients["auto_scale_tril"])
    assert_gradients(gradients, gradient | {"auto_scale_tril": jnp.tril(gradient["auto_scale_tril"])})


def test_numpyro_renyi_elbo_is_wrong_for_a_guide_outside_the_data_plate():
    """Documented comparison: it subtracts the joint log q from every datapoint."""
    program = dataclasses.replace(JOINT_NORMAL, guide=initialised(AutoMultivariateNormal(autoguide_model)))
    values, _ = draws(RenyiELBO(num_particles=2), program)
    value, error = exact_bound(JOINT_NORMAL, 2)[0], values.std() / np.sqrt(len(values))
    assert abs(values.mean() - value) > 50 * error


def initialised(guide):
    """An automatic guide after its first trace, which finds the shapes of the latents."""
    with handlers.block():
        handlers.seed(guide, random.key(0))(jnp.array([0.7, -1.2]))
    return guide


def penalised_mixture(x):
    programs.mixture_model(x)
    numpyro.factor("penalty", -0.5 * numpyro.param("locs", programs.MIXTURE_PARAMS["locs"]) @ jnp.ones(3))


def test_a_factor_outside_the_plate_gives_weights_of_the_whole_model_and_right_values():
    program = dataclasses.replace(JOINT_MIXTURE, model=penalised_mixture)
    assert_exact(VIMCO(2), program, *exact_bound(program, 2))


def traced_only(loss, model, guide, data) -> None:
    jax.eval_shape(lambda rng_key: loss.loss(rng_key, {}, model, guide, data), random.key(0))


def test_lost_plates_are_warned_of_once_they_matter():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def model_with_factor(x):
        model(x)
        numpyro.factor("penalty", 0.0)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.5 * x, 0.7))

    def unplated_guide(x):
        numpyro.sample("z", dist.Normal(0.5 * x, 0.7).to_event(1))

    def loss(model, guide, size, num_particles=3, **options):
        traced_only(IWELBO(num_particles, **options), model, guide, jnp.linspace(-1.0, 1.0, size))

    with pytest.warns(UserWarning, match=r"plate 'data' \(12 elements\).*outside it: 'penalty'"):
        loss(model_with_factor, guide, 12)
    with pytest.warns(UserWarning, match=r"plate 'data' \(12 elements\).*outside it: 'z'"):
        loss(model, unplated_guide, 12)
    # No warning (warnings are errors here): nothing is lost, it is meant, or one particle has no weights.
    loss(model, guide, 12)
    loss(model_with_factor, guide, 12, plates=None)
    loss(model_with_factor, guide, 12, num_particles=1)


def test_a_batch_dimension_without_a_plate_is_warned_of():
    def model(x):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(12), 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        numpyro.sample("z", dist.Normal(0.5 * x, 0.7))

    with pytest.warns(UserWarning, match=r"batch dimension -1 of site '[zx]' \(12 elements\) belongs to no plate"):
        traced_only(IWELBO(3), model, guide, jnp.zeros(12))


# ---- scales and masks


def scaled_model(x):
    """beta-VAE: the latents' terms are scaled, the likelihood is not."""
    logit = numpyro.param("prior_logit", 0.4)
    with numpyro.plate("data", len(x)):
        with handlers.scale(scale=0.3):
            z = numpyro.sample("z", dist.Bernoulli(logits=logit))
        numpyro.sample("x", dist.Normal(2.0 * z, 0.8), obs=x)


def scaled_guide(x):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", len(x)), handlers.scale(scale=0.3):
        numpyro.sample("z", dist.Bernoulli(logits=slope * x))


def unscaled_guide(x):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Bernoulli(logits=slope * x))


SCALED = Program(
    "scaled latents",
    scaled_model,
    scaled_guide,
    jnp.array([0.3, 1.8, -0.5]),
    {"prior_logit": jnp.asarray(0.4), "slope": jnp.asarray(0.5)},
    programs.grid(z=(2, (1,))),
    sampler=unscaled_guide,
)


def unscaled_model(x):
    logit = numpyro.param("prior_logit", 0.4)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(logits=logit))
        numpyro.sample("x", dist.Normal(2.0 * z, 0.8), obs=x)


@pytest.mark.parametrize("name", ["reinforce", "vimco-geometric", "ovis-auxiliary"])
def test_scaled_latents_are_scaled_inside_the_weight_and_not_in_the_score(name):
    """Each log weight is log p(x | z) + 0.3 (log p(z) - log q(z)); the draws are still from q."""
    assert_exact(UNBIASED[name](3), SCALED, *exact_bound(SCALED, 3))


def test_kl_weight_is_the_same_as_scaled_latents():
    plain = dataclasses.replace(SCALED, model=unscaled_model, guide=unscaled_guide, sampler=None)
    a = draws(VIMCO(3, kl_weight=0.3), plain, num_draws=50)
    b = draws(VIMCO(3), SCALED, num_draws=50)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), a, b)


def test_the_reference_of_scaled_latents_is_the_written_formula():
    """By hand, two particles, one datapoint."""
    x, beta = 0.3, 0.3
    q = jax.nn.sigmoid(jnp.array([-0.5 * x, 0.5 * x]))
    p = jax.nn.sigmoid(jnp.array([-0.4, 0.4]))
    likelihood = jnp.exp(dist.Normal(jnp.array([0.0, 2.0]), 0.8).log_prob(x))
    w = likelihood * (p / q) ** beta
    bound = sum(q[i] * q[j] * jnp.log((w[i] + w[j]) / 2) for i in range(2) for j in range(2))
    one = dataclasses.replace(SCALED, data=jnp.array([x]))
    np.testing.assert_allclose(exact_bound(one, 2)[0], bound, rtol=1e-5)


@pytest.mark.parametrize("estimator", [IWELBO, DReG])
def test_scales_act_inside_the_weight_of_reparameterised_guides(estimator):
    """The whole program at half its scale, with K = 1, is half the bound."""
    program = programs.GAUSSIAN
    halved = dataclasses.replace(
        program, model=handlers.scale(program.model, scale=0.5), guide=handlers.scale(program.guide, scale=0.5)
    )
    value, gradient = exact_bound(program, 1)
    assert_exact(estimator(1), halved, 0.5 * value, {k: 0.5 * v for k, v in gradient.items()})


def masked_model(x, observed):
    logit = numpyro.param("prior_logit", 0.4)
    scale = numpyro.param("scale", 0.8, constraint=constraints.positive)
    with numpyro.plate("data", x.shape[0], dim=-2):
        z = numpyro.sample("z", dist.Bernoulli(logits=logit))
        with numpyro.plate("features", x.shape[1], dim=-1), handlers.mask(mask=observed):
            numpyro.sample("x", dist.Normal(2.0 * z, scale), obs=x)


def masked_guide(x, observed):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", x.shape[0], dim=-2):
        total = jnp.sum(jnp.where(observed, x, 0.0), axis=1, keepdims=True)
        numpyro.sample("z", dist.Bernoulli(logits=slope * total))


def observed_only_model(x):
    """One row with its observed values only."""
    masked_model(x, jnp.ones(x.shape, bool))


def observed_only_guide(x):
    masked_guide(x, jnp.ones(x.shape, bool))


def test_masked_observations_add_nothing_and_may_be_nan():
    x = jnp.array([[0.3, jnp.nan], [jnp.nan, 1.8], [0.9, 0.2]])
    params = {"prior_logit": jnp.asarray(0.4), "scale": jnp.asarray(0.8), "slope": jnp.asarray(0.5)}
    program = Program("masked", masked_model, masked_guide, x, params, programs.grid(z=(2, (1, 1))))
    rows = dataclasses.replace(program, model=observed_only_model, guide=observed_only_guide)
    parts = [exact_bound(dataclasses.replace(rows, data=row), 3) for row in (x[:1, :1], x[1:2, 1:], x[2:])]
    gradient = jax.tree.map(lambda *g: sum(g), *(gradient for _, gradient in parts))
    assert_exact(VIMCO(3), program, sum(v for v, _ in parts), gradient, kwargs={"observed": ~jnp.isnan(x)})


def imputed_model(x, observed):
    """obs_mask: what is missing becomes a latent site of its own."""
    loc = numpyro.param("loc", 0.3)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=observed)


def imputing_guide(x, observed):
    start = numpyro.param("start", -0.2)
    with numpyro.plate("data", len(x)), handlers.mask(mask=~observed):
        numpyro.sample("x_unobserved", dist.Normal(start, 1.2))


@pytest.mark.parametrize("estimator", [IWELBO, DReG, VIMCO])
def test_obs_mask_makes_missing_values_latent(estimator):
    """The bound of the observed values is their log density; of a missing one, that of its proposal."""
    x, observed = jnp.array([0.4, jnp.nan, -1.0]), jnp.array([True, False, True])

    def proposal_bound(params):
        nodes, log_weights = programs.gauss_hermite(32)
        value = params["start"] + 1.2 * nodes
        log_w = dist.Normal(params["loc"], 1.0).log_prob(value) - dist.Normal(params["start"], 1.2).log_prob(value)
        pairs = jnp.logaddexp(log_w[:, None], log_w) - jnp.log(2)
        missing = jnp.sum(jnp.exp(log_weights[:, None] + log_weights) * pairs)
        return missing + dist.Normal(params["loc"], 1.0).log_prob(x[jnp.array([0, 2])]).sum()

    params = {"loc": jnp.asarray(0.3), "start": jnp.asarray(-0.2)}
    program = Program("imputed", imputed_model, imputing_guide, x, params, None)
    value, gradient = jax.value_and_grad(proposal_bound)(params)
    assert_exact(estimator(2), program, value, gradient, kwargs={"observed": observed})


# ---- sleep: the guide learns from simulations of the model

ALL_VISIBLES = jnp.array(list(np.ndindex(2, 2, 2)), jnp.result_type(float))


def sleep_divergence_gradient(num_rows: int) -> dict:
    """Gradient in the guide's parameters of E_p(x) KL(p(z | x) || q(z | x)), summed over rows."""
    every_visible = dataclasses.replace(programs.SIGMOID, data=ALL_VISIBLES)
    log_p = every_visible.table[0].log_p
    log_posterior = log_p - jax.nn.logsumexp(log_p, axis=1, keepdims=True)

    def divergence(params):
        return num_rows * jnp.sum(jnp.exp(log_p) * (log_posterior - every_visible.densities(params).log_q))

    gradient = quickly_compiled(jax.grad(divergence))(every_visible.params)
    return {k: gradient[k] for k in every_visible.guide_params}


@pytest.mark.parametrize("kwargs", [{}, SUBSAMPLED], ids=["all rows", "one of three rows"])
def test_sleep_descends_the_inclusive_divergence_under_the_model(kwargs):
    """The model gets no sleep gradient; minus the divergence's gradient is the guide's direction of ascent."""
    program = programs.SIGMOID
    value, gradient = exact_bound(program, 2)
    values, gradients = draws(RWS(2, wake_phi=0.0, sleep_phi=0.7, num_sleep=2), program, kwargs=kwargs)
    expected = gradient | {k: -0.7 * v for k, v in sleep_divergence_gradient(3).items()}
    assert_mean(values, value)
    assert_gradients(gradients, expected)


def test_sleep_only_leaves_the_model_alone():
    _, gradients = draws(RWS(1, wake_theta=0.0, wake_phi=0.0, sleep_phi=1.0), programs.SIGMOID, num_draws=100)
    for name, values in gradients.items():
        assert name in programs.SIGMOID.guide_params or not np.any(values)
        assert name not in programs.SIGMOID.guide_params or np.any(values)


def test_wake_and_sleep_directions_add_up():
    """The same keys: linear in the weights of the objectives."""
    program, options = programs.SCAN, {"num_draws": 20}
    _, wake = draws(RWS(2, wake_phi=1.0), program, **options)
    _, sleep = draws(RWS(2, wake_theta=0.0, wake_phi=0.0, sleep_phi=1.0), program, **options)
    _, both = draws(RWS(2, wake_phi=0.3, sleep_phi=0.7), program, **options)
    for name in program.guide_params:
        np.testing.assert_allclose(both[name], 0.3 * wake[name] + 0.7 * sleep[name], rtol=1e-4, atol=1e-4)


def paired_model(data, num_rows):
    logit = numpyro.param("logit", 0.3)
    with numpyro.plate("rows", num_rows, subsample_size=2):
        x = numpyro.subsample(data["x"], event_dim=0)
        y = numpyro.subsample(data["y"], event_dim=0)
        z = numpyro.sample("z", dist.Bernoulli(logits=logit))
        numpyro.sample("x", dist.Bernoulli(logits=2.0 * z - 1.0), obs=x)
        numpyro.sample("y", dist.Poisson(1.0 + z), obs=y)


def paired_guide(data, num_rows):
    slopes = numpyro.param("slopes", jnp.array([0.4, -0.3]))
    with numpyro.plate("rows", num_rows, subsample_size=2):
        x = numpyro.subsample(data["x"], event_dim=0)
        y = numpyro.subsample(data["y"], event_dim=0)
        numpyro.sample("z", dist.Bernoulli(logits=slopes[0] * x + slopes[1] * y))


def paired_sleep_gradient(slopes):
    """E_p grad log q(z | x, y), for one row."""

    def expected_log_q(slopes):
        z, x, y = (v.ravel() for v in jnp.meshgrid(jnp.arange(2), jnp.arange(2), jnp.arange(25), indexing="ij"))
        log_p = dist.Bernoulli(logits=0.3).log_prob(z) + dist.Bernoulli(logits=2.0 * z - 1.0).log_prob(x)
        log_p += dist.Poisson(1.0 + z).log_prob(y)
        return jnp.sum(jnp.exp(log_p) * dist.Bernoulli(logits=slopes[0] * x + slopes[1] * y).log_prob(z))

    return jax.grad(expected_log_q)(slopes)


@pytest.mark.parametrize("given", ["dict", "simulate"])
def test_simulated_data_reach_a_guide_with_several_observed_sites(given):
    """Two of five rows: a dict of arrays is filled by site name; or the caller says how."""
    data = {"x": jnp.array([0, 1, 1, 0, 1]), "y": jnp.array([0.0, 2.0, 1.0, 3.0, 1.0])}
    params = {"logit": jnp.asarray(0.3), "slopes": jnp.array([0.4, -0.3])}
    program = Program("paired", paired_model, paired_guide, data, params, None)
    options = {}
    if given == "simulate":

        def guide(data, num_rows):
            x, y = data if isinstance(data, tuple) else (data["x"][:2], data["y"][:2])
            slopes = numpyro.param("slopes", jnp.array([0.4, -0.3]))
            with numpyro.plate("rows", num_rows, subsample_size=2):
                numpyro.sample("z", dist.Bernoulli(logits=slopes[0] * x + slopes[1] * y))

        program = dataclasses.replace(program, guide=guide)
        options["simulate"] = lambda values: (((values["x"], values["y"]),), {"num_rows": 5})
    loss = RWS(1, wake_theta=0.0, wake_phi=0.0, sleep_phi=1.0, **options)
    _, gradients = draws(loss, program, kwargs={"num_rows": 5})
    assert_gradients(gradients, {"logit": jnp.zeros(()), "slopes": 5 * paired_sleep_gradient(params["slopes"])})


# ---- drop-in: what an ELBO of NumPyro can be used for

ESTIMATORS: dict[str, Callable] = {
    **UNBIASED,
    "ovis-gamma": partial(OVIS, gamma=1.0),
    "ovis-budget": partial(OVIS, num_auxiliary=1, exclusive=False),
    "rws": partial(RWS, sleep_phi=0.5),
    "tvo": TVO,
}
PATHWISE: dict[str, Callable] = {"iwelbo": IWELBO, "stl": STL, "dreg": DReG}
NUM_STEPS = 4


def trains_in_every_way(loss, program: Program, optim=None) -> None:
    """SVI.run, compiled updates, stable updates and fit take the same steps, and change every parameter."""
    svi = SVI(program.model, program.guide, optim or optax.adam(0.1), loss)
    result = svi.run(random.key(0), NUM_STEPS, program.data, progress_bar=False)
    assert np.isfinite(result.losses).all() and result.losses.shape == (NUM_STEPS,)
    for name, value in result.params.items():
        assert np.isfinite(value).all() and not np.allclose(value, program.params[name]), name
    fitted = fit(svi, random.key(0), NUM_STEPS, program.data, progress_bar=False)
    np.testing.assert_allclose(fitted.losses, result.losses, rtol=1e-4)
    for method in (svi.update, svi.stable_update):
        state, losses = svi.init(random.key(0), program.data), []
        update = quickly_compiled(method)
        for _ in range(NUM_STEPS):
            state, value = update(state, program.data)
            losses.append(value)
        np.testing.assert_allclose(jnp.stack(losses), result.losses, rtol=1e-4)
        assert update._cache_size() == 1
    np.testing.assert_allclose(svi.get_params(state)[name], result.params[name], rtol=1e-4)


ALL_PROGRAMS = (*programs.DISCRETE, *programs.HYBRID, *programs.CONTINUOUS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "program"),
    [(name, program) for name in ESTIMATORS for program in ALL_PROGRAMS]
    + [(name, program) for name in PATHWISE for program in programs.CONTINUOUS],
)
def test_every_estimator_trains_every_program_in_every_way(name, program):
    trains_in_every_way((ESTIMATORS | PATHWISE)[name](3), program)


@pytest.mark.parametrize(
    ("name", "program"),
    [("rws", programs.SCAN), ("dreg", programs.WALK)],
)
def test_estimators_train_in_every_way(name, program):
    trains_in_every_way((ESTIMATORS | PATHWISE)[name](3), program)


def test_estimators_of_the_same_bound_have_the_same_value_for_the_same_key():
    """Their draws are the same; no estimator warns."""
    program = programs.GAUSSIAN

    @quickly_compiled
    def values(rng_key):
        losses = {name: make(3) for name, make in (ESTIMATORS | PATHWISE).items()}
        return {
            k: v.loss(rng_key, program.params, program.model, program.guide, program.data) for k, v in losses.items()
        }

    result = values(random.key(3))
    for name, value in result.items():
        assert np.isfinite(value)
        if name != "tvo":
            np.testing.assert_allclose(value, result["iwelbo"], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["vimco-arithmetic", "vimco-geometric", "ovis", "ovis-gamma", "tvo"])
def test_estimators_that_compare_particles_need_two(name):
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        ESTIMATORS[name](1)


@pytest.mark.parametrize("name", ["reinforce", "ovis-auxiliary", "iwelbo", "dreg"])
def test_one_particle_is_the_evidence_lower_bound(name):
    program = programs.GAUSSIAN if name in PATHWISE else programs.MIXTURE
    assert_exact((UNBIASED | PATHWISE)[name](1), program, *exact_bound(program, 1))


@pytest.mark.parametrize("name", ["dreg", "rws", "ovis-auxiliary"])
def test_forward_mode_gives_the_gradient_of_reverse_mode(name):
    program, loss = programs.WALK, (ESTIMATORS | PATHWISE)[name](3)

    def bound(params):
        return loss.loss(random.key(2), params, program.model, program.guide, program.data)

    reverse, forward = quickly_compiled(lambda p: (jax.grad(bound)(p), jax.jacfwd(bound)(p)))(program.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), reverse, forward)


@pytest.mark.parametrize("name", ["ovis-auxiliary", "rws"])
def test_num_mc_averages_independent_bounds(name):
    """The same mean; the variance of the value is a third."""
    program = programs.MIXTURE
    loss, averaged = ESTIMATORS[name](2), ESTIMATORS[name](2, num_mc=3)
    values, gradients = draws(loss, program)
    mean_values, mean_gradients = draws(averaged, program, seed=1)
    assert_mean(mean_values, exact_bound(program, 2)[0])
    errors = [jnp.std(g) ** 2 for g in (gradients["slopes"][:, 0], mean_gradients["slopes"][:, 0])]
    assert 0.28 < np.var(mean_values) / np.var(values) < 0.39
    if name != "rws":  # whose simulations are not repeated
        assert 0.25 < errors[1] / errors[0] < 0.42
        assert_gradients(mean_gradients, exact_bound(program, 2)[1])


@pytest.mark.parametrize("name", ["vimco-arithmetic", "dreg", "rws", "ovis-auxiliary"])
def test_particles_in_batches_have_the_same_distribution(name):
    program = programs.GAUSSIAN if name in PATHWISE else programs.SIGMOID
    loss = (ESTIMATORS | PATHWISE)[name]
    if name == "rws":
        value, gradient = exact_bound(program, 3)
        wake = exact_direction(program, 3, programs.wake_phi)
        assert_exact(RWS(3, batch_size=2), program, value, mixed(program, gradient, wake))
    else:
        size = 2 if name in PATHWISE else 3
        assert_exact(loss(size, batch_size=size - 1), program, *exact_bound(program, size))


def free_bits_bound(program: Program, free_bits: float) -> tuple[float, dict]:
    """By enumeration, one particle: each latent site's log q - log p is at least ``free_bits``, for every draw.

    The guide's gradient is that of E_q at the scores of the draws.
    """

    def bound(params):
        log_q_rows = []
        for x in program.data:
            deep, shallow = (
                v.reshape(-1, 2).astype(float) for v in jnp.split(jnp.array(list(np.ndindex(2, 2, 2, 2))), 2, axis=1)
            )
            p = params

            def log_bernoulli(logits, value):
                return dist.Bernoulli(logits=logits).to_event(1).log_prob(value)

            prior_deep = log_bernoulli(jnp.broadcast_to(p["prior"], deep.shape), deep)
            prior_shallow = log_bernoulli((2 * deep - 1) @ p["deep_weights"] + p["deep_bias"], shallow)
            likelihood = log_bernoulli((2 * shallow - 1) @ p["visible_weights"] + p["visible_bias"], x)
            q_shallow = log_bernoulli((2 * x - 1) @ p["encoder_weights"] + p["encoder_bias"], shallow)
            q_deep = log_bernoulli((2 * shallow - 1) @ p["top_weights"] + p["top_bias"], deep)
            kl = jnp.maximum(q_deep - prior_deep, free_bits) + jnp.maximum(q_shallow - prior_shallow, free_bits)
            log_q_rows.append(jnp.sum(jnp.exp(q_deep + q_shallow) * (likelihood - kl)))
        return sum(log_q_rows)

    value, gradient = jax.value_and_grad(bound)(program.params)
    return float(value), gradient


def test_free_bits_limit_each_site_and_datapoint_from_below():
    program = programs.SIGMOID
    plain, limited = exact_bound(program, 1), free_bits_bound(program, 0.2)
    np.testing.assert_allclose(free_bits_bound(program, -1e6)[0], plain[0], rtol=1e-5)
    assert limited[0] < plain[0] - 0.1
    assert_exact(Reinforce(1, free_bits=0.2), program, *limited)


def test_kl_weight_and_alpha_follow_their_schedules_and_compile_once():
    """The loss at step s is that of a constant at the schedule's value, with the same keys; one compilation."""
    program = programs.SIGMOID
    traces = []

    def model(x):
        traces.append(1)
        return program.model(x)

    alpha, kl_weight = log_schedule(0.9, 0.1, 3), optax.linear_schedule(0.2, 1.0, 2)
    svi = SVI(model, program.guide, StepwiseOptim(optax.sgd(0.0)), VIMCO(3, alpha=alpha, kl_weight=kl_weight))
    state = svi.init(random.key(0), program.data)
    update, losses = quickly_compiled(svi.update), []
    num_traces = None
    for _ in range(5):
        state, value = update(state, program.data)
        losses.append(value)
        num_traces = num_traces or len(traces)
    assert update._cache_size() == 1 and len(traces) == num_traces
    result = svi.run(random.key(0), 5, program.data, progress_bar=False)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    fitted = fit(svi, random.key(0), 5, program.data, progress_bar=False)
    np.testing.assert_allclose(fitted.losses, losses, rtol=1e-4)
    for step in (1, 4):
        constants = {"alpha": float(alpha(step)), "kl_weight": float(kl_weight(step))}
        svi = SVI(program.model, program.guide, optax.sgd(0.0), VIMCO(3, **constants))
        key = random.key(0)
        state = svi.init(key, program.data)
        for _ in range(step):
            state = state._replace(rng_key=random.split(state.rng_key)[0])
        value = quickly_compiled(svi.evaluate)(state, program.data)
        np.testing.assert_allclose(value, losses[step], rtol=1e-4)


def hierarchical_model(x):
    loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.deterministic("twice", 2 * z)
        numpyro.sample("x", dist.Normal(z, scale), obs=x)


def hierarchical_guide(x):
    """A latent given another one, a deterministic value, a point mass and a key of the user's own."""
    loc = numpyro.sample("loc", dist.Normal(numpyro.param("m", 0.1), numpyro.param("s", 0.6)))
    centre = numpyro.deterministic("centre", loc * numpyro.param("w", 0.7))
    point = numpyro.param("point", 0.9, constraint=constraints.positive)
    scale = numpyro.sample("scale", dist.Delta(point))
    noise = 1e-3 * random.normal(numpyro.prng_key())
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(centre + 0.3 * x + noise, scale * numpyro.param("ratio", 0.8)))


HIERARCHY = Program(
    "hierarchy",
    hierarchical_model,
    hierarchical_guide,
    jnp.array([0.5, -0.2, 1.3]),
    {k: jnp.asarray(v) for k, v in {"m": 0.1, "s": 0.6, "w": 0.7, "point": 0.9, "ratio": 0.8}.items()},
    None,
)


@cache
def renyi_draws_of_the_hierarchy():
    return draws(RenyiELBO(num_particles=2), HIERARCHY, seed=1)


@pytest.mark.parametrize("estimator", [IWELBO, DReG, partial(OVIS, clip_log_odds=None)])
def test_hierarchical_guides_with_point_masses_agree_with_numpyro(estimator):
    """Two samples of 20,000 draws; NumPyro's RenyiELBO is right for reparameterised guides with common plates."""
    values, gradients = draws(estimator(2), HIERARCHY)
    others, expected = renyi_draws_of_the_hierarchy()
    assert_mean(values, others.mean(), reference_error=others.std() / np.sqrt(len(others)))
    for name, values in gradients.items():
        error = expected[name].std() / np.sqrt(len(expected[name]))
        assert_mean(values, expected[name].mean(), reference_error=error)


def test_point_masses_give_the_gradient_of_maximum_a_posteriori():
    """All particles are the same, so value and gradient are those of Trace_ELBO, for every key and estimator."""
    guide = AutoDelta(hierarchical_model)
    svi = SVI(hierarchical_model, guide, optax.adam(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(random.key(0), HIERARCHY.data))

    @quickly_compiled
    def values_and_gradients(rng_key):
        losses = {"trace": Trace_ELBO()} | {k: v(3) for k, v in (ESTIMATORS | PATHWISE).items() if k != "rws"}
        losses["rws"] = RWS(3)
        return {
            name: jax.value_and_grad(
                lambda params, loss=loss: loss.loss(rng_key, params, hierarchical_model, guide, HIERARCHY.data)
            )(params)
            for name, loss in losses.items()
        }

    result = values_and_gradients(random.key(1))
    for name, other in result.items():
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5, err_msg=name), other, result["trace"])


@pytest.mark.parametrize(
    ("automatic", "loss"),
    [(AutoNormal, DReG(3)), (AutoMultivariateNormal, OVIS(3)), (AutoIAFNormal, IWELBO(3))],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_automatic_guides_train(automatic, loss):
    svi = SVI(hierarchical_model, automatic(hierarchical_model), optax.adam(0.01), loss)
    state, losses = svi.init(random.key(0), HIERARCHY.data), []
    for _ in range(3):
        state, value = quickly_compiled(svi.update)(state, HIERARCHY.data)
        losses.append(value)
    assert np.isfinite(losses).all()


def test_predictions_from_a_trained_guide():
    loss = Reinforce(2, baseline=lambda x: numpyro.param("level", 0.0))
    svi = SVI(hierarchical_model, loss.with_baseline(hierarchical_guide), optax.adam(0.01), loss)
    result = svi.run(random.key(0), 3, HIERARCHY.data, progress_bar=False)
    predict = Predictive(hierarchical_model, guide=svi.guide, params=result.params, num_samples=5)
    samples = predict(random.key(1), HIERARCHY.data)
    assert samples["twice"].shape == (5, 3)
    assert set(samples) == {"twice", "x"}


@pytest.mark.parametrize("estimator", [IWELBO, STL, DReG])
def test_flows_agree_with_numpyro(estimator):
    """4,000 draws each, K = 1, where all three are unbiased; the densities need the inverse of the flow."""

    def model(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z[0] * z[1], 1.0), obs=x)

    guide = AutoIAFNormal(model, num_flows=1, hidden_dims=[3])
    svi = SVI(model, guide, optax.adam(0.01), Trace_ELBO())
    params = svi.get_params(svi.init(random.key(0), jnp.asarray(0.5)))
    program = Program("flow", model, guide, jnp.asarray(0.5), params, None)
    values, gradients = draws(estimator(1), program, num_draws=4000)
    others, expected = draws(Trace_ELBO(), program, num_draws=4000, seed=1)
    assert_mean(values, others.mean(), reference_error=others.std() / np.sqrt(4000))
    flatten = jax.vmap(lambda tree: ravel_pytree(tree)[0])
    gradients, expected = np.asarray(flatten(gradients), float), np.asarray(flatten(expected), float)
    error = np.sqrt((gradients.var(0) + expected.var(0)) / 4000) + 1e-6
    assert np.max(np.abs(gradients.mean(0) - expected.mean(0)) / error) < 5


class Encoder(nn.Module):
    """Two outputs for each input, with running statistics or dropout if asked for."""

    has_state: bool = False
    has_dropout: bool = False

    @nn.compact
    def __call__(self, x, **_):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=False)(x) if self.has_state else x
        x = nn.Dropout(0.5, deterministic=False)(x) if self.has_dropout else x
        return nn.Dense(2)(nn.tanh(x))


VISIBLE = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])


def decoder_model(x, is_discrete):
    decoder = eqx_module("decoder", eqx.nn.MLP(2, 3, 4, 1, key=random.key(3)))
    prior = dist.Bernoulli(0.5) if is_discrete else dist.Normal(0.0, 1.0)
    with numpyro.plate("data", 20, subsample_size=len(x)):
        z = numpyro.sample("z", prior.expand([2]).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=jax.vmap(decoder)(z.astype(float))).to_event(1), obs=x)


def encoder_guide(x, is_discrete, has_state=False, has_dropout=False):
    options = {"mutable": ["batch_stats"]} if has_state else {"apply_rng": ["dropout"]} if has_dropout else {}
    encoder = flax_module("encoder", Encoder(has_state, has_dropout), VISIBLE, **options)
    out = encoder(x, rngs={"dropout": numpyro.prng_key()}) if has_dropout else encoder(x)
    with numpyro.plate("data", 20, subsample_size=len(x)):
        numpyro.sample("z", (dist.Bernoulli(logits=out) if is_discrete else dist.Normal(out, 0.5)).to_event(1))


@pytest.mark.parametrize(
    ("name", "is_discrete", "has_dropout"),
    [("dreg", False, False), ("stl", False, True), ("ovis-gamma", True, False), ("rws", True, True)],
)
def test_networks_of_flax_and_equinox_train(name, is_discrete, has_dropout):
    svi = SVI(
        decoder_model,
        partial(encoder_guide, has_dropout=has_dropout),
        optax.adam(0.01),
        (ESTIMATORS | PATHWISE)[name](3),
        is_discrete=is_discrete,
    )
    before = svi.get_params(svi.init(random.key(0), VISIBLE))
    state, value = quickly_compiled(svi.update)(svi.init(random.key(0), VISIBLE), VISIBLE)
    assert np.isfinite(value)
    after = svi.get_params(state)
    assert all(not np.allclose(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_running_statistics_are_kept_for_one_particle_and_refused_for_several():
    guide = partial(encoder_guide, has_state=True)
    states = []
    for loss in (Trace_ELBO(), STL(1)):
        svi = SVI(decoder_model, guide, optax.adam(0.01), loss, is_discrete=False)
        state, _ = quickly_compiled(svi.update)(svi.init(random.key(0), VISIBLE), VISIBLE)
        states.append(state.mutable_state)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *states)
    several = SVI(decoder_model, guide, optax.adam(0.01), IWELBO(2), is_discrete=False)
    several.constrain_fn = svi.constrain_fn
    with pytest.raises(NotImplementedError, match=r"mutable site 'encoder\$state'.*num_particles=1"):
        jax.eval_shape(several.update, state, VISIBLE)


def test_a_decaying_average_is_unbiased_and_finds_the_mean_learning_signal():
    """3,000 steps without learning: the average weighs about 400 independent signals; then its gradient.

    The gradient of a loss that is given the state is that of a step of SVI.
    """
    program, loss = programs.MIXTURE, Reinforce(2, baseline=DecayingAverage(0.995))
    with_average = dataclasses.replace(program, guide=loss.with_baseline(program.guide))
    svi = SVI(program.model, with_average.guide, optax.sgd(0.0), loss)
    result = svi.run(random.key(0), 3000, program.data, progress_bar=False)
    (state,) = result.state.mutable_state.values()

    def signal(log_weights):
        """The mean over particles."""
        bound = jax.nn.logsumexp(log_weights, axis=-1) - jnp.log(2)
        return bound - 1 / 2

    mean = exact_expectation(program, 2, signal)[0] / 4
    square = exact_expectation(program, 2, lambda log_weights: signal(log_weights) ** 2)[0] / 4
    error = np.sqrt((square - mean**2) * 0.005 / 1.995)  # an upper limit: it is also a mean over four elements
    assert abs(state["average"] / state["total"] - mean) < 5 * error

    def one(rng_key):
        def bound(params):
            state = with_average.params | result.state.mutable_state | params
            return -loss.loss_with_mutable_state(rng_key, state, program.model, with_average.guide, program.data)[
                "loss"
            ]

        return jax.value_and_grad(bound)(program.params)

    values, gradients = quickly_compiled(jax.vmap(one))(random.split(random.key(1), NUM_DRAWS))
    value, expected = exact_bound(program, 2)
    assert_mean(values, value)
    assert_gradients(gradients, expected)


def feedback_model(x):
    """The observation of one step enters the next one."""
    stay = numpyro.param("stay", 1.5)

    def step(previous, x_t):
        z = numpyro.sample("z", dist.Bernoulli(logits=stay * (2 * previous - 1)))
        x_t = numpyro.sample("x", dist.Bernoulli(logits=2.0 * z - 1.0), obs=x_t)
        return x_t, None

    scan(step, jnp.asarray(1), x)


def feedback_guide(x):
    gain = numpyro.param("gain", jnp.array([0.3, 0.4]))

    def step(previous, x_t):
        numpyro.sample("z", dist.Bernoulli(logits=gain[0] * (2 * x_t - 1) + gain[1] * (2 * previous - 1)))
        return x_t, None

    scan(step, jnp.asarray(1), x)


def test_sleep_simulates_observations_that_enter_the_next_step_of_a_scan():
    params = {"stay": jnp.asarray(1.5), "gain": jnp.array([0.3, 0.4])}
    data = jnp.array([0, 0, 0])
    assignments = programs.grid(z=(2, (3,)))
    program = Program("feedback", feedback_model, feedback_guide, data, params, assignments, axis=None)
    expected = jnp.zeros(2)
    for x in np.ndindex(2, 2, 2):
        (_, log_p, _), (_, _, gradient) = dataclasses.replace(program, data=jnp.array(x)).table
        expected += jnp.exp(log_p[0]) @ gradient[0, :, :2]
    _, gradients = draws(RWS(1, wake_theta=0.0, wake_phi=0.0, sleep_phi=1.0), program)
    assert_gradients(gradients, {"stay": jnp.zeros(()), "gain": expected})


def clustered_model(x, batch_size=None):
    """A latent outside the plate, so that only one particle allows subsampling."""
    shift = numpyro.sample("shift", dist.Bernoulli(0.4))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        z = numpyro.sample("z", dist.Bernoulli(logits=1.0 * shift - 0.3))
        numpyro.sample("x", dist.Bernoulli(logits=2.0 * z - 1.0), obs=numpyro.subsample(x, event_dim=0))


def clustered_guide(x, batch_size=None):
    numpyro.sample("shift", dist.Bernoulli(logits=numpyro.param("level", 0.2)))
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        x = numpyro.subsample(x, event_dim=0)
        numpyro.sample("z", dist.Bernoulli(logits=slope * (2 * x - 1)))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_sleep_counts_every_row_of_a_plate_inside_the_model(batch_size):
    params = {"level": jnp.asarray(0.2), "slope": jnp.asarray(0.5)}
    data = jnp.array([0, 1, 1])

    def expected_log_q(params):
        shift, z, x = (v.ravel() for v in jnp.meshgrid(*[jnp.arange(2)] * 3, indexing="ij"))
        log_p = dist.Bernoulli(0.4).log_prob(shift) + dist.Bernoulli(logits=1.0 * shift - 0.3).log_prob(z)
        log_p += dist.Bernoulli(logits=2.0 * z - 1.0).log_prob(x)
        of_row = dist.Bernoulli(logits=params["slope"] * (2 * x - 1)).log_prob(z)
        of_shift = dist.Bernoulli(logits=params["level"]).log_prob(shift)
        return jnp.sum(jnp.exp(log_p) * (len(data) * of_row + of_shift))

    program = Program("clustered", clustered_model, clustered_guide, data, params, None)
    loss = RWS(1, wake_theta=0.0, wake_phi=0.0, sleep_phi=1.0)
    _, gradients = draws(loss, program, kwargs={"batch_size": batch_size})
    assert_gradients(gradients, jax.grad(expected_log_q)(params))


def test_mixture_proposals_inside_a_scan_are_accepted():
    """NumPyro leaves their batch shape without the time axis when it has scanned."""

    def guide(x):
        def step(z, x_t):
            locs = jnp.stack([0.5 * x_t, -0.5 * x_t])
            mixture = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.4, 0.6])), dist.Normal(locs, 0.8))
            return numpyro.sample("z", mixture), None

        scan(step, 0.0, x)

    def model(x):
        def step(z, x_t):
            z = numpyro.sample("z", dist.Normal(0.8 * z, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.9), obs=x_t)
            return z, None

        scan(step, 0.0, x)

    traced_only(VIMCO(2), model, guide, jnp.array([0.5, 1.0]))


def noisy_scan_model(x):
    first = numpyro.sample("first", dist.Normal(0.0, 1.0))

    def step(z, x_t):
        z = numpyro.sample("z", dist.Normal(0.8 * z, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.9), obs=x_t)
        return z, None

    scan(step, first, x)


def noisy_scan_guide(x):
    """Noise of the user's own inside a scan, as dropout is, after a latent."""
    slope = numpyro.param("slope", 0.5)
    numpyro.sample("first", dist.Normal(slope, 0.7))

    def step(_, x_t):
        noise = random.normal(numpyro.prng_key())
        return numpyro.sample("z", dist.Normal(slope * x_t + noise, 0.8)), None

    scan(step, 0.0, x)


def test_keys_inside_a_scan_are_the_same_whenever_the_guide_is_run_again():
    """The same draws and noise, so the same value; IWELBO runs the guide once."""
    params, data = {"slope": jnp.asarray(0.5)}, jnp.array([0.5, 1.0])

    @quickly_compiled
    def values(rng_key):
        losses = {name: (ESTIMATORS | PATHWISE)[name](3) for name in ("iwelbo", "dreg", "ovis-auxiliary", "rws")}
        return {k: v.loss(rng_key, params, noisy_scan_model, noisy_scan_guide, data) for k, v in losses.items()}

    result = values(random.key(0))
    for name, value in result.items():
        np.testing.assert_allclose(value, result["iwelbo"], rtol=1e-5, err_msg=name)


def local_params_model(x, batch_size=None):
    loc = numpyro.param("loc", 0.4)
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.8), obs=numpyro.subsample(x, event_dim=0))


def local_params_guide(x, batch_size=None):
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        starts = numpyro.param("starts", jnp.zeros(len(x)), event_dim=0)
        numpyro.sample("z", dist.Normal(starts, 0.7))


def test_parameters_of_each_datapoint_follow_the_subsampled_rows():
    data, starts = jnp.array([0.7, -1.2, 2.0]), jnp.array([0.3, -0.2, 0.9])

    def assignments(params, element):
        nodes, log_weights = programs.gauss_hermite(32)
        return {"z": params["starts"][jnp.argmax(data == element)] + 0.7 * nodes[:, None]}, log_weights

    def one_row_guide(x):
        start = numpyro.param("starts")[jnp.argmax(data == x[0])]
        with numpyro.plate("data", 1):
            numpyro.sample("z", dist.Normal(start, 0.7))

    params = {"loc": jnp.asarray(0.4), "starts": starts}
    reference = Program("rows", local_params_model, one_row_guide, data, params, assignments)
    program = dataclasses.replace(reference, guide=local_params_guide)
    assert_exact(DReG(2), program, *exact_bound(reference, 2), kwargs={"batch_size": 2})
