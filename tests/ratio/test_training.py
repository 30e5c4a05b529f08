"""Training on problems whose ratio is known, and what it does when something goes wrong."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random

from numpyro_smc.ratio import training
from numpyro_smc.ratio.datasets import RatioData
from numpyro_smc.ratio.learning_rates import ConstantRate, CosineRate, PlateauRate
from numpyro_smc.ratio.losses import BalancedLoss, BinaryLoss, ContrastiveLoss, RatioLoss, SoftmaxLoss
from numpyro_smc.ratio.masks import SizesMask, UniformMask
from numpyro_smc.ratio.networks import Network, mlp
from numpyro_smc.ratio.ratio_network import RatioNetwork
from numpyro_smc.ratio.steps import Program, as_batch, train
from numpyro_smc.ratio.stored_data import write
from numpyro_smc.ratio.training import fit

SMALL = RatioNetwork(2, mlp(8, 0), has_masks=True)
QUICK = {"batch_size": 50, "max_epochs": 4, "learning_rate": 1e-3, "schedule": "constant", "progress_bar": False}


def simulate(rng_key, num):
    theta_key, x_key = random.split(rng_key)
    theta = random.normal(theta_key, (num, 2)) * jnp.array([1.0, 2.0])
    return theta, theta + 0.5 * random.normal(x_key, (num, 2))


DATA = RatioData(*simulate(random.key(0), 500))
HELD_OUT = RatioData(*simulate(random.key(4), 2000))


def quick(network=SMALL, loss=None, data=DATA, key=1, **options):
    return fit(random.key(key), network, loss or BinaryLoss(), data, **{**QUICK, **options})


def numbers(result):
    """The table, without the clock."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.table]


def are_equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


# What is learnt

JOINT = np.array([[0.30, 0.05, 0.05], [0.05, 0.15, 0.10], [0.10, 0.02, 0.18]])
TRUE = np.log(JOINT / JOINT.sum(1, keepdims=True) / JOINT.sum(0))


def table_apply(weights, theta, x):
    """A table over three parameters and three outputs, numbered 0, 1 and 2."""
    rows = jnp.clip(jnp.round(theta[..., 0] * weights["unit"] + weights["origin"]), 0, 2).astype(int)
    return weights["table"][rows, jnp.round(x[..., 0]).astype(int)][..., None]


