"""A pytree, or the progress of a training run, in one file that is read back bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer.svi import SVIState
from numpyro.util import find_stack_level

from numpyro_smc.engines.identity import Identity, check_same
from numpyro_smc.programs.compiled import is_array

__all__ = [
    "AnyLength",
    "Progress",
    "as_text",
    "check_folder",
    "identity_of",
    "kept_or_warned",
    "load_pytree",
    "load_run",
    "replacing",
    "save_pytree",
    "save_run",
]


_TRAILER = b"\nsha256"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path``, which becomes it in the end, complete, or not at all.

    Files that processes which were killed on this machine left there are removed.
    """
    folder, name = os.path.split(os.path.abspath(path))
    _sweep(Path(folder), f".{name}.")
    prefix = f".{name}.{socket.gethostname()}-{os.getpid()}-"
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=".part")
    os.close(descriptor)
    try:
        yield Path(temporary)
        os.replace(temporary, os.path.join(folder, name))
    except BaseException:
        os.unlink(temporary)
        raise


def _sweep(folder: Path, prefix: str) -> None:
    of_host = f"{prefix}{socket.gethostname()}-"
    for left in folder.iterdir() if folder.is_dir() else ():
        if left.name.startswith(of_host) and left.name.endswith(".part"):
            number = left.name.removeprefix(of_host).partition("-")[0]
            if number.isdigit() and not _is_running(int(number)):
                left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def check_folder(user: str, checkpoint: str | os.PathLike | None) -> None:
    """:raises ValueError: unless a checkpoint can be written: before hours of work, not after them."""
    if checkpoint is None:
        return
    path = os.path.abspath(checkpoint)
    if not os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"{user}: the folder of checkpoint='{os.fspath(checkpoint)}' does not exist; create it first.")
    if os.path.isdir(path):
        raise ValueError(f"{user}: checkpoint='{os.fspath(checkpoint)}' is a folder; name a file in it.")
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(path)) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"{user}: nothing can be written to the folder of checkpoint='{os.fspath(checkpoint)}': {error}. Name a "
            f"file in another folder."
        ) from error


def kept_or_warned(save: Callable[[], None], user: str, path: str | os.PathLike) -> None:
    """Save a run, or warn if that fails: what was computed is still in memory."""
    try:
        save()
    except OSError as error:
        warnings.warn(
            f"{user}: checkpoint '{os.fspath(path)}' could not be written ({error}). The run goes on, and its result "
            f"is in memory only.",
            stacklevel=find_stack_level(),
        )


def identity_of(description: str, *trees: Any) -> np.ndarray:
    """A digest of a description and of all leaves of ``trees``, by which a checkpoint knows its own work."""
    digest = hashlib.sha256(description.encode())
    for leaf in jax.tree.leaves(trees):
        if is_array(leaf):
            array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        else:
            digest.update(repr(leaf).encode())
    return np.frombuffer(digest.digest(), np.uint8)


@dataclass(frozen=True)
class AnyLength:
    """Stands in the ``like`` of :func:`load_pytree` for a vector whose length only the file knows.

    :param dtype: dtype the vector must have.
    """

    dtype: Any


def save_pytree(path: str | os.PathLike, tree: Any) -> None:
    """Write the leaves of ``tree`` to ``path`` (``.npz`` format, whatever the name), without pickle.

    The file is complete or absent: it is written beside ``path`` under a temporary name, then moved into place.

    :param path: file to write; an existing one is replaced.
    :param tree: pytree of arrays, numbers and random keys (typed or ``uint32``); every dtype is kept bit for bit.
    :raises ValueError: if a leaf is not an array or a number; the message names it.
    """
    named_leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    manifest: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for index, (key_path, leaf) in enumerate(named_leaves):
        name = jax.tree_util.keystr(key_path)
        manifest.append({"name": name, "dtype": _dtype_name(leaf, name), "shape": np.shape(leaf)})
        arrays[f"leaf_{index}"] = _stored_form(leaf)
    arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)

    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        with open(temporary, "rb+") as file:
            checksum = hashlib.file_digest(file, "sha256")
            file.write(_TRAILER + checksum.digest())
            file.flush()
            os.fsync(file.fileno())


def load_pytree(path: str | os.PathLike, like: Any) -> Any:
    """Read a file of :func:`save_pytree` into the structure of ``like``.

    :param path: the file.
    :param like: pytree with the structure, shapes and dtypes to expect. Its leaves decide what is returned: JAX array,
        random key, NumPy array or Python number. :class:`AnyLength` leaves come back as NumPy vectors.
    :return: a pytree like ``like`` with the values of the file.
    :raises ValueError: if it is no such file, or if structure, a shape or a dtype differ; the message names the leaf.
    """
    manifest, stored = _read(path)
    found = {entry["name"]: entry for entry in manifest}
    named_likes, treedef = jax.tree_util.tree_flatten_with_path(like)
    expected = {jax.tree_util.keystr(key_path): leaf for key_path, leaf in named_likes}

    for name, leaf in expected.items():
        if name not in found:
            raise ValueError(f"'{os.fspath(path)}' has no leaf {name}, which is expected.")
        dtype, shape = found[name]["dtype"], tuple(found[name]["shape"])
        if dtype != _dtype_name(leaf, name):
            raise ValueError(
                f"'{os.fspath(path)}': leaf {name} has dtype {dtype}, but {_dtype_name(leaf, name)} is expected."
            )
        wanted = (stored[name].size,) if isinstance(leaf, AnyLength) else np.shape(leaf)
        if shape != wanted:
            raise ValueError(f"'{os.fspath(path)}': leaf {name} has shape {shape}, but {wanted} is expected.")
    for name in found:
        if name not in expected:
            raise ValueError(f"'{os.fspath(path)}' has a leaf {name}, which is not expected.")
    return jax.tree.unflatten(treedef, [_restored_form(stored[name], leaf) for name, leaf in expected.items()])


