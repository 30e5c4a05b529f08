"""The smoothers by name: each turns one run of a filter into smoothing weights."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from numpyro_smc.filtering.smoothing import backward, lineages, marginal, paris
from numpyro_smc.filtering.smoothing.backward_draws import Draw, exact, metropolis, rejection
from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, backward_kernel
from numpyro_smc.filtering.smoothing.marginal import Marginals
from numpyro_smc.filtering.smoothing.pairs import Pairs
from numpyro_smc.filtering.smoothing.peaks import given_bound, known_bound
from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.programs.sequence import Sequence

#: Smoothing weights of a run, and whether some draw was wrong (a density above its bound).
Outcome = tuple[Pairs | Marginals, Array]

BACKWARD_DRAWS = ("exact", "mcmc", "rejection")


def backward_draw(
    kernel: BackwardKernel, how: str, num_mcmc_steps: int, log_bound: Any, max_trials: int, batch_size: int
) -> Draw:
    """The way to draw from the backward kernel.

    :raises ValueError: for an unknown name, and for rejection where no bound is given or known.
    """
    check_positive("smoothing", num_mcmc_steps=num_mcmc_steps, max_trials=max_trials, batch_size=batch_size)
    if how == "exact":
        return exact(batch_size)
    if how == "mcmc":
        return metropolis(num_mcmc_steps)
    if how == "rejection":
        bound = known_bound(kernel) if log_bound is None else given_bound(log_bound)
        return rejection(bound, max_trials, batch_size)
    raise ValueError(f"Unknown backward={how!r}. Use one of {', '.join(map(repr, BACKWARD_DRAWS))}.")


def check_num_draws(user: str, num_backward_draws: int) -> None:
    """:raises ValueError: unless there are two draws or more."""
    check_positive(user, num_backward_draws=num_backward_draws)
    if num_backward_draws < 2:
        raise ValueError(
            f"{user}: PaRIS needs num_backward_draws of at least 2; with one its variance grows with the square of the "
            f"number of steps, as that of method='genealogy' does."
        )


def _genealogy(rng_key: Array, sequence: Sequence, history: Any) -> Outcome:
    return lineages.of_final_particles(history), jnp.asarray(False)


def _fixed_lag(rng_key: Array, sequence: Sequence, history: Any, lag: int = 10) -> Outcome:
    if lag != 0:
        check_positive("smooth", lag=lag)
    return lineages.fixed_lag(history, lag), jnp.asarray(False)


def _twist(rng_key: Array, sequence: Sequence, history: Any) -> Outcome:
    if not sequence.twisted:
        raise ValueError(
            "smooth: method='twist' needs a filter with a guide whose scan body states a twist. State "
            "numpyro_smc.twist('r', log_r) there, or use method='paris'."
        )
    return lineages.by_twist(history), jnp.asarray(False)


def _ffbsm(rng_key: Array, sequence: Sequence, history: Any, batch_size: int = 100) -> Outcome:
    check_positive("smooth", batch_size=batch_size)
    return marginal.smooth_backwards(backward_kernel(sequence, history, "smooth"), batch_size), jnp.asarray(False)


def _paris(
    rng_key: Array,
    sequence: Sequence,
    history: Any,
    num_backward_draws: int = 2,
    backward: str = "mcmc",
    num_mcmc_steps: int = 1,
    log_bound: Any = None,
    max_trials: int = 20,
    batch_size: int = 100,
) -> Outcome:
    check_num_draws("smooth", num_backward_draws)
    kernel = backward_kernel(sequence, history, "smooth")
    draw = backward_draw(kernel, backward, num_mcmc_steps, log_bound, max_trials, batch_size)
    return paris.backward_pairs(rng_key, kernel, draw, num_backward_draws)


def _by_paths(how: str) -> Callable[..., Outcome]:
    def smooth(
        rng_key: Array,
        sequence: Sequence,
        history: Any,
        num_samples: int | None = None,
        num_mcmc_steps: int = 1,
        log_bound: Any = None,
        max_trials: int = 20,
        batch_size: int = 100,
    ) -> Outcome:
        kernel = backward_kernel(sequence, history, "smooth")
        num_samples = kernel.num_particles if num_samples is None else num_samples
        check_positive("smooth", num_samples=num_samples)
        draw = backward_draw(kernel, how, num_mcmc_steps, log_bound, max_trials, batch_size)
        first, path, wrong = backward.sample_indices(rng_key, kernel, draw, num_samples)
        past = jnp.concatenate([first[None], path[:-1]])
        return Pairs(past, path, jnp.full(path.shape, 1.0 / num_samples)), wrong

    return smooth


METHODS: dict[str, Callable[..., Outcome]] = {
    "paris": _paris,
    "ffbsm": _ffbsm,
    "backward": _by_paths("exact"),
    "backward_mcmc": _by_paths("mcmc"),
    "backward_rejection": _by_paths("rejection"),
    "fixed_lag": _fixed_lag,
    "genealogy": _genealogy,
    "twist": _twist,
}

#: Methods that follow ancestors, which schemes that mix particles do not have.
NEED_GENEALOGY = ("genealogy", "fixed_lag", "twist", "backward_mcmc")


def method_of(name: str, user: str, options: dict[str, Any]) -> Callable[..., Outcome]:
    """A smoother by name.

    :raises ValueError: for an unknown name. **TypeError** - for an option it does not have.
    """
    if name not in METHODS:
        raise ValueError(f"{user}: unknown method={name!r}. Use one of {', '.join(map(repr, METHODS))}.")
    method = METHODS[name]
    known = list(inspect.signature(method).parameters)[3:]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        has = f"has the options {', '.join(known)}" if known else "has no options"
        raise TypeError(f"{user}: method={name!r} {has}, but was given {', '.join(unknown)}.")
    return method