@pytest.mark.parametrize(
    ("loss", "is_known_up_to_a_factor"),
    [(BinaryLoss(), False), (ContrastiveLoss(8, 2.0), False), (BalancedLoss(), False), (SoftmaxLoss(8), True)],
    ids=["A", "C", "balanced", "B"],
)
def test_a_trained_table_is_the_true_ratio(loss, is_known_up_to_a_factor):
    """From 14,000 simulations, every cell within five of its standard errors: false alarms below 1e-5 per loss."""
    num = 14_000
    cases = np.random.default_rng(0).choice(9, size=num, p=JOINT.ravel())
    theta, x = (cases // 3).astype(np.float32)[:, None], (cases % 3).astype(np.float32)[:, None]

    def init(rng_key, in_size, out_size):
        return {"table": jnp.zeros((3, 3))}

    mean, scale = theta.mean(), theta.std(ddof=1)
    trunk = Network(init, lambda w, *parts: table_apply({**w, "unit": scale, "origin": mean}, *parts))
    network = RatioNetwork(1, trunk, standardize_x=False)
    result = fit(
        random.key(1),
        network,
        loss,
        RatioData(theta, x),
        validation=None,
        batch_size=1000,
        max_epochs=30,
        learning_rate=0.05,
        schedule="cosine",
        weight_decay=0.0,
        keep="last",
        progress_bar=False,
    )
    difference = np.asarray(result.weights.trained["trunk"]["table"]) - TRUE
    if is_known_up_to_a_factor:
        difference -= difference.mean(axis=0)
    # A cell's count has relative variance (1 - p) / (n p); its margins, known better, add to it.
    error = np.sqrt((1 / JOINT + 1 / JOINT.sum(1, keepdims=True) + 1 / JOINT.sum(0)) / num)
    assert np.all(abs(difference) < 5 * error)


def test_marginals_of_any_parameters_are_learnt_by_one_network_with_masks():
    """Of a Gaussian, against the exact losses at the true ratio: within five standard errors above, and not below."""
    network = RatioNetwork(2, mlp(32, 1), has_masks=True)
    data = RatioData(*simulate(random.key(2), 8000))
    options = {"validation": None, "max_epochs": 25, "batch_size": 200, "learning_rate": 1e-2, "schedule": "cosine"}
    weights = quick(network, data=data, **options).weights
    theta, x = simulate(random.key(3), 4000)

    @jax.jit
    def excesses(mask):
        normal, sd = jax.scipy.stats.norm.logpdf, jnp.sqrt(jnp.array([1.0, 4.0]) + 0.25)

        def loss(ratio):
            return jax.nn.softplus(-ratio(theta)) + jax.nn.softplus(ratio(jnp.roll(theta, 1, axis=0)))

        true = loss(lambda theta: ((normal(x, theta, 0.5) - normal(x, 0, sd)) * mask).sum(1))
        return loss(lambda theta: network.log_ratio(weights, theta, x, mask)) - true

    for mask in ([True, False], [False, True], [True, True]):
        excess = np.asarray(excesses(jnp.array(mask)))
        error = excess.std() / np.sqrt(len(excess))
        assert -5 * error < excess.mean() < 0.02 + 5 * error, mask


def test_fixed_marginals_train_side_by_side():
    network = RatioNetwork(2, mlp(8, 0), marginals=["=1", "11"])
    result = quick(network, max_epochs=8, learning_rate=1e-2, validation=None)
    assert result.table[0]["loss"] < 3 * 2 * np.log(2) * 1.1 and result.table[-1]["loss"] < result.table[0]["loss"]
    assert network.log_ratio(result.weights, DATA.theta, DATA.x).shape == (500, 3)


# What training does


def test_the_published_network_starts_at_twice_log_two():
    network = RatioNetwork(2, mlp(256, 7), has_masks=True)
    program = Program(network, BinaryLoss(), UniformMask(), 500, 0.0, None)
    weights = network.init(random.key(0), DATA.theta, DATA.x)
    loss = jax.jit(program.batch_loss)(*weights, as_batch(DATA), random.key(1), 0.0)
    assert abs(loss - 2 * np.log(2)) < 0.02


def test_the_loss_falls_and_every_epoch_has_its_row():
    result = quick(max_epochs=8, learning_rate=1e-2)
    assert result.losses("loss")[-1] < result.losses("loss")[0] - 0.05
    assert [row["epoch"] for row in result.table] == list(range(1, 9))
    assert result.table[0].keys() >= {"loss_sd", "validation_loss_sd", "learning_rate", "seconds", "num_skipped"}


def test_standardisation_is_not_trained():
    start = SMALL.init(random.key(5), DATA.theta, DATA.x)
    result = quick(weights=start, learning_rate=0.1)
    assert are_equal(result.weights.standardization, start.standardization)
    assert not are_equal(result.weights.trained, start.trained)


def test_validation_does_not_vary_between_epochs_of_the_same_weights():
    losses = quick(learning_rate=0.0).losses()
    assert len(set(losses)) == 1
    assert len(set(quick(learning_rate=0.0).losses("loss"))) == 4


def test_the_best_weights_are_kept_unless_the_last_are_asked_for():
    options = {"learning_rate": 0.3, "max_epochs": 8}
    best, last = quick(**options), quick(keep="last", **options)
    assert numbers(best) == numbers(last) and best.best_epoch == 1 + np.argmin(best.losses()) < 8
    assert are_equal(quick(**options | {"max_epochs": best.best_epoch}, keep="last").weights, best.weights)
    assert not are_equal(last.weights, best.weights)


def test_training_ends_when_patience_does():
    result = quick(learning_rate=0.0, patience=3, max_epochs=20)
    assert len(result.table) == 4 and "3 without a better loss" in repr(result)


def test_a_second_call_of_the_same_shapes_compiles_nothing():
    quick()
    before = train._cache_size()
    quick(network=RatioNetwork(2, mlp(8, 0), has_masks=True), key=7, max_epochs=2)
    assert train._cache_size() == before


def test_epochs_have_the_steps_asked_for_and_a_schedule_sees_each_once():
    """450 simulations make nine batches of 50: 20 steps are two passes and two steps."""
    seen = []

    def halving(step):
        jax.debug.callback(lambda s: seen.append(int(s)), step)
        return 0.5 ** (step / 10)

    result = quick(schedule=halving, steps_per_epoch=20, max_epochs=2, learning_rate=1e-2, validation=None)
    assert sorted(set(seen)) == list(range(40)) and len(seen) <= 42  # the table shows the last one's rate
    np.testing.assert_allclose(result.losses("learning_rate"), 1e-2 * 0.5 ** np.array([1.9, 3.9]), rtol=1e-5)


def test_stored_simulations_train_like_those_in_memory(tmp_path):
    stored = write(tmp_path, simulate, random.key(0), 900, part_size=450, progress_bar=False)
    result = quick(data=stored, validation=DATA.rows(slice(50)), learning_rate=1e-2)
    assert result.losses()[-1] < result.losses()[0] - 0.05


def test_a_context_is_trained_on():
    network = RatioNetwork(2, mlp(8, 0), context_size=1)
    data = RatioData(DATA.theta, DATA.x, np.asarray(DATA.theta)[:, :1] ** 2)
    start = network.init(random.key(5), data.theta, data.x, data.context)
    result = quick(network, data=data, weights=start, weight_decay=0.0, max_epochs=1, validation=None)
    first, trained = (weights.trained["trunk"][0]["weight"] for weights in (start, result.weights))
    assert first.shape[0] == 5 and np.all(abs(trained - first).max(axis=1) > 0)


def test_another_estimator_as_weight_leaves_nothing_to_learn():
    """With the exact ratio as weight, the loss does not fall below that of a coin: within five standard errors."""

    def exact(theta, x, mask, context):
        sd = np.sqrt(np.array([1.0, 4.0]) + 0.25)
        normal = jax.scipy.stats.norm.logpdf
        return ((normal(x, theta, 0.5) - normal(x, 0, sd)) * mask).sum(-1)

    best = quick(log_weight=exact, validation=HELD_OUT, max_epochs=8, learning_rate=1e-2).table[-1]
    error = best["validation_loss_sd"] / np.sqrt(len(HELD_OUT) / 50)
    assert abs(best["validation_loss"] - 2 * np.log(2)) < 5 * error
    assert quick(max_epochs=8, learning_rate=1e-2).losses()[-1] < 2 * np.log(2) - 0.1


# Learning rates


def test_the_plateau_rule_is_that_of_pytorch():
    """Computed with torch.optim.lr_scheduler.ReduceLROnPlateau: factor 0.5, patience 2, threshold 0.01."""
    losses = [1.0, 0.995, 0.98, 0.975, 0.974, 0.973, 0.972, 0.97, 0.9, 0.91, 0.92, 0.93, 0.94]
    expected = [1e-3] * 5 + [5e-4] * 6 + [2.5e-4] * 2
    rule = PlateauRate(0.5, 2, 1e-2, 1e-6)
    found = [rule.rate(1e-3, losses[: i + 1], 100) for i in range(len(losses))]
    np.testing.assert_allclose(found, expected)


def test_the_plateau_rule_ends_the_training_at_its_lowest_rate():
    result = quick(schedule=PlateauRate(0.3, 1, 0.5, 1e-4), max_epochs=30, patience=None)
    assert result.ending == "lowest learning rate"
    np.testing.assert_allclose(result.losses("learning_rate"), [1e-3] * 3 + [3e-4] * 2)


def test_rates_by_name():
    assert ConstantRate().rate(0.1, [1.0] * 50, 100) == 0.1
    halfway, end = (CosineRate(0.01).rate(0.11, [1.0] * n, 100) for n in (50, 100))
    assert np.isclose(halfway, 0.06) and np.isclose(end, 0.01)


class SquareLoss(RatioLoss):
    """Of the whole batch, in whatever order, and with no contrasts: what a step does to it can be repeated."""

    @property
    def num_contrasts(self):
        return 0, 0

    def of_log_ratios(self, joint, marginal, log_weights=None, progress=1.0):
        return jnp.square(joint - 3.0).mean()


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_steps_are_those_of_adamw_with_a_clipped_gradient(clip_norm):
    network = RatioNetwork(2, mlp(8, 0))
    start = network.init(random.key(5), DATA.theta, DATA.x)
    options = {"batch_size": 500, "max_epochs": 3, "validation": None, "keep": "last", "weights": start}
    found = quick(network, SquareLoss(), clip_norm=clip_norm, weight_decay=0.1, learning_rate=0.01, **options)

    def loss(trained):
        return jnp.square(network.log_ratio(start._replace(trained=trained), DATA.theta, DATA.x) - 3.0).mean()

    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    optimizer = optax.chain(clip, optax.adamw(0.01, weight_decay=0.1))
    trained, state = start.trained, optimizer.init(start.trained)
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(gradient(trained), state, trained)
        trained = optax.apply_updates(trained, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found.weights.trained, trained)


# What goes wrong


def test_steps_that_are_not_finite_are_skipped_counted_and_warned_of():
    def explode(weights, *parts):
        value = SMALL.trunk.apply(weights, *parts)
        return jnp.where(parts[0][..., :1] > 2.5, jnp.nan, value)

    network = dataclasses.replace(SMALL, trunk=SMALL.trunk._replace(apply=explode))
    with pytest.warns(UserWarning, match=r"steps had a non-finite loss or gradient and were skipped"):
        result = quick(network, data=DATA.rows(slice(None)), keep="last", validation=None)
    assert 0 < result.num_skipped < 36 and f"{result.num_skipped} steps skipped" in repr(result)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.weights.trained))


