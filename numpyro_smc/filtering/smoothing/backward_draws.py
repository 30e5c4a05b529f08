"""Draws from the backward kernel: exactly, by independence-Metropolis moves, or by rejection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.filtering.smoothing.genealogy import draw_final, take
from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step
from numpyro_smc.filtering.smoothing.peaks import LogBound

#: ``(rng_key, kernel, step, present [M, *batch], num_draws)`` to particles before the step, int
#: ``[num_draws, M, *batch]``, and whether something was wrong, bool ``[]``.
Draw = Callable[[Array, BackwardKernel, Step, Array, int], tuple[Array, Array]]

#: Number of the trial, accepted particles, whether accepted, whether a density exceeded its bound.
Trials = tuple[Array, Array, Array, Array]


def exact(batch_size: int) -> Draw:
    """Choose among all N particles: O(N) densities a state.

    :param batch_size: number of states whose N densities are held at a time.
    """

    def draw(rng_key: Array, kernel: BackwardKernel, step: Step, present: Array, num_draws: int) -> tuple[Array, Array]:
        def one(operand: tuple[Array, dict[str, Array]]) -> Array:
            key, future = operand
            return draw_final(key, kernel.log_probabilities(step, future), num_draws)

        states = (random.split(rng_key, present.shape[0]), kernel.future(step, present))
        return jnp.moveaxis(lax.map(one, states, batch_size=batch_size), 1, 0), jnp.asarray(False)

    return draw


def metropolis(num_mcmc_steps: int) -> Draw:
    """Independence-Metropolis moves from the genealogical ancestor, proposals by the filtering weights [1].

    Moves leave the kernel invariant, and the ancestor is a draw from it on average over the cloud: O(1) densities a
    draw. Draws of one state are successive states of one chain, ``num_mcmc_steps`` moves apart.

    **References**

    1. *On backward smoothing algorithms*, H.-D. Dau, N. Chopin (2023)
    """

    def draw(rng_key: Array, kernel: BackwardKernel, step: Step, present: Array, num_draws: int) -> tuple[Array, Array]:
        future = kernel.future(step, present)
        index = take(step.ancestors, present, kernel.rank)
        current = kernel.of_pairs(step, index, future)
        drawn = []
        for number in range(num_draws * num_mcmc_steps):
            propose_key, accept_key = random.split(random.fold_in(rng_key, number))
            proposal = draw_final(propose_key, step.log_weights, present.shape[0])
            proposed = kernel.of_pairs(step, proposal, future)
            accept = jnp.log(random.uniform(accept_key, current.shape)) < proposed - current
            index, current = jnp.where(accept, proposal, index), jnp.where(accept, proposed, current)
            if (number + 1) % num_mcmc_steps == 0:
                drawn.append(index)
        return jnp.stack(drawn), jnp.asarray(False)

    return draw


def rejection(log_bound: LogBound, max_trials: int, batch_size: int) -> Draw:
    r"""Propose by the filtering weights and accept with probability :math:`p / e^{b}`, b a bound of the density [1].

    What is not accepted after ``max_trials`` is drawn exactly, so the law is that of the kernel either way. A density
    above its bound is reported.

    :param log_bound: ``(kernel, step, future [M, ...])`` to :math:`b`, ``[M, *batch]``.

    **References**

    1. *Sequential Monte Carlo smoothing for general state space hidden Markov models*, R. Douc, A. Garivier,
       E. Moulines, J. Olsson (2011)
    """
    exactly = exact(1)

    def one_draw(rng_key: Array, kernel: BackwardKernel, step: Step, present: Array) -> tuple[Array, Array]:
        trial_key, rng_key = random.split(rng_key)
        future = kernel.future(step, present)
        bound = log_bound(kernel, step, future)
        slack = 1e-4 * (1.0 + jnp.abs(bound))

        def unfinished(state: Trials) -> Array:
            trial, _, accepted, _ = state
            return (trial < max_trials) & ~jnp.all(accepted)

        def attempt(state: Trials) -> Trials:
            trial, index, accepted, wrong = state
            propose_key, accept_key = random.split(random.fold_in(trial_key, trial))
            proposal = draw_final(propose_key, step.log_weights, present.shape[0])
            log_ratio = kernel.of_pairs(step, proposal, future) - bound
            accept = ~accepted & (jnp.log(random.uniform(accept_key, bound.shape)) < log_ratio)
            wrong = wrong | jnp.any(log_ratio > slack)
            return trial + 1, jnp.where(accept, proposal, index), accepted | accept, wrong

        start = (jnp.asarray(0), jnp.zeros_like(present), jnp.zeros(present.shape, bool), jnp.asarray(False))
        _, index, accepted, wrong = lax.while_loop(unfinished, attempt, start)
        every_problem = tuple(range(1, accepted.ndim))
        size = min(batch_size, present.shape[0])

        def remaining(state: tuple[Array, Array]) -> Array:
            return ~jnp.all(state[1])

        def finish(state: tuple[Array, Array]) -> tuple[Array, Array]:
            index, accepted = state
            (rows,) = jnp.nonzero(~jnp.all(accepted, axis=every_problem), size=size, fill_value=0)
            key = random.fold_in(rng_key, jnp.sum(accepted))
            of_rows = jax.vmap(lambda key, row: exactly(key, kernel, step, row[None], 1)[0][0, 0])
            drawn = of_rows(random.split(key, size), present[rows])
            drawn = jnp.where(accepted[rows], index[rows], drawn)
            return index.at[rows].set(drawn), accepted.at[rows].set(True)

        return lax.while_loop(remaining, finish, (index, accepted))[0], wrong

    def draw(rng_key: Array, kernel: BackwardKernel, step: Step, present: Array, num_draws: int) -> tuple[Array, Array]:
        each = [one_draw(key, kernel, step, present) for key in random.split(rng_key, num_draws)]
        return jnp.stack([index for index, _ in each]), jnp.any(jnp.stack([wrong for _, wrong in each]))

    return draw
