"""The benchmark of inference gaps runs from the command line's arguments, writes what it promises, and resumes."""

import csv
import json

import numpy as np
import pytest

from benchmarks import inference_gap
from models import vae

TINY = ["--latent_size", "2", "--epochs", "3", "--num_images", "5", "--batch_size", "3", "--num_mc", "2"]
TINY += ["--max_steps", "200", "--patience", "1", "--num_chains", "3", "--num_temperatures", "3", "--num_leapfrog", "1"]
TINY += ["--num_samples", "50", "--no-progress"]


def test_trains_finds_the_gaps_writes_them_and_resumes(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    for name in ("standard", "linear encoder"):
        monkeypatch.setitem(vae.LAYERS, name, ((6,) if name == "standard" else (), (6,)))
    argv = [*TINY, "--experiments", "E-planar", "--families", "ffg", "planar", "--output", str(tmp_path)]
    (row,) = inference_gap.main(argv)
    assert "error" not in row, row
    assert -60 < row["L[q]"] < row["log p"] < -10 and -60 < row["test ELBO"] < -10
    for name in ("ffg", "planar"):
        parts = row[f"approximation {name}"] + row[f"amortisation {name}"]
        assert parts == pytest.approx(row["inference"]) and row[f"amortisation {name} s.e."] > 0
        assert row["L[q]"] < row[f"L[q*] {name}"]
    document = json.loads((tmp_path / "inference_gap.json").read_text())
    assert document["settings"]["epochs"] == 3 and "digits" in document["settings"]["data"]
    assert not {"output", "data_dir"} & set(document["settings"]) and "jax" in document["environment"]
    assert len(list(csv.DictReader((tmp_path / "inference_gap.csv").read_text().splitlines()))) == 1
    images = list(csv.DictReader((tmp_path / "inference_gap_E-planar.csv").read_text().splitlines()))
    assert np.mean([float(image["inference"]) for image in images]) == pytest.approx(row["inference"])
    assert (tmp_path / "inference_gap.png").stat().st_size > 5000

    # The frozen decoder is that of A-ffg, and its encoder is not.
    options = inference_gap.parse_arguments(argv)
    data = inference_gap.load_images(None, "fixed")
    first, second = (inference_gap.train(name, data, options).params for name in ("A-ffg", "E-planar"))
    equal = [np.array_equal(a, b) for a, b in zip(*map(leaves, (first, second)), strict=True)]
    assert len(equal) > 0 and all(equal)
    assert first["encoder$params"] is not None and len(second) > 2

    def forbidden(*args, **kwargs):
        raise AssertionError("worked again")

    monkeypatch.setattr(inference_gap, "train", forbidden)
    assert inference_gap.main(argv) == [row]


def leaves(params):
    return inference_gap.jax.tree.leaves(params["decoder$params"])


def test_weights_of_more_epochs_are_not_taken_for_those_of_fewer(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    monkeypatch.setitem(vae.LAYERS, "standard", ((6,), (6,)))
    options = inference_gap.parse_arguments([*TINY, "--output", str(tmp_path)])
    data = inference_gap.load_images(None, "fixed")
    inference_gap.train("A-ffg", data, options)
    options.epochs = 2
    with pytest.raises(ValueError, match="trained for 3 epochs, more than 2"):
        inference_gap.train("A-ffg", data, options)


def test_the_learning_rate_falls_in_eight_stages():
    rate = inference_gap.learning_rates(1e-3, 10)
    epochs = {0: 0, 1: 1, 3: 1, 4: 2, 12: 2, 13: 3, 1092: 6, 1093: 7, 3279: 7}
    for epoch, stage in epochs.items():
        assert float(rate(10 * epoch)) == pytest.approx(1e-3 * 10 ** (-stage / 7))


def test_references_stand_beside_mnist_only():
    options = inference_gap.parse_arguments(["--families", "ffg", "--epochs", "10", "--warm_up", "0"])
    row = {"experiment": "A-ffg", "log p": -86.0, "L[q]": -90.0, "L[q*] ffg": -88.0}
    lines = {line["quantity"]: line for line in inference_gap.beside_reference(row, options, on_mnist=True)}
    reference = {name: line["reference"] for name, line in lines.items()}
    assert reference == {
        "test ELBO": -103.5,
        "log p": -86.41,
        "L[q*] ffg": -88.47,
        "L[q]": -90.59,
        "approximation ffg": 2.06,
        "amortisation ffg": 2.13,
        "inference": 4.19,
    }
    frozen = inference_gap.beside_reference(row | {"experiment": "E-ffg"}, options, on_mnist=True)
    assert frozen[0]["quantity"] == "test ELBO" and frozen[0]["reference"] == ""
    digits = inference_gap.beside_reference(row, options, on_mnist=False)
    assert all(line["reference"] == "" for line in digits) and digits[1]["nats"] == -86.0
    assert set(inference_gap.REFERENCE) == set(inference_gap.EXPERIMENTS)
    assert {experiment.layers for experiment in inference_gap.EXPERIMENTS.values()} <= set(vae.LAYERS)
