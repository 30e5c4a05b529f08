"""What a training may be called with, and whether it learned anything."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smc.ratio.datasets import RatioData, SimulationData
from numpyro_smc.ratio.losses import RatioLoss
from numpyro_smc.ratio.masks import MaskLaw
from numpyro_smc.ratio.networks import Embedding, Network
from numpyro_smc.ratio.ratio_network import RatioNetwork, RatioWeights
from numpyro_smc.ratio.steps import Program

_NUM_MASKS = 1000
_KINDS: dict[str, tuple[Any, str]] = {
    "network": (RatioNetwork, "a RatioNetwork"),
    "loss": (RatioLoss, "a loss of numpyro_smc.ratio.losses"),
    "data": (SimulationData, "RatioData or StoredData"),
    "masks": (MaskLaw | None, "a law of masks such as UniformMask()"),
    "weights": (RatioWeights | None, "RatioWeights"),
    "validation": (
        float | int | np.number | RatioData | None,
        "a part of the simulations between 0 and 1, RatioData, or None",
    ),
}
_PARTS: dict[str, tuple[Any, str]] = {
    "loss": (str | RatioLoss, "a name or a loss of numpyro_smc.ratio.losses, such as ContrastiveLoss()"),
    "trunk": (Network | None, "a Network, such as mlp() of numpyro_smc.ratio.networks"),
    "embedding": (Embedding | None, "an Embedding, such as embedding_of(...), from_equinox(...) or from_flax(...)"),
    "data": (SimulationData, "RatioData, StoredData, a tuple or a path"),
}


def check_made_of(**arguments: Any) -> None:
    """:raises ValueError: naming the argument of an NRE that is something else than what it must be."""
    for name, value in arguments.items():
        kind, expected = _PARTS[name]
        if not isinstance(value, kind) or isinstance(value, type):
            raise ValueError(f"NRE: {name} must be {expected}, got {value!r}.")


def check_number(name: str, value: Any, *, may_be_zero: bool = False, remedy: str = "") -> None:
    """:raises ValueError: unless it is a finite number above zero."""
    is_real = isinstance(value, float | int | np.number) and not isinstance(value, bool)
    if not is_real or not 0 <= value < math.inf or (value == 0 and not may_be_zero):
        expected = "a number that is not negative" if may_be_zero else "a positive number"
        raise ValueError(f"fit: {name} must be {expected}, got {value!r}. {remedy}".strip())


def check_kinds(**arguments: Any) -> None:
    """:raises ValueError: naming the argument that is something else than what it must be."""
    for name, value in arguments.items():
        kind, expected = _KINDS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"fit: {name} must be {expected}, got {value!r}.")


def check_masks(masks: MaskLaw, size: int) -> None:
    """A few draws of a law: one mask a row, none of which keeps nothing."""
    some = masks.sample(random.key(0), _NUM_MASKS, size)
    if some.shape != (_NUM_MASKS, size) or some.dtype != bool:
        raise ValueError(
            f"fit: masks.sample(rng_key, {_NUM_MASKS}, {size}) must return booleans [{_NUM_MASKS}, {size}], but "
            f"returns {some.dtype} {list(some.shape)}."
        )
    num_empty = int((~np.asarray(some).any(1)).sum())
    if num_empty:
        raise ValueError(
            f"fit: {num_empty} of {_NUM_MASKS} masks of {masks!r} keep no parameter; every mask must keep at least one."
        )


def check_learned(monitored: Sequence[float], keep: str, program: Program, learning_rate: float) -> None:
    """:raises FloatingPointError: if the weights to be returned never had a finite loss.

    :param monitored: the loss that decides, of every epoch.
    """
    loss = min(monitored) if keep == "best" else monitored[-1]
    remedy = (
        f"Lower learning_rate={learning_rate:g}, set clip_norm (now {program.clip_norm}), and look for simulations of "
        f"huge numbers."
    )
    if not math.isfinite(loss):
        which = "none of the epochs had" if keep == "best" else "the last epoch did not have"
        raise FloatingPointError(
            f"fit: {which} a finite loss ({len(monitored)} epochs): the training diverged. {remedy}"
        )
    num_joint, num_marginal = program.loss.num_contrasts
    tail = (program.batch_size,) if program.network.marginals is None else (1, len(program.network.marginals))
    if num_joint + num_marginal:
        zeros = np.zeros((1 + num_joint, *tail)), np.zeros((max(num_marginal, 1), *tail))
        of_guessing = float(program.loss.of_log_ratios(*map(jnp.asarray, zeros)))
        if loss > 2 * of_guessing:
            warnings.warn(
                f"fit: the loss of the weights returned is {loss:.4g}, more than twice that of a ratio of one "
                f"everywhere, {of_guessing:.4g}: the training diverged. {remedy}",
                stacklevel=3,
            )
