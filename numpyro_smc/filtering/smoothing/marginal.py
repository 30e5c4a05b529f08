r"""Forward filtering, backward smoothing (FFBSm): smoothing weights of all particles, by all pairs [1].

.. math:: W_{t-1 \mid T}^i = \sum_m W_{t \mid T}^m \,
   \frac{W_{t-1}^i\, p(x_t^m, y_t \mid x_{t-1}^i)}{\sum_j W_{t-1}^j\, p(x_t^m, y_t \mid x_{t-1}^j)}

**References**

1. *On sequential Monte Carlo sampling methods for Bayesian filtering*, A. Doucet, S. Godsill, C. Andrieu (2000)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.ops.provenance import eval_provenance

from numpyro_smc.filtering.smoothing.genealogy import take
from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step
from numpyro_smc.filtering.smoothing.pairs import Functional, evaluate, weighted_sum
from numpyro_smc.programs.sequence import Sequence


class Marginals(NamedTuple):
    """Smoothing weights by all pairs, ``batch_size`` rows of N pairs at a time: O(N^2 T) time, O(NT) memory.

    - **weights** - ``[T, N, *batch]``, sum to one over N. **before** - those of the initial particles ``[N, *batch]``.
    """

    kernel: BackwardKernel
    weights: Array
    before: Array
    batch_size: int

    def initial_weights(self, num_particles: int) -> Array:
        """Smoothing weights of the initial particles, ``[N, *batch]``."""
        return self.before

    def expectation(self, sequence: Sequence, steps: Step, functional: Functional) -> Any:
        """Smoothed expectations of a functional at each step, ``[T, ...]``."""
        kernel = self.kernel
        if not _uses_carry(sequence, steps, functional):

            def single(inputs: tuple[Step, Array]) -> Any:
                step, weights = inputs
                past = jax.tree.map(lambda leaf: leaf[0], step.cloud.particles)
                each = jax.vmap(lambda values: evaluate(sequence, functional, step, past, values))(step.values)
                return jax.tree.map(lambda leaf: weighted_sum(leaf, weights), each)

            return lax.map(single, (steps, self.weights))

        def two_step(inputs: tuple[Step, Array]) -> Any:
            step, weights = inputs

            def of_row(values: dict[str, Array]) -> Any:
                return jax.vmap(lambda past: evaluate(sequence, functional, step, past, values))(step.cloud.particles)

            def of_chunk(present: Array, joint: Array) -> Any:
                each = jax.vmap(of_row)(jax.tree.map(lambda leaf: take(leaf, present, kernel.rank), step.values))
                flat = joint.reshape(-1, *joint.shape[2:])
                return jax.tree.map(lambda leaf: weighted_sum(leaf.reshape(-1, *leaf.shape[2:]), flat), each)

            return _over_chunks(kernel, step, weights, self.batch_size, lambda *chunk: of_chunk(*chunk[:2]))

        return lax.map(two_step, (steps, self.weights))

    def log_density(self, kernel: BackwardKernel) -> Array:
        r"""Log density of all pairs by their weights, summed over steps and problems, up to a constant.

        It is taken as :math:`\sum_m W_{t \mid T}^m \log\sum_i W_{t-1}^i\, p(x_t^m, y_t \mid x_{t-1}^i)`, whose gradient
        in the parameters of p is the same.
        """

        def one(total: Array, inputs: tuple[Step, Array]) -> tuple[Array, None]:
            step, weights = inputs

            def of_chunk(present: Array, joint: Array, log_predictive: Array, rows: Array) -> Array:
                return jnp.sum(jnp.where(rows > 0, rows * log_predictive, 0.0))

            return total + _over_chunks(kernel, step, weights, self.batch_size, of_chunk), None

        return lax.scan(one, jnp.zeros(()), (kernel.steps, self.weights))[0]


def smooth_backwards(kernel: BackwardKernel, batch_size: int) -> Marginals:
    """Smoothing weights of all steps."""

    def back(weights: Array, step: Step) -> tuple[Array, Array]:
        before = _over_chunks(kernel, step, weights, batch_size, lambda present, joint, *_: jnp.sum(joint, axis=0))
        return before / jnp.sum(before, axis=0), weights

    final = jax.nn.softmax(kernel.final_log_weights, axis=0)
    before, weights = lax.scan(back, final, kernel.steps, reverse=True)
    return Marginals(kernel, weights, before, batch_size)


def _over_chunks(kernel: BackwardKernel, step: Step, weights: Array, batch_size: int, visit: Any) -> Any:
    """Sum ``visit(present, joint, log_predictive, weights)`` over chunks of rows.

    - **present** - particles after the step, ``[B, *batch]``; **weights** - their smoothing weights, ``[B, *batch]``.
    - **joint** - smoothing weights of their pairs with all particles before, ``[B, N, *batch]``.
    - **log_predictive** - log sum over the particles before, ``[B, *batch]``.
    """
    size = min(batch_size, kernel.num_particles)
    num_chunks = -(-kernel.num_particles // size)
    padding = num_chunks * size - kernel.num_particles
    indices = jnp.pad(jnp.arange(kernel.num_particles), (0, padding))
    shape = (num_chunks, size, *weights.shape[1:])
    rows = jnp.pad(weights, [(0, padding)] + [(0, 0)] * kernel.rank).reshape(shape)
    indices = jnp.broadcast_to(indices.reshape((num_chunks, size) + (1,) * kernel.rank), shape)

    @jax.checkpoint
    def chunk(present: Array, rows: Array) -> Any:
        future = kernel.future(step, present)
        logits = jax.vmap(lambda to: kernel.log_probabilities(step, to))(future)
        peak = lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
        scaled = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
        total = jnp.sum(scaled, axis=1)
        joint = scaled * jnp.where(rows > 0, rows / jnp.where(total > 0, total, 1.0), 0.0)[:, None]
        log_predictive = jnp.log(jnp.where(total > 0, total, 1.0)) + jnp.squeeze(peak, 1)
        return visit(present, joint, log_predictive, rows)

    def add(total: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, chunk(*inputs)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(chunk, indices[0], rows[0]))
    return lax.scan(add, zeros, (indices, rows))[0]


def _uses_carry(sequence: Sequence, steps: Step, functional: Functional) -> bool:
    step = jax.tree.map(lambda leaf: leaf[0], steps)
    past = jax.tree.map(lambda leaf: leaf[0], step.cloud.particles)
    values = jax.tree.map(lambda leaf: leaf[0], step.values)
    uses = eval_provenance(
        lambda past, values: evaluate(sequence, functional, step, past, values), past=past, values=values
    )
    return any("past" in found for found in jax.tree.leaves(uses, is_leaf=lambda leaf: isinstance(leaf, frozenset)))
