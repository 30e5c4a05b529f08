"""Log densities of traced sites, summed per element of the plates that enclose the whole program."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import ExpandedDistribution, MaskedDistribution

from numpyro_smc.programs.supports import log_prob

Site = dict[str, Any]


class BatchPlates(NamedTuple):
    """The plates that enclose every site of a program: its independent problems.

    - **names** - plate names, from the leftmost dimension to the right.
    - **dims** - their (negative) dimensions, increasing.
    - **shape** - their (subsampled) sizes.
    - **scale** - product of full size over subsampled size.
    """

    names: tuple[str, ...] = ()
    dims: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    scale: float = 1.0


def is_latent(site: Site) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def in_control_flow(site: Site) -> bool:
    """Whether a traced site stands inside a scan or a cond."""
    return site.get("_control_flow_done", False)


def is_observed(site: Site) -> bool:
    return site["type"] == "sample" and site["is_observed"]


def enclosing_plates(
    sites: list[Site], plate_scales: dict[str, float], within: frozenset[str] | None = None
) -> BatchPlates:
    """The plates common to all ``sites``, checked to be the leftmost batch dimensions of each.

    :param plate_scales: full size over subsampled size, by plate name.
    :param within: plates that also enclose what follows the scan; ``None`` if nothing does.
    :raises ValueError: if a common plate is not the leftmost dimension of some site, or a plate is subsampled that does
        not enclose every site.
    """
    plates = common_plates(sites, plate_scales, within)
    for name, scale in plate_scales.items():
        if scale != 1.0 and name not in plates.names:
            raise ValueError(
                f"Plate '{name}' is subsampled but does not enclose every site of the sequence (initial sites and "
                f"steps), so the particle weights would be biased. Put every site inside it, or do not subsample it."
            )
    for site in sites if plates.dims else []:
        rank = max((-frame.dim for frame in site["cond_indep_stack"]), default=0)
        rank = max(rank, len(site["fn"].batch_shape))
        if plates.dims != tuple(range(-rank, -rank + len(plates.dims))):
            raise ValueError(
                f"Plates {list(plates.names)} enclose the whole program but are not the leftmost batch "
                f"dimensions of site '{site['name']}' (batch shape {site['fn'].batch_shape}). Give the enclosing plate "
                f"the outermost dimension, e.g. dim=-2 when another plate is at dim=-1."
            )
    return plates


def common_plates(
    sites: list[Site], plate_scales: dict[str, float], within: Collection[str] | None = None
) -> BatchPlates:
    """The plates common to all ``sites``.

    :param plate_scales: full size over subsampled size, by plate name.
    :param within: keep only plates of these names; ``None`` for all.
    """
    frames = [{frame.name: frame for frame in site["cond_indep_stack"]} for site in sites]
    common = set.intersection(*(set(f) for f in frames)) if frames else set()
    common = common if within is None else common & set(within)
    ordered = sorted((frames[0][name] for name in common), key=lambda frame: frame.dim)
    scale = float(np.prod([plate_scales.get(frame.name, 1.0) for frame in ordered])) if ordered else 1.0
    return BatchPlates(
        tuple(frame.name for frame in ordered),
        tuple(frame.dim for frame in ordered),
        tuple(frame.size for frame in ordered),
        scale,
    )


def plate_scales(trace: dict[str, Site]) -> dict[str, float]:
    """Full size over subsampled size of every plate in a trace."""
    return {
        name: float(site["args"][0]) / site["value"].shape[0] for name, site in trace.items() if site["type"] == "plate"
    }


def plate_indices(trace: dict[str, Site]) -> dict[str, Array]:
    return {name: site["value"] for name, site in trace.items() if site["type"] == "plate"}


def remaining_scale(site: Site, plates: BatchPlates) -> Any:
    """The site's scale without the part that comes from subsampling the enclosing plates."""
    scale = 1.0 if site["scale"] is None else site["scale"]
    return scale if plates.scale == 1.0 else scale / plates.scale


def sum_per_problem(values: Array, plates: BatchPlates) -> Array:
    """Sum an array over every axis but those of the enclosing plates."""
    if not plates.dims:
        return jnp.sum(values)
    rank = max(-plates.dims[0], values.ndim)
    values = jnp.reshape(values, (1,) * (rank - values.ndim) + values.shape)
    kept = [rank + dim for dim in plates.dims]
    summed = jnp.sum(values, axis=tuple(axis for axis in range(rank) if axis not in kept))
    return jnp.broadcast_to(summed, plates.shape)


def log_density(site: Site, plates: BatchPlates, bound_scale: float = 1.0) -> Array:
    """Log density of one traced site, masked and scaled as NumPyro does, of the shape of the enclosing plates.

    :param bound_scale: a scale common to every site, left to the bound.
    """
    density = _log_prob(site)
    scale = remaining_scale(site, plates)
    if bound_scale != 1.0:
        scale = scale / bound_scale
    if not is_one(scale):
        density = scale * density
    if "given_until" in site:
        now, end, _ = site["given_until"]
        density = jnp.where(now < end, density, 0.0)
    return sum_per_problem(jnp.asarray(density), plates)


def unscaled_log_density(site: Site, plates: BatchPlates) -> Array:
    """Log density of one traced site, masked but not scaled, of the shape of the enclosing plates."""
    return sum_per_problem(jnp.asarray(_log_prob(site)), plates)


def _log_prob(site: Site) -> Array:
    if site["intermediates"]:
        return site["fn"].log_prob(site["value"], site["intermediates"])
    if site.get("drawn") and not site.get("pinned"):
        return site["fn"].log_prob(site["value"])  # lies in the support that it was drawn from
    return log_prob(site["fn"], site["value"])


def is_one(scale: Any) -> bool:
    """Whether a scale is known to be one while tracing."""
    return isinstance(scale, int | float) and scale == 1.0


def site_mask(site: Site) -> Array:
    """The mask of a sample site, broadcastable to its batch shape."""
    mask, fn = jnp.asarray(True), site["fn"]
    while isinstance(fn, MaskedDistribution | ExpandedDistribution):
        mask = mask & jnp.asarray(fn._mask) if isinstance(fn, MaskedDistribution) else mask
        fn = fn.base_dist
    return mask


def unmasked_value(site: Site) -> Array:
    """The site's value with zeros where it is masked."""
    mask = site_mask(site)
    return jnp.where(mask.reshape(mask.shape + (1,) * site["fn"].event_dim), site["value"], 0)


def observed_elements(site: Site, plates: BatchPlates) -> Array:
    """Whether an observed site holds any unmasked value, per element of the enclosing plates."""
    mask = site_mask(site)
    if "given_until" in site:
        now, end, _ = site["given_until"]
        mask = mask & (now < end)
    return sum_per_problem(mask.astype(jnp.float32), plates) > 0
