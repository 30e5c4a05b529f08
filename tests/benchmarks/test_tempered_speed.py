"""The speed benchmark of tempered SMC runs, and both libraries have the evidence that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import random

from benchmarks import tempered_speed
from benchmarks.tempered_speed import BARE, BLACKJAX, DECODER, GAUSSIAN, LOGISTIC, OURS
from numpyro_smc.programs.unconstrained import UnconstrainedModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tempered_speed")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return tempered_speed.main(["--quick", "--output", str(folder)])


@pytest.mark.slow
def test_every_case_has_both_rows_and_nothing_of_ours_compiles_twice(rows, folder):
    assert [(row["case"], row["library"]) for row in rows] == [
        (GAUSSIAN, OURS),
        (GAUSSIAN, BLACKJAX),
        (LOGISTIC, OURS),
        (LOGISTIC, BLACKJAX),
        (DECODER, OURS),
        (DECODER, BARE),
    ]
    for row in rows:
        assert np.isfinite(row["ratio"]) and row["ratio"] > 0.0 and row["CPU ms"] > 0.0
    assert {row["recompiled"] for row in rows if row["library"] == OURS} == {0}
    document = json.loads((folder / "tempered_speed.json").read_text())
    assert len(document["rows"]) == 6 and document["settings"]["blackjax"]


@pytest.mark.slow
def test_evidences_agree_and_ours_takes_fewer_stages(rows):
    """200 particles, 3 keys: the standard deviation of the mean is about 0.2."""
    cells = {(row["case"], row["library"]): row for row in rows}
    ours = cells[GAUSSIAN, OURS]
    assert abs(ours["log evidence"] - ours["exact"]) < 1.0
    assert abs(cells[LOGISTIC, OURS]["log evidence"] - cells[LOGISTIC, BLACKJAX]["log evidence"]) < 1.5
    for case in (GAUSSIAN, LOGISTIC):
        assert cells[case, OURS]["stages"] < cells[case, BLACKJAX]["stages"]


@pytest.mark.parametrize("case", [GAUSSIAN, LOGISTIC])
def test_the_functions_given_to_blackjax_are_the_program(case):
    target = tempered_speed.gaussian_target() if case == GAUSSIAN else tempered_speed.logistic_target(0)
    position = random.normal(random.key(0), (tempered_speed.DIM,))
    split = jax.jit(lambda u: UnconstrainedModel(target.program, target.args).split(u))(position)
    np.testing.assert_allclose(split.base, target.log_prior(position), rtol=1e-5)
    np.testing.assert_allclose(split.likelihood, target.log_likelihood(position), rtol=1e-5)
