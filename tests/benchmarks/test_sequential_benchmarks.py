"""The sequential benchmarks run from the command line's arguments, write what they promise, and resume."""

import csv
import json

import numpy as np
import pytest

from benchmarks import drift_diffusion, stochastic_volatility


def test_drift_diffusion_trains_every_method_and_writes_its_results(tmp_path):
    argv = ["--num_train_steps", "20", "--num_series", "20", "--batch_size", "4", "--inner_steps", "5", "5"]
    argv += ["--num_eval_particles", "8", "--num_eval_keys", "2", "--no-progress", "--output", str(tmp_path)]
    rows = drift_diffusion.main([*argv, "--bound", "iwae", "sixo-u", "sixo-dre"])
    assert [row["method"] for row in rows] == ["iwae", "sixo-u", "sixo-dre"]
    assert all(np.isfinite(row["gap"]) for row in rows) and 0.9 < rows[2]["density-ratio loss"] < 1.4
    written = list(csv.DictReader((tmp_path / "drift_diffusion.csv").read_text().splitlines()))
    assert [float(row["gap"]) for row in written] == [row["gap"] for row in rows]
    document = json.loads((tmp_path / "drift_diffusion.json").read_text())
    assert document["settings"]["num_train_steps"] == 20 and "jax" in document["environment"]
    assert (tmp_path / "gaps.png").stat().st_size > 5000


@pytest.mark.parametrize("methods", [["fivo", "iwae", "sixo-q"], ["sixo-dre"]])
def test_stochastic_volatility_runs_on_the_embedded_returns_and_resumes(tmp_path, methods):
    argv = ["--start", "2018-11-01", "--num_train_steps", "12", "--num_eval_particles", "50", "--num_eval_keys", "2"]
    argv += ["--num_bound_keys", "4", "--tilt_batch_size", "2", "--rnn_size", "4", "--mlp_size", "4"]
    argv += ["--model_inner_steps", "4", "--tilt_inner_steps", "2", "--no-progress", "--output", str(tmp_path)]
    rows = stochastic_volatility.main([*argv, "--bound", *methods])
    assert [row["method"] for row in rows] == methods
    assert rows[-1]["steps"] == (18 if methods == ["sixo-dre"] else 12)
    assert all(np.isfinite(row["own train bound"]) and np.isfinite(row["filter train"]) for row in rows)
    for name in ("sp500.csv", "sp500.json", "volatility.png", "filter.nc"):
        assert (tmp_path / name).stat().st_size > 100, name
    again = stochastic_volatility.main([*argv, "--bound", *methods])
    assert [row["own train bound"] for row in again] == [row["own train bound"] for row in rows]
    assert all(row["seconds"] < 30 for row in again)
