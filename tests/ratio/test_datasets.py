"""Simulations in memory and on disk: nothing is lost, repeated or silently changed."""

import json

import numpy as np
import pytest
from jax import random

from numpyro_smc.ratio.datasets import RatioData, SimulationData
from numpyro_smc.ratio.stored_data import StoredData, write

THETA = np.arange(20.0).reshape(10, 2)
X = np.arange(30.0).reshape(10, 3, 1)
KEY = random.key(0)


def simulate(rng_key, num):
    theta = random.normal(rng_key, (num, 2))
    return theta, theta[:, :, None] * 2, theta[:, :1] + 1


def interrupted_after(num_parts):
    calls = []

    def simulate_some(rng_key, num):
        if len(calls) == num_parts:
            raise KeyboardInterrupt
        calls.append(num)
        return simulate(rng_key, num)

    return simulate_some


@pytest.fixture(scope="module", params=["npz", "hdf5"])
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return write(folder, simulate, KEY, 95, part_size=20, file_format=request.param, progress_bar=False)


def rows(*parts):
    """All simulations of some data, in one order."""
    theta = np.concatenate([part.theta for part in parts])
    for part in parts:
        np.testing.assert_allclose(part.x[..., 0], part.theta * 2)
        np.testing.assert_allclose(part.context, part.theta[:, :1] + 1)
    return theta[np.argsort(theta[:, 0])]


def test_a_split_keeps_every_simulation_once_and_with_its_output():
    train, validation = RatioData(THETA, X, THETA[:, :1]).split(KEY, 0.3)
    assert (len(train), len(validation)) == (7, 3)
    both = np.concatenate([train.theta, validation.theta])
    assert np.array_equal(np.sort(both, axis=0), THETA)
    for part in (train, validation):
        assert np.array_equal(part.x, X[(part.theta[:, 0] / 2).astype(int)]) and np.array_equal(
            part.context, part.theta[:, :1]
        )
    assert "7 simulations of 2 parameters" in repr(train) and isinstance(train, SimulationData)


def broken():
    x = X.copy()
    x[3, 1] = np.nan
    x[7, 0] = np.inf
    return x


def test_simulations_that_are_not_finite_raise_by_default_and_are_counted():
    with pytest.raises(ValueError, match=r"2 of 10 simulations are not finite \(2 outputs, 0 param.*changes the prior"):
        RatioData(THETA, broken())
    theta = THETA.copy()
    theta[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1 of 10 simulations are not finite \(0 outputs, 1 parameters\)"):
        RatioData(theta, X)
    with pytest.raises(ValueError, match="none of 10 simulations is finite"):
        RatioData(THETA, X * np.nan, nonfinite="drop")


def test_simulations_that_are_not_finite_are_dropped_or_replaced_when_asked_to():
    dropped = RatioData(THETA, broken(), THETA[:, :1], nonfinite="drop")
    assert np.array_equal(dropped.theta, np.delete(THETA, [3, 7], 0)) and len(dropped.context) == 8
    replaced = RatioData(THETA, broken(), nonfinite=lambda x: np.nan_to_num(x, nan=-1.0, posinf=99.0))
    assert len(replaced) == 10 and replaced.x[3, 1, 0] == -1 and replaced.x[7, 0, 0] == 99
    with pytest.raises(ValueError, match="2 of 10 simulations"):
        RatioData(THETA, broken(), nonfinite=lambda x: x)


def test_stored_simulations_are_read_back_once_each_in_an_order_of_the_key(stored):
    assert len(stored) == 95 and stored.num_batches(10) == 9 and stored.num_batches(15) == 5
    chunks = list(stored.chunks(random.key(1)))
    assert sorted(map(len, chunks)) == [15, 20, 20, 20, 20]
    expected = rows(*[RatioData(*simulate(random.fold_in(KEY, i), 20 if i < 4 else 15)) for i in range(5)])
    assert np.array_equal(rows(*chunks), expected)
    firsts = {tuple(c.theta[0, 0] for c in stored.chunks(random.key(seed))) for seed in range(4)}
    assert len(firsts) > 1
    assert np.array_equal(stored.first(30).theta, np.asarray(stored.first(95).theta)[:30])
    assert isinstance(stored, SimulationData) and "95 simulations in 5 chunks" in repr(stored)


def test_a_split_of_stored_simulations_is_of_whole_chunks(stored):
    train, validation = stored.split(random.key(2), 0.4)
    assert len(train) + len(validation) == 95 and len(validation) in (35, 40)
    assert np.array_equal(rows(validation, *train.chunks(KEY)), rows(*stored.chunks(KEY)))
    with pytest.raises(ValueError, match="none would be left"):
        StoredData(stored.path / sorted(p.name for p in stored.path.glob("part*"))[0]).split(KEY, 0.1)


def test_a_cut_simulation_continues_and_gives_the_same_files(stored, tmp_path):
    file_format = "npz" if list(stored.path.glob("*.npz")) else "hdf5"
    options = {"part_size": 20, "file_format": file_format, "progress_bar": False}
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted_after(2), KEY, 95, **options)
    assert len(list(tmp_path.glob("*part*"))) == 2
    continued = write(tmp_path, interrupted_after(3), KEY, 95, **options)
    assert np.array_equal(continued.first(95).theta, stored.first(95).theta)
    longer = write(tmp_path, interrupted_after(2), KEY, 110, **options)  # the last, short part is made anew
    assert np.array_equal(longer.first(80).theta, stored.first(80).theta) and len(longer) == 110


