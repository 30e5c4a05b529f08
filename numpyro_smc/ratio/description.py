"""What simulations and estimators are of, in words and digests that are compared when they are read again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import jax
import numpy as np

from numpyro_smc.programs.fingerprint import fingerprint
from numpyro_smc.programs.simulator import Simulator
from numpyro_smc.ratio.losses import RatioLoss
from numpyro_smc.ratio.masks import MaskLaw
from numpyro_smc.ratio.ratio_network import RatioNetwork

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


def describe_network(network: RatioNetwork, loss: RatioLoss, masks: MaskLaw | None) -> dict[str, Any]:
    """Of what is trained."""
    return {
        "loss": repr(loss) if is_dataclass(loss) else digest_of(loss),
        "masks": repr(masks) if masks is None or is_dataclass(masks) else digest_of(masks),
        "marginals": network.marginals,
        "log_parameters": network.log_parameters,
        "standardize_x": network.standardize_x,
        "trunk": digest_of(network.trunk),
        "embedding": digest_of(network.embedding),
    }


def check_same_simulator(where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """:raises ValueError: naming what differs between the simulator of stored data and another."""
    difference = first_difference(found, as_json(wanted))
    if difference is not None:
        name, one, other = difference
        raise ValueError(
            f"NRE.train: the simulations in {where} are of another simulator: {name} is {one!r} there, but {other!r} "
            f"here."
        )


def check_same_nre(path: str | os.PathLike, text: bytes, wanted: Mapping[str, Any]) -> None:
    """:raises ValueError: naming what differs between the NRE of a file and another."""
    try:
        found = json.loads(text)
    except ValueError:  # of an earlier version
        found = {"description": text.decode(errors="replace")}
    difference = first_difference(found, as_json(wanted))
    if difference is not None:
        name, one, other = difference
        raise ValueError(
            f"NRE.load: '{os.fspath(path)}' is of another NRE: {name} is\n  {one!r} in the file, but\n  {other!r} "
            f"here. Build the NRE with the arguments it was trained with."
        )


def as_json(value: Any) -> Any:
    """As a file gives it back."""
    return json.loads(json.dumps(value))


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
