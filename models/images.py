"""Images for the latent variable models: MNIST, or other IDX files, where they are, else scikit-learn's 8x8 digits."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Binarisation = Literal["dynamic", "fixed", "threshold"]

#: One fixed Bernoulli draw of MNIST: the bits of each image packed, under the keys ``"train"`` and ``"test"``.
FIXED_MNIST = "mnist_bernoulli.npz"
TRAIN_MNIST, TEST_MNIST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"

#: SHA-256 of the pixels of MNIST's test images, by which it is told from other images in files of the same names.
MNIST_DIGEST = "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"

#: What is said of a binarisation that no file holds.
NOTES: dict[Binarisation, str] = {
    "dynamic": "dynamic, grey levels to be redrawn at every step",
    "fixed": "fixed, one Bernoulli draw with seed 0",
    "threshold": "threshold at 0.5",
}

MNIST_SOURCE = (
    "MNIST is published at yann.lecun.com/exdb/mnist and mirrored at storage.googleapis.com/cvdf-datasets/mnist; its "
    "files may stay compressed."
)


class Images(NamedTuple):
    """What :func:`load_images` loaded; ``print`` it to say so. The arrays are float32, one row per image."""

    train: np.ndarray  # [N, D]
    validation: np.ndarray  # [V, D]; V = 0 unless asked for
    test: np.ndarray  # [M, D]
    name: str  # of the data set
    binarisation: str  # what was done, and from which file or seed
    shape: tuple[int, int]  # of an image; D is its product

    def __str__(self) -> str:
        counts = f"{len(self.train)} training, {len(self.validation)} validation and {len(self.test)} test images"
        return f"{self.name}: {counts} of {self.shape[0]}x{self.shape[1]} pixels; binarisation: {self.binarisation}"


def load_images(
    data_dir: str | os.PathLike | None = None, binarisation: Binarisation = "dynamic", validation: bool = False
) -> Images:
    """MNIST from a directory, or without one scikit-learn's 8x8 digits, the first 1500 of them for training.

    :param data_dir: where MNIST's two IDX files of images are (here or in a folder ``mnist``, gzip-compressed or not),
        or those of another data set with the same names, such as Fashion-MNIST, which then is called as its folder.
        Without it, the environment variable ``NUMPYRO_SMC_DATA``; without files there, the digits.
    :param binarisation: ``"dynamic"`` keeps grey levels in [0, 1], to be redrawn at every step with :func:`binarise`;
        ``"fixed"`` reads ``mnist_bernoulli.npz``, or draws once with a fixed seed, in neither case H. Larochelle's
        published draw, which has the same distribution; ``"threshold"`` is 1 from 0.5 on.
    :param validation: set the last sixth of the training images apart: MNIST's usual 50 000 and 10 000.
    :raises FileNotFoundError: if ``data_dir`` is given and an image file is missing, or only one of the two is there.
    """
    if binarisation not in get_args(Binarisation):
        raise ValueError(
            f"load_images: binarisation={binarisation!r}; expected one of {', '.join(get_args(Binarisation))}."
        )
    directory = data_dir if data_dir is not None else os.environ.get("NUMPYRO_SMC_DATA")
    folders = [] if directory is None else [Path(directory), Path(directory) / "mnist"]
    packed = _find(folders, [FIXED_MNIST]) if binarisation == "fixed" else None
    if packed is not None:
        name, shape, note = "MNIST", (28, 28), f"fixed, {FIXED_MNIST}"
        train, test = _read_packed(packed, math.prod(shape))
    else:
        name, shape, train, test = _load_grey(folders, required=data_dir is not None)
        note, rng = NOTES[binarisation], np.random.default_rng(0)
        train, test = _binarise_once(train, binarisation, rng), _binarise_once(test, binarisation, rng)
    num_train = len(train) - (len(train) // 6 if validation else 0)
    return Images(train[:num_train], train[num_train:], test, name, note, shape)


def binarise(rng_key: Array, images: ArrayLike) -> Array:
    """A Bernoulli draw of grey levels in [0, 1], as numbers 0 and 1 of the same shape."""
    return jax.random.bernoulli(rng_key, images).astype(float)


def _load_grey(folders: Sequence[Path], required: bool) -> tuple[str, tuple[int, int], np.ndarray, np.ndarray]:
    """Name, shape of an image, and grey levels ``[N, D]`` of the training and test images."""
    files = {name: _find(folders, [name, f"{name}.gz"]) for name in (TRAIN_MNIST, TEST_MNIST)}
    missing = [name for name, path in files.items() if path is None]
    if missing and (required or len(missing) < len(files)):
        raise FileNotFoundError(
            f"load_images: no file {' and no file '.join(missing)} in {folders[0]} or in its folder 'mnist'. "
            f"{MNIST_SOURCE} Without data_dir and NUMPYRO_SMC_DATA, the 8x8 digits of scikit-learn are loaded instead."
        )
    if not missing:
        train, test = (_read_idx(path) for path in files.values() if path is not None)
        is_mnist = hashlib.sha256(test.tobytes()).hexdigest() == MNIST_DIGEST
        name = "MNIST" if is_mnist else f"images of '{files[TEST_MNIST].resolve().parent.name}'"  # type: ignore[union-attr]
        return name, test.shape[1:], *(pixels.reshape(len(pixels), -1) / np.float32(255) for pixels in (train, test))
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"load_images: no MNIST files were found, and the digits come with scikit-learn; pip install scikit-learn, "
            f"or set NUMPYRO_SMC_DATA to the directory of MNIST. {MNIST_SOURCE}",
            name=error.name,
        ) from error
    digits = load_digits().data.astype(np.float32) / 16
    return "scikit-learn digits (no MNIST files were found)", (8, 8), digits[:1500], digits[1500:]


def _binarise_once(grey: np.ndarray, binarisation: Binarisation, rng: np.random.Generator) -> np.ndarray:
    if binarisation == "dynamic":
        return grey
    bits = grey >= 0.5 if binarisation == "threshold" else rng.random(grey.shape, np.float32) < grey
    return bits.astype(np.float32)


def _find(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _read_idx(path: Path) -> np.ndarray:
    """The images of an IDX file as bytes ``[N, height, width]``."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = struct.unpack(">4I", data[:16]) if len(data) >= 16 else None
    if header is None or header[0] != 0x803 or len(data) != 16 + math.prod(header[1:]):
        raise ValueError(
            f"load_images: {path} is not a complete IDX file of images (magic number 0x803, three sizes, one byte per "
            f"pixel). {MNIST_SOURCE}"
        )
    return np.frombuffer(data, np.uint8, offset=16).reshape(header[1:])


def _read_packed(path: Path, num_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as arrays:
        if missing := {"train", "test"} - set(arrays):
            raise ValueError(
                f"load_images: {path} has no array {' and '.join(sorted(missing))}; expected 'train' and 'test', whose "
                "rows are images packed by numpy.packbits."
            )
        train, test = (np.unpackbits(arrays[k], axis=1, count=num_pixels).astype(np.float32) for k in ("train", "test"))
    return train, test