def _read(path: str | os.PathLike) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Names, dtypes and shapes of the leaves in a file, and the leaves by name."""
    raw = Path(path).read_bytes()
    contents, trailer = raw[: -len(_TRAILER) - 32], raw[-len(_TRAILER) - 32 :]
    has_checksum = trailer.startswith(_TRAILER)
    if has_checksum and hashlib.sha256(contents).digest() != trailer[len(_TRAILER) :]:
        raise ValueError(f"'{os.fspath(path)}' is damaged: its contents are not those of its checksum.")
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            manifest = json.loads(file["manifest"].tobytes())
            stored = {entry["name"]: file[f"leaf_{index}"] for index, entry in enumerate(manifest)}
        is_whole = all(
            tuple(entry["shape"]) == stored[entry["name"]].shape
            for entry in manifest
            if not entry["dtype"].startswith("key<")
        )
    except Exception as error:  # whatever a damaged header makes of NumPy's reader
        raise ValueError(f"'{os.fspath(path)}' was not written by save_pytree, or is damaged: {error}") from error
    if not is_whole:
        raise ValueError(f"'{os.fspath(path)}' is damaged: an array has another shape than was written.")
    if not has_checksum:
        warnings.warn(
            f"'{os.fspath(path)}' has no checksum: it was written by an earlier version, and whether it is damaged "
            f"cannot be told.",
            stacklevel=find_stack_level(),
        )
    return manifest, stored


def save_run(path: str | os.PathLike, settings: str, contents: dict[str, Any], of: Identity) -> None:
    """:func:`save_pytree` with the settings of what ran, and what it ran on."""
    save_pytree(path, {**contents, "settings": as_text(settings), "of": as_text(json.dumps(dict(of)))})


def load_run(
    path: str | os.PathLike,
    settings: str,
    like: dict[str, Any],
    of: Identity | Callable[[dict[str, Any]], Identity],
    user: str,
    advice: str,
) -> dict[str, Any]:
    """Read a file of :func:`save_run`.

    :param like: the contents to expect, as for :func:`load_pytree`.
    :param of: what the run must be of; may depend on the contents.
    :param advice: the end of each message.
    :raises ValueError: if it is no such file, of other contents, of other settings, or of other programs or data.
    """
    try:
        contents = load_pytree(path, {**like, "settings": AnyLength("uint8"), "of": AnyLength("uint8")})
    except ValueError as error:
        raise ValueError(f"{user}: checkpoint {error} {advice}") from error
    found = contents["settings"].tobytes().decode()
    if found != settings:
        raise ValueError(
            f"{user}: checkpoint '{os.fspath(path)}' is of another sampler.\n  found    {found}\n"
            f"  expected {settings}\n{advice}"
        )
    written = json.loads(contents["of"].tobytes())
    expected = of(contents) if callable(of) else of
    check_same(f"{user}: checkpoint '{os.fspath(path)}'", written, expected, advice)
    return contents


def as_text(text: str) -> np.ndarray:
    """A text as a vector to store."""
    return np.frombuffer(text.encode(), np.uint8)


@dataclass(frozen=True)
class Progress:
    """A training run so far: everything a restart needs. Immutable, so that Ctrl-C finds all or nothing of a step.

    :ivar state: the :data:`~numpyro.infer.svi.SVIState`.
    :ivar evaluation_key: the key from which those of the evaluations are derived.
    :ivar losses: the losses of the steps taken.
    :ivar evaluations: ``(step, values)`` of the evaluations made.
    :ivar num_skipped: number of steps that were skipped.
    """

    state: SVIState
    evaluation_key: Array
    losses: np.ndarray
    evaluations: tuple[tuple[int, dict[str, float]], ...] = ()
    num_skipped: int = 0

    @property
    def step(self) -> int:
        return len(self.losses)

    def save(self, path: str | os.PathLike, of: Identity) -> None:
        save_run(path, "fit", {**vars(self), "evaluations": as_text(json.dumps(self.evaluations))}, of)

    def load(self, path: str | os.PathLike, of: Identity) -> Progress:
        """The run saved in ``path``, by the same training as this one."""
        like = {**vars(self), "losses": AnyLength(self.losses.dtype), "evaluations": AnyLength("uint8")}
        advice = "Pass the svi and the data that wrote it, another file, or resume=False to overwrite it."
        contents = load_run(path, "fit", like, of, "fit", advice)
        del contents["settings"], contents["of"]
        evaluations = json.loads(contents["evaluations"].tobytes())
        return Progress(**{**contents, "evaluations": tuple((step, values) for step, values in evaluations)})


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _dtype_name(leaf: Any, name: str) -> str:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if not _is_key(leaf) and np.dtype(dtype).kind in "OUSMm":
        raise ValueError(f"Leaf {name} is a {type(leaf).__name__}; only arrays, numbers and random keys can be stored.")
    return str(dtype if _is_key(leaf) else np.dtype(dtype))


def _stored_form(leaf: Any) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    # .npy knows no bfloat16 and the like, which NumPy sees as kind "V": their bits are stored
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _restored_form(array: np.ndarray, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    if isinstance(like, bool | int | float | complex):
        return type(like)(array.item())
    if np.dtype(like.dtype).kind == "V":
        array = array.view(like.dtype)
    if isinstance(like, np.generic):
        return array[()]
    return array if isinstance(like, np.ndarray | AnyLength) else jnp.asarray(array)