def test_a_gradient_that_is_not_finite_is_a_skipped_step():
    def flat_but_broken(weights, *parts):
        value = SMALL.trunk.apply(weights, *parts)
        return value + 0.0 * jnp.sqrt(weights[0]["weight"][0, 0] * 0.0)

    network = dataclasses.replace(SMALL, trunk=SMALL.trunk._replace(apply=flat_but_broken))
    start = network.init(random.key(5), DATA.theta, DATA.x)
    with pytest.warns(UserWarning, match="10 of 10 steps"):
        result = quick(network, max_epochs=1, weights=start, validation=None)
    assert are_equal(result.weights, start) and np.isfinite(result.table[0]["loss"])


def interrupt_in_epoch(monkeypatch, number):
    original, calls = training._Epochs.run, []

    def run(self, state, rng_key, rate):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(self, state, rng_key, rate)

    monkeypatch.setattr(training._Epochs, "run", run)


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_a_restart_gives_the_numbers_of_an_uninterrupted_run(tmp_path, monkeypatch, schedule):
    options = {"schedule": schedule, "learning_rate": 0.05, "max_epochs": 6}
    whole = quick(**options)
    checkpoint = tmp_path / "run.npz"
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 4)
        cut = quick(**options, checkpoint=checkpoint)
    assert (
        cut.interrupted and len(cut.table) == 3 and are_equal(cut.weights, quick(**options | {"max_epochs": 3}).weights)
    )
    resumed = quick(**options, checkpoint=checkpoint)
    assert numbers(resumed) == numbers(whole) and are_equal(resumed.weights, whole.weights)
    again = quick(**options, checkpoint=checkpoint)
    assert again.table == resumed.table and are_equal(again.weights, whole.weights)


