"""The image loader: the format on tiny files, what is chosen when, its errors, and known facts of the real files."""

import gzip
import hashlib
import os
import struct

import jax
import numpy as np
import pytest

from models import images

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


@pytest.fixture(autouse=True)
def no_data_directory(monkeypatch):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)


def pixels(num_images: int, shape=(2, 3)) -> np.ndarray:
    count = num_images * shape[0] * shape[1]
    return (np.arange(count) * 37 % 256).astype(np.uint8).reshape(num_images, *shape)


def write_idx(path, array: np.ndarray, compress: bool = False) -> None:
    data = struct.pack(">4I", 0x803, *array.shape) + array.tobytes()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(data)) if compress else path.write_bytes(data)


def write_mnist(folder, compress: bool = False):
    folder.mkdir(exist_ok=True)
    write_idx(folder / TRAIN, pixels(12), compress)
    write_idx(folder / TEST, pixels(4), compress)
    return folder


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("folder", ["", "mnist"])
def test_idx_files_are_read_as_grey_levels(tmp_path, compress, folder):
    write_mnist(tmp_path / folder, compress)
    loaded = images.load_images(tmp_path)
    np.testing.assert_allclose(loaded.train, pixels(12).reshape(12, 6) / 255, rtol=1e-6)
    np.testing.assert_allclose(loaded.test, pixels(4).reshape(4, 6) / 255, rtol=1e-6)
    assert loaded.train.dtype == loaded.test.dtype == np.float32
    assert (loaded.shape, loaded.validation.shape) == ((2, 3), (0, 6))


def test_directory_defaults_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMPYRO_SMC_DATA", str(write_mnist(tmp_path / "other")))
    assert images.load_images().name == "images of 'other'"


@pytest.mark.parametrize("binarisation", ["dynamic", "fixed", "threshold"])
def test_other_images_in_the_same_format_go_by_the_name_of_their_folder(tmp_path, monkeypatch, binarisation):
    """Fashion-MNIST's files have MNIST's names: only MNIST's own pixels are called MNIST."""
    folder = write_mnist(tmp_path / "fashion", compress=True)
    loaded = images.load_images(folder, binarisation)
    assert str(loaded).startswith("images of 'fashion': 12 training, 0 validation and 4 test images of 2x3 pixels")
    grey = pixels(12).reshape(12, 6) / 255
    assert binarisation == "dynamic" or set(np.unique(loaded.train)) == {0, 1}
    assert binarisation == "fixed" or np.array_equal(loaded.train >= 0.5, grey >= 0.5)
    monkeypatch.setattr(images, "MNIST_DIGEST", hashlib.sha256(pixels(4).tobytes()).hexdigest())
    assert images.load_images(folder, binarisation).name == "MNIST"


def test_validation_is_the_last_sixth_of_the_training_images(tmp_path):
    whole = images.load_images(write_mnist(tmp_path))
    split = images.load_images(tmp_path, validation=True)
    assert (len(split.train), len(split.validation)) == (10, 2)
    np.testing.assert_array_equal(np.concatenate([split.train, split.validation]), whole.train)
    np.testing.assert_array_equal(split.test, whole.test)


def test_threshold_is_one_from_the_middle_on(tmp_path):
    loaded = images.load_images(write_mnist(tmp_path), "threshold")
    np.testing.assert_array_equal(loaded.train, pixels(12).reshape(12, 6) >= 128)
    assert loaded.train.dtype == np.float32


def test_fixed_binarisation_is_drawn_once_and_respects_black_and_white(tmp_path):
    write_idx(tmp_path / TRAIN, np.tile(np.array([0, 51, 255], np.uint8), (2000, 1)).reshape(-1, 1, 3))
    write_idx(tmp_path / TEST, pixels(4, (1, 3)))
    loaded, again = (images.load_images(tmp_path, "fixed") for _ in range(2))
    np.testing.assert_array_equal(loaded.train, again.train)
    assert set(np.unique(loaded.train)) == {0, 1}
    np.testing.assert_array_equal(loaded.train[:, [0, 2]], np.tile([0, 1], (2000, 1)))
    assert loaded.train[:, 1].mean() == pytest.approx(0.2, abs=0.045)  # 5 standard errors
    assert "seed 0" in loaded.binarisation


