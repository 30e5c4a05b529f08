"""Independent runs of a filter, each smoothed: the spread of their answers is the standard error."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_smc.filtering.smoothing.estimate import SmoothedEstimate
from numpyro_smc.filtering.smoothing.kernel import check_markov, read, steps_of
from numpyro_smc.filtering.smoothing.marginal import Marginals
from numpyro_smc.filtering.smoothing.methods import method_of
from numpyro_smc.filtering.smoothing.pairs import Functional, Pairs, weighted_sum
from numpyro_smc.programs.sequence import Sequence

#: ``(program, sequence, history, smoothing weights)`` to what one run says.
Question = Callable[[Any, Sequence, Any, Pairs | Marginals], Any]


def repeat(
    particle_filter: Any,
    user: str,
    question: Question,
    filter_key: Array,
    rng_key: Array,
    program: Any,
    num_repeats: int,
    method: str,
    options: dict[str, Any],
) -> tuple[Any, Array, Array]:
    """Ask one question of ``num_repeats`` runs, one after another; the first is that of ``filter_key``.

    :return: answers with a leading axis of runs, log evidences ``[num_repeats, *batch]``, whether some draw was wrong.
    """
    smooth = method_of(method, user, options)
    filter_key, rng_key = (as_typed(key) for key in (filter_key, rng_key))

    def one(number: Array) -> tuple[Any, Array, Array]:
        run_key = lax.cond(number == 0, lambda: filter_key, lambda: random.fold_in(rng_key, 2 * number))
        log_evidence, history = particle_filter._run(run_key, *program, history=True)
        sequence = read(particle_filter, run_key, program, history)
        if user == "score":  # by any method: its densities are those of pairs
            check_markov(sequence, user)
        weights, wrong = smooth(random.fold_in(rng_key, 2 * number + 1), sequence, history, **options)
        return question(program, sequence, history, weights), log_evidence, wrong

    return lax.map(one, jnp.arange(num_repeats))


def as_typed(rng_key: Array) -> Array:
    """A random key in the new style, whichever it is."""
    return rng_key if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) else random.wrap_key_data(rng_key)


def expectation_of(functional: Functional | str, additive: bool) -> Question:
    """The question after a functional's smoothed expectation; a string asks after the site of that name."""

    def ask(program: Any, sequence: Sequence, history: Any, weights: Pairs | Marginals) -> Any:
        if isinstance(functional, str) and functional not in history.steps["values"]:
            values = history.initial["values"][functional]
            return weighted_sum(values, weights.initial_weights(len(values)))
        of_step = (lambda t, carry, values: values[functional]) if isinstance(functional, str) else functional
        each = weights.expectation(sequence, steps_of(sequence, history), of_step)
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each) if additive else each

    return ask


def summarise(
    user: str, answers: tuple[Any, Array, Array], what: str, method: str, num_particles: int, per_step: bool
) -> SmoothedEstimate:
    """Mean over the runs, with its standard error.

    :raises FloatingPointError: if some run lost all its particles. **ValueError** - if a density exceeded its bound.
    """
    runs, log_evidence, wrong = answers
    num_repeats = len(log_evidence)
    lost = ~np.isfinite(np.asarray(log_evidence)).reshape(num_repeats, -1).all(1)
    if lost.any():
        raise FloatingPointError(
            f"{user}: {lost.sum()} of {num_repeats} runs of the filter lost all particles. Use more particles, or a "
            f"guide."
        )
    check_bound(user, wrong)

    def error(leaf: Array) -> Array:
        if num_repeats == 1:
            return jnp.full(leaf.shape[1:], jnp.nan)
        return jnp.std(leaf, axis=0, ddof=1) / num_repeats**0.5

    value = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), runs)
    errors = jax.tree.map(error, runs)
    return SmoothedEstimate(value, errors, runs, what, method, num_particles, num_repeats, per_step)


def check_bound(user: str, wrong: Array) -> None:
    """:raises ValueError: if a density exceeded the bound of the rejection sampler."""
    if bool(np.any(np.asarray(wrong))):
        raise ValueError(
            f"{user}: a step's log density exceeds log_bound, so draws by rejection would be biased. Give a log_bound "
            f"that no log density of a step's sites (observations included) exceeds, or use 'backward_mcmc'."
        )
