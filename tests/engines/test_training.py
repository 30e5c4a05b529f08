"""fit: the steps of SVI, compiled once, skipping what is not finite, and restarting to the bit."""

import gc
import os
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax, random
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

from numpyro_smc.engines.checkpoint import AnyLength, load_pytree, save_pytree
from numpyro_smc.engines.training import FitResult, fit

Y = jnp.array([1.0, 2.0, 4.0])
KEY = random.key(3)


def model(y, prior_scale=2.0, use_prior=True):
    z = numpyro.sample("z", dist.Normal(0.0, prior_scale if use_prior else 1e3))
    numpyro.sample("y", dist.Normal(z, 1.0).expand(y.shape).to_event(1), obs=y)


def guide(y, prior_scale=2.0, use_prior=True):
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    numpyro.sample("z", dist.Normal(loc, scale))


class Count:
    """A number that is no part of what a loss computes."""

    number = 0

    def __fingerprint__(self):
        return ()


class CountedELBO(Trace_ELBO):
    """Counts how often it is traced."""

    def __init__(self, num_particles=1):
        super().__init__(num_particles)
        self.count = Count()

    @property
    def num_traces(self):
        return self.count.number

    def loss(self, *args, **kwargs):
        self.count.number += 1
        return super().loss(*args, **kwargs)


class SometimesBroken(Trace_ELBO):
    """Has a non-finite value, or only a non-finite gradient, for some keys."""

    def __init__(self, broken, breaks_value):
        super().__init__()
        self.broken, self.breaks_value = broken, breaks_value

    def loss(self, rng_key, params, *args, **kwargs):
        value = super().loss(rng_key, params, *args, **kwargs)
        broken = self.broken(rng_key)
        if self.breaks_value:
            return jnp.where(broken, jnp.inf, value)
        return value + jnp.sqrt(jnp.where(broken, 0.0 * params["loc"], 1.0)) - ~broken


def make_svi(loss=None, optim=None, guide=guide):
    return SVI(model, guide, optim or optax.adam(0.05), loss or Trace_ELBO())


@pytest.fixture(scope="module")
def svi():
    return make_svi(CountedELBO())


def quiet_fit(*args, **kwargs):
    return fit(*args, progress_bar=False, **kwargs)


def same_bits(a, b):
    def bits(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(random.key_data(leaf) if is_key else leaf)

    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert pairs
    return all(bits(x).dtype == bits(y).dtype and bits(x).tobytes() == bits(y).tobytes() for x, y in pairs)


def interrupt_at(step, error=KeyboardInterrupt):
    def log(at, values):
        if at >= step:
            raise error

    return log


# --- the steps -------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_svi_update(svi):
    state, losses = svi.init(KEY, Y), []
    update = jax.jit(svi.update)
    for _ in range(30):
        state, loss = update(state, Y)
        losses.append(loss)
    result = quiet_fit(svi, KEY, 30, Y)
    np.testing.assert_allclose(result.losses, np.array(losses), rtol=1e-4)
    np.testing.assert_allclose(result.params["loc"], svi.get_params(state)["loc"], rtol=1e-4)
    assert same_bits(result.state.rng_key, state.rng_key)
    assert not result.interrupted and result.num_skipped == 0 and result.evaluations == []


def test_reaches_the_conjugate_posterior():
    result = quiet_fit(make_svi(Trace_ELBO(num_particles=20), optax.adam(0.03)), KEY, 1500, Y)
    precision = 1 / 4 + 3  # seed fixed; the optimiser's noise is about 0.01
    np.testing.assert_allclose(result.params["loc"], 7 / precision, atol=0.05)
    np.testing.assert_allclose(result.params["scale"], precision**-0.5, atol=0.05)
    exact = dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3) + 4.0).log_prob(Y)
    np.testing.assert_allclose(result.bound[-500:].mean(), exact, atol=0.02)


def test_init_state_continues_a_run(svi):
    whole, half = quiet_fit(svi, KEY, 24, Y), quiet_fit(svi, KEY, 12, Y)
    rest = quiet_fit(svi, random.key(99), 12, Y, init_state=half.state)
    assert same_bits(rest.state, whole.state)
    assert np.array_equal(np.append(half.losses, rest.losses), whole.losses)


def test_init_state_is_enough_for_a_fresh_svi(svi):
    half = quiet_fit(svi, KEY, 12, Y)
    rest = quiet_fit(make_svi(), random.key(99), 12, Y, init_state=half.state)
    assert same_bits(rest.params, quiet_fit(svi, KEY, 24, Y).params)


