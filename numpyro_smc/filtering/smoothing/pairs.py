"""Weighted pairs of particles before and after each step: what most smoothers make of a filter's history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_smc.filtering.smoothing.genealogy import take
from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step
from numpyro_smc.programs.elements.labels import along
from numpyro_smc.programs.elements.plates import fits
from numpyro_smc.programs.elements.tracing import trace
from numpyro_smc.programs.sequence import Sequence

#: ``(t, carry, values)`` to an array, or a pytree of them: the carry the step received, and the step's site values.
Functional = Callable[[Array, Any, dict[str, Array]], Any]


class Pairs(NamedTuple):
    """Pairs that approximate the smoothing law of two successive states, K at each step.

    - **past**, **present** - particles before and after the step, int ``[T, K, *batch]``.
    - **weights** - ``[T, K, *batch]``, sum to one over K.
    """

    past: Array
    present: Array
    weights: Array

    def expectation(self, sequence: Sequence, steps: Step, functional: Functional) -> Any:
        """Smoothed expectations of a functional at each step, ``[T, ...]``."""
        rank = len(sequence.batch_shape)

        def one(inputs: tuple[Step, Pairs]) -> Any:
            step, (past, present, weights) = inputs
            particles = jax.tree.map(lambda leaf: take(leaf, past, rank), step.cloud.particles)
            values = jax.tree.map(lambda leaf: take(leaf, present, rank), step.values)
            each = jax.vmap(lambda *pair: evaluate(sequence, functional, step, *pair))(particles, values)
            return jax.tree.map(lambda leaf: weighted_sum(leaf, weights), each)

        return lax.map(one, (steps, self))

    def initial_weights(self, num_particles: int) -> Array:
        """Smoothing weights of the initial particles, ``[N, *batch]``."""
        past, weights = self.past[0], self.weights[0]
        flat = past.reshape(len(past), -1), weights.reshape(len(weights), -1)
        total = jax.vmap(lambda i, w: jnp.zeros(num_particles).at[i].add(w), 1, 1)(*flat)
        return total.reshape(num_particles, *past.shape[1:])

    def log_density(self, kernel: BackwardKernel) -> Array:
        """Weighted log density of all pairs, summed over steps and problems."""

        def one(total: Array, inputs: tuple[Step, Pairs]) -> tuple[Array, None]:
            step, (past, present, weights) = inputs
            values = kernel.of_pairs(step, past, kernel.future(step, present))
            return total + jnp.sum(weighted_sum(values, weights)), None

        return lax.scan(one, jnp.zeros(()), (kernel.steps, self))[0]


def evaluate(sequence: Sequence, functional: Functional, step: Step, particles: Any, values: dict[str, Array]) -> Any:
    """A functional of one pair.

    :raises ValueError: if its value does not start with the axes of the plates that enclose the program.
    """
    carry = sequence.model.merge(particles["model"], step.cloud.shared["model"])
    result = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, float)), functional(step.t, carry, values)
    )
    batch = sequence.batch_shape
    for leaf in jax.tree.leaves(result):
        if leaf.shape[: len(batch)] != batch:
            raise ValueError(
                f"smooth: the functional's value has shape {leaf.shape}, but plates {list(sequence.plates.names)} of "
                f"shape {batch} enclose the program and every element has weights of its own: the value must start "
                f"with these axes. Do not sum over them."
            )
    if batch:
        _check_independent(sequence, functional, step.t, carry, values)
    return result


def _check_independent(sequence: Sequence, functional: Functional, t: Array, carry: Any, values: Any) -> None:
    """:raises ValueError: if one element of the functional depends on others, whose particles are of another path."""

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))

    labels = trace(functional, *jax.tree.map(shape, (t, carry, values)))
    axes = sequence.model.batch_axes
    leaves, treedef = jax.tree.flatten(carry)
    for place, (plate, size) in enumerate(zip(sequence.plates.names, sequence.batch_shape, strict=True)):
        moving = [along(jnp.shape(leaf), its[place]) if its else None for leaf, its in zip(leaves, axes, strict=True)]
        of_values = {name: along(jnp.shape(value), place) for name, value in values.items()}
        found = labels(None, jax.tree.unflatten(treedef, moving), of_values)
        if not all(fits(label, place, size) for label in jax.tree.leaves(found)):
            raise ValueError(
                f"smooth: the functional's value at one element of plate '{plate}' depends on other elements, which "
                f"are filtered as problems of their own. Let it depend on each element alone, or compute it on the "
                f"paths of sample_posterior."
            )


def weighted_sum(values: Array, weights: Array) -> Array:
    """Sum over the leading axis; what has no weight does not count, whatever its value.

    :param values: ``[K, *batch, ...]``. **weights** - ``[K, *batch]``.
    """
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    alive = weights > 0
    return jnp.sum(jnp.where(alive, weights * jnp.where(alive, values, 0.0), 0.0), axis=0)
