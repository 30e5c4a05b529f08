"""Log densities that are -inf outside the support, for distributions that have lost NumPyro's own check too.

NumPyro checks the support in ``log_prob`` of a distribution that validates its arguments. One that went through
``tree_unflatten`` no longer does, as every site of a ``scan`` or a ``cond`` has: the flag is only looked up on the
instance, where it stands if it was given to the constructor. ``log_prob(scan of Uniform(0, 1) at 2)`` is 0.
"""

import copy
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.distributions import (
    Delta,
    Distribution,
    ExpandedDistribution,
    ImproperUniform,
    Independent,
    MaskedDistribution,
    MixtureGeneral,
    MixtureSameFamily,
    TransformedDistribution,
    biject_to,
    constraints,
)
from numpyro.primitives import Messenger
from numpyro.util import find_stack_level

_REAL = (type(constraints.real), type(constraints.complex))
_BOUNDS = {"low": "lower_bound", "loc": "lower_bound", "high": "upper_bound"}
_PLAIN_CHECKS = (Distribution._validate_sample, ImproperUniform._validate_sample)


class Supported(Messenger):
    """Restore the supports of sites that come out of a scan, for densities that NumPyro evaluates."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg.get("_control_flow_done"):
            msg["fn"] = checked(msg["fn"])


def log_prob(fn: Distribution, value: Any) -> Array:
    """Log density, -inf outside the support, without the not-a-numbers that formulas give there, in gradients neither.

    A distribution made with ``validate_args=False`` is taken at its word.

    :param value: of the distribution's shape, possibly with leading axes.
    """
    if isinstance(fn, MaskedDistribution):
        return _masked(fn, value)
    if isinstance(fn, Independent):
        each = log_prob(fn.base_dist, value)
        return jnp.sum(each, axis=tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    if isinstance(fn, ExpandedDistribution):
        each = log_prob(fn.base_dist, value)
        leading = jnp.shape(value)[: max(jnp.ndim(value) - fn.event_dim, 0)]
        return jnp.broadcast_to(each, jnp.broadcast_shapes(fn.batch_shape, leading, jnp.shape(each)))
    if not _is_checked_here(fn):
        return _with_parts_checked(fn).log_prob(value)
    inside, safe = _within(fn, value)
    if safe is None:
        return checked(fn).log_prob(value)
    if _is_plainly_transformed(fn) and _is_checked_here(fn.base_dist):
        in_image, safe = _within_image(fn, safe)
        if safe is None:
            return checked(fn).log_prob(value)
        inside = inside & in_image
    unchecked = copy.copy(_with_parts_checked(fn))
    unchecked._validate_args = False
    density = unchecked.log_prob(safe)
    return density if inside is True else jnp.where(inside, density, -jnp.inf)


def checked(fn: Distribution) -> Distribution:
    """The distribution with NumPyro's own check of its support, unless it was made without."""
    fn = _with_parts_checked(fn)
    if fn._validate_args or not _is_checked_here(fn):
        return fn
    found, fn = support(fn), copy.copy(fn)
    fn._validate_args = True
    if found is not fn.support:
        fn._support = found
    return fn


def support(fn: Distribution) -> Any:
    """The support, also of a distribution that came out of a scan without it, or with bounds of other shapes than its
    arguments."""
    found = fn.support
    if found is None:
        return type(fn)(**fn.get_args()).support
    if vars(fn).get("_support") is found:
        arguments = {side: vars(fn)[name] for name, side in _BOUNDS.items() if name in vars(fn)}
        arguments = {side: value for side, value in arguments.items() if side in vars(found)}
        if any(jnp.ndim(value) > jnp.ndim(vars(found)[side]) for side, value in arguments.items()):
            found = copy.copy(found)
            vars(found).update(arguments)
    return found


