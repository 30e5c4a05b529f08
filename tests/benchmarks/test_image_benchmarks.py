"""The image benchmarks run from the command line's arguments, write what they promise, and resume without training."""

import argparse
import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gaussian_vae, image_training, sigmoid_belief_network
from models.images import Images
from numpyro_smc import OVIS, TVO

TINY = ["--num_particles", "3", "--num_train_steps", "8", "--num_evaluations", "2", "--batch_size", "4"]
TINY += ["--num_eval_particles", "12", "--num_eval_points", "5", "--num_curve_particles", "4"]
TINY += ["--num_curve_points", "3", "--num_unit_samples", "6", "--seed", "0", "7", "--no-progress"]


@pytest.mark.parametrize(
    ("benchmark", "sizes", "estimators", "num_units"),
    [
        (sigmoid_belief_network, ["--num_layers", "2", "--width", "3"], ["wake-wake", "ovis-gamma1+anneal"], 6),
        (gaussian_vae, ["--latent_size", "2", "--hidden_size", "4", "--num_gradient_samples", "3"], ["stl"], 2),
    ],
)
def test_trains_every_estimator_writes_its_results_and_resumes(
    tmp_path, monkeypatch, benchmark, sizes, estimators, num_units
):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    name = benchmark.__name__.rpartition(".")[2]
    argv = [*TINY, *sizes, "--estimators", *estimators, "--output", str(tmp_path)]
    rows = benchmark.main(argv)
    assert [(row["estimator"], row["K"]) for row in rows] == [(estimator, 3) for estimator in estimators]
    for row in rows:
        assert -60 < row["test L"] < -10 and -60 < row["train L"] < -10
        assert row["KL(q|p)"] > 0 and 1 <= row["ESS"] <= 3 and 0 <= row["active"] <= num_units
        assert row["ms/step"] > 0 and row["published test L"] == "" and row["test s.d. (seeds)"] > 0
    assert rows[0][f"test - {estimators[0]}"] == 0.0
    assert ("SNR" in rows[0]) == (benchmark is gaussian_vae)
    written = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    assert [float(row["test L"]) for row in written] == [row["test L"] for row in rows]
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["settings"]["num_train_steps"] == 8 and "digits" in document["settings"]["data"]
    assert not {"output", "data_dir"} & set(document["settings"]) and "jax" in document["environment"]
    curves = json.loads((tmp_path / f"{name}_curves.json").read_text())["rows"]
    assert [(row["seed"], row["step"]) for row in curves[:4]] == [(0, 4), (0, 8), (7, 4), (7, 8)]
    assert all(np.isfinite(row["test"]) for row in curves) and len(curves) == 4 * len(estimators)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000

    again = benchmark.main(argv)
    assert all(row["ms/step"] == "" for row in again), "trained again"
    assert [{**row, "ms/step": ""} for row in rows] == again


def test_names_of_estimators_make_their_losses():
    annealed = image_training.make_loss("ovis-gamma1+anneal", 5, 100)
    assert isinstance(annealed, OVIS) and annealed.gamma == 1.0
    assert [round(float(annealed.alpha(jnp.array(step))), 3) for step in (0, 50, 100)] == [0.99, 0.9, 0.0]
    assert image_training.make_loss("ovis-gamma1+anneal", 5, None).alpha == 0.0
    assert image_training.make_loss("stl+alpha0.7", 5, 100).alpha == 0.7
    for num_particles, first in ((5, 0.05), (10, 0.2), (50, 0.3)):
        loss = image_training.make_loss("tvo-part2-config1", num_particles, 100)
        assert isinstance(loss, TVO) and np.allclose(loss.betas, [0.0, first, 1.0])
    for name in image_training.ESTIMATORS:
        assert image_training.estimator(name) == name and image_training.make_loss(name, 5, 100).num_particles == 5
    for name in (*sigmoid_belief_network.ESTIMATORS, *gaussian_vae.ESTIMATORS):
        image_training.estimator(name)
    for name in ("ovis", "stl+alpha1.0", "stl+warm", "vimco"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not an estimator"):
            image_training.estimator(name)


def test_published_figures_stand_beside_mnist_only():
    published = sigmoid_belief_network.PUBLISHED
    assert published["vimco-arithmetic"]["test"] == {5: -91.43, 10: -90.13, 50: -88.96}
    assert 50 not in published["ovis-S50"]["test"]
    assert set(published) <= {f"{name}{end}" for name in image_training.ESTIMATORS for end in ("", "+anneal")}
    experiment = image_training.Experiment("name", sigmoid_belief_network.make_programs, "inference", published)
    images = Images(*[np.zeros((2, 4), np.float32)] * 3, "MNIST", "fixed", (2, 2))
    options = argparse.Namespace(seed=[0], num_train_steps=10, estimators=["ovis-gamma0"], num_layers=1, width=2)
    programs = experiment.make_programs(image_training.random.key(0), images, options)
    bounds = np.array([[-1.0, -3.0]])
    trained = image_training.Replicates({}, {}, seconds=0.5, resumed=5)
    rows = [
        image_training.row_of(
            image_training.Cell(experiment, programs, images._replace(name=name), "ovis-gamma0", 10, options),
            trained,
            {"test": np.array([-2.0])},
            bounds,
            bounds - 0.5,
        )
        for name in ("MNIST", "digits")
    ]
    assert [row["published test L"] for row in rows] == [-90.06, ""]
    assert rows[0]["published KL(q|p)"] == "" and rows[0]["ms/step"] == 100.0
    assert rows[0]["test - ovis-gamma0"] == 0.5 and rows[0]["s.e. of difference"] == 0.0
    assert rows[0]["test s.e. (images)"] == pytest.approx(1.0)
