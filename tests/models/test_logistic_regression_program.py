"""Logistic regression: the density, the two designs, and the loader's formats and errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy.stats import norm

from models import logistic_regression as lr

SHAPES = {"sonar": (208, 60), "ionosphere": (351, 34)}
FILES = {"sonar": "sonar.all-data", "ionosphere": "ionosphere.data"}
LABELS = {"sonar": "MR", "ionosphere": "bg"}


def write(directory, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A file of the published format, with one constant feature."""
    rng = np.random.default_rng(0)
    features, y = rng.uniform(size=SHAPES[name]).round(4), rng.integers(0, 2, SHAPES[name][0])
    features[:, 1] = 0.0
    lines = [",".join([*map(str, row), LABELS[name][label]]) for row, label in zip(features, y, strict=True)]
    (directory / FILES[name]).write_text("\n".join(lines) + "\n")
    return features, y


def test_log_density_is_the_written_one():
    x, y = lr.simulate(jax.random.key(0), 20, 3)
    w = np.random.default_rng(0).normal(size=3)
    logits = np.asarray(x) @ w
    expected = norm.logpdf(w).sum() - np.logaddexp(0, np.where(y, -logits, logits)).sum()
    found = log_density(lr.model, (x, y), {}, {"w": jnp.asarray(w)})[0]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_evidences_of_all_labellings_add_up_to_one():
    """By quadrature in two weights, over the eight labellings of three rows."""
    x = lr.simulate(jax.random.key(0), 3, 2).x
    grid = jnp.linspace(-8, 8, 161)
    w = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    labels = jnp.array(list(itertools.product((0, 1), repeat=3)))
    joint = jax.vmap(jax.vmap(lambda y, w: log_density(lr.model, (x, y), {}, {"w": w})[0], (None, 0)), (0, None))
    evidences = jnp.exp(joint(labels, w)).sum(1) * (grid[1] - grid[0]) ** 2
    assert float(evidences.sum()) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(evidences, evidences[::-1], rtol=1e-4)  # w and -w exchange the labels
    assert evidences.max() > 1.2 * evidences.min()


def test_breast_cancer_is_the_default():
    x, y = lr.load_dataset()
    assert (x.shape, y.shape, set(y), y.sum()) == ((569, 31), (569,), {0, 1}, 357)
    np.testing.assert_allclose(x[:, :-1].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x[:, :-1].std(0), 1)
    np.testing.assert_array_equal(x[:, -1], 1)


@pytest.mark.parametrize("name", FILES)
def test_uci_files_are_read_standardised_with_an_intercept(tmp_path, name):
    features, y = write(tmp_path, name)
    dataset = lr.load_dataset(name, tmp_path)
    assert dataset.x.shape == (len(y), features.shape[1] + 1)
    np.testing.assert_array_equal(dataset.y, y)
    np.testing.assert_allclose(dataset.x[:, 0], (features[:, 0] - features[:, 0].mean()) / features[:, 0].std())
    np.testing.assert_array_equal(dataset.x[:, 1], 0)  # the constant feature
    np.testing.assert_array_equal(dataset.x[:, -1], 1)


def test_published_design_has_the_negative_logits_of_the_code(tmp_path):
    features, _ = write(tmp_path, "sonar")
    weights = np.random.default_rng(1).normal(size=61)
    logits = lr.load_dataset("sonar", tmp_path, "published").x @ weights
    np.testing.assert_allclose(logits, -((features * weights[:-1]) + weights[-1]).sum(1), rtol=1e-10)


def test_directory_defaults_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMPYRO_SMC_DATA", str(tmp_path))
    _, y = write(tmp_path, "sonar")
    np.testing.assert_array_equal(lr.load_dataset("sonar").y, y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sonar", "ionosphere"])
def test_real_files_are_read(name):
    x, y = lr.load_dataset(name)
    assert x.shape == (SHAPES[name][0], SHAPES[name][1] + 1)
    assert y.sum() == {"sonar": 97, "ionosphere": 225}[name]


@pytest.mark.parametrize("named", [True, False])
def test_missing_file_is_named_with_its_source_and_the_fallback(tmp_path, monkeypatch, named):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"ionosphere\.data .*archive\.ics\.uci\.edu.*data_dir.*breast_cancer"):
        lr.load_dataset("ionosphere", tmp_path if named else None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:-1],
        lambda lines: [lines[0][:-1] + "Q", *lines[1:]],
        lambda lines: ["x" + lines[0], *lines[1:]],
        lambda lines: ["0.1," + lines[0], *lines[1:]],
        lambda lines: ["<html>"],
        lambda lines: [],
    ],
    ids=["truncated", "label", "number", "column", "page", "empty"],
)
def test_damaged_file_is_refused(tmp_path, damage):
    write(tmp_path, "sonar")
    path = tmp_path / "sonar.all-data"
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=r"sonar\.all-data is not the published file: expected 208 rows of 60 numbers"):
        lr.load_dataset("sonar", tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="name='iris'; expected one of breast_cancer, sonar, ionosphere"):
        lr.load_dataset("iris")
    with pytest.raises(ValueError, match="design='raw'; expected one of standardised, published"):
        lr.load_dataset(design="raw")


def test_simulated_data_follow_the_model():
    dataset = lr.simulate(jax.random.key(0))
    assert dataset.x.shape == (200, 10)
    assert set(np.unique(dataset.y)) == {0, 1}
    np.testing.assert_array_equal(dataset.x[:, -1], 1)
