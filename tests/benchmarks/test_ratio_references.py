"""The benchmark of exact posteriors: its table, its controls, and what its measure of uniformity sees."""

import json

import numpy as np
import pytest

from benchmarks import ratio_references
from benchmarks.ratio_references import HALVES, NUTS, PRIOR, RANKS, SMC

#: One size for both tables, so that tempered SMC is compiled once.
SMALL = ["--tasks", "gaussian_linear", "--observations", "1", "--num_samples", "200", "--num_moves", "3"]
SMALL += [
    "--methods",
    SMC,
    HALVES,
    PRIOR,
    "--rank_task",
    "gaussian_linear",
    "--num_simulations",
    "3",
    "--rank_particles",
    "200",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ratio_references")


@pytest.fixture(scope="module")
def tables(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NUMPYRO_SMC_DATA", raising=False)
        return ratio_references.main([*SMALL, "--output", str(folder)])


def test_controls_are_measured_once_and_nuts_where_there_is_one_mode():
    options = ratio_references.parse_arguments(["--tasks", "slcp", "bernoulli_glm", "--observations", "2", "1"])
    found = [tuple(cell.values()) for cell in ratio_references.cells(options)]
    assert found == [
        *(("slcp", 2, method) for method in (SMC, HALVES, PRIOR)),
        ("slcp", 1, SMC),
        *(("bernoulli_glm", 2, method) for method in (SMC, NUTS, HALVES, PRIOR)),
        *(("bernoulli_glm", 1, method) for method in (SMC, NUTS)),
    ]


@pytest.mark.slow
def test_every_cell_is_measured_and_written(tables, folder):
    rows = tables[ratio_references.NAME]
    assert [row["method"] for row in rows] == [SMC, HALVES, PRIOR]
    assert not any(row.get("error") for row in rows)
    assert len(json.loads((folder / "ratio_references.json").read_text())["rows"]) == 3


@pytest.mark.slow
def test_samplers_are_nearer_to_the_reference_than_the_prior(tables):
    """Of 400 rows: the standard error of an accuracy is 0.025."""
    accuracy = {row["method"]: row["C2ST"] for row in tables[ratio_references.NAME]}
    assert accuracy[PRIOR] > 0.75
    assert max(accuracy[method] for method in (SMC, HALVES)) < 0.64


@pytest.mark.slow
def test_evidence_of_the_gaussian_is_the_exact_one(tables):
    row = tables[ratio_references.NAME][0]
    assert abs(row["log evidence"] - row["exact"]) < 5 * row["log evidence s.e."]


@pytest.mark.slow
def test_ranks_have_a_row_for_each_parameter_and_the_likelihood(tables):
    ranks = tables[RANKS]
    assert [row["quantity"] for row in ranks] == [*(f"theta[{i}]" for i in range(10)), "log likelihood"]
    assert all(0 <= row["inside 50%"] <= row["inside 95%"] <= 1 for row in ranks)


@pytest.mark.slow
def test_second_call_measures_nothing_again(tables, folder, monkeypatch):
    monkeypatch.setattr(ratio_references, "compare", None)
    monkeypatch.setattr(ratio_references, "rank_table", None)
    assert len(ratio_references.main([*SMALL, "--output", str(folder)])[RANKS]) == 11


def test_uniformity_sees_what_is_not_uniform():
    """Kolmogorov's distance of 400 values exceeds 1.95 in 0.1 % of uniform samples."""
    shares = np.random.default_rng(0).uniform(size=400)
    even, shifted, narrow = (ratio_references.uniformity(s) for s in (shares, shares**1.5, 0.5 + (shares - 0.5) / 2))
    assert even["distance"] < 1.95 < shifted["distance"] and narrow["distance"] > 1.95
    assert narrow["inside 50%"] == 1.0 and abs(even["inside 80%"] - 0.8) < 0.1
    assert ratio_references.uniformity(np.array([0.25, 0.75]))["distance"] == pytest.approx(0.25 * 2**0.5)
    for values in ([0.9, 0.95], [0.05, 0.1]):  # too high, and too low
        assert ratio_references.uniformity(np.array(values))["distance"] == pytest.approx(0.9 * 2**0.5)
