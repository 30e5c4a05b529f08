"""Optimisers under which the loss sees the step, and which train two groups of parameters in turns."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax, random
from jax.example_libraries import optimizers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import optax_to_numpyro

from numpyro_smc.engines.alternation import StepwiseOptim, alternating, current_phase, current_step
from numpyro_smc.engines.training import fit

Y = jnp.array([1.0, 2.0, 4.0])
KEY = random.key(3)
TWIST = {"weight": jnp.array([0.5, -1.0]), "bias": jnp.array(0.25)}


def model(y):
    z = numpyro.sample("z", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=y)


def guide(y):
    numpyro.param("twist_net$params", TWIST)
    numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), jnp.exp(numpyro.param("log_scale", 0.0))))


def twist_loss(params):
    twist = params["twist_net$params"]
    return jnp.sum((twist["weight"] - params["loc"]) ** 2) + (twist["bias"] - 3.0) ** 2


class TwoObjectives(Trace_ELBO):
    """The bound in the model's phase, a regression of the twist on the guide in the twist's."""

    def loss(self, rng_key, params, model, guide, *args, **kwargs):
        def bound():
            twist = params["twist_net$params"]  # so that the frozen group has a gradient
            return Trace_ELBO.loss(self, rng_key, params, model, guide, *args, **kwargs) + twist["weight"].sum()

        return lax.cond(current_phase(), lambda: twist_loss(params), bound)


class StepLoss(Trace_ELBO):
    """A loss whose value is the step, and whose gradient is not zero."""

    def loss(self, rng_key, params, *args, **kwargs):
        return current_step() + params["loc"] - lax.stop_gradient(params["loc"])


def make_svi(optim=None, loss=None):
    return SVI(model, guide, optim or alternating(optax.adam(0.1), optax.adam(0.03)), loss or TwoObjectives())


@pytest.fixture(scope="module")
def svi():
    return make_svi()


def groups(state):
    """The model's and the twist's optimiser state."""
    return state.optim_state[1]


def same_bits(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert pairs
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def states_along(svi, num_steps):
    state = svi.init(KEY, Y)
    update = jax.jit(svi.update)
    states = [state]
    for _ in range(num_steps):
        state, _ = update(state, Y)
        states.append(state)
    return states


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optim", [optax.sgd(0.1), numpyro.optim.ClippedAdam(0.1), optimizers.sgd(0.1)], ids=["optax", "numpyro", "jax"]
)
def test_the_loss_sees_the_step(optim):
    svi = make_svi(StepwiseOptim(optim), StepLoss())
    np.testing.assert_array_equal(svi.run(KEY, 5, Y, progress_bar=False).losses, range(5))


@pytest.mark.parametrize("flag", ["progress_bar", "stable_update", "forward_mode_differentiation"])
def test_the_loss_sees_the_step_in_every_mode_of_svi_run(flag):
    svi = make_svi(StepwiseOptim(optax.sgd(0.1)), StepLoss())
    np.testing.assert_array_equal(svi.run(KEY, 4, Y, **{"progress_bar": False, flag: True}).losses, range(4))


@pytest.mark.parametrize("stable_update", [False, True])
def test_forward_mode_reaches_the_wrapped_optimiser(stable_update):
    class Looping(StepLoss):
        def loss(self, rng_key, params, *args, **kwargs):
            zero = lax.while_loop(lambda x: x > 1.0, lambda x: x / 2, jnp.exp(params["loc"])) * 0.0
            return super().loss(rng_key, params, *args, **kwargs) + zero  # reverse mode refuses the loop

    options = {"progress_bar": False, "forward_mode_differentiation": True, "stable_update": stable_update}
    np.testing.assert_array_equal(make_svi(loss=Looping()).run(KEY, 4, Y, **options).losses, range(4))


def test_the_loss_sees_the_step_in_an_alternation_and_in_fit():
    result = fit(make_svi(loss=StepLoss()), KEY, 9, Y, progress_bar=False, chunk_size=2)
    np.testing.assert_array_equal(result.losses, range(9))


def test_the_loss_sees_the_step_under_minimize():
    seen = []

    def loss(params):
        seen.append(current_step())
        return (params["x"] - 2.0) ** 2, None

    optim = StepwiseOptim(numpyro.optim.Minimize())
    _, state = optim.eval_and_update(loss, optim.init({"x": jnp.array(0.0)}))
    assert seen and all(step is not None for step in seen)
    np.testing.assert_allclose(optim.get_params(state)["x"], 2.0, atol=1e-4)


def test_a_scan_body_sees_the_step_at_every_trace():
    def body(carry, _):
        step = current_step()
        numpyro.factor("step", 0.0 if step is None else step)
        return carry, None

    def stepping_model(y):
        numpyro.param("loc", 0.0)
        scan(body, None, None, length=2)

    svi = SVI(stepping_model, lambda y: None, StepwiseOptim(optax.sgd(0.1)), Trace_ELBO())
    for _ in range(2):
        np.testing.assert_array_equal(svi.run(KEY, 3, Y, progress_bar=False).losses, [0.0, -2.0, -4.0])


def test_wrapping_changes_no_step():
    plain, wrapped = (
        SVI(model, guide, optim, Trace_ELBO()) for optim in (optax.adam(0.1), StepwiseOptim(optax.adam(0.1)))
    )
    assert same_bits(states_along(plain, 3)[-1].optim_state, states_along(wrapped, 3)[-1].optim_state)


def test_outside_a_step_there_is_none():
    assert current_step() is None and current_phase() is None
    states_along(make_svi(), 1)
    assert current_step() is None and current_phase() is None


def test_the_phase_is_none_without_alternation():
    def loss(params):
        assert current_phase() is None and current_step() is not None
        return params["x"] ** 2, None

    optim = StepwiseOptim(optax.sgd(0.1))
    _, (step, _) = optim.eval_and_update(loss, optim.init({"x": jnp.array(1.0)}))
    assert step == 1


def test_nested_optimisers_see_their_own_step_and_errors_restore_it():
    inner = StepwiseOptim(optax.sgd(0.1))
    inner_state = inner.init({"x": jnp.array(1.0)})
    seen = []

    def inner_loss(params):
        seen.append(("inner", int(current_step())))
        raise ZeroDivisionError

    def outer_loss(params):
        seen.append(("outer", int(current_step())))
        with pytest.raises(ZeroDivisionError):
            inner.eval_and_update(inner_loss, (jnp.array(7), inner_state[1]))
        seen.append(("outer", int(current_step())))
        raise KeyError

    outer = StepwiseOptim(optax.sgd(0.1))
    for method in (outer.eval_and_update, outer.eval_and_stable_update):
        seen.clear()
        with pytest.raises(KeyError):
            method(outer_loss, (jnp.array(2), outer.init({"x": jnp.array(1.0)})[1]))
        assert seen == [("outer", 2), ("inner", 7), ("outer", 2)] and current_step() is None


# --- the alternation -------------------------------------------------------------------------------------------------


def test_two_adams_taking_turns_by_hand():
    svi = make_svi(alternating(optax.adam(0.1), optax.adam(0.03), num_steps=2, num_twist_steps=3))
    forward, reverse = (fit(svi, KEY, 12, Y, progress_bar=False, forward_mode_differentiation=f) for f in (True, False))

    model_group, twist_group = {"loc": jnp.array(0.0), "log_scale": jnp.array(0.0)}, {"twist_net$params": TWIST}
    adams = {False: optax.adam(0.1), True: optax.adam(0.03)}
    params = {False: model_group, True: twist_group}
    states = {phase: adams[phase].init(params[phase]) for phase in adams}
    key, losses = svi.init(KEY, Y).rng_key, []
    for step in range(12):
        key, step_key = random.split(key)
        phase = step % 5 >= 2

        def loss(group, phase=phase, step_key=step_key):
            merged = {**params[False], **params[True], **group}
            if phase:
                return twist_loss(merged)
            return Trace_ELBO().loss(step_key, merged, model, guide, Y) + merged["twist_net$params"]["weight"].sum()

        value, gradient = jax.value_and_grad(loss)(params[phase])
        updates, states[phase] = adams[phase].update(gradient, states[phase])
        params[phase] = optax.apply_updates(params[phase], updates)
        losses.append(value)

    by_hand = [(6, (params[False], states[False])), (6, (params[True], states[True]))]
    for result in (forward, reverse):
        np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
        pairs = zip(jax.tree.leaves(groups(result.state)), jax.tree.leaves(by_hand), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_frozen_group_is_untouched_to_the_bit():
    svi = make_svi(alternating(optax.adam(0.1), numpyro.optim.Adam(0.03), num_steps=1, num_twist_steps=2))
    states = states_along(svi, 6)
    for step, (before, after) in enumerate(pairwise(states)):
        trained = int(step % 3 >= 1)
        assert same_bits(groups(before)[1 - trained], groups(after)[1 - trained])
        pairs = zip(jax.tree.leaves(groups(before)[trained]), jax.tree.leaves(groups(after)[trained]), strict=True)
        assert all((np.asarray(old) != np.asarray(new)).any() for old, new in pairs)


@pytest.mark.parametrize("library", ["optax", "numpyro"])
def test_schedules_count_the_steps_of_their_own_group(library):
    def schedule(step):
        return jnp.where(step == 2, 1.0, 0.0)  # only the group's third step moves it

    sgd = {"optax": optax.sgd, "numpyro": numpyro.optim.SGD}[library]
    svi = make_svi(alternating(sgd(schedule), sgd(schedule), num_steps=2, num_twist_steps=1))
    locs, biases = [], []
    for state in states_along(svi, 9):
        params = svi.get_params(state)
        locs.append(float(params["loc"]))
        biases.append(float(params["twist_net$params"]["bias"]))
    assert np.flatnonzero(np.diff(locs)).tolist() == [3]  # steps 0, 1, 3 are the model's first three
    assert np.flatnonzero(np.diff(biases)).tolist() == [8]  # steps 2, 5, 8 are the twist's


@pytest.mark.parametrize("options", [{"progress_bar": True}, {"progress_bar": False, "stable_update": True}])
def test_svi_run_and_fit_agree(svi, options):
    run = svi.run(KEY, 20, Y, **options)
    result = fit(svi, KEY, 20, Y, progress_bar=False)
    np.testing.assert_allclose(run.losses, result.losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), run.params, result.params)


def test_both_groups_reach_their_optimum():
    svi = make_svi(alternating(optax.adam(0.03), optax.adam(0.1), num_twist_steps=2))
    params = fit(svi, KEY, 1500, Y, progress_bar=False).params  # one sample a step: the guide's mean errs by about 0.1
    np.testing.assert_allclose(params["twist_net$params"]["bias"], 3.0, atol=1e-3)
    np.testing.assert_allclose(params["twist_net$params"]["weight"], params["loc"], atol=0.3)


def test_restarts_are_exact_in_the_middle_of_a_phase(tmp_path):
    optim = alternating(optax.adam(0.1), optax.adam(0.03), num_steps=3, num_twist_steps=2)
    svi = make_svi(optim)

    def interrupt(step, values):
        if step == 11:
            raise KeyboardInterrupt

    whole = fit(svi, KEY, 20, Y, progress_bar=False)
    shared = {"progress_bar": False, "checkpoint": tmp_path / "run"}
    part = fit(svi, KEY, 20, Y, chunk_size=11, log=interrupt, **shared)
    again = fit(svi, KEY, 20, Y, chunk_size=4, **shared)
    assert part.interrupted and len(part.losses) == 11
    assert same_bits(again.state.optim_state, whole.state.optim_state) and same_bits(again.losses, whole.losses)


def test_a_non_finite_gradient_of_the_frozen_group_prevents_no_stable_step():
    def loss(params):
        frozen = lax.cond(current_phase(), lambda: params["a"], lambda: params["twist"])
        active = lax.cond(current_phase(), lambda: params["twist"], lambda: params["a"])
        return active**2 + jnp.sqrt(0.0 * frozen), None

    optim = alternating(optax.sgd(0.1), optax.sgd(0.1))
    state = optim.init({"a": jnp.array(1.0), "twist": jnp.array(1.0)})
    for _ in range(4):
        (value, _), state = optim.eval_and_stable_update(loss, state)
        assert np.isfinite(value)
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0.64, rtol=1e-6), optim.get_params(state))
    _, broken = optim.eval_and_stable_update(lambda params: (jnp.log(params["a"] - params["a"]), None), state)
    assert same_bits(broken, state)


def test_the_prefix_decides():
    svi = make_svi(alternating(optax.sgd(0.1), optax.sgd(0.1), twist_prefix="lo"))
    (_, (model_params, _)), (_, (twist_params, _)) = groups(svi.init(KEY, Y))
    assert set(model_params) == {"twist_net$params"} and set(twist_params) == {"loc", "log_scale"}


@pytest.mark.parametrize(("prefix", "message"), [("tilt", "'twist_net.params'. none does"), ("z_", "none does")])
def test_no_parameter_with_the_prefix_is_an_error(prefix, message):
    svi = make_svi(alternating(optax.sgd(0.1), optax.sgd(0.1), twist_prefix=prefix))
    with pytest.raises(ValueError, match=f"twist_prefix='{prefix}'.*{message}"):
        svi.init(KEY, Y)


def test_only_parameters_with_the_prefix_is_an_error():
    optim = alternating(optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"of \['twist_a', 'twist_b'\] every one does"):
        optim.init({"twist_a": jnp.array(0.0), "twist_b": jnp.array(0.0)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "alternating: num_steps must be a positive integer"),
        ({"num_twist_steps": 0}, "alternating: num_twist_steps must be a positive integer"),
        ({"twist_prefix": ""}, "twist_prefix is empty"),
        ({"optim": 0.1}, "optim must be an optimiser"),
        ({"twist_optim": numpyro.optim.Minimize()}, "twist_optim is a Minimize"),
        ({"twist_optim": StepwiseOptim(optax.sgd(0.1))}, "twist_optim is a StepwiseOptim"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        alternating(**{"optim": optax_to_numpyro(optax.sgd(0.1)), "twist_optim": optax.sgd(0.1), **arguments})
