"""Several stages of a run in one compiled call: short stages would otherwise wait for Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from numpyro_smc.samplers.tempering import StageReport

MOST = 16
_SECONDS = 0.2


def advance_stages(advance: Callable[[Any], tuple[Any, Array]], state: Any, limit: Array) -> tuple[Any, Array, Array]:
    """Stages until the temperature is 1, ``limit`` of them are done, or one has failed.

    :param advance: one stage: from a state to the next, and its :class:`StageReport` as a vector.
    :param limit: at most :data:`MOST`.
    :return: the new state, the reports ``[MOST, fields]`` and how many of them there are.
    """
    dtype = state.temperature.dtype
    reports = jnp.zeros((MOST, len(StageReport._fields)), dtype)

    def goes_on(carry: tuple[Array, Any, Array, Array]) -> Array:
        number, state, _, healthy = carry
        return (number < limit) & (state.temperature < 1.0) & healthy

    def step(carry: tuple[Array, Any, Array, Array]) -> tuple[Array, Any, Array, Array]:
        number, state, reports, _ = carry
        new, report = advance(state)
        named = StageReport(*report)
        healthy = jnp.isfinite(named.increment) & (named.temperature > state.temperature)
        return number + 1, new, reports.at[number].set(report), healthy

    carry = (jnp.zeros((), jnp.int32), state, reports, jnp.asarray(True))
    number, state, reports, _ = lax.while_loop(goes_on, step, carry)
    return state, reports, number


def next_limit(limit: int, seconds: float) -> int:
    """How many stages the next call may make, if one that could make ``limit`` took so long."""
    return min(max(int(limit * _SECONDS / max(seconds, 1e-9)), 1), MOST)
