"""The error for a step whose weights all vanish or are not numbers, whole series and streams alike."""

from collections.abc import Sequence

import jax
import numpy as np
from jax import Array


def is_lost(increment: Array) -> bool:
    """Whether some problem's log evidence is not finite from here on; never so while JAX traces, where nobody knows."""
    return not isinstance(increment, jax.core.Tracer) and not np.isfinite(np.asarray(increment)).all()


def lost_particles(
    user: str, where: str, sites: Sequence[str], increment: Array, remedy: str = ""
) -> FloatingPointError:
    """What went wrong and what to do.

    :param where: which step, in words.
    :param sites: names of observed sites that hold non-finite, unmasked values there.
    :param increment: of the log evidence, per problem.
    :param remedy: what else to say.
    """
    named = ", ".join(f"'{name}'" for name in sites)
    if named:
        text = (
            f"{user}: non-finite data at site {named} {where}. Mask missing values with handlers.mask, or clean the "
            f"data."
        )
    elif np.isneginf(np.asarray(increment)).any():
        text = (
            f"{user}: all particles have weight zero {where}: no particle explains the observation. Use more "
            f"particles, a guide, or check the observation and its support."
        )
    else:
        text = (
            f"{user}: the weights are not numbers {where}. Check the parameters, the model's distributions and the "
            f"twists."
        )
    return FloatingPointError(f"{text} {remedy}".strip())
