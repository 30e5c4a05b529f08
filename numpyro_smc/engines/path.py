r"""The annealed path from a guide to its model, as a Feynman-Kac model for the particle recursion.

Between the ends :math:`q_0` and :math:`f` stand :math:`\gamma_k = q_0^{1-\beta_k} f^{\beta_k}` with
:math:`0 = \beta_0 < \dots < \beta_K = 1`. A particle that a transition takes from :math:`z_{k-1}` to :math:`z_k` gains

.. math:: \log\gamma_k(z_k) - \log\gamma_{k-1}(z_{k-1}) + \log B_k(z_{k-1} \mid z_k) - \log F_k(z_k \mid z_{k-1}).

With resampling this is an SMC sampler; without, annealed importance sampling.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.engines.transitions import Drifts, Kernel, Phase, Settings, axpy
from numpyro_smc.programs.guide_target import Ends, GuideTarget, State
from numpyro_smc.programs.sequence import Cloud, Move

_LOWEST = -1e15  # log densities below are zero whatever else happens, and their derivatives overflow


class Schedule(NamedTuple):
    """The path's numbers: **betas** ``[K + 1]``, from 0 to 1; **step_sizes** ``[K]``; **mass**; **refreshment**."""

    betas: Array
    step_sizes: Array
    mass: Array
    refreshment: Array


#: Added to the drift of the reversal of transition ``k`` at a state.
Score = Callable[[Array, State], State]


class AnnealedPath:
    """Particles that move from the guide to the model; see :class:`~numpyro_smc.engines.particles.FeynmanKac`."""

    def __init__(self, target: GuideTarget, kernel: Kernel, schedule: Schedule, score: Score | None = None) -> None:
        self.target, self.kernel, self.schedule, self.score = target, kernel, schedule, score
        self.length = schedule.step_sizes.shape[0]

    @property
    def has_initial_weights(self) -> bool:
        return self.length == 0

    def inputs(self) -> Any:
        betas = self.schedule.betas
        return betas[:-1], betas[1:], self.schedule.step_sizes

    def init(self, rng_key: Array, num_particles: int) -> tuple[Cloud, Move]:
        draw_key, momentum_key = random.split(rng_key)
        position = jax.vmap(self.target.draw, (None, 0))(draw_key, jnp.arange(num_particles))
        ends = jax.vmap(self.target.ends)(position)
        momentum = None
        if self.kernel.has_momentum:
            noise = self.noise(momentum_key, position)
            momentum = jax.tree.map(lambda e: jnp.sqrt(self.schedule.mass) * e, noise)
        log_weights = jnp.zeros_like(ends.base) if self.length else ends.target - ends.base
        return Cloud((Phase(position, momentum), ends), None), _move(log_weights)

    def step(self, rng_key: Array, t: Array, inputs: Any, cloud: Cloud, num_particles: int) -> tuple[Cloud, Move]:
        beta_before, beta, step_size = inputs
        settings = Settings(step_size, self.schedule.mass, self.schedule.refreshment)
        noise = self.noise(rng_key, cloud.particles[0].position)
        drifts = self._drifts(t, beta)

        def move(particle: tuple[Phase, Ends], noise: State) -> tuple[tuple[Phase, Ends], Array]:
            phase, ends = particle
            moved, log_ratio = self.kernel.transition(phase, noise, drifts, settings, self._squared_norm)
            alive = self._is_alive(moved.position, beta)
            # A dead particle stays where it was: densities where it went would put 0 * inf into gradients.
            phase = self._where(alive, moved, lax.stop_gradient(phase))
            new = self.target.ends(phase.position)
            gain = _bridge(new, beta) - _bridge(ends, beta_before) + log_ratio
            return (phase, new), jnp.where(alive & ~jnp.isnan(gain), gain, -jnp.inf)

        particles, log_weights = jax.vmap(move)(cloud.particles, noise)
        return Cloud(particles, None), _move(log_weights)

    def noise(self, rng_key: Array, like: State) -> State:
        """Standard normal noise for every particle."""
        return {
            name: random.normal(random.fold_in(rng_key, i), jnp.shape(x), jnp.result_type(x))
            for i, (name, x) in enumerate(like.items())
        }

    def _drifts(self, t: Array, beta: Array) -> Drifts:
        gradient = jax.grad(lambda state: jnp.sum(_bridge(self.target.ends(state), beta)))
        if self.score is None:
            return Drifts(gradient, gradient)
        score = self.score
        return Drifts(gradient, lambda state: axpy(1.0, gradient(state), score(t, state)))

    def _is_alive(self, position: State, beta: Array) -> Array:
        """Whether a position, per problem, is in the support and where floating-point numbers can follow."""
        ends = self.target.ends(lax.stop_gradient(position))
        return jnp.isfinite(ends.base) & jnp.isfinite(ends.target) & (_bridge(ends, beta) > _LOWEST)

    def _where(self, condition: Array, phase: Phase, otherwise: Phase) -> Phase:
        def select(x: Array, y: Array) -> Array:
            return jnp.where(condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim)), x, y)

        return jax.tree.map(select, phase, otherwise)

    def _squared_norm(self, tree: State) -> Array:
        """Sum of squares per problem."""
        rank = len(self.target.plates.dims)
        return sum(
            (jnp.sum(x**2, axis=tuple(range(rank, x.ndim))) for x in tree.values()),
            start=jnp.zeros(self.target.plates.shape),
        )


def _bridge(ends: Ends, beta: Array) -> Array:
    # Where the path has not left the guide, a target of -inf does not matter yet.
    return (1.0 - beta) * ends.base + jnp.where(beta > 0.0, beta * jnp.where(beta > 0.0, ends.target, 0.0), 0.0)


def _move(log_weights: Array) -> Move:
    zeros = jnp.zeros_like(log_weights)
    return Move(log_weights, {}, zeros, zeros)
