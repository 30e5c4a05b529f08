"""Log densities that are -inf outside the support, for distributions that have lost NumPyro's own check too.

NumPyro checks the support in ``log_prob`` of a distribution that validates its arguments. One that went through
``tree_unflatten`` no longer does, as every site of a ``scan`` or a ``cond`` has: the flag is only looked up on the
instance, where it stands if it was given to the constructor. ``log_prob(scan of Uniform(0, 1) at 2)`` is 0.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpyro.distributions import (
    Distribution,
    ExpandedDistribution,
    ImproperUniform,
    Independent,
    MaskedDistribution,
    MixtureGeneral,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)
from numpyro.primitives import Messenger

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
