"""The numbers of an annealed path as parameters of a program."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro.distributions import constraints

from numpyro_smc.engines.path import Schedule
from numpyro_smc.programs.arguments import check_not_negative, check_number

LEARNABLE = ("betas", "step_size", "mass", "refreshment")
PREFIX = "annealing$"

_VANISHED = 1e-3  # a step this small, relative to the largest allowed, moves nothing


class LearnedSchedule:
    r"""Temperatures, step sizes, mass and refreshment of K transitions; learned where ``learn`` says so.

    Temperatures are :math:`\beta_k = \sum_{j \le k} \operatorname{softmax}(l)_j`; step sizes lie in
    ``(0, step_size_max)``, the refreshment in (0.01, 0.99).

    :param user: who asks, for error messages.
    :raises ValueError: for unknown names in ``learn`` and initial values out of range.
    """

    def __init__(
        self,
        user: str,
        num_transitions: int,
        learn: Collection[str],
        step_size: float | None,
        step_size_max: float,
        mass: float,
        refreshment: float,
    ) -> None:
        check_not_negative(user, num_transitions=num_transitions)
        if isinstance(learn, str):
            raise ValueError(f"{user}: learn must be several names out of {list(LEARNABLE)}, got {learn!r}.")
        if unknown := set(learn) - set(LEARNABLE):
            raise ValueError(f"{user}: learn names {sorted(unknown)}; the sampler has {list(LEARNABLE)}.")
        check_number(user, "(0, inf)", step_size_max=step_size_max, mass=mass)
        step_size = step_size_max / 2.0 if step_size is None else step_size
        check_number(user, f"(0, {step_size_max})", "Raise step_size_max for larger ones.", step_size=step_size)
        check_number(user, "(0.01, 0.99)", refreshment=refreshment)
        self.user, self.num_transitions, self.step_size_max = user, int(num_transitions), step_size_max
        self.initial = {
            "betas": jnp.zeros(self.num_transitions),
            "step_size": jnp.full(self.num_transitions, step_size),
            "mass": jnp.asarray(mass),
            "refreshment": jnp.asarray(refreshment),
        }
        self.learned = tuple(name for name in LEARNABLE if name in learn and self.num_transitions)

    def declare(self) -> None:
        """The ``param`` statements of what is learned."""
        support: dict[str, Any] = {
            "betas": constraints.real,
            "step_size": constraints.interval(1e-5 * self.step_size_max, self.step_size_max),
            "mass": constraints.positive,
            "refreshment": constraints.interval(0.01, 0.99),
        }
        for name in self.learned:
            numpyro.param(PREFIX + name, self.initial[name], constraint=support[name])

    def at(self, params: dict[str, Any]) -> Schedule:
        """The schedule at constrained parameter values."""
        missing = [PREFIX + name for name in self.learned if PREFIX + name not in params]
        if missing:
            raise undeclared(self.user, missing)
        values = self.initial | {name: params[PREFIX + name] for name in self.learned}
        zero, one = jnp.zeros(1), jnp.ones(1)
        inner = jnp.cumsum(jax.nn.softmax(values["betas"]))[:-1]
        betas = jnp.concatenate([zero, inner, one]) if self.num_transitions else zero
        return Schedule(betas, values["step_size"], values["mass"], values["refreshment"])

    def num_vanished(self, step_sizes: Array) -> int:
        """How many transitions hardly move."""
        return int(np.sum(np.asarray(step_sizes) < _VANISHED * self.step_size_max))


def undeclared(user: str, names: list[str]) -> ValueError:
    return ValueError(
        f"{user}: the sampler's parameters {names} are not declared. Wrap the guide: "
        f"SVI(model, loss.wrap(guide), optim, loss)."
    )
