"""Masked latents: density one in NumPyro, so drawn from nothing, unless what they would touch is masked too.

Padding is masked from some place on, latents and observations alike, and changes nothing. A masked latent that
something unmasked depends on has an improper prior: a proposal is weighed against it, its own law is none. The missing
values of ``obs_mask`` are a case apart: what is masked there are dummies, at the places that are observed.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import Distribution, ExpandedDistribution, Independent, MaskedDistribution

from numpyro_smc.programs.sites import BatchPlates, Site, is_latent, is_observed, observed_elements


def with_proper_dummies(trace: dict[str, Site]) -> dict[str, Site]:
    """Give the dummies of ``obs_mask`` the law of the values they stand for: it integrates to one."""
    for name, site in trace.items():
        if is_dummies(name, trace) and is_latent(site):
            site["as written"], site["fn"] = site["fn"], unmasked(site["fn"])
            site["dummies"] = True
    return trace


def is_dummies(name: str, trace: dict[str, Site]) -> bool:
    """Whether a site holds the missing values that NumPyro draws for ``obs_mask``."""
    whole = trace.get(name.removesuffix("_unobserved"), {})
    return name.endswith("_unobserved") and whole.get("type") == "deterministic"


def unmasked(fn: Distribution) -> Distribution:
    """The distribution without its masks."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, Independent) and (base := unmasked(fn.base_dist)) is not fn.base_dist:
        return base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution) and (base := unmasked(fn.base_dist)) is not fn.base_dist:
        return base.expand(fn.batch_shape)
    return fn


def is_masked(site: Site) -> bool:
    """Whether a site has a mask that is not known to keep everything."""
    return any(not (_is_known(mask) and np.all(mask)) for mask in _masks(site["fn"]))


def is_wholly_masked(site: Site) -> bool:
    """Whether a site has a mask that is known to keep nothing."""
    return any(_is_known(mask) and not np.any(mask) for mask in _masks(site["fn"]))


def check_drawn(latents: Iterable[Site], observed: Iterable[Site], user: str) -> None:
    """:raises ValueError: naming a latent that the model draws although its mask keeps nothing, unless no data are."""
    if all(is_wholly_masked(site) for site in observed):
        return
    for site in latents:
        if is_wholly_masked(site):
            raise ValueError(
                f"{user}: the latent site '{site['name']}' is masked, so that its density is one, an improper prior, "
                f"from which nothing can be drawn. Remove the mask (data are masked at their own site), or sample "
                f"'{site['name']}' in a guide, without a mask: its draws are weighed against that density."
            )


def check_weighed(model: dict[str, Site], guide: dict[str, Site], plates: BatchPlates, user: str) -> None:
    """:raises ValueError: naming a latent that is drawn under a mask, where data of the same problem count."""
    data = jnp.zeros(plates.shape, bool)
    for site in model.values():
        if is_observed(site):
            data = data | observed_elements(site, plates)
    for name, site in guide.items():
        free = is_latent(site) and is_masked(site) and ~observed_elements(site, plates) & data
        if not site.get("dummies") and np.any(free):
            raise ValueError(
                f"{user}: the latent site '{name}' is masked where it is drawn, so that no density weighs its draws, "
                f"though data that count depend on them. Remove the mask (data are masked at their own site), or "
                f"sample '{name}' in a guide, without a mask: its draws are weighed against the model's density, one."
            )


def skipped_then_used(
    model: dict[str, Site], proposals: dict[str, Site], given: frozenset[str], plates: BatchPlates, skipped: Array
) -> tuple[Array, Array]:
    """Which problems have a latent whose draw no density weighs, and which have one that anything unmasked follows.

    :param proposals: where latents were drawn, unless the model drew them itself.
    :param skipped: problems that had such a latent before.
    """
    misused = jnp.zeros(plates.shape, bool)
    for name, site in model.items():
        if site["type"] != "sample":
            continue
        counts = observed_elements(site, plates) if is_masked(site) else jnp.ones(plates.shape, bool)
        misused = misused | (skipped & counts)
        source = site if site.get("drawn") else proposals.get(name)
        if is_latent(site) and name not in given and source is not None and is_masked(source):
            free = ~observed_elements(source, plates)
            misused, skipped = misused | (free & counts & (source is not site)), skipped | free
    return skipped, misused


def _masks(fn: Any) -> list[Any]:
    masks = []
    while hasattr(fn, "base_dist"):
        if isinstance(fn, MaskedDistribution):
            masks.append(fn._mask)
        fn = fn.base_dist
    return masks


def _is_known(mask: Any) -> bool:
    return not isinstance(mask, jax.core.Tracer | jax.ShapeDtypeStruct)
