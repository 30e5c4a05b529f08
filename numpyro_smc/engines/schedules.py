"""Quantities that change over training: schedules of the optimiser's step."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.engines.alternation import current_step
from numpyro_smc.programs.arguments import check_number, check_positive

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
    check_number("log_schedule", "(-inf, 1)", start=start, stop=stop)
    check_positive("log_schedule", num_steps=num_steps)
    check_number("log_schedule", "(-inf, inf)", offset=offset)
    first, last = np.log1p(-start), np.log1p(-stop)

    def schedule(step: Array) -> Array:
        progress = jnp.clip((step - offset) / num_steps, 0.0, 1.0)
        return -jnp.expm1((1.0 - progress) * first + progress * last)

    return schedule


def burda_schedule(base: float, steps_per_epoch: int, num_stages: int = 8) -> Schedule:
    r"""Learning rates that fall from stage to stage, while the stages grow [1].

    Stage :math:`i = 0, \dots, S - 1` lasts :math:`3^i` epochs at :math:`10^{-i / (S - 1)}` times ``base``; the last
    rate, a tenth of the first, stays. The eight stages of [1] are 3280 epochs; training for ten epochs goes through
    two of them and most of a third.

    :param base: learning rate of the first stage; 0.001 in [1].
    :param steps_per_epoch: optimiser steps in an epoch.
    :param num_stages: :math:`S`.
    :return: function of the step number, as Optax's optimisers take.
    :raises ValueError: if an argument is not positive.

    **Example**

    .. doctest::

        >>> import optax
        >>> from numpyro_smc.engines.schedules import burda_schedule
        >>> rate = burda_schedule(1e-3, steps_per_epoch=600)
        >>> optim = optax.adam(rate, eps=1e-4)
        >>> [round(1e3 * float(rate(600 * epoch)), 3) for epoch in (0, 1, 4, 13, 3279)]
        [1.0, 0.72, 0.518, 0.373, 0.1]

    **References**

    1. *Importance Weighted Autoencoders*, Y. Burda, R. Grosse, R. Salakhutdinov (2016)
    """
    check_number("burda_schedule", "(0, inf)", base=base)
    check_positive("burda_schedule", steps_per_epoch=steps_per_epoch, num_stages=num_stages)
    ends = np.cumsum(3 ** np.arange(num_stages - 1)) * steps_per_epoch
    rates = base * np.logspace(0.0, -1.0, num_stages)

    def schedule(step: Array) -> Array:
        return jnp.asarray(rates)[jnp.searchsorted(ends, step, side="right")]

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
