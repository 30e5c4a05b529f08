"""What a network was trained on: the ranges beyond which its ratio is a guess."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.ratio.datasets import RatioData

_MARGIN = 0.5


class Seen(NamedTuple):
    """Lowest and highest values of the training data, ``[2, ...]``: of parameters, outputs and, if any, contexts."""

    theta: Array
    x: Array
    context: Array | None

    @classmethod
    def of(cls, data: RatioData) -> Seen:
        def ends(values: Any) -> Array | None:
            return None if values is None else jnp.stack([jnp.asarray(values.min(0)), jnp.asarray(values.max(0))])

        theta, x = ends(data.theta), ends(data.x)
        assert theta is not None and x is not None
        return cls(theta, x, ends(data.context))


def check_finite(what: str, values: Any) -> None:
    """:raises ValueError: if values, where they are known, are not finite."""
    if values is None or isinstance(values, jax.core.Tracer):
        return
    bad = ~np.isfinite(np.asarray(values))
    if bad.any():
        raise ValueError(
            f"RatioEstimator: {bad.sum()} of {bad.size} numbers of the {what} are not finite, and the network has seen "
            f"finite ones only. Leave such data out, or train with nonfinite=f and give f of the observation."
        )


def warn_beyond(what: str, names: Sequence[str], values: Any, ends: Any, stacklevel: int = 4) -> None:
    """Warn of values, where they are known, that lie farther outside of the training data than half their range.

    :param names: of the elements. **ends** - lowest and highest, ``[2, *event]``; ``None`` if not known.
    """
    if ends is None or values is None or isinstance(values, jax.core.Tracer):
        return
    low, high = np.asarray(ends, np.float64)
    margin = _MARGIN * (high - low) + 1e-5 * np.maximum(abs(low), abs(high))
    given = np.asarray(values, np.float64).reshape(-1, *low.shape)
    outside = np.atleast_1d(((given < low - margin) | (given > high + margin)).any(0)).ravel()
    if outside.any():
        first = int(np.argmax(outside))
        column = given.reshape(len(given), -1)[:, first]
        far = column[np.argmax(np.maximum(low.ravel()[first] - column, column - high.ravel()[first]))]
        warnings.warn(
            f"RatioEstimator: {names[first]} of the {what} is {far:g}, but {low.ravel()[first]:g} to "
            f"{high.ravel()[first]:g} in the simulations trained on ({outside.sum()} of {outside.size} numbers lie so "
            f"far outside): the ratio is a guess there. Check the {what}, or the simulator and its prior.",
            stacklevel=stacklevel,
        )
