"""Independent replicates of a user's function of a random key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax, random


def replicates(function: Callable[[Array], Any], rng_key: Array, number: int, *, batch_size: int | None = None) -> Any:
    """``function(key)`` for many keys: its arrays on the host, with a leading axis of replicates.

    All in one compiled program; a function that cannot be traced by JAX is called once for each key instead.

    :param batch_size: replicates that are vectorised; all by default.
    """
    keys = random.split(rng_key, number)

    def every(keys: Array) -> Any:
        return lax.map(function, keys, batch_size=batch_size or number)

    try:
        compiled = jax.jit(every).lower(keys).compile()
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        found = [jax.tree.map(np.asarray, function(key)) for key in keys]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    return jax.tree.map(np.asarray, compiled(keys))
