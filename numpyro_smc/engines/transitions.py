r"""Deterministic-gradient transitions of annealed paths, with the log density ratio of their reversals.

A transition moves position :math:`z` and momentum :math:`v` by a step :math:`\delta` along the gradient
:math:`g = \nabla\log\gamma` of the bridging density, with noise :math:`\epsilon \sim N(0, I)` given. Its log ratio
:math:`\log B - \log F` compares the backward with the forward transition. No transition is accepted or rejected, so all
are differentiable in everything.

**References**

1. *Differentiable Annealed Importance Sampling and the Perils of Gradient Noise*, G. Zhang et al. (2021)
2. *MCMC Variational Inference via Uncorrected Hamiltonian Annealing*, T. Geffner, J. Domke (2021)
3. *Monte Carlo Variational Auto-Encoders*, A. Thin et al. (2021)
4. *Score-Based Diffusion meets Annealed Importance Sampling*, A. Doucet et al. (2022)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Tree = Any


class Phase(NamedTuple):
    """Position and momentum, pytrees of the same structure (momentum ``None`` without one)."""

    position: Tree
    momentum: Tree


class Settings(NamedTuple):
    r"""Numbers of one transition: step :math:`\delta > 0`, mass :math:`M > 0`, refreshment :math:`\eta \in [0, 1)`."""

    step_size: Array
    mass: Array
    refreshment: Array


Gradient = Callable[[Tree], Tree]
SquaredNorm = Callable[[Tree], Array]


class Drifts(NamedTuple):
    """Along what a transition drifts, **forward** and **backward** in reversal; gradients of the bridging density."""

    forward: Gradient
    backward: Gradient


Transition = Callable[[Phase, Tree, Drifts, Settings, SquaredNorm], tuple[Phase, Array]]


class Kernel(NamedTuple):
    """A transition, whether it has a momentum, and whether its reversal has a learned score."""

    transition: Transition
    has_momentum: bool
    has_score: bool = False


def axpy(factor: Any, x: Tree, y: Tree) -> Tree:
    """``factor * x + y``."""
    return jax.tree.map(lambda a, b: factor * a + b, x, y)


def refresh(momentum: Tree, noise: Tree, settings: Settings) -> Tree:
    r"""Partial refreshment :math:`\eta v + \sqrt{(1 - \eta^2) M}\,\epsilon`, reversible for :math:`N(0, M)`."""
    scale = jnp.sqrt((1.0 - settings.refreshment**2) * settings.mass)
    return jax.tree.map(lambda v, e: settings.refreshment * v + scale * e, momentum, noise)


def energy_lost(before: Tree, after: Tree, settings: Settings, squared_norm: SquaredNorm) -> Array:
    r""":math:`\log N(v'; 0, M) - \log N(v; 0, M)`."""
    return (squared_norm(before) - squared_norm(after)) / (2.0 * settings.mass)


def drift_kick_drift(
    phase: Phase, noise: Tree, drifts: Drifts, settings: Settings, squared_norm: SquaredNorm
) -> tuple[Phase, Array]:
    """Refresh, then a leapfrog that evaluates the gradient once, at its middle [1]."""
    momentum = refresh(phase.momentum, noise, settings)
    half = settings.step_size / (2.0 * settings.mass)
    middle = axpy(half, momentum, phase.position)
    kicked = axpy(settings.step_size, drifts.forward(middle), momentum)
    return Phase(axpy(half, kicked, middle), kicked), energy_lost(momentum, kicked, settings, squared_norm)


def kick_drift_kick(
    phase: Phase, noise: Tree, drifts: Drifts, settings: Settings, squared_norm: SquaredNorm
) -> tuple[Phase, Array]:
    """Refresh, then a leapfrog that evaluates the gradient at both ends [2]."""
    momentum = refresh(phase.momentum, noise, settings)
    half = settings.step_size / 2.0
    kicked = axpy(half, drifts.forward(phase.position), momentum)
    position = axpy(settings.step_size / settings.mass, kicked, phase.position)
    last = axpy(half, drifts.forward(position), kicked)
    return Phase(position, last), energy_lost(momentum, last, settings, squared_norm)


def unadjusted_langevin(
    phase: Phase, noise: Tree, drifts: Drifts, settings: Settings, squared_norm: SquaredNorm
) -> tuple[Phase, Array]:
    r"""Overdamped Langevin, :math:`z' = z + \delta g(z) + \sqrt{2\delta}\,\epsilon` [3].

    Reversed by a transition along ``drifts.backward``: :math:`g` itself, or :math:`g` and a learned score [4].
    """
    delta = settings.step_size
    position = axpy(jnp.sqrt(2.0 * delta), noise, axpy(delta, drifts.forward(phase.position), phase.position))
    back = axpy(-1.0, axpy(delta, drifts.backward(position), position), phase.position)
    # |z' - m(z)|^2 / (4 delta) is |noise|^2 / 2: the difference of two large numbers is never formed.
    return Phase(position, None), squared_norm(noise) / 2.0 - squared_norm(back) / (4.0 * delta)


KERNELS = {
    "uha": Kernel(drift_kick_drift, has_momentum=True),
    "uha_kdk": Kernel(kick_drift_kick, has_momentum=True),
    "ula": Kernel(unadjusted_langevin, has_momentum=False),
    "mcd": Kernel(unadjusted_langevin, has_momentum=False, has_score=True),
}
