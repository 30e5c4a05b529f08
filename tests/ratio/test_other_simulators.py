"""Folders, estimators and checkpoints are of one simulator, prior and training; another is refused by what differs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_smc.ratio.datasets import RatioData
from numpyro_smc.ratio.losses import BinaryLoss
from numpyro_smc.ratio.masks import UniformMask
from numpyro_smc.ratio.networks import mlp
from numpyro_smc.ratio.nre import NRE
from numpyro_smc.ratio.ratio_network import RatioNetwork
from numpyro_smc.ratio.stored_data import StoredData, write
from numpyro_smc.ratio.training import fit

KEY = random.key(0)
QUICK = {"max_epochs": 1, "batch_size": 100, "progress_bar": False}
STORED = {"part_size": 100, "progress_bar": False}


def program(scale=1.0, low=-1.0, high=1.0, has_offset=False):
    def simulator():
        theta = numpyro.sample("theta", dist.Uniform(low, high))
        x = scale * (theta + 0.1 * random.normal(numpyro.prng_key()))
        numpyro.deterministic("x", x + 1.0 if has_offset else x)

    return simulator


def nre(*args, nonfinite="raise", trunk=None, **options):
    trunk = mlp(8, 0) if trunk is None else trunk
    return NRE(program(*args, **options), ["theta"], loss="A", trunk=trunk, nonfinite=nonfinite)


def replaced(x):
    return np.nan_to_num(x)


OTHERS = [
    (lambda: nre(100.0), "simulator"),
    (lambda: nre(has_offset=True), "simulator"),
    (lambda: nre(low=-2.0), r"prior\.theta"),
    (lambda: nre(nonfinite="drop"), "nonfinite"),
    (lambda: nre(nonfinite=replaced), "nonfinite"),
]


@pytest.mark.parametrize(("other", "name"), OTHERS)
def test_a_folder_of_another_simulator_is_neither_continued_nor_trained_on(other, name, tmp_path):
    first = nre()
    first.simulate_to(tmp_path, KEY, 150, **STORED)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    inner = name.removeprefix(r"prior\.")
    with pytest.raises(ValueError, match=rf"was begun with settings=.*{inner}=.* Name\s+another folder"):
        other().simulate_to(tmp_path, KEY, 300, **STORED)
    for data in (tmp_path, StoredData(tmp_path)):
        with pytest.raises(ValueError, match=rf"NRE\.train: the simulations in .* of another simulator: {name} is"):
            other().train(KEY, data=data, **QUICK)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    nre().simulate_to(tmp_path, KEY, 250, **STORED)  # an equal one, made anew, goes on


@pytest.mark.parametrize(
    ("other", "name"), [*OTHERS[:3], (lambda: nre(trunk=mlp(8, 0, "relu")), "trunk"), (OTHERS[4][0], "nonfinite")]
)
def test_an_estimator_of_another_nre_is_refused_by_what_differs(other, name, tmp_path):
    found = nre().train(KEY, 400, **QUICK)
    found.save(tmp_path / "ratio")
    with pytest.raises(ValueError, match=rf"NRE\.load: .* is of another NRE: {name} is"):
        other().load(tmp_path / "ratio")
    again = nre().load(tmp_path / "ratio")
    np.testing.assert_array_equal(again.log_ratio(jnp.array([0.3]), 0.2), found.log_ratio(jnp.array([0.3]), 0.2))
    np.testing.assert_array_equal(again.seen.x, found.seen.x)


def test_the_message_tells_both_priors(tmp_path):
    nre().train(KEY, 400, **QUICK).save(tmp_path / "ratio")
    with pytest.raises(ValueError, match=r"Uniform \[\]: 1\.0, -1\.0|Uniform \[\]: -1\.0, 1\.0") as error:
        nre(low=40.0, high=50.0).load(tmp_path / "ratio")
    assert "40.0" in str(error.value) and "50.0" in str(error.value)


@pytest.mark.parametrize("file_format", ["npz", "hdf5"])
@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_fewer_simulations_are_the_first_and_nothing_is_rewritten(file_format, policy, tmp_path):
    def simulate(rng_key, num):
        theta = np.asarray(random.normal(rng_key, (num, 1)))
        return theta, np.where(theta > -0.5, theta, np.nan) if policy == "drop" else theta

    options = {"part_size": 20, "file_format": file_format, "nonfinite": policy, "progress_bar": False}
    whole = write(tmp_path, simulate, KEY, 90, **options)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    asked = np.concatenate([simulate(random.fold_in(KEY, i), 20)[0] for i in range(5)])
    for num in (1, 20, 33, 85, 90):
        less = write(tmp_path, simulate, KEY, num, **options)
        found = less.first(100)
        assert len(less) + len(found.failed) == num
        kept = asked[:num][asked[:num] > -0.5] if policy == "drop" else asked[:num]
        np.testing.assert_array_equal(found.theta, kept[:, None] if kept.ndim == 1 else kept)
        np.testing.assert_array_equal(np.sort(np.concatenate([found.theta, found.failed]), 0), np.sort(asked[:num], 0))
    assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    assert len(whole) == len(StoredData(tmp_path, nonfinite=policy))


# Trainings

RNG = np.random.default_rng(0)
THETA = RNG.normal(size=(500, 2)).astype(np.float32)
DATA = RatioData(THETA, THETA + 0.5 * RNG.normal(size=(500, 2)).astype(np.float32))
NETWORK = RatioNetwork(2, mlp(8, 0), has_masks=True)


def trained(checkpoint, **options):
    options = {"network": NETWORK, "data": DATA, "loss": BinaryLoss(), **QUICK, "checkpoint": checkpoint, **options}
    network, loss, data = (options.pop(name) for name in ("network", "loss", "data"))
    return fit(KEY, network, loss, data, **options)


def halved(step):
    return 0.5 + 0.0 * step


def constant(step):
    return 1.0 + 0.0 * step


class Pairs:
    """A law of masks whose repr says where it is in memory."""

    def __init__(self, chance):
        self.chance = chance

    def sample(self, rng_key, num, size):
        return random.bernoulli(rng_key, self.chance, (num, size)).at[:, 0].set(True)


OTHER_X = dataclasses.replace(DATA, x=DATA.x + 1e-3)
WEIGHTS = NETWORK.init(random.key(7), DATA.theta, DATA.x)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ({}, {"network": dataclasses.replace(NETWORK, trunk=mlp(8, 0, "relu"))}, "network"),
        ({}, {"network": dataclasses.replace(NETWORK, standardize_x=False)}, "network"),
        ({"schedule": constant}, {"schedule": halved}, "schedule"),
        ({}, {"data": OTHER_X}, "simulations"),
        ({"weights": WEIGHTS}, {"weights": None}, "initial weights"),
        ({"validation": DATA}, {"validation": OTHER_X}, "validation"),
        ({"masks": Pairs(0.5)}, {"masks": Pairs(0.7)}, "masks"),
        ({"masks": UniformMask()}, {"clip_norm": 1.0}, "clip_norm"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_by_what_differs(first, second, name, tmp_path):
    before = trained(tmp_path / "run", **first)
    with pytest.raises(ValueError, match=rf"fit: checkpoint .* is of other simulations, other settings .*: {name} is"):
        trained(tmp_path / "run", **first | second)
    assert trained(tmp_path / "run", **first).table == before.table


def test_a_checkpoint_of_other_stored_simulations_is_refused(tmp_path):
    for name, x in (("one", DATA.x), ("other", OTHER_X.x)):
        (tmp_path / name).mkdir()
        for i in range(2):
            rows = slice(250 * i, 250 * i + 250)
            np.savez(tmp_path / name / f"part_{i}.npz", theta=THETA[rows], x=x[rows])
    options = {"validation": None}
    trained(tmp_path / "run", data=StoredData(tmp_path / "one"), **options)
    trained(tmp_path / "run", data=StoredData(tmp_path / "one"), **options)
    with pytest.raises(ValueError, match="simulations is"):
        trained(tmp_path / "run", data=StoredData(tmp_path / "other"), **options)