def test_init_params_are_used(svi):
    result = quiet_fit(svi, KEY, 1, Y, init_params={"loc": jnp.array(7.0)})
    np.testing.assert_allclose(result.params["loc"], 7.0, atol=0.06)


def test_forward_mode_takes_the_same_steps_and_differentiates_loops(svi):
    class Looping(Trace_ELBO):
        def loss(self, rng_key, params, *args, **kwargs):
            zero = lax.while_loop(lambda x: x > 1.0, lambda x: x / 2, jnp.exp(params["loc"])) * 0.0
            return super().loss(rng_key, params, *args, **kwargs) + zero

    forward = quiet_fit(make_svi(Looping()), KEY, 20, Y, forward_mode_differentiation=True)
    np.testing.assert_allclose(forward.losses, quiet_fit(svi, KEY, 20, Y).losses, rtol=1e-4)


def test_mutable_state_is_carried():
    def counting_guide(y):
        counter = numpyro.primitives.mutable("counter", {"steps": jnp.array(0.0)})
        counter["steps"] = counter["steps"] + 1.0
        guide(y)

    state = quiet_fit(make_svi(guide=counting_guide), KEY, 9, Y).state
    assert state.mutable_state["counter"]["steps"] == 9 + 1  # svi.init runs the guide once


# --- compiled once ---------------------------------------------------------------------------------------------------


def test_chunks_remainders_and_later_calls_compile_nothing():
    loss = CountedELBO()
    svi = make_svi(loss)
    quiet_fit(svi, KEY, 57, Y, chunk_size=10)
    assert loss.num_traces == 1
    quiet_fit(svi, random.key(4), 31, np.asarray(Y) + 1, chunk_size=7)
    quiet_fit(svi, random.key(4), 2000, Y)
    assert loss.num_traces == 1
    quiet_fit(svi, KEY, 5, Y, use_prior=False)
    assert loss.num_traces == 2
    quiet_fit(svi, KEY, 5, Y, use_prior=False)
    quiet_fit(svi, KEY, 5, Y)
    assert loss.num_traces == 2
    quiet_fit(svi, KEY, 5, Y[:2])
    assert loss.num_traces == 3


def test_numbers_are_static_by_value_and_type():
    loss = CountedELBO()
    svi = make_svi(loss)
    first, same, changed = (quiet_fit(svi, KEY, 3, Y, prior_scale=scale).losses for scale in (2.0, 2, 3))
    assert loss.num_traces == 3
    np.testing.assert_allclose(first, same, rtol=1e-6)
    assert not np.isclose(first, changed).any()


def test_sharded_data_compile_once_and_take_the_same_steps():
    y, svi = jnp.arange(4.0), make_svi(CountedELBO())
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("series",))
    sharded = jax.device_put(y, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("series")))
    result = quiet_fit(svi, KEY, 20, sharded)
    assert svi.loss.num_traces == 1 and len(result.state.rng_key.devices()) == 2
    np.testing.assert_allclose(result.losses, quiet_fit(svi, KEY, 20, y).losses, rtol=1e-4)


def test_data_dependent_constraints_are_not_stale():
    def bounded_guide(y):
        loc = numpyro.param("loc", 0.5, constraint=constraints.interval(0.0, y.max()))
        numpyro.sample("z", dist.Normal(loc, 0.1))

    svi = make_svi(guide=bounded_guide)
    assert 0.9 < quiet_fit(svi, KEY, 200, jnp.full(3, 1.0)).params["loc"] < 1.0
    again, fresh = (quiet_fit(s, KEY, 200, jnp.full(3, 9.0)) for s in (svi, make_svi(guide=bounded_guide)))
    assert same_bits(again.losses, fresh.losses) and again.params["loc"] > 1.0


def test_a_compiled_svi_is_freed():
    svi = make_svi()
    quiet_fit(svi, KEY, 2, Y)
    reference = weakref.ref(svi)
    del svi
    gc.collect()
    assert reference() is None


