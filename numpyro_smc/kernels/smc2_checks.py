"""Whether a run of SMC2 has sensible options, can start, and can go on."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from numpyro_smc.engines.checkpoint import check_folder
from numpyro_smc.engines.identity import Identity, check_same
from numpyro_smc.kernels.smc2_stages import PROPOSALS, SMC2State
from numpyro_smc.programs.arguments import check_between, check_if_given, check_number, check_positive


def check_options(
    num_parameter_particles: int,
    num_state_particles: int,
    max_state_particles: int | None,
    threshold: float,
    min_acceptance: float,
    proposal: str,
    num_moves: int,
    batch_size: int | None,
) -> None:
    """:raises ValueError: naming the option that is out of range or does not go with another."""
    check_positive(
        "SMC2",
        num_parameter_particles=num_parameter_particles,
        num_state_particles=num_state_particles,
        num_moves=num_moves,
    )
    check_if_given("SMC2", max_state_particles=max_state_particles, batch_size=batch_size)
    check_between("SMC2", 0.0, 1.0, "Use 0.0 for a fixed number of state particles.", min_acceptance=min_acceptance)
    if num_parameter_particles < 2:
        raise ValueError("SMC2: num_parameter_particles must be 2 or more: moves are fitted to the particles.")
    if max_state_particles is not None and max_state_particles < num_state_particles:
        raise ValueError(
            f"SMC2: max_state_particles={max_state_particles} is below num_state_particles={num_state_particles}. "
            f"Raise it, or use min_acceptance=0.0 for a fixed number."
        )
    remedy = "It is a fraction of num_parameter_particles."
    check_number("SMC2", "(0, 1]", remedy, parameter_ess_threshold=threshold)
    if proposal not in PROPOSALS:
        raise ValueError(f"SMC2: unknown proposal={proposal!r}. Known: {', '.join(map(repr, PROPOSALS))}.")


def check_file(checkpoint: str | os.PathLike | None, checkpoint_every: int) -> None:
    """:raises ValueError: if nothing can be saved there."""
    check_positive("SMC2", checkpoint_every=checkpoint_every)
    check_folder("SMC2", checkpoint)


def check_settings(found: str, expected: str, found_of: Identity, of: Identity) -> None:
    """:raises ValueError: unless a result is of a sampler with the same options, programs and past data."""
    if found != expected:
        raise ValueError(
            f"SMC2.resume: the result is of another sampler.\n  found    {found}\n  expected {expected}\n"
            f"Pass it to the sampler that made it, or to one with the same options."
        )
    advice = "Pass the sampler that made it, and the observations it has taken in, with what is known beyond."
    check_same("SMC2.resume: the result", found_of, of, advice)


def check_start(state: SMC2State) -> None:
    """:raises FloatingPointError: naming the site whose draws from the prior cannot be moved."""
    for name, values in state.particles.z.items():
        broken = ~np.isfinite(np.asarray(values)).reshape(len(values), -1).all(axis=1)
        if broken.any():
            raise FloatingPointError(
                f"SMC2: {broken.sum()} of {len(values)} draws of site '{name}' from the prior lie on the edge of the "
                f"support, where the log density over the reals is not finite. Use a less extreme prior."
            )


def checked_until(until: int | None, done: int, length: int) -> int:
    """The number of steps to take in.

    :param done: how many have been. **length** - how many there are.
    """
    if until is None:
        until = length
    check_positive("SMC2", until=until)
    if until > length:
        raise ValueError(f"SMC2: until={until}, but the series has {length} steps. Give a longer series.")
    if until < done:
        raise ValueError(
            f"SMC2: {done} steps have been taken in already, and {until} is fewer. Run anew, or go on with a series of "
            f"{done} steps or more."
        )
    return int(until)


def checked_increment(increment: Any, broken: Any, t: int) -> float:
    """An increment of the log evidence.

    :param broken: how many filters' increments are not numbers. **t** - the step.
    :raises FloatingPointError: naming the step, unless the increment is finite.
    """
    value = float(increment)
    if np.isfinite(value):
        return value
    if int(broken):
        raise FloatingPointError(
            f"SMC2: at step {t} the weights of {int(broken)} filters are not numbers, and nothing is left of the "
            f"others. Mask missing values with handlers.mask, and check the data and the model's distributions."
        )
    raise FloatingPointError(
        f"SMC2: all particles have weight zero at step {t}: no parameter explains the observation. Use more parameter "
        f"and state particles or a guide, check the observation and its support, and mask missing values "
        f"(handlers.mask)."
    )
