"""The speed benchmark of ratio training runs, its libraries train the same loss, and what is missing keeps a row."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import ratio_speed
from benchmarks.ratio_speed import FIT, OURS, PYTORCH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ratio_speed")


@pytest.fixture(scope="module")
def rows(folder):
    return {row["library"]: row for row in ratio_speed.main(["--quick", "--output", str(folder)])}


def test_every_library_has_a_row_with_finite_times(rows, folder):
    assert rows.keys() == {OURS, FIT, PYTORCH}
    for library in (OURS, FIT):
        assert "error" not in rows[library]
        assert rows[library][ratio_speed.time_column()] > 0 and rows[library]["epochs / s"] > 0
    assert len(json.loads((folder / "ratio_speed.json").read_text())["rows"]) == 3


def test_nothing_compiles_at_a_second_call(rows):
    assert rows[OURS]["recompiled"] == rows[FIT]["recompiled"] == 0


def test_all_libraries_have_the_same_loss(rows):
    losses = [row["loss"] for row in rows.values() if "loss" in row]
    assert len(losses) >= 2 and abs(losses[0] - 2 * np.log(2)) < 0.2
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_a_missing_or_failing_library_keeps_its_row(rows):
    if importlib.util.find_spec("torch") is None:
        assert rows[PYTORCH]["error"] == "not installed"

    def broken(problem):
        raise RuntimeError("no such option")

    problem = ratio_speed.make_problem(ratio_speed.parse_arguments(["--quick"]), 64)
    (row,) = ratio_speed.measure(problem, {OURS: broken}, 1, 1)
    assert row["error"] == "RuntimeError: no such option"