def test_ctrl_c_before_the_first_epoch_is_not_swallowed(monkeypatch):
    interrupt_in_epoch(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        quick()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    checkpoint = tmp_path / "run.npz"
    quick(checkpoint=checkpoint, max_epochs=1)
    for options in ({"key": 9}, {"loss": ContrastiveLoss(3)}, {"learning_rate": 0.1}, {"data": DATA.rows(slice(400))}):
        with pytest.raises(ValueError, match=r"run.npz' is of other simulations, other settings or another random key"):
            quick(checkpoint=checkpoint, **options)
    with pytest.raises(ValueError, match=r"fit: checkpoint .* shape"):
        quick(checkpoint=checkpoint, network=RatioNetwork(2, mlp(9, 0), has_masks=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 600}, r"batch_size=600 is more than the 450 simulations"),
        (
            {"loss": ContrastiveLoss(50)},
            r"needs at least 51 rows, .* has 50|validation has 50 simulations, too few .* 51",
        ),
        (
            {"loss": ContrastiveLoss(30), "validation": 0.02},
            r"validation has 10 simulations, too few for batches of .* 31",
        ),
        ({"network": RatioNetwork(2, mlp(8, 0)), "masks": UniformMask()}, r"build it with has_masks=True"),
        ({"masks": SizesMask((3,))}, r"masks of 3 parameters were asked for, but there are 2"),
        ({"keep": "first"}, r"keep must be 'best' or 'last', got 'first'"),
        ({"schedule": "linear"}, r"schedule must be one of .* got 'linear'"),
        ({"max_epochs": 0}, r"max_epochs must be a positive integer, got 0"),
        ({"loss": SoftmaxLoss(4), "log_weight": lambda *_: 0.0}, r"for BinaryLoss only"),
        ({"checkpoint": "no/such/folder/run.npz"}, r"the folder of checkpoint='no/such/folder/run.npz' does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quick(**options)


def test_the_figure_shows_both_losses_and_the_best_epoch():
    result = quick()
    ax = result.plot()
    assert [line.get_label() for line in ax.lines] == ["training", "validation", "best"]


@pytest.mark.slow
@pytest.mark.skipif("NUMPYRO_SMC_DATA" not in os.environ, reason="needs the SLCP simulations in NUMPYRO_SMC_DATA")
def test_slcp_reaches_the_loss_of_the_original_code():
    """16 epochs of 64 steps on 2^14 simulations: the original's validation loss is 0.987 in one run."""
    folder = Path(os.environ["NUMPYRO_SMC_DATA"]) / "slcp"
    train_data, valid_data = (
        RatioData(file["theta"], file["x"])
        for file in (np.load(folder / f"slcp_{name}.npz") for name in ("train16k", "valid8k"))
    )
    network = RatioNetwork(5, mlp(256, 7), has_masks=True, standardize_x=False)
    options = {"masks": UniformMask(), "validation": valid_data, "steps_per_epoch": 64, "max_epochs": 16}
    options |= {"schedule": "plateau", "patience": None, "keep": "last", "progress_bar": False}
    losses = [fit(random.key(seed), network, BinaryLoss(), train_data, **options).losses()[-1] for seed in range(3)]
    assert np.all(abs(np.array(losses) - 0.99) < 0.05)
