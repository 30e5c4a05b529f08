"""What a checkpoint is of: digests of programs, data and options, by which a restart knows its own work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.util import find_stack_level

from numpyro_smc.programs.compiled import is_array
from numpyro_smc.programs.fingerprint import Ignored, fingerprint

#: Digests by what they are of: ``"model"``, ``"data"``.
Identity = Mapping[str, str]


def identity(user: str, ignored: Ignored | None = None, **parts: Any) -> dict[str, str]:
    """A digest of each part, the same in every process; underscores in names become spaces.

    :param ignored: what the programs themselves change while they are traced.
    """
    found = {name.replace("_", " "): fingerprint(_canonical(part), ignored=ignored) for name, part in parts.items()}
    for name, of_part in found.items():
        if of_part.unknown:
            warnings.warn(
                f"{user}: the {name} holds objects of type {', '.join(of_part.unknown)}, which cannot be pickled. A "
                f"checkpoint of another {name} is told by its code and types, not by what these objects hold.",
                stacklevel=find_stack_level(),
            )
    return {name: of_part.digest for name, of_part in found.items()}


def check_same(what: str, found: Identity, expected: Identity, advice: str) -> None:
    """:raises ValueError: naming the parts that differ.

    :param what: the checkpoint, for the message. **advice** - the end of the message.
    """
    other = [name for name, digest in expected.items() if found.get(name) != digest]
    if other:
        raise ValueError(f"{what} is not of the same {' and '.join(other)}. {advice}")


def _canonical(part: Any) -> Any:
    """Arguments as they are traced, so that NumPy's arrays and JAX's are the same."""
    if not isinstance(part, tuple | dict | list):
        return part
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if is_array(leaf) else leaf, part)
