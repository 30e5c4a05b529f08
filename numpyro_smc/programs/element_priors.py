"""Priors of some of the elements of a site: densities where they have a closed form, and bounds."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random
from numpyro.distributions.transforms import biject_to

from numpyro_smc.programs.sites import Site
from numpyro_smc.programs.supports import log_prob

_NUM_DRAWS = 64


def density_of_elements(site: Site, name: str, indices: np.ndarray, user: str) -> Callable[[Array], Array]:
    """Log density of the raveled site's elements at ``indices``, where it is known."""
    fn, value = site["fn"], jnp.asarray(site["value"])
    whole = fn
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    if len(indices) < value.size and isinstance(fn, dist.MultivariateNormal) and value.ndim == 1:
        return dist.MultivariateNormal(fn.mean[indices], fn.covariance_matrix[indices[:, None], indices]).log_prob
    if len(indices) < value.size and (fn.event_shape or isinstance(fn, dist.MaskedDistribution)):
        raise ValueError(
            f"{user}: the prior of site '{name}' ({type(fn).__name__}) is not factorised, so the density of some of "
            f"its elements has no closed form. Take the whole site, or use sir or sample, which need no density."
        )

    def log_density(piece: Array) -> Array:
        full = jnp.ravel(value).at[indices].set(piece).reshape(value.shape)
        if len(indices) == value.size:
            return jnp.sum(log_prob(whole, full))
        return jnp.sum(jnp.broadcast_to(log_prob(fn, full), value.shape).reshape(-1)[indices])

    return log_density


def is_on_surface(site: Site) -> bool:
    """Whether a site's support has fewer dimensions than its values have elements, as a simplex."""
    shape = jnp.shape(site["value"])
    try:
        return int(np.prod(biject_to(site["fn"].support).inverse_shape(shape))) < int(np.prod(shape))
    except NotImplementedError:  # a support without a bijection: a sphere, say
        return True


def is_factorized(site: Site) -> bool:
    """Whether a site's elements are independent for certain."""
    fn = site["fn"]
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return not fn.event_shape and not isinstance(fn, dist.MaskedDistribution)


def constant_elements(site: Site) -> np.ndarray:
    """Which elements of a site's draws do not vary, to rounding, though others do: bool ``[size]``."""
    size = jnp.size(site["value"])
    if size == 1:
        return np.zeros(1, bool)
    draws = np.asarray(site["fn"].sample(random.key(0), (_NUM_DRAWS,))).reshape(_NUM_DRAWS, size)
    found = np.ptp(draws, axis=0) <= 4 * np.finfo(draws.dtype).eps * np.abs(draws).max(axis=0)
    return np.zeros(size, bool) if found.all() else found


def bounds_of_elements(site: Site) -> np.ndarray:
    """Lower and upper bound of each element of a site's support, infinite where there is none: ``[size, 2]``."""
    support = site["fn"].support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    ends = [getattr(support, side, default) for side, default in (("lower_bound", -np.inf), ("upper_bound", np.inf))]
    shape = jnp.shape(site["value"])
    return np.stack([np.broadcast_to(np.asarray(end, float), shape).ravel() for end in ends], -1)
