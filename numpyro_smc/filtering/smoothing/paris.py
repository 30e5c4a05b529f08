r"""PaRIS: smoothing weights by a few draws from the backward kernel for every particle [1].

With :math:`\tilde N \ge 2` draws :math:`J_t^{i,k}` of the backward kernel for each particle, an additive functional is
carried forward online,

.. math:: \tau_t^i = \frac1{\tilde N} \sum_k \tau_{t-1}^{J_t^{i,k}} + f_t(x_{t-1}^{J_t^{i,k}}, x_t^i),

and :math:`\sum_i W_t^i \tau_t^i` is its smoothed expectation. Seen from the end, the same draws
give each pair a weight.

**References**

1. *Efficient particle-based online smoothing in general hidden Markov models: the PaRIS algorithm*, J. Olsson,
   J. Westerborn (2017)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.filtering.smoothing.backward_draws import Draw
from numpyro_smc.filtering.smoothing.genealogy import take
from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step
from numpyro_smc.filtering.smoothing.pairs import Functional, Pairs, evaluate
from numpyro_smc.programs.sequence import Sequence


def backward_pairs(rng_key: Array, kernel: BackwardKernel, draw: Draw, num_draws: int) -> tuple[Pairs, Array]:
    """All pairs of all steps with their smoothing weights, as the draws of :func:`carry_forward` imply them.

    :return: pairs with K = num_draws * N, and whether some draw was wrong.
    """
    num_particles, batch = kernel.num_particles, kernel.final_log_weights.shape[1:]
    everyone = jnp.arange(num_particles, dtype=jnp.int32).reshape((-1,) + (1,) * len(batch))
    everyone = jnp.broadcast_to(everyone, kernel.final_log_weights.shape)

    def back(weights: Array, step: Step) -> tuple[Array, tuple[Pairs, Array]]:
        parents, wrong = draw(random.fold_in(rng_key, step.t), kernel, step, everyone, num_draws)
        past = parents.reshape(-1, *batch)
        each = jnp.tile(weights / num_draws, (num_draws,) + (1,) * len(batch))
        present = jnp.tile(everyone, (num_draws,) + (1,) * len(batch))
        flat = past.reshape(past.shape[0], -1), each.reshape(past.shape[0], -1)
        before = jax.vmap(lambda i, w: jnp.zeros(num_particles, w.dtype).at[i].add(w), 1, 1)(*flat)
        return before.reshape(weights.shape), (Pairs(past, present, each), wrong)

    final = jax.nn.softmax(kernel.final_log_weights, axis=0)
    _, (pairs, wrong) = lax.scan(back, final, kernel.steps, reverse=True)
    return pairs, wrong.any()


def carry_forward(sequence: Sequence, step: Step, parents: Array, functional: Functional, statistic: Any) -> Any:
    """One step of the statistic of every particle.

    :param parents: drawn particles before the step, ``[num_draws, N, *batch]``.
    :param statistic: of the particles before the step, ``[N, *batch, ...]``.
    :return: of the particles after it.
    """
    rank = parents.ndim - 2

    def one_draw(past: Array) -> Any:
        particles = jax.tree.map(lambda leaf: take(leaf, past, rank), step.cloud.particles)
        added = jax.vmap(lambda *pair: evaluate(sequence, functional, step, *pair))(particles, step.values)
        return jax.tree.map(lambda leaf, new: take(leaf, past, rank) + new, statistic, added)

    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.vmap(one_draw)(parents))


def zero_statistic(sequence: Sequence, step: Step, functional: Functional) -> Any:
    """The statistic before the first step, ``[N, *batch, ...]`` of zeros."""
    each = jax.vmap(lambda *pair: evaluate(sequence, functional, step, *pair))
    shapes = jax.eval_shape(each, step.cloud.particles, step.values)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
