"""Filtering one observation at a time, with memory that does not grow."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers
from numpyro.util import find_stack_level

from numpyro_smc.engines.particles import ParticleState, StepInfo, advance, initialise, step_keys
from numpyro_smc.filtering.forecasting import not_finite_values as not_finite
from numpyro_smc.filtering.lost import is_lost, lost_particles
from numpyro_smc.programs.inputs import check_names
from numpyro_smc.programs.replay import observed_values, simulated_step
from numpyro_smc.programs.sequence import Sequence
from numpyro_smc.programs.sites import is_observed, unmasked_value
from numpyro_smc.programs.weights import add_compensated

if TYPE_CHECKING:
    from numpyro_smc.filtering.filter import ParticleFilter


class FilterState(NamedTuple):
    """A running filter, between two observations; a pytree of arrays.

    - **rng_key** - the run's key. **t** - number of observations taken in.
    - **particles** - the particles and their log weights (of mean one).
    - **log_evidence** - log evidence of the observations so far; **increment** - the last one's share.
    - **ess** - effective sample size after the last observation. **values** - its step's sites, ``[N, ...]``.
    - **program** - params, args and kwargs the run was started with. **lost** - what rounding has added to the sum.
    """

    rng_key: Array
    t: Array
    particles: ParticleState
    log_evidence: Array
    increment: Array
    ess: Array
    values: dict[str, Array]
    program: Any
    lost: Array


def warn_of_data_outside(sequence: Sequence) -> None:
    """Say that the evidences of a batch leave out data that stand outside of its plates."""
    if sequence.global_observed:
        names = ", ".join(f"'{name}'" for name in sorted(sequence.global_observed))
        plates = ", ".join(f"'{name}'" for name in sequence.plates.names)
        warnings.warn(
            f"{sequence.user}: log_evidence has one value per element of plate {plates}, and the data {names} stand "
            f"outside of it: they belong to no element and are not in log_evidence. The log evidence of all data is "
            f"ParticleFilter(...).run(...).total_log_evidence.",
            stacklevel=find_stack_level(),
        )


def start(particle_filter: ParticleFilter, rng_key: Array, params: Any, args: Any, kwargs: Any) -> FilterState:
    """The initial particles of a stream, with the keys that a run over the whole series would use."""
    read_key, run_key = random.split(rng_key)
    sequence = _read(particle_filter, read_key, params, args, kwargs, {})
    warn_of_data_outside(sequence)
    init_key, _ = random.split(run_key)
    state, info, _ = initialise(init_key, sequence, particle_filter.num_particles)
    zero = jnp.asarray(0)

    def first_values() -> dict[str, Array]:
        return advance(step_keys(run_key, zero), sequence, None, state, zero, _first_inputs(sequence))[2].values

    values = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(first_values))
    increment = info.increment
    lost = jnp.zeros_like(increment)
    return FilterState(rng_key, zero, state, increment, increment, info.ess, values, None, lost)


def take_in(
    particle_filter: ParticleFilter,
    state: FilterState,
    program: tuple[Any, Any, Any],
    x: Any,
    guide_x: Any,
    data: dict[str, Any],
) -> FilterState:
    """One step of a stream. Twists look ahead and are left out."""
    return take_step(particle_filter, state, program, x, guide_x, data)[0]


def take_step(
    particle_filter: ParticleFilter,
    state: FilterState,
    program: tuple[Any, Any, Any],
    x: Any,
    guide_x: Any,
    data: dict[str, Any],
) -> tuple[FilterState, StepInfo, Sequence]:
    """One step of a stream, with what it did and the program as read for it."""
    read_key, run_key = random.split(state.rng_key)
    params, args, kwargs = program
    sequence = _read(particle_filter, read_key, params, args, kwargs, data)
    inputs = {"model": x, "guide": None if sequence.guide is None else guide_x, "look ahead": None}
    expected = _first_inputs(sequence)
    if jax.tree.map(jnp.shape, inputs) != jax.tree.map(jnp.shape, expected):
        raise ValueError(
            f"ParticleFilter.update: the scan's body receives {jax.tree.map(jnp.shape, expected['model'])} at each "
            f"step but was given {jax.tree.map(jnp.shape, x)}. Pass one slice of the model's xs."
        )
    _, step_key = random.split(run_key)
    keys = step_keys(step_key, state.t)
    particles, info, move = advance(keys, sequence, particle_filter.resampling, state.particles, state.t, inputs)
    log_evidence, lost = add_compensated(state.log_evidence, state.lost, info.increment)
    new = state._replace(
        t=state.t + 1,
        particles=particles,
        log_evidence=log_evidence,
        lost=lost,
        increment=info.increment,
        ess=info.ess,
        values=move.values,
    )
    return new, info, sequence


def check_step(
    particle_filter: ParticleFilter, user: str, before: FilterState | None, after: FilterState, x: Any, data: Any
) -> None:
    """:raises FloatingPointError: if the last observation, or what stands before the scan, left no particle alive.

    :param before: the state that the observation was given to, with its program; ``None`` before the first.
    """
    if not is_lost(after.increment):
        return
    state = after if before is None else before
    read_key, _ = random.split(state.rng_key)
    params, args, kwargs = state.program
    sequence = _read(particle_filter, read_key, params, args, kwargs, data)
    if before is None:
        sites = not_finite(observed_values(sequence.model, -1))
        raise lost_particles(user, "before the first step", sites, after.increment)
    t = int(before.t)
    if is_lost(before.log_evidence):
        raise FloatingPointError(
            f"{user}: no particle was left before step {t}, and the log evidence stays at {before.log_evidence}. Go on "
            f"with a state from before the observation that no particle explains."
        )
    _, trace = simulated_step(sequence.model, t, x)
    sites = not_finite({name: unmasked_value(site) for name, site in trace.items() if is_observed(site)})
    remedy = "The state that it was given to is as it was: go on with that one to leave the observation out."
    raise lost_particles(user, f"at step {t}", sites, after.increment, remedy)


def _read(
    particle_filter: ParticleFilter, rng_key: Array, params: Any, args: Any, kwargs: Any, data: dict[str, Any]
) -> Sequence:
    model = handlers.condition(particle_filter.model, data=data) if data else particle_filter.model
    sequence = particle_filter.read(rng_key, params, args, kwargs, model)
    check_names("ParticleFilter.update", "data", data, [*sequence.model.step_sites, *sequence.model.prefix])
    if sequence.after is not None:
        raise NotImplementedError(
            "ParticleFilter.update: the likelihood stands after the scan, where single observations cannot be given. "
            "Move it into the step to stream."
        )
    sequence.twisted = False
    return sequence


def _first_inputs(sequence: Sequence) -> Any:
    return jax.tree.map(lambda x: x[0], sequence.inputs())
