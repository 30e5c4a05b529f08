"""The complete-data density of a run as a function of the parameters: its smoothed gradient is the score."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step
from numpyro_smc.filtering.smoothing.pairs import weighted_sum
from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.replay import replay_step
from numpyro_smc.programs.scans import Fixed, run_prefix
from numpyro_smc.programs.sequence import Cloud, Sequence
from numpyro_smc.programs.sites import is_observed, plate_indices


def initial_part(sequence: Sequence, values: dict[str, Array]) -> tuple[Array, list[Array], list[Array]]:
    """One particle's part before the scan.

    :return: the log density of its sites ``[*batch]``, and the initial carry's leaves: those that differ between
        particles, and those that do not.
    """
    given = Fixed(sequence.global_values | values, plate_indices(sequence.model.prefix), "the filter")
    trace, scan = run_prefix(sequence.model.program, CloudDraws(random.key(0)), given)
    assert scan is not None
    total = jnp.zeros(sequence.batch_shape)
    outside = sequence.global_values.keys() | sequence.global_observed
    for name, site in trace.items():
        counts = site["type"] == "sample" and name not in outside
        if counts and (is_observed(site) or name not in sequence.given):
            total = total + sequence.log_density(site)
    return total, *sequence.model.split(scan.init)


def initial_log_density(sequence: Sequence, history: Any, weights: Array) -> Array:
    """Log density of the sites before the scan by the weights ``[N, *batch]`` of the initial particles, summed."""
    return jnp.sum(weighted_sum(_each_initial(sequence, history)[0], weights))


def with_carries_recomputed(sequence: Sequence, kernel: BackwardKernel, history: Any) -> BackwardKernel:
    """The kernel whose carries are functions of the latents and of the parameters of ``sequence`` again.

    A carry such as ``coefficient * x`` holds a parameter: taken from the history as a number it would have no gradient.
    """
    steps = kernel.steps
    _, first, still = _each_initial(sequence, history)

    def advance_shared(still: list[Array], step: Step) -> tuple[list[Array], list[Array]]:
        particles = jax.tree.map(lambda leaf: leaf[0], step.cloud.particles)
        future = {name: step.values[name][0] for name in kernel.latents}
        carry = replay_step(sequence, step.t, step.x, particles, {"model": still}, future)[1][1]
        return sequence.model.split(carry)[1], still

    _, shared = lax.scan(advance_shared, still, steps)

    def moving(inputs: tuple[Step, list[Array]]) -> list[Array]:
        step, shared = inputs

        def one(particles: Any, future: dict[str, Array]) -> list[Array]:
            return replay_step(sequence, step.t, step.x, particles, {"model": shared}, future)[0]

        return jax.vmap(one)(step.cloud.particles, {name: step.values[name] for name in kernel.latents})

    later = lax.map(moving, (steps, shared))
    particles = jax.tree.map(lambda start, rest: jnp.concatenate([start[None], rest[:-1]]), first, later)
    cloud = Cloud({"model": particles}, {"model": shared})
    return replace(kernel, sequence=sequence, steps=steps._replace(x=sequence.inputs()["model"], cloud=cloud))


def _each_initial(sequence: Sequence, history: Any) -> tuple[Array, list[Array], list[Array]]:
    # The numbers are there for programs without a site before the scan, where nothing else has a particle axis.
    numbers = jnp.arange(history.initial["log_weights"].shape[0])
    each = jax.vmap(lambda _, values: initial_part(sequence, values), out_axes=(0, 0, None))
    return each(numbers, history.initial["values"])
