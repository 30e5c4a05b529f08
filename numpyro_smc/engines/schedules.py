"""Quantities that change over training: schedules of the optimiser's step."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.engines.alternation import current_step

Schedule = Callable[[Array], Any]


def log_schedule(start: float, stop: float, num_steps: int, *, offset: int = 0) -> Schedule:
    r"""Anneal a number below one so that its distance to one changes geometrically.

    With :math:`u = \min(\max((s - s_0) / S, 0), 1)` at step :math:`s`:
    :math:`1 - \alpha_s = (1 - \alpha_{start})^{1 - u} (1 - \alpha_{stop})^u`. For straight lines use
    ``optax.linear_schedule``; any function of the step will do.

    :param start: value until step ``offset``, below one.
    :param stop: value from step ``offset + num_steps`` on, below one.
    :param num_steps: :math:`S`, steps that the change takes.
    :param offset: :math:`s_0`, steps before it begins.
    :return: function of the step number.
    :raises ValueError: if a value is not below one, or ``num_steps`` is not positive.

    **Example**

    .. doctest::

        >>> from numpyro_smc import log_schedule
        >>> alpha = log_schedule(0.99, 0.0, 1000)
        >>> [round(float(alpha(step)), 3) for step in (0, 500, 1000, 2000)]
        [0.99, 0.9, 0.0, 0.0]
    """
    if not (start < 1.0 and stop < 1.0):
        raise ValueError(f"log_schedule: start and stop must be below 1, got {start} and {stop}.")
    if num_steps < 1:
        raise ValueError(f"log_schedule: num_steps must be positive, got {num_steps}.")
    first, last = np.log1p(-start), np.log1p(-stop)

    def schedule(step: Array) -> Array:
        progress = jnp.clip((step - offset) / num_steps, 0.0, 1.0)
        return -jnp.expm1((1.0 - progress) * first + progress * last)

    return schedule


def value_now(value: float | Schedule, name: str, user: str) -> Any:
    """A number, or the value of a schedule at the optimiser's current step.

    :raises ValueError: if a schedule is asked for outside a step of a ``StepwiseOptim``.
    """
    if not callable(value):
        return value
    step = current_step()
    if step is None:
        raise ValueError(
            f"{user}: {name} is a schedule, but the optimiser does not tell its step. Use "
            f"SVI(model, guide, StepwiseOptim(optim), loss); to evaluate outside training, give {name} a number."
        )
    return value(step)
