r"""The stages of SMC2: particles of parameters, each with a filter of its own, start, advance, move and change size.

After the data :math:`y_{0:t-1}` a parameter particle is :math:`(z, \text{filter})`, with :math:`z` unconstrained and
:math:`\hat p(y_{0:t-1} \mid \theta)` the filter's unbiased estimate. The particles target the extended law whose
marginal in :math:`\theta` is the exact posterior, for any number of state particles. All functions are pure and meant
for ``jit``, with :math:`t` traced: filters are run again over a number of steps that no program depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.flatten_util import ravel_pytree

from numpyro_smc.engines.particles import ParticleState, advance, initialise, step_keys
from numpyro_smc.kernels.estimated_likelihood import EstimatedLikelihood
from numpyro_smc.programs.global_latents import GlobalLatents, Values
from numpyro_smc.programs.resample import build
from numpyro_smc.programs.resampling import systematic
from numpyro_smc.programs.sequence import Sequence
from numpyro_smc.programs.weights import impossible_if_nan, normalise
from numpyro_smc.samplers.moves import cloud_scale

PROPOSALS = ("independent", "random_walk")


class Filtered(NamedTuple):
    r"""A filter between two observations.

    - **particles** - the state particles and their log weights. **values** - the last step's sites, ``[N, ...]``.
    - **log_evidence** - :math:`\log \hat p(y_{0:t-1} \mid \theta)`; minus infinity where it is not a number.
    """

    particles: ParticleState
    values: Values
    log_evidence: Array


class ParameterParticle(NamedTuple):
    """One parameter.

    - **z** - unconstrained, by site. **parameters** - in their supports, with the deterministic sites of them alone.
    - **log_prior** - of ``z``. **filtered** - the filter at this parameter.
    """

    z: Values
    parameters: Values
    log_prior: Array
    filtered: Filtered


class SMC2State(NamedTuple):
    """All parameter particles, with a leading axis, and their log weights ``[N]``: of mean one after the first step."""

    particles: ParameterParticle
    log_weights: Array


class Moves(NamedTuple):
    """How parameters are moved: **proposal**, **num_moves**, and how many are moved at a time (**batch_size**)."""

    proposal: str
    num_moves: int
    batch_size: int | None


class Filters:
    """Particle filters of a program at its arguments, over any number of steps. Build it inside ``jit``.

    :param likelihood: the estimate, whose options of resampling count.
    :param args, kwargs: of the model.
    """

    def __init__(self, likelihood: EstimatedLikelihood, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.likelihood, self.args, self.kwargs = likelihood, args, kwargs
        self.resample = build(likelihood.resampler, likelihood.resample, likelihood.ess_threshold)

    def latents(self) -> GlobalLatents:
        """The parameters of the program."""
        likelihood = self.likelihood
        return GlobalLatents(likelihood.model, self.args, self.kwargs, likelihood.params, user=likelihood.user)

    def start(self, rng_key: Array, parameters: Values, num_particles: int) -> Filtered:
        """The filter at given parameters before the first step."""
        return self._start(random.split(rng_key)[0], self._read(parameters), num_particles)

    def run(self, rng_key: Array, parameters: Values, t: Array, num_particles: int) -> Filtered:
        """The filter at given parameters after the first ``t`` steps."""
        sequence = self._read(parameters)
        init_key, run_key = random.split(rng_key)

        def step(s: Array, filtered: Filtered) -> Filtered:
            return self._step(step_keys(run_key, s), sequence, s, filtered)[0]

        return lax.fori_loop(0, t, step, self._start(init_key, sequence, num_particles))

    def advance(self, rng_key: Array, parameters: Values, t: Array, filtered: Filtered) -> tuple[Filtered, Array]:
        """Step ``t`` of a filter, and the increment of its log evidence."""
        return self._step(random.split(rng_key), self._read(parameters), t, filtered)

    def _read(self, parameters: Values) -> Sequence:
        sequence = self.likelihood.read(parameters, self.args, self.kwargs)
        sequence.twisted = False  # a twist looks ahead of the data that have been taken in
        return sequence

    def _start(self, rng_key: Array, sequence: Sequence, num_particles: int) -> Filtered:
        particles, info, _ = initialise(rng_key, sequence, num_particles)
        start = Filtered(particles, {}, impossible_if_nan(sequence.bound(info.increment)))
        zero = jnp.asarray(0)
        first = jax.eval_shape(lambda: self._step(step_keys(rng_key, zero), sequence, zero, start)[0])
        return start._replace(values=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first.values))

    def _step(self, keys: Array, sequence: Sequence, t: Array, filtered: Filtered) -> tuple[Filtered, Array]:
        inputs = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, t, keepdims=False), sequence.inputs())
        particles, info, move = advance(keys, sequence, self.resample, filtered.particles, t, inputs)
        increment = sequence.over_problems(info.increment)
        return Filtered(particles, move.values, impossible_if_nan(filtered.log_evidence + increment)), increment


def start(rng_key: Array, filters: Filters, num_parameters: int, num_states: int, moves: Moves) -> SMC2State:
    """Parameters from the prior, with filters before the first step."""
    latents = filters.latents()

    def one(rng_key: Array) -> ParameterParticle:
        draw_key, filter_key = random.split(rng_key)
        return _particle(latents, latents.draw(draw_key), lambda values: filters.start(filter_key, values, num_states))

    particles = _each(one, random.split(rng_key, num_parameters), moves.batch_size)
    return _strong(SMC2State(particles, particles.filtered.log_evidence))


def advance_all(
    rng_key: Array, t: Array, state: SMC2State, filters: Filters, moves: Moves
) -> tuple[SMC2State, Array, Array, Array]:
    """Take in the observation of step ``t``.

    :return: the state; the increment of the log evidence; the parameters' effective sample size; and how many of the
        increments of the filters are not numbers.
    """

    def one(operand: tuple[Array, ParameterParticle]) -> tuple[ParameterParticle, Array]:
        key, particle = operand
        values = {name: particle.parameters[name] for name in particle.z}
        filtered, increment = filters.advance(key, values, t, particle.filtered)
        return particle._replace(filtered=filtered), increment

    particles, increments = _each(one, (_keys(rng_key, state), state.particles), moves.batch_size)
    log_weights, increment, ess = normalise(impossible_if_nan(state.log_weights + increments))
    broken = jnp.sum(jnp.isnan(increments) | jnp.isposinf(increments))
    return _strong(SMC2State(particles, log_weights)), increment, ess, broken


def rejuvenate(rng_key: Array, t: Array, state: SMC2State, filters: Filters, moves: Moves) -> tuple[SMC2State, Array]:
    r"""Resample the parameters and move each by particle Metropolis on the first ``t`` observations.

    Proposals are :math:`\mathcal N(\mu, \Sigma)`, or :math:`\mathcal N(z, 2.38^2 \Sigma / D)` as a random walk, with
    the weighted mean and covariance of the particles.

    :return: the state, and the mean acceptance probability.
    """
    latents = filters.latents()
    resample_key, move_key = random.split(rng_key)
    z = jax.vmap(lambda values: ravel_pytree(values)[0])(state.particles.z)
    weights = jax.nn.softmax(state.log_weights)
    scale = cloud_scale(z, weights, dense=True)
    mean = weights @ jnp.where(weights[:, None] > 0.0, z, 0.0)
    ancestors = systematic(resample_key, state.log_weights, len(z))
    particles = jax.tree.map(lambda leaf: leaf[ancestors], state.particles)
    num_states = state.particles.filtered.particles.log_weights.shape[1]

    def move(current: ParameterParticle, rng_key: Array) -> tuple[ParameterParticle, Array]:
        direction_key, filter_key, accept_key = random.split(rng_key, 3)
        position, unravel = ravel_pytree(current.z)
        direction = random.normal(direction_key, position.shape, position.dtype)
        proposed, log_proposals = _propose(moves.proposal, position, direction, mean, scale)
        new = _particle(latents, unravel(proposed), lambda values: filters.run(filter_key, values, t, num_states))
        gain = (new.log_prior + new.filtered.log_evidence) - (current.log_prior + current.filtered.log_evidence)
        accept_prob = jnp.minimum(jnp.exp(impossible_if_nan(gain + log_proposals)), 1.0)
        accepted = random.uniform(accept_key) < accept_prob
        return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, current), accept_prob

    def one(operand: tuple[Array, ParameterParticle]) -> tuple[ParameterParticle, Array]:
        key, particle = operand
        return lax.scan(move, particle, random.split(key, moves.num_moves))

    particles, accept_probs = _each(one, (_keys(move_key, state), particles), moves.batch_size)
    return _strong(SMC2State(particles, jnp.zeros_like(state.log_weights))), jnp.mean(accept_probs)


def exchange(
    rng_key: Array, t: Array, state: SMC2State, filters: Filters, moves: Moves, num_states: int
) -> tuple[SMC2State, Array]:
    r"""Give every parameter a new filter, of another size, over the first ``t`` observations.

    The weights change by :math:`\hat p_{\text{new}}(y_{0:t-1} \mid \theta) / \hat p_{\text{old}}(y_{0:t-1} \mid
    \theta)`, an importance sampling step between two extended targets with the same constant.

    :return: the state, and what that adds to the log evidence.
    """
    old = state.particles.filtered.log_evidence

    def one(operand: tuple[Array, Values]) -> Filtered:
        return filters.run(operand[0], operand[1], t, num_states)

    values = {name: state.particles.parameters[name] for name in state.particles.z}
    filtered = _each(one, (_keys(rng_key, state), values), moves.batch_size)
    log_weights, increment, _ = normalise(impossible_if_nan(state.log_weights + filtered.log_evidence - old))
    return _strong(SMC2State(state.particles._replace(filtered=filtered), log_weights)), increment


def _particle(latents: GlobalLatents, z: Values, filtered: Callable[[Values], Filtered]) -> ParameterParticle:
    parameters = latents.values(z)
    filter_at = filtered({name: parameters[name] for name in z})
    return ParameterParticle(z, parameters, impossible_if_nan(latents.log_prior(z)), filter_at)


def _propose(kind: str, z: Array, direction: Array, mean: Array, scale: Array) -> tuple[Array, Array]:
    """A proposal, and the log density of the way back minus that of the way there."""
    if kind == "random_walk":
        return z + 2.38 / math.sqrt(max(z.shape[0], 1)) * (scale @ direction), jnp.zeros(())
    back = jax.scipy.linalg.solve_triangular(scale, z - mean, lower=True)
    return mean + scale @ direction, 0.5 * (jnp.sum(direction**2) - jnp.sum(back**2))


def _each(fn: Callable[[Any], Any], operands: Any, batch_size: int | None) -> Any:
    """``fn`` of every element of the leading axis, all at once or ``batch_size`` at a time."""
    return jax.vmap(fn)(operands) if batch_size is None else lax.map(fn, operands, batch_size=batch_size)


def _keys(rng_key: Array, state: SMC2State) -> Array:
    return random.split(rng_key, state.log_weights.shape[0])


def _strong(state: SMC2State) -> SMC2State:
    """The same arrays with definite types, whichever stage made them: a stage is compiled once for all of them."""
    return jax.tree.map(lambda leaf: lax.convert_element_type(leaf, leaf.dtype), state)