def is_narrower(site: dict[str, Any], proposal: dict[str, Any], user: str) -> bool:
    """Whether a guide's support of a site is known to leave out a part of the model's, of which it warns.

    The posterior may lie inside, which only the data tell, so this is no error; but no weight of the guide's draws
    could tell if it does not.

    :param site: of the model. **proposal** - the same of the guide.
    :raises ValueError: if one is discrete and the other continuous: a mass is no density.
    """
    model, guide = site["fn"], proposal["fn"]
    if isinstance(innermost(model), Delta) or isinstance(innermost(guide), Delta):
        return False
    of_model, of_guide = support(innermost(model)), support(innermost(guide))
    kinds = ["discrete" if of.is_discrete else "continuous" for of in (of_model, of_guide)]
    names = [type(innermost(fn)).__name__ for fn in (model, guide)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{user}: site '{site['name']}' is {kinds[0]} in the model ({names[0]}) and {kinds[1]} in the guide "
            f"({names[1]}), so that a probability would be weighed against a density. Use a {kinds[0]} distribution in "
            f"the guide."
        )
    if not _is_smaller(elementwise(of_guide), elementwise(of_model)):
        return False
    warnings.warn(
        f"{user}: the guide's support of site '{site['name']}', {elementwise(of_guide)} of {names[1]}, is smaller than "
        f"the model's, {elementwise(of_model)} of {names[0]}. What the posterior has outside is missing from every "
        f"estimate, and none can show it. Use a guide with the model's support, such as a TransformedDistribution.",
        stacklevel=find_stack_level(),
    )
    return True


def check_bijection(site: dict[str, Any], user: str) -> None:
    """:raises ValueError: naming a latent site whose support NumPyro cannot map to the reals."""
    try:
        biject_to(site["fn"].support)
    except NotImplementedError:
        of = type(innermost(site["fn"])).__name__
        raise ValueError(
            f"{user}: the support of site '{site['name']}' ({of}: {elementwise(site['fn'].support)}) cannot be mapped "
            f"to the reals, where it would move. Write it as a function of a site on the reals (a ProjectedNormal by "
            f"numpyro.handlers.reparam(config={{'{site['name']}': ProjectedNormalReparam()}})), or use a method that "
            f"only draws and weighs: importance, ParticleFilter."
        ) from None


def innermost(fn: Distribution) -> Distribution:
    """What stands behind masks, plates and ``to_event``."""
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return fn


def _is_smaller(guide: Any, model: Any) -> bool:
    """Whether a guide's bounds are known to lie inside the model's."""
    of_model, of_guide = _ends(model), _ends(guide)
    if of_model is None or of_guide is None:
        return False
    for sign, outer, inner in zip((1, -1), of_model, of_guide, strict=True):
        open_end = not isinstance(outer, jax.core.Tracer) and np.any(np.isneginf(sign * np.asarray(outer)))
        if isinstance(inner, jax.core.Tracer):
            if open_end:
                return True  # an end that is not known, but an end
        elif not isinstance(outer, jax.core.Tracer):
            low, lower = sign * np.asarray(inner, float), sign * np.asarray(outer, float)
            if np.shape(low) and np.shape(lower) and np.shape(low) != np.shape(lower):
                low, lower = np.min(low), np.max(lower)
            if np.any(low > lower + 1e-6 * (1.0 + np.abs(np.where(np.isfinite(lower), lower, 0.0)))):
                return True
    return False


def _ends(constraint: Any) -> tuple[Any, Any] | None:
    if isinstance(constraint, _REAL):
        return -np.inf, np.inf
    if isinstance(constraint, type(constraints.boolean)):
        return 0, 1
    low, high = (getattr(constraint, side, None) for side in ("lower_bound", "upper_bound"))
    if constraint.event_dim or (low is None and high is None):
        return None
    return (-np.inf if low is None else low), (np.inf if high is None else high)


