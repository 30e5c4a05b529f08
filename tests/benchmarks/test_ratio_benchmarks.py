"""The benchmarks of ratio estimators run from the command line's arguments, write what they promise, and resume."""

import csv
import json

import numpy as np
import pytest

from benchmarks import ratio_benchmark, ratio_marginals
from numpyro_smc.reports.c2st import c2st

TINY = ["--num_simulations", "600", "--batch_size", "64", "--max_epochs", "2", "--width", "16"]


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_posteriors_are_compared_with_references_and_the_table_resumes(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    argv = [*TINY, "--tasks", "two_moons", "--observations", "1", "2", "--num_classes", "4", "--num_blocks", "1"]
    argv += ["--num_samples", "200", "--num_moves", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(ratio_benchmark, "c2st", short_c2st)
    rows = ratio_benchmark.main(argv)
    assert [row["observation"] for row in rows] == [1, 2] and not any("error" in row for row in rows), rows
    assert all(0.4 < row["C2ST"] <= 1 and np.isfinite(row["calibration"]) for row in rows)
    document = json.loads((tmp_path / "ratio_benchmark.json").read_text())
    assert document["settings"]["loss"] == "C" and "jax" in document["environment"]
    assert not {"data_dir", "output"} & set(document["settings"])
    monkeypatch.setattr(ratio_benchmark, "train", None)
    assert len(ratio_benchmark.main(argv)) == 2


def short_c2st(reference, samples):
    return c2st(reference[:200], samples, num_folds=2, max_iterations=20)


def test_the_fast_preset_is_small():
    assert ratio_benchmark.parse_arguments(["--fast"]).max_epochs < ratio_benchmark.parse_arguments([]).max_epochs


def test_published_figures_stand_beside_means():
    rows = [{"task": "slcp", "simulations": 10_000, "observation": i, "C2ST": 0.9 + i / 100} for i in (1, 2)]
    rows = [row | {"training CPU s": 1.0, "sampling CPU s": 2.0} for row in rows]
    options = ratio_benchmark.parse_arguments(["--tasks", "slcp", "--observations", "1", "2"])
    (line,) = ratio_benchmark.beside_published(rows, options)
    assert line["C2ST"] == pytest.approx(0.915) and line["published NRE-C"] == 0.892


@pytest.mark.slow
def test_subsets_are_learned_checked_and_drawn(tmp_path):
    argv = [*TINY, "--experiments", "slcp-amnre", "--num_layers", "1", "--num_validation", "200", "--num_pairs", "200"]
    argv += ["--num_coverage", "50", "--num_consistency", "1", "--num_exact", "2", "--bins", "10", "--no-progress"]
    (row,) = ratio_marginals.main([*argv, "--output", str(tmp_path)])
    assert "error" not in row, row
    assert row["loss of exact ratios"] > 0 and abs(row["coverage deviation"]) <= 1
    lines = list(csv.DictReader((tmp_path / "ratio_marginals_curves.csv").read_text().splitlines()))
    assert [line["epoch"] for line in lines] == ["1", "2"]
    for figure in ("loss", "roc", "coverage", "consistency", "corner"):
        assert (tmp_path / f"slcp-amnre_{figure}.png").stat().st_size > 1000
