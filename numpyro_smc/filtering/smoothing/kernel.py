r"""The backward kernel of a filter's particles: which particle of the step before a state may have come from.

.. math:: B_t(x_t, i) \propto W_{t-1}^i \; p(x_t \mid x_{t-1}^i)\, p(y_t \mid x_{t-1}^i, x_t).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.filtering.smoothing.genealogy import take
from numpyro_smc.programs.replay import depends_on_past, step_latents, transition_density
from numpyro_smc.programs.sequence import Cloud, Sequence

#: What to do instead where a carry has lags, by who asks.
_REMEDIES = {
    "score": "FIVO(resampling_gradient='stop_gradient') and differentiate it",
    "sample_posterior": "method='genealogy'",
    "OnlineSmoother": "ParticleFilter.run with FilterResult.smooth(method='fixed_lag')",
}


class Step(NamedTuple):
    """One step of a filter beside the particles it started from; with a leading time axis, all of them.

    - **t**, **x** - the step's number and the body's inputs.
    - **cloud**, **log_weights** - particles and filtering log weights ``[N, *batch]`` before the step.
    - **values** - site values after the step, ``[N, ...]``. **ancestors** - ``[N, *batch]``.
    """

    t: Array
    x: Any
    cloud: Cloud
    log_weights: Array
    values: dict[str, Array]
    ancestors: Array


@dataclass(frozen=True)
class BackwardKernel:
    """The backward kernel of one run of a filter.

    - **sequence** - the program as read. **steps** - all steps. **final_log_weights** - ``[N, *batch]``.
    """

    sequence: Sequence
    steps: Step
    final_log_weights: Array

    @property
    def rank(self) -> int:
        return len(self.sequence.batch_shape)

    @property
    def latents(self) -> list[str]:
        return step_latents(self.sequence)

    @property
    def num_particles(self) -> int:
        return self.final_log_weights.shape[0]

    def future(self, step: Step, present: Array) -> dict[str, Array]:
        """The step's latents of the particles ``present`` ``[M, *batch]``: by site, ``[M, ...]``."""
        return {name: take(step.values[name], present, self.rank) for name in self.latents}

    def log_density(self, step: Step, past: Any, future: dict[str, Array]) -> Array:
        """Log density of one step from one particle to one state, observations included, ``[*batch]``."""
        return transition_density(self.sequence, step.t, step.x, past, step.cloud.shared, future)

    def of_pairs(self, step: Step, past: Array, future: dict[str, Array]) -> Array:
        """Log densities from the particles ``past`` ``[M, *batch]`` to as many states, ``[M, *batch]``."""
        particles = jax.tree.map(lambda leaf: take(leaf, past, self.rank), step.cloud.particles)
        # The size is said for programs without latents, whose pairs are empty.
        each = jax.vmap(lambda one, to: self.log_density(step, one, to), axis_size=past.shape[0])
        return each(particles, future)

    def log_probabilities(self, step: Step, future: dict[str, Array]) -> Array:
        """Unnormalised log probabilities of all particles to have led to one state, ``[N, *batch]``."""
        each = jax.vmap(lambda past: self.log_density(step, past, future), axis_size=self.num_particles)
        return step.log_weights + each(step.cloud.particles)


def steps_of(sequence: Sequence, history: Any) -> Step:
    """All steps of a filter's history. The initial particles stand before the first."""
    before = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest[:-1]]),
        {name: history.initial[name] for name in ("cloud", "log_weights")},
        {name: history.steps[name] for name in ("cloud", "log_weights")},
    )
    times, inputs = jnp.arange(sequence.length), sequence.inputs()["model"]
    values = history.steps["values"]
    return Step(times, inputs, before["cloud"], before["log_weights"], values, history.ancestors)


def backward_kernel(sequence: Sequence, history: Any, user: str) -> BackwardKernel:
    """The backward kernel of a filter's history.

    :param user: who asks, for error messages.
    :raises ValueError: unless the new carry is a function of the step's latents alone.
    """
    check_markov(sequence, user)
    return BackwardKernel(sequence, steps_of(sequence, history), history.steps["log_weights"][-1])


def read(particle_filter: Any, filter_key: Array, program: Any, history: Any) -> Sequence:
    """The program of a run, with the global latents that the run drew held fixed."""
    params, args, kwargs = program
    return particle_filter.read(random.split(filter_key)[0], params | history.global_values, args, kwargs)


def check_markov(sequence: Sequence, user: str) -> None:
    """:raises ValueError: unless the new carry is a function of the step's latents alone.

    Otherwise exchanging the past of a path would change the carries of its whole future.
    """
    if depends_on_past(sequence):
        remedy = _REMEDIES.get(user, "method='genealogy' or 'fixed_lag'")
        raise ValueError(
            f"{user}: backward smoothing needs a carry that the step's own latents determine, but this model's "
            f"new carry also depends on the old one (lags, recurrent networks, reparameterised innovations). Use "
            f"{remedy}."
        )
