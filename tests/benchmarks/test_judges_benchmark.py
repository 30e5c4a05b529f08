"""The benchmark of published values runs, keeps its rows and computes what it says."""

import json

import numpy as np
import pytest

from benchmarks import judges


def test_rows_are_kept_and_differences_are_in_combined_standard_errors(tmp_path, capsys):
    argv = ["--judges", "isotropic", "--num-particles", "2000", "--keys", "3", "--output", str(tmp_path)]
    (row,) = judges.main(argv)
    assert row["z"] == pytest.approx((row["ours"] - row["theirs"]) / row["s.e."]) and row["keys"] == 3
    assert json.loads((tmp_path / "judges.json").read_text())["rows"][0] == row
    assert judges.main(argv) == [row]
    assert "isotropic  PyAutoFit" in capsys.readouterr().out


def test_estimates_of_keys_are_averaged_as_evidences(monkeypatch):
    made_up = judges.Judge("nobody", -3000.0, 0.3, lambda options, num_particles, keys: [-3001.0, -2999.0], 5, 2)
    monkeypatch.setitem(judges.JUDGES, "made up", made_up)
    row = judges.compare("made up", judges.parse_arguments([]))
    assert row["ours"] == pytest.approx(np.log(np.mean(np.exp([-1.0, 1.0]))) - 3000.0, abs=1e-3)
    assert row["z"] == pytest.approx((row["ours"] + 3000.0) / np.hypot(row["s.e."], 0.3)) and row["N"] == 5
