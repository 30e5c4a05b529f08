"""The benchmarks of the estimators run from the command line's arguments, write what they promise, and resume."""

import csv
import json
import math
import subprocess

import numpy as np
import pytest

from benchmarks import asymptotic_variance, efficiency, gaussian_mixture, replicates
from benchmarks.estimators import make_estimator
from numpyro_smc import IWELBO, OVIS, RWS, TVO, VIMCO


def written(folder, name):
    """Rows of the CSV, which agrees with the JSON; there is a figure."""
    rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
    document = json.loads((folder / f"{name}.json").read_text())
    assert len(rows) == len(document["rows"]) and "jax" in document["environment"]
    assert (folder / f"{name}.png").stat().st_size > 5000
    return rows


def test_asymptotic_variance_measures_resumes_and_keeps_what_failed(tmp_path, monkeypatch):
    argv = ["--num_data", "20", "--dim", "3", "--replicates", "10", "--output", str(tmp_path)]
    rows = asymptotic_variance.main(
        [*argv, "--estimators", "ovis-gamma0", "--particles", "4", "8", "--seeds", "0", "1"]
    )
    assert [(row["K"], row["seed"]) for row in rows] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert all(row["SNR"] > 0 and row["DSNR"] > 0 and row["variance"] > 0 and 1 <= row["ESS"] <= 8 for row in rows)
    assert [float(row["SNR"]) for row in written(tmp_path, "asymptotic_variance")] == [row["SNR"] for row in rows]

    def fail(*args, **kwargs):
        raise RuntimeError("measured again")

    monkeypatch.setattr(asymptotic_variance, "gradient_statistics", fail)
    again = asymptotic_variance.main(
        [*argv, "--estimators", "ovis-gamma0", "vimco", "--particles", "4", "--seeds", "0"]
    )
    assert again[:4] == rows
    assert again[4]["error"] == "RuntimeError: measured again"


def test_published_configurations_are_defaults_that_arguments_override():
    options = asymptotic_variance.parse_arguments(["--config", "mini", "--replicates", "7"])
    assert (options.num_data, options.particles, options.replicates) == (100, [3, 17, 100], 7)
    options = asymptotic_variance.parse_arguments(["--config", "extended", "--geomspace", "3", "1000", "5"])
    assert options.particles == [3, 12, 54, 234, 1000] and options.replicates == 10_000


def test_slopes_are_those_of_powers_of_k():
    rows = [
        {"estimator": "vimco", "seed": seed, "K": k}
        | {"SNR": (1 + seed) * k**-0.5, "DSNR": 2 * k**-0.5, "variance": 3 / k, "|mean|": 1.0 / k}
        for seed in (0, 1)
        for k in (3, 10, 100, 1000)
    ]
    (slope,) = asymptotic_variance.slopes(rows, [3, 100])
    expected = {"SNR": -0.5, "DSNR": -0.5, "variance": -1.0, "|mean|": -1.0}
    assert {name: slope[name] for name in expected} == pytest.approx(expected)
    (published,) = asymptotic_variance.slopes([{**rows[0], "estimator": "ovis-gamma0"}], [3, 1000])
    assert 0.2 < published["SNR publ."] < 0.5


def test_gaussian_mixture_trains_seeds_side_by_side_and_resumes(tmp_path, monkeypatch):
    argv = ["--estimators", "rws", "--particles", "4", "--seeds", "0", "1", "--batch_size", "8", "--no-progress"]
    argv += ["--evaluate_every", "5", "--num_eval_data", "20", "--num_gradients", "5", "--output", str(tmp_path)]
    (row,) = gaussian_mixture.main([*argv, "--num_steps", "10"])
    assert row["seeds"] == 2 and 0.5 < row["posterior"] < 1.0 and row["smallest"] <= row["posterior"]
    assert row["SNR"] > 0 and 1 <= row["ESS"] <= 4
    curves = list(csv.DictReader((tmp_path / "gaussian_mixture_curves.csv").read_text().splitlines()))
    assert [int(point["step"]) for point in curves] == [5, 10]
    assert float(written(tmp_path, "gaussian_mixture")[0]["posterior"]) == row["posterior"]

    trained = []
    monkeypatch.setattr(replicates, "train", lambda *args, **kwargs: trained.append(args))
    assert gaussian_mixture.main([*argv, "--num_steps", "10"]) == [row]
    assert not trained


