"""Simulations on disk: written part by part, read in shuffled chunks, never all in memory."""

from __future__ import annotations

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
from numpyro_smc.programs.arguments import check_if_given, check_positive
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.ratio.datasets import NonfinitePolicy, RatioData, are_finite, check_policy
from numpyro_smc.ratio.parts import (
    SETTINGS,
    SUFFIXES,
    describe_part,
    import_h5py,
    part_digest,
    read_part,
    read_settings,
    write_part,
)

__all__ = ["StoredData", "write"]


@dataclass(frozen=True)
class _Chunk:
    """Rows ``start`` to ``stop`` of a file, and as many of the parameters that failed."""

    path: Path
    start: int
    stop: int
    failed: tuple[int, int]

    def read(self, nonfinite: NonfinitePolicy, checked: set[Path], needs_checksum: bool) -> RatioData:
        """:param checked: files whose checksum was compared already; this one is added."""
        rows = slice(self.start, self.stop)
        taken = {"theta": rows, "x": rows, "context": rows, "failed": slice(*self.failed)}
        if self.path in checked:
            arrays = read_part(self.path, taken)
        else:
            whole = read_part(self.path, needs_checksum=needs_checksum)
            checked.add(self.path)
            arrays = {name: whole[name][piece] for name, piece in taken.items() if name in whole}
        return RatioData(arrays["theta"], arrays["x"], arrays.get("context"), nonfinite, arrays.get("failed"))


