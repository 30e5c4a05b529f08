"""Optimisers that tell the loss which step it is, and that train a model and its twist in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.example_libraries import optimizers
from numpyro.optim import _NumPyroOptim, optax_to_numpyro

from numpyro_smc.programs.arguments import check_positive, named

__all__ = ["StepwiseOptim", "alternating", "current_phase", "current_step"]


class _Progress(NamedTuple):
    step: Array
    phase: Array | None


_PROGRESS: ContextVar[_Progress | None] = ContextVar("numpyro_smc_optimiser_progress", default=None)


def current_step() -> Array | None:
    """Number of optimiser steps taken before this one; ``None`` outside a step of a :class:`StepwiseOptim`.

    To be called while the loss is traced: by an ELBO, a model or a guide, NumPyro's ``scan`` bodies included. But JAX
    reuses the first trace of a function given to ``jit``, ``lax.scan``, ``lax.cond`` or ``jax.checkpoint``: one that is
    defined outside the loss must not call this, and should get the number as an argument.

    :return: int32 scalar, traced under ``jit``.
    """
    progress = _PROGRESS.get()
    return None if progress is None else progress.step


def current_phase() -> Array | None:
    """Whether this step trains the twist; ``None`` outside a step of an :func:`alternating` optimiser.

    To be called as :func:`current_step` is, for instance ``lax.cond(current_phase(), twist_loss, model_loss)``.

    :return: boolean scalar, traced under ``jit``.
    """
    progress = _PROGRESS.get()
    return None if progress is None else progress.phase


@contextmanager
def _exposed(progress: _Progress) -> Iterator[None]:
    token = _PROGRESS.set(progress)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


class StepwiseOptim(_NumPyroOptim):
    """An optimiser whose steps are unchanged, but let the loss read :func:`current_step` and :func:`current_phase`.

    :param optim: what :class:`~numpyro.infer.svi.SVI` accepts: an optimiser of :mod:`numpyro.optim`, an Optax
        transformation, or an optimiser of ``jax.example_libraries``.
    :param phase: function of the step number giving what :func:`current_phase` returns.

    **Example**

    .. doctest::

        >>> import optax
        >>> from jax import numpy as jnp
        >>> from numpyro_smc.engines.alternation import StepwiseOptim, current_step
        >>> optim = StepwiseOptim(optax.sgd(0.1))
        >>> state = optim.init({"x": jnp.array(0.0)})
        >>> def loss(params):
        ...     return current_step() + params["x"] ** 2, None
        >>> for _ in range(3):
        ...     (value, _), state = optim.eval_and_update(loss, state)
        ...     print(value)
        0.0
        1.0
        2.0
    """

    def __init__(self, optim: Any, *, phase: Callable[[Array], Array] | None = None) -> None:
        with named("StepwiseOptim"):
            self.optim = _as_numpyro_optim(optim, "optim")
        self.phase = phase

    def init(self, params: Any) -> tuple:
        return self.optim.init(params)

    def update(self, g: Any, state: tuple, value: Any = None) -> tuple:
        return self.optim.update(g, state, value=value)

    def get_params(self, state: tuple) -> Any:
        return self.optim.get_params(state)

    def eval_and_update(self, fn: Callable, state: tuple, forward_mode_differentiation: bool = False) -> tuple:
        with _exposed(self._progress(state)):
            return self.optim.eval_and_update(fn, state, forward_mode_differentiation=forward_mode_differentiation)

    def eval_and_stable_update(self, fn: Callable, state: tuple, forward_mode_differentiation: bool = False) -> tuple:
        with _exposed(self._progress(state)):
            return self.optim.eval_and_stable_update(
                fn, state, forward_mode_differentiation=forward_mode_differentiation
            )

    def _progress(self, state: tuple) -> _Progress:
        step = jnp.asarray(state[0])
        return _Progress(step, None if self.phase is None else self.phase(step))


def alternating(
    optim: Any, twist_optim: Any, *, num_steps: int = 1, num_twist_steps: int = 1, twist_prefix: str = "twist"
) -> StepwiseOptim:
    r"""Train model and guide for ``num_steps`` steps, then the twist for ``num_twist_steps``, and so on, as SIXO [1].

    Step :math:`s` trains the twist when :math:`s \bmod (n_{model} + n_{twist}) \ge n_{model}`: model first, as in the
    published code; the published algorithm starts with the twist. The parameters of the other group, their moments and
    the step counter of their learning-rate schedule stay as they are, to the bit. :func:`current_phase` tells the loss
    which objective is due.

    Cost: the loss is differentiated with respect to both groups at every step.

    :param optim: optimiser of the parameters of model and guide: anything :class:`~numpyro.infer.svi.SVI` accepts that
        steps along a gradient.
    :param twist_optim: optimiser of the twist's parameters.
    :param num_steps: steps in a row for model and guide.
    :param num_twist_steps: steps in a row for the twist.
    :param twist_prefix: the twist's parameters are those whose site name starts so (``"twist_net$params"``).
    :return: an optimiser to pass to :class:`~numpyro.infer.svi.SVI`. ``SVI.init`` raises ``ValueError`` if no parameter
        belongs to the twist, or every one does.
    :raises ValueError: if a number of steps is below 1, or an optimiser does not step along a gradient (``Minimize``).

    **Example**

    .. doctest::

        >>> import optax
        >>> from numpyro_smc.engines.alternation import alternating
        >>> optim = alternating(optax.adam(1e-3), optax.adam(3e-3), num_steps=1, num_twist_steps=2)

    **References**

    1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventós, A. Warrington, S. Linderman (2022)
    """
    check_positive("alternating", num_steps=num_steps, num_twist_steps=num_twist_steps)
    if not isinstance(twist_prefix, str):
        raise ValueError(f"alternating: twist_prefix must be the start of parameters' names, got {twist_prefix!r}.")
    if not twist_prefix:
        raise ValueError("alternating: twist_prefix is empty, so every parameter would belong to the twist.")

    def phase(step: Array) -> Array:
        return step % (num_steps + num_twist_steps) >= num_steps

    with named("alternating"):
        groups = _gradient_optim(optim, "optim"), _gradient_optim(twist_optim, "twist_optim")
    return StepwiseOptim(_TwoGroups(*groups, phase, twist_prefix), phase=phase)


class _TwoGroups(_NumPyroOptim):
    """State ``(step, (model group's state, twist group's state))``, of which a step changes one group's."""

    def __init__(
        self, optim: _NumPyroOptim, twist_optim: _NumPyroOptim, phase: Callable[[Array], Array], twist_prefix: str
    ) -> None:
        self.optim = optim
        self.twist_optim = twist_optim
        self.phase = phase
        self.twist_prefix = twist_prefix

    def init(self, params: dict[str, Any]) -> tuple:
        if not isinstance(params, Mapping):
            raise ValueError(f"alternating: params must be a dict of site name to value, got {type(params).__name__}.")
        model, twist = self._split(params)
        for group, whose in ((model, "every one does"), (twist, "none does")):
            if not group:
                raise ValueError(
                    f"alternating: the twist's parameters are those whose name starts with twist_prefix="
                    f"{self.twist_prefix!r}, and of {sorted(params)} {whose}. Rename the param sites or pass another "
                    f"twist_prefix; with one group only, pass its optimiser to SVI directly."
                )
        return jnp.array(0), (self.optim.init(model), self.twist_optim.init(twist))

    def update(self, g: dict[str, Any], state: tuple, value: Any = None) -> tuple:
        step, (model_state, twist_state) = state
        model_gradient, twist_gradient = self._split(g)
        groups = lax.cond(
            self.phase(step),
            lambda: (model_state, self.twist_optim.update(twist_gradient, twist_state, value=value)),
            lambda: (self.optim.update(model_gradient, model_state, value=value), twist_state),
        )
        return step + 1, groups

    def get_params(self, state: tuple) -> dict[str, Any]:
        _, (model_state, twist_state) = state
        return {**self.optim.get_params(model_state), **self.twist_optim.get_params(twist_state)}

    def eval_and_stable_update(self, fn: Callable, state: tuple, forward_mode_differentiation: bool = False) -> tuple:
        is_twist_phase = self.phase(state[0])

        def active_only(params: dict[str, Any]) -> tuple:
            # the step depends on one group's gradient, so the other's being non-finite must not prevent it
            model, twist = self._split(params)
            return fn({**_differentiable_if(~is_twist_phase, model), **_differentiable_if(is_twist_phase, twist)})

        return super().eval_and_stable_update(active_only, state, forward_mode_differentiation)

    def _split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        twist = {name: value for name, value in params.items() if name.startswith(self.twist_prefix)}
        return {name: value for name, value in params.items() if name not in twist}, twist


def _differentiable_if(condition: Array, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, lax.stop_gradient(leaf)), tree)


def _as_numpyro_optim(optim: Any, argument: str) -> _NumPyroOptim:
    if isinstance(optim, _NumPyroOptim):
        return optim
    if isinstance(optim, optimizers.Optimizer):
        return _NumPyroOptim(lambda *functions: functions, *optim)
    if isinstance(optim, optax.GradientTransformation):
        return optax_to_numpyro(optim)
    raise ValueError(
        f"{argument} must be an optimiser of numpyro.optim, an Optax transformation or an optimiser of "
        f"jax.example_libraries, got {type(optim).__name__}."
    )


def _gradient_optim(optim: Any, argument: str) -> _NumPyroOptim:
    optim = _as_numpyro_optim(optim, argument)
    if type(optim).eval_and_update is not _NumPyroOptim.eval_and_update:
        raise ValueError(
            f"alternating: {argument} is a {type(optim).__name__}, which evaluates the loss itself; pass an optimiser "
            f"that steps along a gradient, such as optax.adam(1e-3)."
        )
    return optim
