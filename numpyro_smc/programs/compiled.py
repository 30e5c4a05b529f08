"""Calling functions of user programs compiled: arrays are traced, everything else (lengths, flags) is static."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a program's arguments is traced."""
    return isinstance(leaf, jax.Array) or (isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind not in "OUSMm")


class Compiled:
    """A jitted function whose arguments may hold non-arrays, compiled once per set of static values and shapes.

    :param fn: function of the arguments it is called with.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.cache: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        arrays = [jnp.asarray(leaf) for leaf in leaves if is_array(leaf)]
        static = tuple(None if is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
        try:
            cached = self.cache.get((treedef, static))
        except TypeError as error:
            unhashable = next(leaf for leaf in leaves if not is_array(leaf) and not isinstance(leaf, Hashable))
            raise TypeError(
                f"An argument of the program has type {type(unhashable).__name__}, which is neither an array nor "
                f"hashable. Pass it as an array, or close over it in the program."
            ) from error
        if cached is None:

            def run(arrays: list[Any]) -> Any:
                rest = iter(arrays)
                return self.fn(*jax.tree.unflatten(treedef, [next(rest) if s is None else s[1] for s in static]))

            cached = self.cache[(treedef, static)] = jax.jit(run)
        return cached(arrays)

    def __getstate__(self) -> dict[str, Any]:
        """What travels by pickle and copy: the function, to be compiled anew."""
        return self.__dict__ | {"cache": {}}

    def num_compiled(self) -> int:
        """How many programs have been compiled, for tests of recompilation."""
        return sum(fn._cache_size() for fn in self.cache.values())  # type: ignore[attr-defined]