def test_fixed_binarisation_prefers_the_packed_file(tmp_path):
    bits = np.random.default_rng(1).integers(0, 2, (10, 784))
    arrays = {"train": np.packbits(bits[:6], axis=1), "test": np.packbits(bits[6:], axis=1)}
    np.savez(tmp_path / "mnist_bernoulli.npz", **arrays)
    write_mnist(tmp_path / "mnist")
    loaded = images.load_images(tmp_path, "fixed", validation=True)
    np.testing.assert_array_equal(np.concatenate([loaded.train, loaded.validation, loaded.test]), bits)
    assert loaded.shape == (28, 28)
    assert "mnist_bernoulli.npz" in loaded.binarisation
    assert images.load_images(tmp_path, "dynamic").shape == (2, 3)


@pytest.mark.parametrize("environment", [False, True])
def test_without_files_the_digits_are_loaded_and_said_to_be(tmp_path, monkeypatch, environment):
    if environment:
        monkeypatch.setenv("NUMPYRO_SMC_DATA", str(tmp_path))
    loaded = images.load_images(validation=True)
    assert (loaded.train.shape, loaded.validation.shape, loaded.test.shape) == ((1250, 64), (250, 64), (297, 64))
    assert (loaded.train.min(), loaded.train.max(), loaded.shape) == (0, 1, (8, 8))
    description = str(loaded)
    assert description.startswith("scikit-learn digits (no MNIST files were found): 1250 training, 250 validation")
    assert "8x8 pixels; binarisation: dynamic" in description


@pytest.mark.parametrize("present", [None, TRAIN, TEST])
def test_missing_files_are_named_with_their_source(tmp_path, monkeypatch, present):
    missing = {TRAIN, TEST} - {present}
    if present is None:
        directory = tmp_path
    else:
        write_idx(tmp_path / present, pixels(4))
        monkeypatch.setenv("NUMPYRO_SMC_DATA", str(tmp_path))
        directory = None
    with pytest.raises(FileNotFoundError, match=r"yann\.lecun\.com") as error:
        images.load_images(directory)
    assert all(f"no file {name}" in str(error.value) for name in missing)
    assert present is None or present not in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\1" + data[1:], lambda data: data[:7]])
def test_damaged_files_are_refused(tmp_path, damage):
    path = write_mnist(tmp_path) / TEST
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{TEST} is not a complete IDX file"):
        images.load_images(tmp_path)


def test_packed_file_without_its_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "mnist_bernoulli.npz", train=np.zeros((2, 98), np.uint8))
    with pytest.raises(ValueError, match="no array test"):
        images.load_images(tmp_path, "fixed")


def test_unknown_binarisation_is_refused():
    with pytest.raises(ValueError, match="binarisation='static'; expected one of dynamic, fixed, threshold"):
        images.load_images(binarisation="static")


def test_binarise_draws_with_the_grey_level_as_probability():
    grey = np.tile(np.float32([0, 0.25, 1]), (4000, 1))
    drawn = images.binarise(jax.random.key(0), grey)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn[:, [0, 2]], grey[:, [0, 2]])
    assert set(np.unique(drawn[:, 1])) == {0, 1}
    assert float(drawn[:, 1].mean()) == pytest.approx(0.25, abs=0.035)  # 5 standard errors
    assert np.any(drawn != images.binarise(jax.random.key(1), grey))


REAL_DIRECTORY = os.environ.get("NUMPYRO_SMC_DATA")


@pytest.mark.slow
@pytest.mark.skipif(REAL_DIRECTORY is None, reason="NUMPYRO_SMC_DATA names no directory")
def test_real_mnist_has_its_known_sizes_and_the_fixed_draw_is_of_it():
    grey = images.load_images(REAL_DIRECTORY, validation=True)
    assert grey.name == "MNIST"
    assert (grey.train.shape, grey.validation.shape, grey.test.shape) == ((50_000, 784), (10_000, 784), (10_000, 784))
    assert np.concatenate([grey.train, grey.validation]).mean(dtype=float) == pytest.approx(0.13066, abs=1e-5)
    fixed = images.load_images(REAL_DIRECTORY, "fixed", validation=True)
    for levels, bits in zip(grey[:3], fixed[:3], strict=True):
        assert bits.shape == levels.shape
        assert not np.any(bits[levels == 0]) and np.all(bits[levels == 1])
        assert bits.mean(dtype=float) == pytest.approx(levels.mean(dtype=float), abs=1e-3)