def test_a_folder_of_other_settings_is_refused(tmp_path):
    write(tmp_path, simulate, KEY, 5, settings={"noise": 1.0}, progress_bar=False)
    for key, settings, name in ((KEY, {"noise": 2.0}, "settings"), (random.key(9), {"noise": 1.0}, "rng_key")):
        with pytest.raises(ValueError, match=f"was begun with {name}="):
            write(tmp_path, simulate, key, 5, settings=settings, progress_bar=False)
    assert json.loads((tmp_path / "settings.json").read_text())["settings"] == {"noise": 1.0}


def test_dropped_simulations_do_not_make_a_part_look_unfinished(tmp_path):
    def sometimes_infinite(rng_key, num):
        theta = np.asarray(random.normal(rng_key, (num, 1)))
        return theta, np.where(theta > 0, theta, np.inf)

    options = {"part_size": 10, "nonfinite": "drop", "progress_bar": False}
    data = write(tmp_path, sometimes_infinite, KEY, 40, **options)
    assert 0 < len(data) < 40
    assert len(write(tmp_path, interrupted_after(0), KEY, 40, **options)) == len(data)
    with pytest.raises(ValueError, match="simulations are not finite"):
        write(tmp_path / "other", sometimes_infinite, KEY, 40, progress_bar=False)


def test_one_file_is_read_in_chunks(tmp_path):
    np.savez(tmp_path / "all.npz", theta=THETA, x=X)
    data = StoredData(tmp_path / "all.npz", chunk_size=4)
    assert sorted(len(chunk) for chunk in data.chunks(KEY)) == [2, 4, 4]
    assert np.array_equal(data.first(10).x, X)


def test_hdf5_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        write(tmp_path, simulate, KEY, 5, file_format="hdf5", progress_bar=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: RatioData(THETA[:9], X), r"one row per simulation, got shapes \(9, 2\) and \(10, 3, 1\)"),
        (lambda folder: RatioData(THETA, X, THETA[:4]), r"context must be \[10, C\], got shape \(4, 2\)"),
        (lambda folder: RatioData(THETA, X, nonfinite="ignore"), r"nonfinite must be .* got 'ignore'"),
        (lambda folder: RatioData(THETA, X).split(KEY, 0.99), r"leaves none to train on"),
        (lambda folder: RatioData(THETA, X).split(KEY, 1.5), r"leaves none to train on"),
        (lambda folder: StoredData(folder), r"no simulations in"),
        (lambda folder: write(folder, simulate, KEY, 0), r"num_simulations must be a positive integer, got 0"),
        (lambda folder: write(folder, simulate, KEY, 5, file_format="csv"), r"file_format must be .* got 'csv'"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
