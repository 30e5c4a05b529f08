"""The benchmark of annealing's budget runs from the command line's arguments, counts its gradients, and resumes."""

import csv
import json

import numpy as np
import pytest

from benchmarks import annealing_budget
from models import vae

TINY = ["--latent_size", "2", "--epochs", "2", "--num_images", "4", "--num_simulated", "4", "--num_chains", "3"]
TINY += ["--num_pilot_chains", "2", "--num_leapfrog", "2", "--batch_size", "4", "--no-progress"]
TINY += ["--guide_temperatures", "4", "--prior_temperatures", "--certified_temperatures", "4"]


@pytest.mark.slow
def test_every_line_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    monkeypatch.setitem(vae.LAYERS, "standard", ((6,), (6,)))
    argv = [*TINY, "--output", str(tmp_path)]
    rows = annealing_budget.main(argv)
    assert not any("error" in row for row in rows), rows
    guide, simulated = rows
    assert [(row["start"], row["temperatures"]) for row in rows] == [("guide", 4), ("simulated", 4)]
    assert guide["difference"] == 0.0 and "difference" not in simulated
    assert guide["mean log weight"] < guide["log p"] < 0.0 < simulated["gap s.e."]
    for row, num_chains in ((guide, 2 + 3), (simulated, 2 + 3 + 3)):
        assert 1e6 * row["M row-gradients/CPU s"] * row["CPU s"] == pytest.approx(num_chains * 4 * 4 * 2)
        assert row["times original"] == pytest.approx(row["M row-gradients/CPU s"] / 4.1e-3)
    assert len(list(csv.DictReader((tmp_path / "annealing_budget.csv").read_text().splitlines()))) == 2
    assert "digits" in json.loads((tmp_path / "annealing_budget.json").read_text())["settings"]["data"]

    def forbidden(*args, **kwargs):
        raise AssertionError("worked again")

    monkeypatch.setattr(annealing_budget, "measure", forbidden)
    assert annealing_budget.main(argv) == rows


def test_lines_are_paired_by_image_with_the_longest_from_the_guide(tmp_path):
    options = annealing_budget.parse_arguments(["--guide_temperatures", "10", "20", "--output", str(tmp_path)])
    values = {("guide", 10): [1.0, 2.0], ("guide", 20): [3.0, 7.0], ("prior", 10): [2.5, 6.5]}
    for (start, temperatures), numbers in values.items():
        np.save(annealing_budget.values_file(start, temperatures, options), np.array(numbers))
    rows = [{"start": start, "temperatures": number} for start, number in (*values, ("simulated", 10))]
    found = annealing_budget.add_differences(rows, options)
    assert [row.get("difference") for row in found] == [-3.5, 0.0, -0.5, None]
    assert [round(row.get("difference s.e.", -1.0), 6) for row in found] == [1.5, 0.0, 0.0, -1.0]