# --- non-finite steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaks_value", [True, False])
def test_non_finite_steps_are_skipped_counted_and_warned_of_once(breaks_value):
    svi = make_svi(SometimesBroken(lambda key: random.uniform(key) < 0.3, breaks_value), optax.sgd(0.01))
    with pytest.warns(UserWarning, match="was skipped") as warned:
        result = quiet_fit(svi, KEY, 40, Y, chunk_size=7)
    assert len(warned) == 1 and warned[0].filename == __file__

    healthy, state, broken = make_svi(optim=optax.sgd(0.01)), svi.init(KEY, Y), []
    healthy.init(KEY, Y)
    update = jax.jit(healthy.update)
    for _ in range(40):
        broken.append(bool(random.uniform(random.split(state.rng_key)[1]) < 0.3))
        new, _ = update(state, Y)
        state = state._replace(rng_key=new.rng_key) if broken[-1] else new
    assert 0 < sum(broken) < 40 and result.num_skipped == sum(broken)
    assert re.search(rf"step {broken.index(True)} ", str(warned[0].message))
    assert np.array_equal(np.isfinite(result.losses), ~np.array(broken) | (not breaks_value))
    np.testing.assert_allclose(result.params["loc"], svi.get_params(state)["loc"], rtol=1e-4)
    assert same_bits(result.state.rng_key, state.rng_key)


def test_optimiser_state_stays_finite():
    """A gradient of 1e30 leaves Adam's parameters finite but its second moment infinite, for good."""

    class HugeOnce(Trace_ELBO):
        def loss(self, rng_key, params, *args, **kwargs):
            value = super().loss(rng_key, params, *args, **kwargs)
            return value * jnp.where(random.uniform(rng_key) < 0.2, 1e30, 1.0)

    with pytest.warns(UserWarning, match="was skipped"):
        result = quiet_fit(make_svi(HugeOnce()), KEY, 300, Y)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.optim_state))
    np.testing.assert_allclose(result.params["loc"], 7 / 3.25, atol=0.4)


# --- callbacks -------------------------------------------------------------------------------------------------------


def test_evaluation_does_not_disturb_training(svi):
    seen = []

    def evaluate(params, rng_key):
        seen.append(random.key_data(rng_key).tolist())
        return {"loc": params["loc"], "draw": random.normal(rng_key)}

    result = quiet_fit(svi, KEY, 40, Y, chunk_size=7, evaluate=evaluate, evaluate_every=12)
    assert [step for step, _ in result.evaluations] == [12, 24, 36] and len({str(key) for key in seen}) == 3
    assert same_bits(result.losses, quiet_fit(svi, KEY, 40, Y).losses)
    assert result.evaluations == quiet_fit(svi, KEY, 36, Y, evaluate=evaluate, evaluate_every=12).evaluations
    assert result.evaluations[0][1]["loc"] == float(quiet_fit(svi, KEY, 12, Y).params["loc"])


def test_evaluation_and_training_keys_are_disjoint(svi):
    used, key = [], svi.init(KEY, Y).rng_key
    for _ in range(4):
        key, step_key = random.split(key)
        used += [random.key_data(key).tolist(), random.key_data(step_key).tolist()]
    used += random.key_data(random.split(KEY, 3)).tolist()

    def evaluate(params, rng_key):
        assert random.key_data(rng_key).tolist() not in used
        return {}

    assert len(quiet_fit(svi, KEY, 4, Y, evaluate=evaluate, evaluate_every=1).evaluations) == 4


def test_log_sees_every_chunk_and_evaluation(svi):
    seen = {}
    result = quiet_fit(
        svi, KEY, 25, Y, chunk_size=10, log=seen.__setitem__, evaluate=lambda *_: {"one": 1}, evaluate_every=15
    )
    assert list(seen) == [10, 15, 20, 25]
    assert seen[15]["one"] == 1.0 and "one" not in seen[20]
    np.testing.assert_allclose(seen[20]["bound"], result.bound[10:20].mean(), rtol=1e-6)


def test_the_bar_shows_bound_evaluation_and_skipped_steps(capsys):
    svi = make_svi(SometimesBroken(lambda key: random.uniform(key) < 0.3, True))
    with pytest.warns(UserWarning):
        result = fit(svi, KEY, 20, Y, evaluate=lambda *_: {"score": 0.25})
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "20/20" in shown and f"bound={result.bound[-1]:.5g}" in shown
    assert "score=0.25" in shown and f"skipped={result.num_skipped}" in shown
    assert capsys.readouterr().err == "" and quiet_fit(svi, KEY, 1, Y) and capsys.readouterr().err == ""


