"""What a fingerprint's parts are made of, in bytes: of arrays, and of a whole key as another process finds it too."""

import hashlib
import pickle
import types
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

ARRAYS = jax.Array | np.ndarray | np.generic
_DIGESTS: dict[int, tuple[weakref.ref, bytes]] = {}


class Same:
    """An object as a key, by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def array_digest(value: Any) -> bytes:
    """Of an array: dtype, shape and bytes, with the labels of a table. Arrays of JAX never change: read once."""
    known = _DIGESTS.get(id(value))
    if known is not None and known[0]() is value:
        return known[1]
    is_key = isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(value) if is_key else value)
    labels = [list(getattr(value, name, ())) for name in ("columns", "index")] if not isinstance(value, ARRAYS) else ()
    digest = hashlib.sha256(f"{array.dtype}{array.shape}{labels}".encode())
    digest.update(
        repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).view(np.uint8).data
    )
    found = digest.digest()
    if isinstance(value, jax.Array):
        number = id(value)
        _DIGESTS[number] = weakref.ref(value, lambda _: _DIGESTS.pop(number, None)), found
    return found


def rendered(key: tuple[Any, ...]) -> tuple[str, tuple[str, ...]]:
    """A digest of a key, and the types of what it holds that another process cannot tell apart."""
    digest, unknown = hashlib.sha256(), dict[str, None]()
    for text in _texts(key, unknown):
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest(), tuple(unknown)


def _texts(part: Any, unknown: dict[str, None]) -> Iterator[bytes]:
    """A token in bytes that another process makes of it too."""
    if isinstance(part, tuple):
        yield f"{len(part)}".encode()
        for item in part:
            yield from _texts(item, unknown)
    elif isinstance(part, frozenset):
        yield from sorted(b"".join(_texts(item, unknown)) for item in part)
    elif isinstance(part, types.CodeType):
        counts = (part.co_argcount, part.co_posonlyargcount, part.co_kwonlyargcount, part.co_flags)
        names = (part.co_names, part.co_varnames, part.co_freevars, part.co_cellvars)
        yield from _texts((part.co_code, counts, names, part.co_consts), unknown)
    elif isinstance(part, Same):
        name = f"{type(part.value).__module__}.{type(part.value).__qualname__}"
        try:
            yield name.encode() + pickle.dumps(part.value, protocol=4)
        except Exception:
            unknown[name] = None
            yield name.encode()
    else:
        yield (
            f"class {part.__qualname__}" if isinstance(part, type) else f"{type(part).__qualname__} {part!r}"
        ).encode()
