"""The one particle recursion: resample when told to, move, weigh.

For a Feynman-Kac model (initial law, Markov moves, log-weight increments :math:`g_t`) and N particles, with :math:`W`
the log weights of mean one,

.. math:: \\ell_t = \\log \\tfrac1N \\sum_i e^{W_{t-1}^i + g_t^i}, \\qquad W_t^i = W_{t-1}^i + g_t^i - \\ell_t,
   \\qquad \\log \\hat Z = \\sum_t \\ell_t,

with :math:`W_{t-1} := 0` after resampling. :math:`\\hat Z` is unbiased for any unbiased resampling scheme and schedule.
Filters, FIVO and SIXO bounds, tempered samplers and conditional SMC are this recursion with different models.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.programs.resample import ResampleFn
from numpyro_smc.programs.sequence import Cloud, Move
from numpyro_smc.programs.weights import normalise, sum_of_steps


class FeynmanKac(Protocol):
    """What the recursion needs of a model. :class:`~numpyro_smc.programs.sequence.Sequence` is one."""

    length: int

    @property
    def has_initial_weights(self) -> bool: ...

    def inputs(self) -> Any: ...

    def init(self, rng_key: Array, num_particles: int) -> tuple[Cloud, Move]: ...

    def step(self, rng_key: Array, t: Array, inputs: Any, cloud: Cloud, num_particles: int) -> tuple[Cloud, Move]: ...


class ParticleState(NamedTuple):
    """Where the recursion stands.

    - **cloud** - the particles; **log_weights** - ``[N, *batch]``, of mean one.
    """

    cloud: Cloud
    log_weights: Array


class StepInfo(NamedTuple):
    """What one step did; stacked over time by :func:`run`.

    - **increment** - :math:`\\ell_t`, ``[*batch]``; their sum is the log evidence.
    - **ess** - effective sample size after weighing, before any resampling, ``[*batch]``.
    - **resampled** - whether particles were resampled before the step, ``[*batch]``.
    - **ancestors** - parent of each particle at the step before, ``[N, *batch]``.
    - **score** - log probability of the ancestors and of the non-reparameterised draws, ``[*batch]``.
    - **history** - what ``keep`` selected of the new state and the move.
    """

    increment: Array
    ess: Array
    resampled: Array
    ancestors: Array
    score: Array
    history: Any


class Recursion(NamedTuple):
    """A whole run: final state, info of the initial part and of the steps, and what was kept of the initial part."""

    state: ParticleState
    initial: StepInfo
    steps: StepInfo
    kept: Any

    @property
    def log_evidence(self) -> Array:
        """Log evidence, ``[*batch]``."""
        return self.initial.increment + sum_of_steps(self.steps.increment)


Keep = Callable[[ParticleState, Move], Any]
Pivots = Callable[[Array, Array, Any, ParticleState], Array]


def initialise(rng_key: Array, model: FeynmanKac, num_particles: int) -> tuple[ParticleState, StepInfo, Move]:
    """Draw and weigh the initial particles."""
    cloud, move = model.init(rng_key, num_particles)
    log_weights, increment, ess = normalise(move.log_weights)
    ancestors = jnp.broadcast_to(
        jnp.arange(num_particles, dtype=jnp.int32).reshape((-1,) + (1,) * increment.ndim), log_weights.shape
    )
    info = StepInfo(increment, ess, jnp.zeros(increment.shape, bool), ancestors, jnp.sum(move.log_score, axis=0), None)
    return ParticleState(cloud, log_weights), info, move


def step_keys(rng_key: Array, t: Array) -> Array:
    """The keys of step ``t``, for resampling and for moving."""
    return random.split(random.fold_in(rng_key, t))


def advance(
    keys: Array,
    model: FeynmanKac,
    resample: ResampleFn | None,
    state: ParticleState,
    t: Array,
    inputs: Any,
    pivots: Pivots | None = None,
) -> tuple[ParticleState, StepInfo, Move]:
    """One step of the recursion, with the keys of :func:`step_keys`.

    :param pivots: for conditional SMC, ``(rng_key, t, inputs, state)`` to the ancestors, int ``[*batch]``, that
        particle 0 must have where the cloud is resampled.
    """
    resample_key, move_key = keys[0], keys[1]
    cloud, log_weights = state
    num_particles, batch = log_weights.shape[0], log_weights.shape[1:]
    if resample is None:
        identity = jnp.arange(num_particles, dtype=jnp.int32).reshape((-1,) + (1,) * len(batch))
        ancestors = jnp.broadcast_to(identity, log_weights.shape)
        resampled, score = jnp.zeros(batch, bool), jnp.zeros(batch)
    else:
        # Equal initial weights are never resampled: that would only add noise.
        allowed = jnp.asarray(True) if model.has_initial_weights else t > 0
        pivot = None
        if pivots is not None:
            resample_key, pivot_key = random.split(resample_key)
            pivot = pivots(pivot_key, t, inputs, state)
        particles, log_weights, ancestors, resampled, score = resample(
            resample_key, log_weights, cloud.particles, t, allowed, pivot
        )
        cloud = Cloud(particles, cloud.shared)
    cloud, move = model.step(move_key, t, inputs, cloud, num_particles)
    log_weights, increment, ess = normalise(log_weights + move.log_weights)
    score = score + jnp.sum(move.log_score, axis=0)
    return ParticleState(cloud, log_weights), StepInfo(increment, ess, resampled, ancestors, score, None), move


def run(
    rng_key: Array,
    model: FeynmanKac,
    num_particles: int,
    resample: ResampleFn | None,
    *,
    keep: Keep | None = None,
    remat: bool | str = False,
    pivots: Pivots | None = None,
) -> Recursion:
    """Run the recursion over all steps.

    :param keep: what to store of each step, a function of the new state and the move; nothing by default, and then
        memory is O(N) however long the series.
    :param remat: recompute each step in the backward pass instead of storing its intermediate values; ``"sqrt"``
        also recomputes the states between, from one in about every :math:`\\sqrt T` that is stored.
    :param pivots: see :func:`advance`.
    """
    init_key, run_key = random.split(rng_key)
    state, initial, move = initialise(init_key, model, num_particles)
    kept = None if keep is None else keep(state, move)

    def step(state: ParticleState, timed: tuple[Array, Array, Any]) -> tuple[ParticleState, StepInfo]:
        t, keys, inputs = timed
        new_state, info, move = advance(keys, model, resample, state, t, inputs, pivots)
        return new_state, info._replace(
            history=None if keep is None else keep(new_state, move),
            ancestors=info.ancestors if keep is not None else jnp.zeros((), jnp.int32),
        )

    body = jax.checkpoint(step) if remat else step  # type: ignore[arg-type]
    times = jnp.arange(model.length)
    # All keys at once: deriving them one step at a time would dominate filters with few particles.
    keys = jax.vmap(step_keys, (None, 0))(run_key, times)
    scan = _scan_in_blocks if remat == "sqrt" else lax.scan
    state, infos = scan(body, state, (times, keys, model.inputs()))
    return Recursion(state, initial, infos, kept)


def score_terms(recursion: Recursion, future_only: bool) -> Array:
    """Log probabilities of all discrete choices times the log evidence that they can influence, per problem.

    :param future_only: leave out the increments before a choice, which it cannot influence: less variance.
    """
    steps = lax.stop_gradient(recursion.steps.increment)
    total = lax.stop_gradient(recursion.log_evidence)
    if future_only:
        future = jnp.flip(jnp.cumsum(jnp.flip(steps, 0), axis=0), 0)
    else:
        future = jnp.broadcast_to(total, steps.shape)
    future = jnp.where(jnp.isfinite(future), future, 0.0)
    first = jnp.where(jnp.isfinite(total), total, 0.0) * recursion.initial.score
    return first + jnp.sum(recursion.steps.score * future, axis=0)


def _scan_in_blocks(body: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
    """``lax.scan`` that stores the state once per block of about the square root of the length."""
    length = len(jax.tree.leaves(inputs)[0])
    size = max(math.isqrt(length), 1)
    num_blocks = length // size

    @jax.checkpoint
    def block(state: Any, inputs: Any) -> tuple[Any, Any]:
        return lax.scan(body, state, inputs)

    split = jax.tree.map(lambda x: x[: num_blocks * size].reshape(num_blocks, size, *x.shape[1:]), inputs)
    state, outputs = lax.scan(block, state, split)
    outputs = jax.tree.map(lambda x: x.reshape(num_blocks * size, *x.shape[2:]), outputs)
    state, rest = block(state, jax.tree.map(lambda x: x[num_blocks * size :], inputs))
    return state, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, rest)
