"""The benchmarks of evidence and of differentiable resampling write what they promise, resume, and keep what failed."""

import csv
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import differentiable_resampling, evidence
from models import linear_gaussian, static_targets


def written(folder, name):
    """Rows of the CSV, as many as the JSON has."""
    rows = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
    document = json.loads((folder / f"{name}.json").read_text())
    assert len(rows) == len(document["rows"]) and "jax" in document["environment"]
    return rows


def fail(*args, **kwargs):
    raise RuntimeError("measured again")


@pytest.mark.slow
def test_evidence_estimates_certifies_covers_resumes_and_keeps_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "COVERAGE_METHODS", {"importance": {"num_samples": 200}})
    argv = [
        "--targets",
        "student-t",
        "--runs",
        "2",
        "--leapfrog",
        "2",
        "--samples",
        "2000",
        "--chains",
        "4",
        "--fit-steps",
        "100",
    ]
    argv += ["--simulated", "2", "--max-temperatures", "50", "--output", str(tmp_path)]
    tables = evidence.main([*argv, "--methods", "importance, prior", "importance, guide", "--coverage", "4"])
    truth = static_targets.student_t_integrals(static_targets.student_t_data()).log_evidence
    for row in tables["evidence"]:
        assert abs(row["value"] - truth - row["difference"]) < 1e-9 and abs(row["difference"]) < 0.5
        assert row["s.e."] > 0 and row["inside"].endswith("/2") and row["gradients"] == 2000
    (gap,) = tables["evidence_bidirectional"]
    assert gap["temperatures"] == 50 and math.isfinite(gap["gap"]) and "lower" not in gap
    (covered,) = tables["evidence_coverage"]
    assert covered["problems"] == 4 and 0 <= covered["inside of trusted"] <= covered["inside"] <= 4
    for name, rows in tables.items():
        assert not rows or len(written(tmp_path, name)) == len(rows)
    assert (tmp_path / "evidence.png").stat().st_size > 5000
    monkeypatch.setattr(evidence, "log_marginal_likelihood", fail)
    monkeypatch.setattr(evidence, "bidirectional", fail)
    again = evidence.main([*argv, "--methods", "importance, prior", "ais, prior"])
    assert again["evidence"][:2] == tables["evidence"]
    assert again["evidence"][2]["error"] == "RuntimeError: measured again"


def test_gradients_of_an_annealed_run_are_those_it_takes():
    """One gradient at the start and one per leapfrog step; a pilot of 30 moves and at least a hundred more."""
    assert evidence.annealing_gradients(chains=2, temperatures=11, leapfrog=3) == 2 * (1 + 10 * 3)
    assert evidence.annealing_gradients(2, 11, 3, pilot=4) == 2 * 31 + 4 * (1 + 130 * 3)
    assert evidence.annealing_gradients(2, 201, 3, pilot=4) == 2 * 601 + 4 * (1 + 230 * 3)


@pytest.mark.slow
def test_nuts_with_four_chains_misses_modes_that_tempering_finds(tmp_path):
    argv = ["--targets", "student-t", "--methods", "--simulated", "0", "--modes", "4", "--output", str(tmp_path)]
    rows = evidence.main(argv)["evidence_modes"]
    shares = {method: [row["share"] for row in rows if row["method"] == method] for method in ("nuts, 4 chains", "smc")}
    assert abs(np.mean(shares["smc"]) - 0.9) < 0.05 and max(abs(np.array(shares["smc"]) - 0.9)) < 0.15
    assert max(abs(np.array(shares["nuts, 4 chains"]) - 0.9)) > 0.1
    for row in rows:
        if row["method"] == "nuts, 4 chains":
            # Every chain stays in the mode that it found.
            assert all(float(share) in (0.0, 1.0) for share in row["by chain"].split())


def test_differentiable_resampling_measures_fits_resumes_and_keeps_what_failed(tmp_path, monkeypatch):
    argv = ["--steps", "12", "--keys", "4", "--series", "2", "--particles", "16", "--output", str(tmp_path)]
    tables = differentiable_resampling.main([*argv, "--schemes", "multinomial", "gumbel .3"])
    for row in tables["differentiable_resampling"]:
        assert all(math.isfinite(value) for key, value in row.items() if key != "scheme") and row["ms"] > 0
    for row in tables["differentiable_resampling_fits"]:
        assert row["series"] == 2 and 0 <= row["close"] <= row["moved"] <= 2 and row["evaluations"] >= 1
    for name, rows in tables.items():
        assert len(written(tmp_path, name)) == len(rows) == 2
    assert (tmp_path / "differentiable_resampling.png").stat().st_size > 5000
    monkeypatch.setattr(differentiable_resampling, "make_loss", fail)
    again = differentiable_resampling.main([*argv, "--schemes", "multinomial", "diffusion"])
    assert [row["scheme"] for row in again["differentiable_resampling"]] == ["multinomial", "gumbel .3", "diffusion"]
    assert again["differentiable_resampling"][:2] == tables["differentiable_resampling"]
    assert again["differentiable_resampling"][2]["error"] == "RuntimeError: measured again"


def test_the_exact_loss_is_that_of_the_published_code():
    """Minus log evidence 217.2236 and gradient (7.6114, -4.1507) on the published series, rounded to four decimals."""
    y, theta = jnp.asarray(differentiable_resampling.PUBLISHED_SERIES), jnp.array([0.5, 1.0])
    assert abs(float(differentiable_resampling.exact_loss(theta, y)) - 217.2236) < 2e-3
    other = linear_gaussian.ar1_parameters(0.5, 1.0, 0.5**0.5, 1e-6)
    np.testing.assert_allclose(
        differentiable_resampling.exact_loss(theta, y[:5]), -linear_gaussian.log_evidence(other, y[:5, None]), rtol=1e-6
    )
