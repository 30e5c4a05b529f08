"""Labels of sites along a plate, and whether results keep a plate's elements apart."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.programs.elements.labels import MIXED, Labels, along
from numpyro_smc.programs.sites import Site


def labels_of(sites: dict[str, Site], shared: Collection[str], dim: int) -> dict[str, Labels]:
    """Labels of latent sites along a plate's dimension.

    :param shared: sites that are the same for all particles: they have no labels.
    """
    labels: dict[str, Labels] = dict.fromkeys(sites)
    for name in sites.keys() - set(shared):
        shape = jnp.shape(sites[name]["value"])
        labels[name] = along(shape, len(shape) - sites[name]["fn"].event_dim + dim)
    return labels


def shapes(sites: dict[str, Site]) -> dict[str, Any]:
    return {n: jax.ShapeDtypeStruct(jnp.shape(s["value"]), jnp.result_type(s["value"])) for n, s in sites.items()}


def values_of(sites: dict[str, Site], kind: str) -> dict[str, Array]:
    """Values of the statements of one type."""
    return {name: jnp.asarray(site["value"]) for name, site in sites.items() if site["type"] == kind}


def densities(sites: dict[str, Site]) -> dict[str, Array]:
    """Log densities of the sample sites, elementwise."""
    found = {}
    for name, site in sites.items():
        if site["type"] == "sample":
            between = [site["intermediates"]] if site["intermediates"] else []
            found[name] = jnp.asarray(site["fn"].log_prob(site["value"], *between))
    return found


def fits(label: Labels, axis: int, size: int) -> bool:
    """Whether each entry along ``axis`` depends on its own element at most."""
    if label is None:
        return True
    if not -label.ndim <= axis < label.ndim or label.shape[axis] != size:
        return size == 1 and not np.any(label == MIXED)
    return not np.any((label != 0) & (label != along(label.shape, axis)))


def axis_of(label: Labels, preferred: int, size: int) -> int | None:
    """The axis along which entries depend on their own element at most."""
    if label is None:
        return None
    order = [preferred, *(axis for axis in range(label.ndim) if axis != preferred)]
    fitting = [axis for axis in order if axis < label.ndim and label.shape[axis] == size and fits(label, axis, size)]
    return fitting[0] if fitting else None


def coupled_density(site: str) -> str:
    """What to say of a site whose density joins elements."""
    return f"the density of site '{site}' at one element depends on latents of other elements"


def not_independent(plate: str, coupling: str) -> str:
    """What to say of a plate whose elements are joined."""
    return f"plate '{plate}' does not make independent problems: {coupling}"
