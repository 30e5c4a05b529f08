"""The smoothing benchmark runs, keeps its rows, and compares estimators at equal CPU time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import smoothing
from benchmarks.smoothing import PARAMS, SCORE, STATES, STOP_GRADIENT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoothing")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return smoothing.main(["--quick", "--output", str(folder)])


def test_every_case_has_its_rows_and_numbers(rows, folder):
    assert [(row["case"], row["method"]) for row in rows] == [
        (SCORE, STOP_GRADIENT),
        (SCORE, "backward_mcmc"),
        (STATES, "backward_mcmc"),
    ]
    for row in rows:
        assert np.isfinite([value for value in row.values() if isinstance(value, float)]).all()
    np.testing.assert_allclose([rows[0]["least gain"], rows[0]["total gain"]], 1.0, rtol=1e-9)
    document = json.loads((folder / "smoothing.json").read_text())
    assert len(document["rows"]) == 3 and document["settings"]["clock"] == "CPU time of all threads"


def test_smoothed_scores_and_states_are_near_the_exact_ones(rows):
    """8 runs of 200 particles; bounds are 8 standard errors (Student's t, 7 degrees: false alarms 9e-5 a number)."""
    smoothed = rows[1]
    for name in PARAMS:
        assert abs(smoothed[f"bias {name}"]) < 8.0 * smoothed[f"sd {name}"] / np.sqrt(8.0)
    assert smoothed["total gain"] > 1.0
    assert 0.0 < rows[2]["rms of averages"] < rows[2]["rms mean"] < 0.2


def test_a_second_run_measures_nothing_again(rows, folder, monkeypatch):
    monkeypatch.setattr(smoothing, "replicate", lambda *args: pytest.fail("measured again"))
    again = smoothing.main(["--quick", "--output", str(folder)])
    assert again == json.loads((folder / "smoothing.json").read_text())["rows"]
    assert [row["CPU ms"] for row in again] == [row["CPU ms"] for row in rows]


def test_errors_at_equal_time_are_interpolated_and_fall_as_one_over_time_beyond():
    reference = [{"CPU ms": 1.0, "mse": 16.0}, {"CPU ms": 4.0, "mse": 1.0}]
    at = [smoothing.mse_at(time, reference, "mse") for time in (0.5, 1.0, 2.0, 4.0, 8.0)]
    np.testing.assert_allclose(at, [32.0, 16.0, 4.0, 1.0, 0.5], rtol=1e-6)