# --- interruption and restarts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(37, 11), (5, 60)])
def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(svi, tmp_path, chunks):
    path = tmp_path / "run.ckpt"
    shared = {"evaluate": lambda params, key: {"draw": random.normal(key) + params["loc"]}, "evaluate_every": 10}
    whole = quiet_fit(svi, KEY, 60, Y, **shared)
    first = quiet_fit(
        svi, KEY, 60, Y, checkpoint=path, checkpoint_every=99, chunk_size=chunks[0], log=interrupt_at(36), **shared
    )
    assert first.interrupted and 36 <= len(first.losses) < 60
    assert same_bits(first.losses, whole.losses[: len(first.losses)])
    steps, fresh = [], {"log": lambda step, _: steps.append(step), "chunk_size": chunks[1]}
    again = svi if chunks[0] == 5 else make_svi(CountedELBO())
    again = quiet_fit(again, random.key(0), 60, Y, checkpoint=path, **fresh, **shared)
    assert not again.interrupted and min(steps) > len(first.losses)
    assert same_bits((again.state, again.params, again.losses), (whole.state, whole.params, whole.losses))
    assert again.evaluations == whole.evaluations


def test_an_interrupted_evaluation_is_made_up_for(svi, tmp_path):
    def interrupted(params, rng_key):
        raise KeyboardInterrupt

    shared = {"checkpoint": tmp_path / "run", "evaluate_every": 10}
    first = quiet_fit(svi, KEY, 20, Y, evaluate=interrupted, **shared)
    assert first.interrupted and len(first.losses) == 10
    again = quiet_fit(svi, KEY, 20, Y, evaluate=lambda *_: {}, **shared)
    assert [step for step, _ in again.evaluations] == [10, 20]


def test_an_error_leaves_a_checkpoint(svi, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        quiet_fit(svi, KEY, 20, Y, checkpoint=path, chunk_size=6, log=interrupt_at(12, ZeroDivisionError))
    steps = []
    quiet_fit(svi, KEY, 20, Y, checkpoint=path, chunk_size=1, log=lambda step, _: steps.append(step))
    assert steps == list(range(13, 21))


def test_a_failed_compilation_leaves_no_checkpoint(tmp_path):
    class Failing(Trace_ELBO):
        def loss(self, *args, **kwargs):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quiet_fit(make_svi(Failing()), KEY, 20, Y, checkpoint=tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_checkpoints_are_written_on_the_way(svi, tmp_path):
    path, sizes = tmp_path / "run", []

    def log(step, values):
        sizes.append((step, path.exists() and load_losses(path)))

    def load_losses(path):
        with np.load(path) as file:
            return max(file[name].size for name in file.files if file[name].dtype == np.float32)

    quiet_fit(svi, KEY, 24, Y, chunk_size=4, checkpoint=path, checkpoint_every=8, log=log)
    assert sizes == [(4, False), (8, False), (12, 8), (16, 8), (20, 16), (24, 16)] and load_losses(path) == 24


def test_a_finished_run_returns_at_once_and_can_be_extended(svi, tmp_path):
    path, loss = tmp_path / "run", CountedELBO()
    done = quiet_fit(svi, KEY, 20, Y, checkpoint=path)
    for num_steps, arguments in ((20, {}), (11, {"evaluate": lambda *_: 1 / 0, "evaluate_every": 4})):
        again = quiet_fit(make_svi(loss), KEY, num_steps, Y, checkpoint=path, log=interrupt_at(0), **arguments)
        assert same_bits((again.state, again.losses), (done.state, done.losses)) and not again.interrupted
    assert loss.num_traces == 0
    longer = quiet_fit(svi, KEY, 30, Y, checkpoint=path)
    assert same_bits(longer.losses, quiet_fit(svi, KEY, 30, Y).losses)


def test_resume_false_starts_afresh(svi, tmp_path):
    path, other = tmp_path / "run", random.key(8)
    quiet_fit(svi, KEY, 20, Y, checkpoint=path)
    assert same_bits(
        quiet_fit(svi, other, 10, Y, checkpoint=path, resume=False).losses, quiet_fit(svi, other, 10, Y).losses
    )
    assert len(quiet_fit(svi, other, 10, Y, checkpoint=path).losses) == 10


def test_a_checkpoint_of_another_guide_or_optimiser_is_refused(svi, tmp_path):
    path = tmp_path / "run"
    quiet_fit(svi, KEY, 2, Y, checkpoint=path)
    with pytest.raises(ValueError, match=r"optim_state.*loc.*\(3,\) is expected.*resume=False"):
        quiet_fit(svi, KEY, 4, Y, checkpoint=path, init_params={"loc": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"optim_state.*which is not expected"):
        quiet_fit(make_svi(optim=optax.sgd(0.1)), KEY, 4, Y, checkpoint=path)
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"was not written by save_pytree"):
        quiet_fit(svi, KEY, 4, Y, checkpoint=path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"checkpoint_every": 3}, "checkpoint_every=3"),
        ({"evaluate_every": 3}, "evaluate_every=3"),
        ({"evaluate": lambda *_: {}, "evaluate_every": -1}, "evaluate_every"),
        ({"evaluate": lambda *_: 3.0}, "evaluate must return a dict"),
        ({"checkpoint": "no/such/folder/run", "checkpoint_every": 1}, "no/such/folder"),
        ({"init_state": 1, "init_params": {}}, "init_params"),
        ({"svi": "svi"}, "svi"),
    ],
)
def test_bad_arguments_are_named(svi, arguments, named):
    with pytest.raises(ValueError, match=f"fit: .*{named}"):
        quiet_fit(arguments.pop("svi", svi), KEY, arguments.pop("num_steps", 5), Y, **arguments)


