"""What simulations and estimators are of, in words and digests that are compared when they are read again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from numpyro_smc.programs.fingerprint import fingerprint
from numpyro_smc.programs.simulator import Simulator

_FEW = 8


def digest_of(*values: Any) -> str:
    """Of functions and objects, the same in every process of one version of Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{fingerprint(*values).digest[:32]} (Python {version})"


def describe_simulator(simulator: Simulator, nonfinite: Any) -> dict[str, Any]:
    """Of a simulator: its parameters with their priors, outputs, contexts, program, and what becomes of failures."""
    return {
        "elements": list(simulator.elements),
        "observed": [*simulator.observed, *simulator.event_shape],
        "context": list(simulator.context),
        "prior": {name: in_words(fn) for name, fn in simulator.priors().items()},
        "nonfinite": nonfinite if isinstance(nonfinite, str) else digest_of(nonfinite),
        "simulator": digest_of(simulator.model),
    }


def in_words(fn: Any) -> str:
    """A distribution with its numbers; of many numbers, their digest."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(fn)]
    numbers = [
        str(np.round(leaf, 6).tolist()) if leaf.size <= _FEW else f"{leaf.shape} {fingerprint(leaf).digest[:16]}"
        for leaf in leaves
        if np.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool
    ]
    kinds = [type(fn).__name__]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        kinds.append(type(fn).__name__)
    return f"{' of '.join(kinds)} {list(fn.shape())}: {', '.join(numbers)}"


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry that differs, with both its values; entries of dictionaries are named ``outer.inner``."""
    for name in dict.fromkeys([*wanted, *found]):
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = first_difference(one, other)
            if inner is not None:
                return f"{name}.{inner[0]}", inner[1], inner[2]
        elif one != other:
            return name, one, other
    return None
