"""Simulations on disk: written part by part, read in shuffled chunks, never all in memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array, random
from tqdm import tqdm

from numpyro_smc.engines.checkpoint import identity_of, replacing
from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.ratio.datasets import NonfinitePolicy, RatioData

__all__ = ["StoredData", "write"]

_SETTINGS = "settings.json"
_SUFFIXES = (".npz", ".h5", ".hdf5")


@dataclass(frozen=True)
class _Chunk:
    """Rows ``start`` to ``stop`` of a file."""

    path: Path
    start: int
    stop: int

    def read(self, nonfinite: NonfinitePolicy) -> RatioData:
        with _opened(self.path) as file:
            rows = slice(self.start, self.stop)
            context = file["context"][rows] if "context" in file else None
            return RatioData(file["theta"][rows], file["x"][rows], context, nonfinite)


class StoredData:
    """Simulations in files, read a chunk at a time.

    An epoch goes through the chunks in random order and through the rows of a chunk in random order; no batch is of two
    chunks. Chunks should therefore hold many batches, and be drawn alike, as those of :func:`write` are.

    :param path: a folder that :func:`write` filled, or a file ``.npz``, ``.h5`` or ``.hdf5`` with arrays ``theta``
        ``[n, D]``, ``x`` ``[n, *event]`` and maybe ``context`` ``[n, C]``. HDF5 files need ``h5py``.
    :param chunk_size: most rows read at a time.
    :param nonfinite: as for :class:`~numpyro_smc.ratio.datasets.RatioData`, applied to every chunk read.
    :raises ValueError: if there are no simulations in ``path``.
    :raises ImportError: for HDF5 files without ``h5py``.
    """

    def __init__(
        self, path: str | os.PathLike[str], chunk_size: int = 2**18, nonfinite: NonfinitePolicy = "raise"
    ) -> None:
        check_positive("StoredData", chunk_size=chunk_size)
        self.path, self.nonfinite = Path(path), nonfinite
        files = [self.path] if self.path.is_file() else sorted(_parts(self.path))
        if not files:
            raise ValueError(f"StoredData: no simulations in '{self.path}'; write() fills a folder with them.")
        self._chunks = [chunk for file in files for chunk in _chunks_of(file, chunk_size)]

    def __len__(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self._chunks)

    def __repr__(self) -> str:
        return f"StoredData('{self.path}', {len(self)} simulations in {len(self._chunks)} chunks)"

    def chunks(self, rng_key: Array) -> Iterator[RatioData]:
        for index in np.asarray(random.permutation(rng_key, len(self._chunks))):
            yield self._chunks[index].read(self.nonfinite)

    def num_batches(self, batch_size: int) -> int:
        return sum((chunk.stop - chunk.start) // batch_size for chunk in self._chunks)

    def first(self, num: int) -> RatioData:
        chosen, found = [], 0
        for chunk in self._chunks:
            chosen.append(chunk.read(self.nonfinite))
            found += len(chosen[-1])
            if found >= num:
                break
        return _joined(chosen).first(num)

    def split(self, rng_key: Array, fraction: float) -> tuple[StoredData, RatioData]:
        """Whole chunks for training, and others, read into memory, for validation.

        :raises ValueError: if there is one chunk only.
        """
        num = max(1, round(fraction * len(self._chunks)))
        if not 0 < fraction < 1 or num >= len(self._chunks):
            raise ValueError(
                f"StoredData: validation={fraction!r} is made of whole chunks, and of {len(self._chunks)} chunks none "
                f"would be left to train on. Lower chunk_size, or pass other simulations (RatioData) as validation."
            )
        order = np.asarray(random.permutation(rng_key, len(self._chunks)))
        held_out = _joined([self._chunks[index].read(self.nonfinite) for index in np.sort(order[:num])])
        rest = object.__new__(StoredData)
        rest.path, rest.nonfinite = self.path, self.nonfinite
        rest._chunks = [self._chunks[index] for index in np.sort(order[num:])]
        return rest, held_out

    def digest(self) -> str:
        settings = self.path / _SETTINGS
        description = [settings.read_text() if settings.is_file() else ""]
        description += [f"{c.path.name} {c.path.stat().st_size} {c.start} {c.stop}" for c in self._chunks]
        return identity_of("\n".join(description)).tobytes().hex()


def write(
    path: str | os.PathLike[str],
    simulate: Callable[[Array, int], tuple[Any, ...]],
    rng_key: Array,
    num_simulations: int,
    *,
    part_size: int = 2**16,
    file_format: str = "npz",
    settings: Mapping[str, Any] | None = None,
    nonfinite: NonfinitePolicy = "raise",
    progress_bar: bool = True,
) -> StoredData:
    """Simulate into a folder of files, one part after another.

    A part is complete or absent, and depends on its number and the key alone: the same call continues where the last
    one was cut, and a larger ``num_simulations`` adds parts.

    :param path: folder; made if it does not exist.
    :param simulate: ``simulate(rng_key, num)``: parameters ``[num, D]``, outputs ``[num, *event]`` and maybe a context
        ``[num, C]``.
    :param rng_key: random key.
    :param num_simulations: simulations in total.
    :param part_size: simulations of a file.
    :param file_format: ``"npz"`` or ``"hdf5"``, which needs ``h5py``.
    :param settings: what the simulator depends on, as JSON knows it; a folder begun with others is refused.
    :param nonfinite: as for :class:`~numpyro_smc.ratio.datasets.RatioData`.
    :return: the :class:`StoredData`.
    :raises ValueError: if an argument makes no sense, the folder was begun with other settings, or a simulation is not
        finite.
    :raises ImportError: for ``"hdf5"`` without ``h5py``.

    **Example**

    .. doctest::

        >>> import tempfile
        >>> from jax import random
        >>> from numpyro_smc.ratio.stored_data import write
        >>> def simulate(rng_key, num):
        ...     theta_key, x_key = random.split(rng_key)
        ...     theta = random.normal(theta_key, (num, 1))
        ...     return theta, theta + random.normal(x_key, (num, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data = write(folder, simulate, random.key(0), 250, part_size=100, progress_bar=False)
        ...     len(data), data.num_batches(50)
        (250, 5)
    """
    check_positive("write", num_simulations=num_simulations, part_size=part_size)
    if file_format not in ("npz", "hdf5"):
        raise ValueError(f"write: file_format must be 'npz' or 'hdf5', got {file_format!r}.")
    if file_format == "hdf5":
        _h5py()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    begun_with = {
        "rng_key": np.asarray(random.key_data(rng_key)).tolist(),
        "part_size": part_size,
        "file_format": file_format,
        "settings": dict(settings or {}),
    }
    _check_settings(folder, json.loads(json.dumps(begun_with)))
    sizes = [min(part_size, num_simulations - first) for first in range(0, num_simulations, part_size)]
    for number, size in enumerate(tqdm(sizes, unit="part", disable=not progress_bar)):
        file = folder / f"part_{number:05d}{'.npz' if file_format == 'npz' else '.h5'}"
        if file.exists() and _num_asked_for(file) == size:
            continue
        theta, x, *context = simulate(random.fold_in(rng_key, number), size)
        data = RatioData(theta, x, context[0] if context else None, nonfinite)
        arrays = {"theta": data.theta, "x": data.x, "context": data.context, "num_asked_for": np.array(size)}
        _save(file, {name: array for name, array in arrays.items() if array is not None})
    return StoredData(folder, chunk_size=part_size, nonfinite=nonfinite)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / _SETTINGS
    if file.exists():
        found = json.loads(file.read_text())
        differing = [name for name in settings if settings[name] != found.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"write: the folder '{folder}' was begun with {name}={found.get(name)!r}, not {settings[name]!r}. Name "
                f"another folder, or delete this one."
            )
        return
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(file) as temporary:
        if file.suffix == ".npz":
            with open(temporary, "wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]
        else:
            with _h5py().File(temporary, "w") as opened:
                for name, array in arrays.items():
                    opened[name] = array


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with np.load(file) if file.suffix == ".npz" else _h5py().File(file, "r") as opened:
        if "theta" not in opened or "x" not in opened:
            raise ValueError(f"StoredData: '{file}' must have arrays theta and x, found {sorted(opened)}.")
        yield opened


def _num_asked_for(file: Path) -> int:
    with _opened(file) as opened:
        return int(np.asarray(opened["num_asked_for"]))


def _parts(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith(".")]


def _chunks_of(file: Path, chunk_size: int) -> list[_Chunk]:
    with _opened(file) as opened:
        num = len(opened["theta"])
    return [_Chunk(file, start, min(start + chunk_size, num)) for start in range(0, num, chunk_size)]


def _joined(parts: list[RatioData]) -> RatioData:
    contexts = [part.context for part in parts if part.context is not None]
    return RatioData(
        np.concatenate([part.theta for part in parts]),
        np.concatenate([part.x for part in parts]),
        np.concatenate(contexts) if contexts else None,
    )


def _h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ImportError(
            "HDF5 files need h5py: pip install h5py. Or use file_format='npz', which needs nothing."
        ) from error
    return h5py
