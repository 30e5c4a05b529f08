"""A pytree, or the progress of a training run, in one file that is read back bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer.svi import SVIState

from numpyro_smc.programs.compiled import is_array

__all__ = [
    "AnyLength",
    "Progress",
    "as_text",
    "check_folder",
    "identity_of",
    "load_pytree",
    "load_run",
    "replacing",
    "save_pytree",
    "save_run",
]


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path``, which becomes it in the end, complete, or not at all."""
    path = os.path.abspath(path)
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=f".{os.path.basename(path)}.")
    os.close(descriptor)
    try:
        yield Path(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_folder(user: str, checkpoint: str | os.PathLike | None) -> None:
    """:raises ValueError: unless the folder of a checkpoint exists: before hours of work, not after them."""
    if checkpoint is not None and not os.path.isdir(os.path.dirname(os.path.abspath(checkpoint))):
        raise ValueError(f"{user}: the folder of checkpoint='{os.fspath(checkpoint)}' does not exist; create it first.")


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

    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
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
    try:
        with np.load(path, allow_pickle=False) as file:
            manifest = json.loads(file["manifest"].tobytes())
            stored = {entry["name"]: file[f"leaf_{index}"] for index, entry in enumerate(manifest)}
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise ValueError(f"'{os.fspath(path)}' was not written by save_pytree, or is damaged: {error}") from error
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


def save_run(path: str | os.PathLike, settings: str, contents: dict[str, Any]) -> None:
    """:func:`save_pytree` with the settings of what ran."""
    save_pytree(path, {**contents, "settings": as_text(settings)})


def load_run(path: str | os.PathLike, settings: str, like: dict[str, Any], user: str, advice: str) -> dict[str, Any]:
    """Read a file of :func:`save_run`.

    :param like: the contents to expect, as for :func:`load_pytree`.
    :param advice: the end of each message.
    :raises ValueError: if it is no such file, of other contents, or of other settings.
    """
    try:
        contents = load_pytree(path, {**like, "settings": AnyLength("uint8")})
    except ValueError as error:
        raise ValueError(f"{user}: checkpoint {error} {advice}") from error
    found = contents["settings"].tobytes().decode()
    if found != settings:
        raise ValueError(
            f"{user}: checkpoint '{os.fspath(path)}' is of another sampler.\n  found    {found}\n"
            f"  expected {settings}\n{advice}"
        )
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

    def save(self, path: str | os.PathLike) -> None:
        save_pytree(path, {**vars(self), "evaluations": as_text(json.dumps(self.evaluations))})

    def load(self, path: str | os.PathLike) -> Progress:
        """The run saved in ``path``, by the same training as this one."""
        like = {**vars(self), "losses": AnyLength(self.losses.dtype), "evaluations": AnyLength("uint8")}
        try:
            contents = load_pytree(path, like)
        except ValueError as error:
            raise ValueError(
                f"fit: checkpoint {error} Pass the svi that wrote it, another file, or resume=False to overwrite it."
            ) from error
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