def elementwise(constraint: Any) -> Any:
    """What a constraint says of each element of a product."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def is_real(constraint: Any) -> bool:
    """Whether a support is all of the reals, or a product of them."""
    return isinstance(elementwise(constraint), _REAL)


def _is_checked_here(fn: Distribution) -> bool:
    """Whether a support is to be checked: it is not all of the reals, and the distribution not made without checks."""
    if isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        return _is_checked_here(fn.base_dist)
    # A density of components is what theirs are: each is zero outside its own support.
    if isinstance(fn, MixtureGeneral | MixtureSameFamily) or vars(fn).get("_validate_args") is False:
        return False
    if _is_plainly_transformed(fn) and _is_checked_here(fn.base_dist):
        return True
    return not is_real(support(fn))


def _with_parts_checked(fn: Distribution) -> Distribution:
    """The distribution, with checks in those that it is made of."""
    new = {name: part for name, held in vars(fn).items() if (part := _checked_part(held)) is not held}
    if not new:
        return fn
    fn = copy.copy(fn)
    vars(fn).update(new)
    return fn


def _checked_part(held: Any) -> Any:
    if isinstance(held, Distribution):
        return checked(held)
    if isinstance(held, list | tuple) and any(isinstance(part, Distribution) for part in held):
        parts = [_checked_part(part) for part in held]
        return held if all(a is b for a, b in zip(parts, held, strict=True)) else type(held)(parts)
    return held


def _masked(fn: MaskedDistribution, value: Any) -> Array:
    if fn._mask is False:
        return fn.log_prob(value)
    if fn._mask is True:
        return log_prob(fn.base_dist, value)
    mask = jnp.asarray(fn._mask)
    if (feasible := _feasible(fn, value)) is not None:
        value = jnp.where(_over_event(mask, fn), value, feasible)
    return jnp.where(mask, log_prob(fn.base_dist, value), 0.0)


def _within(fn: Distribution, value: Any) -> tuple[Any, Any]:
    """Where values lie inside the support (``True`` if known to be everywhere), and values with those outside replaced
    by some inside: ``None`` where NumPyro cannot say."""
    if not any(type(fn)._validate_sample is plain for plain in _PLAIN_CHECKS):
        return None, None
    constraint = support(fn)
    if not isinstance(value, np.ndarray) or any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(constraint)):
        value = jnp.asarray(value)
    inside = constraint(value)
    if (extra := fn.event_dim - constraint.event_dim) > 0:
        inside = inside.all(axis=tuple(range(-extra, 0)))
    if not isinstance(inside, jax.Array) and np.all(inside):
        return True, value
    event = jnp.shape(value)[jnp.ndim(value) - fn.event_dim :]
    feasible = _feasible(fn, jnp.broadcast_to(value, jnp.shape(inside) + event))
    return inside, None if feasible is None else jnp.where(_over_event(inside, fn), value, feasible)


def _within_image(fn: TransformedDistribution, value: Array) -> tuple[Any, Any]:
    """As :func:`_within`, for the image of the base distribution's support."""
    base = value
    for transform in reversed(fn.transforms):
        base = transform.inv(base)
    inside, image = _within(fn.base_dist, base)
    if image is None or inside is True:
        return inside, value if inside is True else None
    for transform in fn.transforms:
        image = transform(image)
    extra = len(fn.base_dist.batch_shape) - len(fn.batch_shape)
    inside = inside.all(axis=tuple(range(-extra, 0))) if extra > 0 else inside
    return inside, jnp.where(_over_event(inside, fn), value, lax.stop_gradient(image))


def _feasible(fn: Distribution, like: Any) -> Array | None:
    try:
        feasible = support(fn).feasible_like(like)
    except NotImplementedError:
        return None
    return lax.stop_gradient(jnp.asarray(feasible).astype(jnp.result_type(like)))


def _is_plainly_transformed(fn: Distribution) -> bool:
    return isinstance(fn, TransformedDistribution) and type(fn).log_prob is TransformedDistribution.log_prob


def _over_event(inside: Any, fn: Distribution) -> Any:
    return jnp.reshape(inside, jnp.shape(inside) + (1,) * fn.event_dim)