@pytest.mark.slow
def test_efficiency_measures_in_a_process_of_its_own_and_chunks_need_less_memory(tmp_path, monkeypatch):
    argv = ["--models", "sbn", "--estimators", "ovis-gamma1", "--particles", "120", "--chunk", "20", "--width", "8"]
    argv += ["--batch_size", "4", "--rounds", "1", "--round_seconds", "0.01", "--output", str(tmp_path)]
    rows = efficiency.main(argv)
    assert [row.get("error") for row in rows] == [None, None]
    assert all(row["ms"] > 0 and row["wall ms"] > 0 for row in rows)
    assert rows[1]["MB"] < rows[0]["MB"] / 2
    assert len(written(tmp_path, "efficiency")) == 2
    monkeypatch.setattr(efficiency, "measure_apart", None)
    assert efficiency.main(argv) == rows


def test_a_process_that_fails_leaves_rows_with_errors(tmp_path, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="out of memory")
    monkeypatch.setattr(efficiency.subprocess, "run", lambda *args, **kwargs: killed)
    rows = efficiency.main(["--models", "vae", "--particles", "5", "--chunk", "0", "--output", str(tmp_path)])
    assert [row["error"] for row in rows] == ["exit status -9 out of memory"] * 3


@pytest.mark.parametrize(
    ("name", "kind", "attributes"),
    [
        ("ovis-gamma1", OVIS, {"gamma": 1.0, "num_auxiliary": 0}),
        ("ovis-S10-exclusive", OVIS, {"num_auxiliary": 10, "exclusive": True}),
        ("ovis-S2", OVIS, {"num_auxiliary": 2, "exclusive": False}),
        ("vimco-geometric", VIMCO, {"mean": "geometric"}),
        ("pathwise-iwae", IWELBO, {}),
        ("wake-wake", RWS, {"wake_phi": 1.0}),
    ],
)
def test_names_stand_for_the_published_estimators(name, kind, attributes):
    loss = make_estimator(name, 6)
    assert type(loss) is kind and loss.num_particles == 6
    assert {key: getattr(loss, key) for key in attributes} == attributes


@pytest.mark.parametrize(
    ("name", "num_particles", "betas"),
    [
        ("tvo-part2-config1", 5, [0, 0.05, 1]),
        ("tvo-part2-config1", 10, [0, 0.2, 1]),
        ("tvo-part5-beta2", 10, [0, *np.logspace(-2, 0, 5)]),
        ("tvo-part1", 10, [0, 1]),
    ],
)
def test_names_of_thermodynamic_objectives_give_their_partition(name, num_particles, betas):
    loss = make_estimator(name, num_particles)
    assert isinstance(loss, TVO)
    np.testing.assert_allclose(np.ravel(loss.betas), betas, rtol=1e-6)


def test_an_unknown_name_is_refused_and_names_the_known():
    with pytest.raises(ValueError, match=r"'ovis'; there are ovis-gamma0"):
        make_estimator("ovis", 5)


def test_exponents_are_of_the_two_largest():
    sizes = {10: 5.0, 100: 7.0, 1000: 700.0}
    rows = [{"model": "sbn", "estimator": "vimco", "chunk": 0, "K": k} for k in sizes]
    rows = [row | {"ms": sizes[row["K"]], "wall ms": 1.0, "MB": row["K"]} for row in rows]
    (found,) = efficiency.exponents(rows)
    assert math.isclose(found["exponent of ms"], 2.0) and math.isclose(found["exponent of MB"], 1.0)