class StoredData:
    """Simulations in files, read a chunk at a time.

    An epoch goes through the chunks in random order and through the rows of a chunk in random order; no batch is of two
    chunks. Chunks should therefore hold many batches, and be drawn alike, as those of :func:`write` are.

    :param path: a folder that :func:`write` filled, or a file ``.npz``, ``.h5`` or ``.hdf5`` with arrays ``theta``
        ``[n, D]``, ``x`` ``[n, *event]`` and maybe ``context`` ``[n, C]``. HDF5 files need ``h5py``.
    :param chunk_size: most rows read at a time.
    :param nonfinite: as for :class:`~numpyro_smc.ratio.datasets.RatioData`, applied to every chunk read.
    :param num_simulations: only so many, the first ones, those that failed included; all by default.
    :raises ValueError: if there are no simulations in ``path``; naming the file, where one is damaged.
    :raises ImportError: for HDF5 files without ``h5py``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        chunk_size: int = 2**18,
        nonfinite: NonfinitePolicy = "raise",
        num_simulations: int | None = None,
    ) -> None:
        check_positive("StoredData", chunk_size=chunk_size)
        check_if_given("StoredData", num_simulations=num_simulations)
        check_policy("StoredData", nonfinite)
        self.path, self.nonfinite = Path(path), nonfinite
        files = [self.path] if self.path.is_file() else sorted(_parts(self.path))
        if not files:
            raise ValueError(f"StoredData: no simulations in '{self.path}'; write() fills a folder with them.")
        self.settings = read_settings(self.path)
        self._checked: set[Path] = set()
        self._chunks: list[_Chunk] = []
        self.lacks_failures, left = False, num_simulations
        for file in files:
            part = describe_part(file)
            num_rows, num_failed = (part.num, part.num_failed) if left is None else part.first(left)
            left = None if left is None else left - min(left, part.num_asked_for)
            self.lacks_failures |= part.num + part.num_failed < part.num_asked_for
            for start in range(0, num_rows, chunk_size):
                stop = min(start + chunk_size, num_rows)
                failed = (num_failed * start // num_rows, num_failed * stop // num_rows)
                self._chunks.append(_Chunk(file, start, stop, failed))

    def _read(self, chunk: _Chunk) -> RatioData:
        return chunk.read(self.nonfinite, self._checked, "checksums" in self.settings)

    def __len__(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self._chunks)

    def __repr__(self) -> str:
        return f"StoredData('{self.path}', {len(self)} simulations in {len(self._chunks)} chunks)"

    def chunks(self, rng_key: Array) -> Iterator[RatioData]:
        for index in np.asarray(random.permutation(rng_key, len(self._chunks))):
            yield self._read(self._chunks[index])

    def num_batches(self, batch_size: int) -> int:
        return sum((chunk.stop - chunk.start) // batch_size for chunk in self._chunks)

    def first(self, num: int) -> RatioData:
        chosen, found = [], 0
        for chunk in self._chunks:
            chosen.append(self._read(chunk))
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
        held_out = _joined([self._read(self._chunks[index]) for index in np.sort(order[:num])])
        rest = object.__new__(StoredData)
        rest.path, rest.nonfinite, rest.settings = self.path, self.nonfinite, self.settings
        rest._checked, rest.lacks_failures = self._checked, self.lacks_failures
        rest._chunks = [self._chunks[index] for index in np.sort(order[num:])]
        return rest, held_out

    def digest(self) -> str:
        description = [json.dumps(self.settings, sort_keys=True)]
        contents = {file: part_digest(file) for file in dict.fromkeys(chunk.path for chunk in self._chunks)}
        description += [f"{c.path.name} {contents[c.path]} {c.start} {c.stop}" for c in self._chunks]
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
    one was cut, a larger ``num_simulations`` adds parts, and a smaller one reads the first and writes nothing. Parts
    carry checksums. One process at a time writes a folder.

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
    :raises ValueError: if an argument makes no sense, the folder was begun with other settings, a part is damaged, or a
        simulation is not finite.
    :raises PermissionError: before anything is simulated, if the folder cannot be written.
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
    rng_key = one_key("write", rng_key)
    check_positive("write", num_simulations=num_simulations, part_size=part_size)
    if file_format not in ("npz", "hdf5"):
        raise ValueError(f"write: file_format must be 'npz' or 'hdf5', got {file_format!r}.")
    check_policy("write", nonfinite)
    if file_format == "hdf5":
        import_h5py()
    folder = _prepared(Path(path))
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
        if file.exists() and describe_part(file).num_asked_for >= size:
            continue
        theta, x, *context = simulate(random.fold_in(rng_key, number), size)
        given = (np.asarray(theta), np.asarray(x), np.asarray(context[0]) if context else None)
        data = RatioData(*given, nonfinite)
        arrays = {"theta": data.theta, "x": data.x, "failed": data.failed, "num_asked_for": np.array(size)}
        if data.context is not None:
            arrays["context"] = data.context
        if nonfinite == "drop":
            arrays["failed_rows"] = np.flatnonzero(~are_finite(*given, drop=True))
        write_part(file, arrays)
    return StoredData(folder, chunk_size=part_size, nonfinite=nonfinite, num_simulations=num_simulations)


def _prepared(folder: Path) -> Path:
    """The folder, made, writable, and without what a killed process left half-written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"write: '{folder}' is a file; name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"write: the folder '{folder}' cannot be written; change its permissions or name another."
        )
    for pattern in (".part_*", f".{SETTINGS}.*"):
        for left_over in folder.glob(pattern):
            left_over.unlink()
    return folder


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / SETTINGS
    if file.exists():
        found = read_settings(folder)
        for name, value in settings.items():
            _check_same(folder, name, found.get(name), value)
        return
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(settings | {"checksums": "sha256"}, indent=2) + "\n")


def _check_same(folder: Path, name: str, found: Any, wanted: Any) -> None:
    """Of two settings or dictionaries of settings, name the first that differs."""
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        differing = next(part for part in {**wanted, **found} if found.get(part) != wanted.get(part))
        return _check_same(
            folder, f"{name}={{{differing!r}: ...}}, {differing}", found.get(differing), wanted.get(differing)
        )
    raise ValueError(
        f"write: the folder '{folder}' was begun with {name}={found!r}, not {wanted!r}. Name another folder, or delete "
        f"this one."
    )


def _parts(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]


def _joined(parts: list[RatioData]) -> RatioData:
    contexts = [part.context for part in parts if part.context is not None]
    return RatioData(
        np.concatenate([part.theta for part in parts]),
        np.concatenate([part.x for part in parts]),
        np.concatenate(contexts) if contexts else None,
        failed=np.concatenate([part.failed for part in parts if part.failed is not None]),
    )
