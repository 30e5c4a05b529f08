"""What a user may ask of a tempered sampler, checked."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np

from numpyro_smc.programs.arguments import check_if_given, check_number, check_positive, named
from numpyro_smc.programs.resampling import Scheme, resolve
from numpyro_smc.programs.unconstrained import UnconstrainedModel
from numpyro_smc.samplers import moves as moves_module
from numpyro_smc.samplers.moves import MOVES, Move
from numpyro_smc.samplers.paths import Path, Rows, Temperatures
from numpyro_smc.samplers.tempering import Settings

_TUNABLE = ("step_size", "inverse_mass_matrix")


def check_options(
    num_particles: int,
    num_moves: int | None,
    target_ess: float,
    ess_threshold: float,
    waste_free: int | None,
    persistent: bool,
    tune: Collection[str],
    init_guide: Any,
    step_size: float | None,
) -> None:
    """:raises ValueError: for options that make no sense, naming them."""
    check_positive("SMCSampler", num_particles=num_particles)
    if num_particles < 2:
        raise ValueError(f"SMCSampler: num_particles must be at least 2, got {num_particles}.")
    check_if_given("SMCSampler", num_moves=num_moves, waste_free=waste_free)
    remedy = "It is the fraction of num_particles to which the effective sample size may fall at each temperature."
    check_number("SMCSampler", "(0, 1)", remedy, target_ess=target_ess)
    check_number("SMCSampler", "[0, 1]", ess_threshold=ess_threshold)
    if step_size is not None:
        check_number("SMCSampler", "(0, inf)", step_size=step_size)
    if waste_free is not None:
        if waste_free < 2 or num_particles % waste_free or num_particles == waste_free:
            raise ValueError(
                f"SMCSampler: waste_free={waste_free} must be at least 2 and a proper divisor of "
                f"num_particles={num_particles}: it is the number of states kept of each chain."
            )
        if num_moves is not None:
            raise ValueError("SMCSampler: waste_free=P moves each chain P - 1 times; leave out num_moves.")
        if persistent:
            raise ValueError("SMCSampler: waste_free and persistent are two ways to reuse states; choose one.")
    if isinstance(tune, str) or not isinstance(tune, Collection) or not set(tune) <= set(_TUNABLE):
        raise ValueError(f"SMCSampler: tune must be a tuple of names out of {', '.join(_TUNABLE)}; got {tune!r}.")
    if init_guide is not None and not (
        isinstance(init_guide, tuple)
        and len(init_guide) == 2
        and callable(init_guide[0])
        and hasattr(init_guide[1], "keys")
    ):
        raise ValueError(
            "SMCSampler: init_guide must be (guide, params): a guide of the model and the values of its param sites, "
            "such as FitResult.params or svi.get_params(state)."
        )


def chosen_move(moves: str | Callable[..., Any], options: dict[str, Any] | None) -> Move:
    """The Markov kernel of that name, or made of a function."""
    if callable(moves):
        if options:
            raise ValueError("SMCSampler: moves_kwargs are for moves by name; bind them to the function.")
        return moves_module.of_function(moves)
    if moves not in MOVES:
        raise ValueError(f"SMCSampler: unknown moves={moves!r}. Use {', '.join(map(repr, MOVES))}, or a function.")
    try:
        return MOVES[moves](**(options or {}))
    except TypeError as error:
        raise ValueError(f"SMCSampler: moves={moves!r} does not take moves_kwargs={options}: {error}") from error


def chosen_scheme(resampler: Any, needs_fewer: bool) -> Scheme:
    """The resampling scheme, which must be unbiased and tell whom it copied.

    :param needs_fewer: whether it will be asked for fewer offspring than there are particles.
    """
    with named("SMCSampler"):
        scheme = resolve(resampler)
    plain = scheme.ancestors is not None and getattr(scheme, "transport", None) is None
    plain = plain and getattr(scheme, "selection", None) is None and getattr(scheme, "keep", None) is None
    if not plain or not scheme.unbiased:
        raise ValueError(
            f"SMCSampler: resampler '{scheme.name}' does not copy particles in proportion to their weights, without "
            f"which there is no unbiased evidence and no genealogy. Use 'systematic' or 'multinomial'."
        )
    if needs_fewer and scheme.name == "killing":
        raise ValueError("SMCSampler: resampler 'killing' needs as many offspring as particles. Use 'systematic'.")
    return scheme


def chosen_path(
    tempering: Any, data_plate: str, row_counts: Any, persistent: bool, init_guide: Any
) -> tuple[Callable[[UnconstrainedModel], Path], np.ndarray | None]:
    """The path of a model, and its entries after the start, or ``None`` if they are chosen on the way."""
    if not (isinstance(tempering, str) and tempering == "data"):
        if row_counts is not None:
            raise ValueError("SMCSampler: row_counts are the schedule of tempering='data'; temperatures go there.")
        return Temperatures, chosen_temperatures(tempering)
    if persistent:
        raise ValueError(
            "SMCSampler: persistent=True reweighs past particles by their temperatures, which tempering='data' does "
            "not have. Use waste_free to reuse states."
        )
    if init_guide is not None:
        raise ValueError(
            "SMCSampler: tempering='data' starts from the prior, to which the rows are added; an init_guide already "
            "knows of them. Use tempering='adaptive' with init_guide."
        )
    counts = None if row_counts is None else np.asarray(row_counts)
    if counts is None:
        return partial(Rows, plate=data_plate), None
    whole = counts.ndim == 1 and len(counts) > 0 and np.issubdtype(counts.dtype, np.integer)
    if not whole or not (np.diff(counts, prepend=0) > 0).all():
        raise ValueError(
            f"SMCSampler: row_counts={counts} must be one strictly increasing array of whole numbers, from at least 1 "
            f"to the number of rows, such as numpy.arange(10, 101, 10) for 100."
        )
    return partial(Rows, plate=data_plate, row_counts=tuple(counts.tolist())), counts


def chosen_temperatures(tempering: Any) -> np.ndarray | None:
    """The temperatures after 0, or ``None`` if they are chosen on the way."""
    if isinstance(tempering, str):
        if tempering == "adaptive":
            return None
        raise ValueError(
            f"SMCSampler: tempering must be 'adaptive', 'data' or an array of temperatures, got {tempering!r}."
        )
    schedule = np.asarray(tempering, np.float64)
    if schedule.ndim == 1 and len(schedule) and schedule[0] == 0.0:
        schedule = schedule[1:]
    increasing = schedule.ndim == 1 and len(schedule) > 0 and (np.diff(schedule, prepend=0.0) > 0.0).all()
    if not increasing or schedule[-1] != 1.0:
        raise ValueError(
            f"SMCSampler: tempering={np.asarray(tempering)} must be one strictly increasing array of temperatures "
            f"between 0 and 1 that ends at 1, such as numpy.linspace(0, 1, 21) ** 3."
        )
    return schedule


def description(
    settings: Settings, moves: str, schedule: np.ndarray | None, persistent: bool, rows_of: str | None
) -> str:
    """What a checkpoint must agree with."""
    parts = {
        "num_particles": settings.num_particles,
        "moves": moves,
        "num_moves": settings.num_moves,
        "tuned": (settings.tune_step_size, settings.tune_scale, settings.dense, settings.step_size),
        "resampler": settings.scheme.name,
        "target_ess": settings.target_ess,
        "schedule": None if schedule is None else list(map(float, schedule)),
        "waste_free": settings.chain_length,
        "persistent": persistent,
        "rows_of": rows_of,
    }
    return ", ".join(f"{name}={value}" for name, value in parts.items())
