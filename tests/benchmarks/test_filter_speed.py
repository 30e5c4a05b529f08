"""The speed benchmark runs, its filters estimate the same evidence, and what fails or is missing keeps a row."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from benchmarks import filter_speed
from benchmarks.filter_speed import AR1, BOUND, GRADIENT, HAND_WRITTEN, LINEAR_GAUSSIAN, OURS, PLATE, VOLATILITY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("filter_speed")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    """A quick run, merged with what another environment wrote of one cell."""
    cell = {"case": LINEAR_GAUSSIAN, "library": "particles", "N": 1000, "T": 50, "series": 1}
    other = {"settings": {"peers_only": "particles"}, "rows": [cell | {filter_speed.time_column(): 100.0}]}
    path = folder / "particles.json"
    path.write_text(json.dumps(other))
    return filter_speed.main(["--quick", "--skip-memory", "--peers", "--merge", str(path), "--output", str(folder)])


def test_every_cell_has_our_row_and_a_hand_written_one(rows):
    assert not [row["error"] for row in rows if "error" in row]
    for case in (LINEAR_GAUSSIAN, VOLATILITY, PLATE, BOUND, GRADIENT):
        libraries = {row["library"].split(",")[0] for row in rows if row["case"] == case}
        assert {OURS, HAND_WRITTEN} <= libraries


def test_ratios_and_rates_are_finite_and_the_reference_is_the_fastest_hand_written_filter(rows):
    for row in rows:
        assert np.isfinite(row["ratio"]) and row["ratio"] > 0
        if row["library"] != "particles":
            assert np.isfinite([row["M/s"], row["compile s"]]).all()
        if row["case"] == GRADIENT:
            assert np.isfinite(row["over value"])
    by_hand = [row["ratio"] for row in rows if row["case"] == PLATE and row["library"].startswith(HAND_WRITTEN)]
    assert len(by_hand) == 2 and min(by_hand) == 1.0


def test_nothing_of_ours_compiles_at_a_second_call(rows):
    assert {row["recompiled"] for row in rows if row["library"].startswith(OURS)} == {0}


def test_program_and_hand_written_filter_agree_with_kalman(rows):
    # Standard deviation at N=1000, T=50: 0.25; the keys are fixed.
    errors = [row["error (nat)"] for row in rows if row["case"] == LINEAR_GAUSSIAN and "log evidence" in row]
    assert len(errors) == 3
    np.testing.assert_allclose(errors, 0.0, atol=1.0)


def test_volatility_program_and_hand_written_filter_agree(rows):
    values = [row["log evidence"] for row in rows if row["case"] == VOLATILITY]
    assert abs(values[0] - values[1]) < 1.0  # standard deviation of one: 0.2


def test_hand_written_filters_are_unbiased():
    # Mean of 400 relative evidences within 5 standard errors of 1: false alarms 6e-7 per filter.
    y = filter_speed.simulate(AR1, 4, 20, seed=1)
    exact = np.array([filter_speed.kalman_log_evidence(series[None]) for series in y])
    one = partial(filter_speed.hand_written, AR1, 64)
    mapped = jax.vmap(lambda key: jax.vmap(one)(random.split(key, 4), jnp.asarray(y)))
    batched = jax.vmap(lambda key: filter_speed.hand_written_batch(AR1, 64, key, jnp.asarray(y)))
    for log_evidences in (mapped, batched):
        relative = np.exp(jax.jit(log_evidences)(random.split(random.key(2), 100)) - exact)
        assert abs(relative.mean() - 1) < 5 * relative.std() / np.sqrt(relative.size)


def test_results_are_written_and_a_merged_row_is_compared(rows, folder):
    document = json.loads((folder / "filter_speed.json").read_text())
    assert len(document["rows"]) == len(rows)
    assert "merged particles" in document["settings"]
    (merged,) = (row for row in document["rows"] if row["library"] == "particles")
    assert merged["ratio"] > 0
    assert len((folder / "filter_speed.csv").read_text().splitlines()) == len(rows) + 1


def test_a_failing_library_keeps_its_row_beside_the_others():
    def broken(attempt: int) -> float:
        raise RuntimeError("no such option")

    problem = filter_speed.Problem(LINEAR_GAUSSIAN, AR1, np.zeros((1, 2), np.float32), 10, seed=0)
    failed, works = filter_speed.measure(problem, {HAND_WRITTEN: broken, OURS: lambda attempt: 1.5}, 1, 1)
    assert failed["error"] == "RuntimeError: no such option"
    assert works["log evidence"] == 1.5 and "error" not in works


def test_a_missing_package_keeps_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(filter_speed.importlib.util, "find_spec", lambda name: None)
    rows = filter_speed.main(["--quick", "--cases", "memory", "--skip-memory", "--output", str(tmp_path)])
    assert {row["library"]: row["error"] for row in rows} == dict.fromkeys(filter_speed.PEERS, "not installed")


def test_memory_is_measured_in_its_own_process():
    row = filter_speed.measure_memory(filter_speed.parse_arguments(["--quick"]))
    assert "error" not in row
    assert 0 < row["before GiB"] <= row["peak RSS GiB"] < filter_speed.MEMORY_LIMIT_GIB
    assert abs(row["error (nat)"]) < 1.0
