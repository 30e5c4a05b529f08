"""When a tempered run cannot start, cannot go on, or did not move."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from numpyro_smc.programs.unconstrained import Split
from numpyro_smc.samplers.progress import Progress

_LOW_ACCEPTANCE = 0.01


def broken_particle(split: Split) -> tuple[int, int]:
    """The first initial particle whose log densities are not usable, and how many are not; -1 and 0 if all are.

    Some particles may have no likelihood, but not all.
    """
    base, likelihood = np.asarray(split.base), np.asarray(split.likelihood)
    broken = ~np.isfinite(base) | np.isnan(likelihood) | np.isposinf(likelihood)
    if not broken.any() and np.isneginf(likelihood).all():
        broken[:] = True
    return (int(broken.argmax()), int(broken.sum())) if broken.any() else (-1, 0)


def not_startable(
    number: int, num_particles: int, densities: dict[str, Any], latents: dict[str, Any]
) -> FloatingPointError:
    """The error for ``number`` broken initial particles, from the sites' log densities and latents of the first."""
    at_edge = [f"'{name}'" for name, value in latents.items() if not np.isfinite(value).all()]
    if at_edge:
        return FloatingPointError(
            f"SMCSampler: {number} of {num_particles} initial draws of site {', '.join(at_edge)} lie on the edge of "
            f"the support, where the log density over the reals is not finite. Use a less extreme prior."
        )
    sites = [f"'{name}' ({value})" for name, value in densities.items() if not np.isfinite(value)]
    where = f"at site {', '.join(sites)}" if sites else "in the sum over sites"
    return FloatingPointError(
        f"SMCSampler: {number} of {num_particles} initial particles have non-finite log densities, the first {where}. "
        f"Check the data, the supports, and the model's arithmetic at draws from its prior."
    )


def check_advance(before: Progress, after: Progress, target_ess: float | None) -> None:
    """:raises FloatingPointError: if no particle has any likelihood left, or the temperature stands still."""
    where = f"temperature {after.temperature:.3g} (stage {before.num_stages})"
    if not np.isfinite(after.column("increment")[-1]):
        raise FloatingPointError(
            f"SMCSampler: no particle has any likelihood left at {where}. Check the observations and their support, or "
            f"use more particles or temperatures."
        )
    if after.temperature <= before.temperature:
        raise FloatingPointError(
            f"SMCSampler: tempering came to a halt at {where}: the smallest step loses more particles than "
            f"target_ess={target_ess} allows. The log likelihood varies too much over the start; start closer to the "
            f"posterior with init_guide=(guide, params)."
        )


def too_many_stages(progress: Progress, max_stages: int) -> FloatingPointError:
    return FloatingPointError(
        f"SMCSampler: temperature {progress.temperature:.3g} after max_stages={max_stages} stages. Raise it, lower "
        f"target_ess, or start closer to the posterior with init_guide=(guide, params)."
    )


def warn_of_stuck_particles(progress: Progress) -> None:
    acceptance, temperature = progress.column("acceptance"), progress.column("temperature")
    stuck = acceptance < _LOW_ACCEPTANCE
    if stuck.any():
        warnings.warn(
            f"SMCSampler: at {stuck.sum()} of {len(stuck)} temperatures fewer than one move in a hundred was accepted, "
            f"first at {temperature[stuck.argmax()]:.3g}: particles barely moved. Use more moves, another kernel, or a "
            f"smaller step_size.",
            stacklevel=5,
        )