# --- the result ------------------------------------------------------------------------------------------------------


def make_result(**changes):
    losses = np.linspace(9.0, 1.0, 200)
    losses[50] = np.nan
    fields = {"losses": losses, "evaluations": [(100, {"score": 3.0})], "num_skipped": 1, "interrupted": True}
    return FitResult(params={}, state=None, **{**fields, **changes})


def test_repr_is_one_short_line():
    assert repr(make_result()) == (
        "FitResult(200 steps; bound -1.3819 over the last tenth; score 3 at step 100; 1 skipped; interrupted)"
    )
    assert (
        repr(make_result(losses=np.zeros(0), evaluations=[], num_skipped=0, interrupted=False)) == "FitResult(0 steps)"
    )


def test_plot_draws_raw_smoothed_and_evaluations():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    result = make_result()
    ax = result.plot()
    raw, smooth, score = ax.get_lines()
    assert len(raw.get_xdata()) == 199 and 51 not in raw.get_xdata()
    np.testing.assert_allclose(smooth.get_ydata()[0], result.bound[:3].mean())
    assert smooth.get_xdata()[-1] == 200 and score.get_xdata().tolist() == [100]
    assert result.plot(ax) is ax
    make_result(losses=np.zeros(0), evaluations=[]).plot(ax)
    pyplot.close("all")


# --- files -----------------------------------------------------------------------------------------------------------


def test_pytrees_come_back_bit_for_bit(tmp_path):
    tree = {
        "typed": random.split(random.key(1), 3),
        "rbg": random.key(2, impl="rbg"),
        "legacy": jax.random.PRNGKey(4),
        "bfloat16": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16),
        "float8": jnp.array(0.5, jnp.float8_e4m3fn),
        "nested": (jnp.array([-0.0, jnp.inf, 1e-40]), {"bool": jnp.array(True), "empty": jnp.zeros((0, 3))}),
        "numpy": np.arange(3.0),
        "numbers": [2, 0.1, True, None],
        "vector": np.arange(5),
    }
    save_pytree(tmp_path / "tree", tree)
    back = load_pytree(tmp_path / "tree", {**jax.tree.map(lambda leaf: leaf, tree), "vector": AnyLength(int)})
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert back["numbers"] == [2, 0.1, True, None] and isinstance(back["numbers"][2], bool)
    assert same_bits(*({k: v for k, v in t.items() if k != "numbers"} for t in (back, tree)))
    assert isinstance(back["numpy"], np.ndarray) and isinstance(back["bfloat16"], jax.Array)
    assert random.key_impl(back["rbg"]) == random.key_impl(tree["rbg"])
    with np.load(tmp_path / "tree", allow_pickle=False) as file:
        assert {file[name].dtype.kind for name in file.files} <= set("biuf")  # nothing that plain NumPy cannot read
    assert os.listdir(tmp_path) == ["tree"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.zeros(3)}, r"leaf \['a'\] has shape \(2,\), but \(3,\) is expected"),
        ({"a": jnp.zeros(2, int)}, r"leaf \['a'\] has dtype float32, but int32 is expected"),
        ({"a": random.key(0)}, r"leaf \['a'\] has dtype float32, but key<fry> is expected"),
        ({"b": jnp.zeros(2)}, r"no leaf \['b'\]"),
        ({}, r"has a leaf \['a'\], which is not expected"),
    ],
)
def test_what_differs_is_named(tmp_path, like, message):
    save_pytree(tmp_path / "tree", {"a": jnp.zeros(2)})
    with pytest.raises(ValueError, match=message):
        load_pytree(tmp_path / "tree", like)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tree"
    save_pytree(path, {"a": 1})
    with pytest.raises(ValueError, match=r"Leaf \['a'\] is a str"):
        save_pytree(path, {"a": "text"})

    def full_disk(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="disk full"):
            save_pytree(path, {"a": 2})
    assert load_pytree(path, {"a": 0}) == {"a": 1} and os.listdir(tmp_path) == ["tree"]
