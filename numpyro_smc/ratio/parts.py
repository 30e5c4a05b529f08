"""Files of simulations: arrays with a checksum, which are read as they were written or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from numpyro_smc.engines.checkpoint import replacing

SETTINGS = "settings.json"
SUFFIXES = (".npz", ".h5", ".hdf5")
_REMEDY = "Delete it; simulate_to or write, called as before, writes this part anew."


class Part(NamedTuple):
    """What a file says of itself.

    - **num**, **num_failed** - simulations kept, and left out. **num_asked_for** - both, where it is known.
    - **failed_rows** - which of those asked for failed.
    """

    num: int
    num_failed: int
    num_asked_for: int
    failed_rows: np.ndarray

    def first(self, num: int) -> tuple[int, int]:
        """How many of the first ``num`` asked for were kept, and how many failed."""
        num_failed = int((self.failed_rows < num).sum())
        return min(self.num, num - num_failed), min(self.num_failed, num_failed)


def write_part(file: Path, arrays: dict[str, Any]) -> None:
    """Write arrays and their checksum: complete, or not at all."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    arrays["checksum"] = _checksum(arrays)
    with replacing(file) as temporary:
        if file.suffix == ".npz":
            with open(temporary, "wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]
        else:
            with import_h5py().File(temporary, "w") as opened:
                for name, array in arrays.items():
                    opened[name] = array
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())


def read_part(
    file: Path, rows: Mapping[str, Any] | None = None, *, needs_checksum: bool = False
) -> dict[str, np.ndarray]:
    """Arrays of a file.

    :param rows: the arrays and rows wanted; by default all, which are compared with the checksum.
    :param needs_checksum: whether the file is one of :func:`write_part` for certain.
    :raises ValueError: naming the file, if it is damaged.
    """
    if rows is not None:
        return _arrays(file, rows)
    found = _arrays(file, None)
    checksum = found.pop("checksum", None)
    if needs_checksum if checksum is None else not np.array_equal(checksum, _checksum(found)):
        raise ValueError(f"StoredData: '{file}' is damaged: its contents are not those of its checksum. {_REMEDY}")
    return found


def describe_part(file: Path) -> Part:
    """What is known of a file before its simulations are read.

    :raises ValueError: if it has no simulations, or is damaged.
    """
    found = _arrays(file, {"failed_rows": ..., "num_asked_for": ..., "failed": slice(0)})
    num, num_failed = _lengths(file)
    asked = int(found["num_asked_for"]) if np.size(found.get("num_asked_for", ())) == 1 else num + num_failed
    return Part(num, num_failed, asked, found.get("failed_rows", np.zeros(0, int)))


def part_digest(file: Path) -> str:
    """Text that differs between contents: the checksum that a part carries, or that of the whole file."""
    found = _arrays(file, {"checksum": ...})
    if "checksum" in found:
        return found["checksum"].tobytes().hex()
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_settings(path: Path) -> dict[str, Any]:
    """What a folder was begun with; nothing, for a file or a folder of other files."""
    file = path / SETTINGS
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"StoredData: '{file}' is damaged ({error}). Restore it, or delete the folder and simulate again."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"StoredData: '{file}' holds no settings. Restore it, or delete the folder and simulate again."
        )
    return found


def _lengths(file: Path) -> tuple[int, int]:
    with _Opened(file) as opened:
        return len(opened["theta"]), len(opened["failed"]) if "failed" in opened else 0


def _arrays(file: Path, rows: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    with _Opened(file) as opened:
        wanted = dict.fromkeys(opened, ...) if rows is None else {name: rows[name] for name in rows if name in opened}
        return {name: np.asarray(opened[name][piece]) for name, piece in wanted.items()}


class _Opened:
    """A file of arrays, whose every trouble in reading is one error that names it."""

    def __init__(self, file: Path) -> None:
        self.file, self.closing = file, contextlib.ExitStack()

    def __enter__(self) -> Any:
        try:
            stream = self.closing.enter_context(open(self.file, "rb"))  # zip does not close what it cannot read
            opened = np.load(stream) if self.file.suffix == ".npz" else import_h5py().File(stream, "r")
            self.closing.callback(getattr(opened, "close", lambda: None))
            names = list(opened)
        except ImportError:
            self.closing.close()
            raise
        except Exception as error:  # zip, NumPy and HDF5 raise what they like
            self.closing.close()
            raise _damaged(self.file, error) from error
        if "theta" not in names or "x" not in names:
            self.closing.close()
            raise ValueError(
                f"StoredData: '{self.file}' must have arrays theta and x, found {sorted(map(str, names))}."
            )
        return opened

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.closing.close()
        if isinstance(error, Exception):
            raise _damaged(self.file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"StoredData: '{file}' is damaged, or no file of simulations ({type(error).__name__}: {error}). {_REMEDY}"
    )


def _checksum(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {np.shape(arrays[name])} ".encode() + array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def import_h5py() -> Any:
    """:raises ImportError: saying what to install."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ImportError(
            "HDF5 files need h5py: pip install h5py. Or use file_format='npz', which needs nothing."
        ) from error
    return h5py
