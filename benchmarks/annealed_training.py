"""What the benchmarks of annealed samplers share: methods by name, evaluation, and tables whose finished cells stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array, lax, random
from jax.scipy.special import logsumexp

from benchmarks import report
from numpyro_smc import DAIS, DSMCS
from numpyro_smc.programs.density import Program
from numpyro_smc.programs.weights import effective_sample_size

METHODS = (
    "dais, or GRADIENT-SCHEDULE: none, stop_gradient, score or score_rb (gradient of resampling), and always or ess "
    "(resampling at half of the particles), or published-NAME; none-always is published-cat"
)

Cell = dict[str, Any]
Measure = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


def make_loss(method: str, num_particles: int, num_transitions: int, **options: Any) -> DSMCS:
    """The loss that a name stands for, one of :data:`METHODS`.

    By default resampling is systematic with ``stop_gradient``, else multinomial, as published. A score gradient under
    ``ess`` is biased by what the decisions depend on; here that is measured.

    :param options: passed on, for example ``step_size_max``.
    :raises ValueError: for an unknown name.
    """
    if method == "dais":
        return DAIS(num_particles, num_transitions, **options)
    gradient, _, schedule = method.partition("-")
    if gradient == "published":
        return DSMCS.published(schedule, num_particles, num_transitions, **options)
    if schedule not in ("always", "ess"):
        raise ValueError(f"There is no method '{method}'; there are {METHODS}.")
    resampler = "systematic" if gradient == "stop_gradient" else "multinomial"
    when = at_half if schedule == "ess" else "always"
    choices = {"resampler": resampler, "resample": when, "resampling_gradient": gradient}
    return DSMCS(num_particles, num_transitions, **choices | options)


def at_half(log_weights: Array, t: Array) -> Array:
    """Whether the effective sample size is at most half of the particles."""
    return effective_sample_size(log_weights) <= 0.5 * log_weights.shape[0]


def evaluate(
    rng_key: Array, loss: DSMCS, params: dict[str, Any], model: Program, guide: Program, *args: Any, num_runs: int
) -> dict[str, Array]:
    """The bound and the effective sample sizes of ``num_runs`` runs, elements of plates being runs as well.

    :return: scalars: :func:`summary`; ``"ESS k"`` after transition k, and ``"ESS"``, their mean over all but the last
        (those that resampling may follow, as published); ``"resampled"``, how often in a run.
    """

    def one(rng_key: Array) -> tuple[Array, Array, Array]:
        found = loss.diagnostics(rng_key, params, model, guide, *args)
        return found.log_evidence, found.ess, found.resampled

    runs_at_once = one(rng_key)[0].size
    keys = random.split(rng_key, -(-num_runs // runs_at_once))
    log_evidence, ess, resampled = lax.map(one, keys)
    by_transition = jnp.mean(ess, axis=tuple(axis for axis in range(ess.ndim) if axis != 2))
    return {
        **summary(log_evidence),
        "ESS": jnp.mean(by_transition[:-1]),
        "resampled": jnp.sum(resampled) / log_evidence.size,
        **{f"ESS {k}": value for k, value in enumerate(by_transition, 1)},
    }


def summary(log_evidence: Array) -> dict[str, Array]:
    """Of independent estimates: the bound, its standard error, and the log of their mean, the evidence up to noise."""
    size = log_evidence.size
    return {
        "bound": jnp.mean(log_evidence),
        "s.e.": jnp.std(log_evidence, ddof=1) / jnp.sqrt(size),
        "log-mean-exp": logsumexp(log_evidence) - jnp.log(size),
    }


def learned(loss: DSMCS, params: dict[str, Any]) -> dict[str, Any]:
    """The sampler's numbers at constrained parameters, to four digits."""
    schedule = loss.schedule.at(params)
    return {
        "betas": [round(float(beta), 4) for beta in schedule.betas],
        "step sizes": [round(float(step), 4) for step in schedule.step_sizes],
        "mass": round(float(schedule.mass), 4),
        "refreshment": round(float(schedule.refreshment), 4),
    }


def fill_table(
    name: str,
    cells: Sequence[Cell],
    measure: Measure,
    folder: Path,
    settings: Mapping[str, Any],
    free: Sequence[str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure the cells that the folder's table lacks; write it after each.

    A cell that fails keeps its row, with the error, and is tried again by the next call.

    :param cells: what identifies each row.
    :param measure: ``measure(**cell)`` gives the rest of the row and the points of its curves, perhaps none.
    :param free: settings that choose cells rather than change them.
    :return: rows and points, those of earlier calls included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = report.load(folder, name, settings, free)
    curves = report.load(folder, f"{name}_curves", settings, free)
    for cell in cells:
        if any(cell.items() <= row.items() for row in rows):
            continue
        started = time.perf_counter()
        try:
            row, points = measure(**cell)
            curves += [cell | point for point in points]
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        rows.append(cell | row)
        print(f"{' '.join(map(str, cell.values()))}: {time.perf_counter() - started:.0f} s", flush=True)
        report.write(folder, name, rows, settings)
        if curves:
            report.write(folder, f"{name}_curves", curves, settings)
    return rows, curves
