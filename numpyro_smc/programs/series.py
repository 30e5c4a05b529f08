r"""Which arguments of a likelihood after the scan run over time, proved from the program.

The likelihood of a path splits into :math:`\sum_t g_t(x_t)` if each of its terms depends on one step's outputs alone.
An argument runs over time if moreover no term depends on one step's outputs and on an entry of the argument at another
step: then the t-th factor needs its t-th entry alone. A matrix with as many rows as there are steps does not pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.programs.elements.labels import Labels, along
from numpyro_smc.programs.elements.terms import Sum, trace_terms
from numpyro_smc.programs.sites import Site


class Series(NamedTuple):
    """What runs over time after the scan.

    - **arguments** - for each leaf of the program's arguments, whether the t-th factor gets its t-th entry alone.
    - **plates** - names of plates over time.
    - **mixed** - names of the sites whose densities at one step depend on another step, or stand elsewhere.
    """

    arguments: tuple[bool, ...]
    plates: frozenset[str]
    mixed: tuple[str, ...]


def read_series(sites: Callable[[Any, Any], dict[str, Site]], outputs: Any, arguments: Any, length: int) -> Series:
    """Read off what runs over time.

    :param sites: the observed sites after the scan, a function of its stacked outputs and the program's arguments.
    :param outputs: the stacked outputs, arrays or shapes.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    candidates = [i for i, leaf in enumerate(leaves) if _may_run(leaf, length)]
    frames: dict[str, list[Any]] = {}

    def densities(outputs: Any, values: list[Any]) -> dict[str, Array]:
        merged = list(leaves)
        for i, value in zip(candidates, values, strict=True):
            merged[i] = value
        found = sites(outputs, jax.tree.unflatten(treedef, merged))
        frames.update({name: site["cond_indep_stack"] for name, site in found.items()})
        return {name: _scaled(site) for name, site in found.items()}

    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaves[i]), _dtype(leaves[i])) for i in candidates]
    labels_of = trace_terms(densities, outputs, shapes)
    by_time = jax.tree.map(lambda leaf: along(leaf.shape, 0), outputs)
    nothing = jax.tree.map(lambda leaf: None, outputs)

    def labels(outputs: Any, chosen: list[int]) -> dict[str, Sum]:
        return labels_of(outputs, [along(jnp.shape(leaves[i]), 0) if i in chosen else None for i in candidates])

    running = []
    for i in candidates:
        is_used = any(_labelled(found) for found in labels(nothing, [i]).values())
        if is_used and all(_splits(found, length) for found in labels(by_time, [i]).values()):
            running.append(i)
    together = labels(by_time, running)
    plates = {
        frame.name
        for name, found in together.items()
        for frame in frames[name]
        if frame.size == length and _runs_along(found.labels, frame.dim)
    }
    return Series(
        tuple(i in running for i in range(len(leaves))),
        frozenset(plates),
        tuple(name for name, found in together.items() if not _splits(found, length)),
    )


def _scaled(site: Site) -> Array:
    log_prob = site["fn"].log_prob(site["value"])
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def _may_run(leaf: Any, length: int) -> bool:
    return hasattr(leaf, "shape") and len(leaf.shape) > 0 and leaf.shape[0] == length


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else jnp.result_type(leaf)


def _labelled(found: Sum) -> bool:
    return any(label is not None and bool(label.any()) for label in found.parts())


def _splits(found: Sum, length: int) -> bool:
    """Whether each term depends on one step alone, and stands where the step stands."""
    return all(label is None or not label.any() or _in_order(label, length) for label in found.parts())


def _in_order(label: np.ndarray, length: int) -> bool:
    """Whether some axis runs over time: step by step, or each step in several places (a flattened panel)."""
    for axis, size in enumerate(label.shape):
        if size % length == 0:
            place = np.arange(size).reshape([-1 if i == axis else 1 for i in range(label.ndim)])
            for step in (place // (size // length), place % length):
                if np.all((label == 0) | (label == step + 1)):
                    return True
    return False


def _runs_along(label: Labels, dim: int) -> bool:
    if label is None or -dim > label.ndim:
        return False
    return bool(np.any(label != 0) and np.all((label == 0) | (label == along(label.shape, dim))))
