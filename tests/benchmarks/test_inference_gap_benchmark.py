"""The benchmark of inference gaps runs from the command line's arguments, writes what it promises, and resumes."""

import csv
import json

import jax
import numpy as np
import pytest
from numpyro import handlers

from benchmarks import inference_gap
from benchmarks.inference_gap_experiments import EXPERIMENTS, REFERENCE, make_programs
from benchmarks.inference_gap_training import train
from models import vae
from models.images import load_images

TINY = ["--latent_size", "2", "--epochs", "3", "--num_images", "5", "--batch_size", "3", "--num_mc", "2"]
TINY += ["--max_steps", "200", "--patience", "1", "--num_chains", "3", "--num_temperatures", "3", "--num_leapfrog", "1"]
TINY += ["--num_samples", "50", "--no-progress"]


@pytest.mark.slow
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
    images = list(csv.DictReader((tmp_path / "inference_gap_E-planar_3.csv").read_text().splitlines()))
    assert np.mean([float(image["inference"]) for image in images]) == pytest.approx(row["inference"])
    for figure in ("inference_gap.png", "inference_gap_images.png"):
        assert (tmp_path / figure).stat().st_size > 5000
    assert not (tmp_path / "inference_gap_training.png").exists()

    # The frozen decoder is that of A-ffg, and its encoder is not.
    options = inference_gap.parse_arguments(argv)
    data = load_images(None, "fixed")
    first, second = (train(name, data, options).params for name in ("A-ffg", "E-planar"))
    equal = [np.array_equal(a, b) for a, b in zip(*map(leaves, (first, second)), strict=True)]
    assert len(equal) > 0 and all(equal)
    assert first["encoder$params"] is not None and len(second) > 2

    # What is finished is not done again; gaps of an earlier epoch stand beside, and are drawn over training.
    def earlier(experiment, epochs, **others):
        assert (experiment, epochs) == ("E-planar", 1)
        return {name: value for name, value in row.items() if name not in ("experiment", "epochs")}, []

    monkeypatch.setattr(inference_gap, "measure", earlier)
    assert inference_gap.main(argv) == [row]
    rows = inference_gap.main([*argv, "--checkpoints", "1"])
    assert [row["epochs"] for row in rows] == [3, 1] and rows[0] == row
    assert (tmp_path / "inference_gap_training.png").stat().st_size > 5000


def leaves(params):
    return jax.tree.leaves(params["decoder$params"])


def test_training_goes_on_from_the_latest_earlier_epoch_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    monkeypatch.setitem(vae.LAYERS, "standard", ((6,), (6,)))
    data, found = load_images(None, "fixed"), {}
    for folder, numbers in (("straight", [3]), ("in steps", [1, 3, 2])):
        (tmp_path / folder).mkdir()
        options = inference_gap.parse_arguments([*TINY, "--output", str(tmp_path / folder)])
        found[folder] = {epochs: leaves(train("A-ffg", data, options, epochs).params) for epochs in numbers}
    pairs = list(zip(found["straight"][3], found["in steps"][3], strict=True))
    assert len(pairs) > 0 and all(np.array_equal(a, b) for a, b in pairs)
    after = found["in steps"]
    assert all(not np.array_equal(after[2][0], after[epochs][0]) for epochs in (1, 3))  # neither of them in its place
    assert len(list((tmp_path / "in steps").glob("A-ffg-*-[123].npz"))) == 3


@pytest.mark.parametrize("name", ["A-planar", "A-coupling"])
def test_flows_are_trained_jointly_and_planar_ones_are_functions_of_the_encoder(name):
    _, guide = make_programs(name, 16, 4, 0)
    x = np.random.default_rng(0).integers(0, 2, (3, 16)).astype(np.float32)

    @jax.jit
    def transforms():
        with handlers.seed(rng_seed=0), handlers.trace() as trace:
            guide(x)
        return trace["z"]["fn"].transforms

    found = transforms()
    assert len(found) == (2 if name == "A-planar" else 4)
    if name == "A-planar":
        assert found[0].u.shape == (3, 4) and np.ptp(found[0].u, axis=0).min() > 0


def test_checkpoints_after_the_end_are_refused(capsys):
    with pytest.raises(SystemExit):
        inference_gap.parse_arguments(["--epochs", "10", "--checkpoints", "3", "10"])
    assert "--checkpoints must lie between 0 and --epochs 10" in capsys.readouterr().err


def test_references_stand_beside_mnist_only():
    options = inference_gap.parse_arguments(["--families", "ffg", "--epochs", "10", "--warm_up", "0"])
    row = {"experiment": "A-ffg", "epochs": 10, "log p": -86.0, "L[q]": -90.0, "L[q*] ffg": -88.0}
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
    assert set(REFERENCE) | {"A-coupling"} == set(EXPERIMENTS)
    assert {experiment.layers for experiment in EXPERIMENTS.values()} <= set(vae.LAYERS)
