"""Calling functions of user programs compiled, as ``jax.jit`` does, but never stale."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smc.programs.fingerprint import Fingerprint, Ignored, fingerprint
from numpyro_smc.programs.tracing import TRACING, tracing

_MOST = 64  # programs, and fingerprints, that are kept
_NUMBERS = (float, complex)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a program's arguments is an array, which is traced."""
    return isinstance(leaf, jax.Array) or (isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind not in "OUSMm")


class Compiled:
    """A jitted function whose arguments may hold non-arrays, compiled once per set of static values and shapes.

    Arrays and Python floats are traced; anything else (lengths, flags, names, functions) is static, and so are floats
    where the program cannot do with traced ones, as in ``if scale > 0:``. Whatever the function closes over, or looks
    up, and the static arguments do, is part of what is compiled: if it has changed, another program is.

    :param fn: function of the arguments it is called with.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self._programs: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self._known: OrderedDict[int, Fingerprint] = OrderedDict()
        self._ignored: Ignored = {}
        self._need_static: OrderedDict[Hashable, None] = OrderedDict()

    def __fingerprint__(self) -> tuple[Any, ...]:
        return ()  # what it has compiled is no part of the object that holds it

    def __call__(self, *args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        tokens = tuple([self._token(leaf) for leaf in leaves])
        key = (treedef, tokens, self._current(self.fn))
        if not any(token in _NUMBERS for token in tokens):
            return self._call(key, leaves)
        if key not in self._need_static:
            try:
                return self._call(key, leaves)
            except (FloatingPointError, jax.errors.JaxRuntimeError):
                raise
            except Exception:  # whatever the program makes of a traced number; if it is no fault of that, it comes back
                _put(self._need_static, key, None)
        static = tuple((t, repr(x)) if t in _NUMBERS else t for t, x in zip(tokens, leaves, strict=True))
        return self._call((treedef, static, key[2]), leaves)

    def num_compiled(self) -> int:
        """How many programs have been compiled, for tests of recompilation."""
        return sum(fn._cache_size() for fn in self._programs.values())  # type: ignore[attr-defined]

    def _token(self, leaf: Any) -> Any:
        kind = type(leaf)
        if kind in _NUMBERS:
            return kind
        if is_array(leaf):
            return None
        if not isinstance(leaf, Hashable):
            raise TypeError(
                f"An argument of the program has type {kind.__name__}, which is neither an array nor hashable. Pass it "
                f"as an array, or close over it in the program."
            )
        return (kind, leaf) if kind in (int, bool, str) else self._current(leaf)

    def _current(self, value: Any) -> Fingerprint:
        """The fingerprint of a value as it is now."""
        known = self._known.get(id(value))
        if known is None or not known.holds():
            known = fingerprint(value, ignored=self._ignored)
            _put(self._known, id(value), known)
        return known

    def _call(self, key: Any, leaves: list[Any]) -> Any:
        traced = [
            leaf if isinstance(leaf, jax.Array | float | complex) else jnp.asarray(leaf)
            for leaf, token in zip(leaves, key[1], strict=True)
            if token is None or token in _NUMBERS
        ]
        program = self._programs.get(key)
        if program is None:
            return self._compiled(key, leaves, traced)(traced)
        return program(traced)

    def _compiled(self, key: Any, leaves: list[Any], traced: list[Any]) -> Callable[..., Any]:
        treedef, tokens, version = key
        is_traced = [token is None or token in _NUMBERS for token in tokens]
        static = [None if t else leaf for t, leaf in zip(is_traced, leaves, strict=True)]

        def run(traced: list[Any]) -> Any:
            rest = iter(traced)
            full = [next(rest) if t else leaf for t, leaf in zip(is_traced, static, strict=True)]
            with tracing(version):
                return self.fn(*jax.tree.unflatten(treedef, full))

        program = jax.jit(run)
        with TRACING:
            if not any(isinstance(leaf, jax.core.Tracer) for leaf in traced):
                program.trace(traced)  # here, and not in the call, so that this lock is taken before those of JAX
            changed = version.changed()
            for token in tokens:
                changed |= token.changed() if isinstance(token, Fingerprint) else {}
            if changed:  # by the program itself, while it was traced
                self._ignored = self._ignored | changed
                tokens = tuple(self._again(t, leaf) for t, leaf in zip(tokens, leaves, strict=True))
                key = (treedef, tokens, self._again(version, self.fn))
            _put(self._programs, key, program)
        return program

    def _again(self, token: Any, value: Any) -> Any:
        if not isinstance(token, Fingerprint):
            return token
        _put(self._known, id(value), new := fingerprint(value, ignored=self._ignored))
        return new


def _put(cache: OrderedDict, key: Hashable, value: Any) -> None:
    cache[key] = value
    while len(cache) > _MOST:
        cache.popitem(last=False)
