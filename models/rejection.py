"""Exact draws by rejection, for posteriors that are known but for a condition on their support."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax import Array

MAX_ROUNDS = 1000


def sample_accepted(
    rng_key: Array, propose: Callable[[Array, int], tuple[Array, Array]], num_samples: int
) -> np.ndarray:
    """The first ``num_samples`` proposals that are accepted.

    :param propose: ``(rng_key, number) -> (proposals [number, D], accepted [number])``.
    :return: ``[num_samples, D]``.
    :raises RuntimeError: if :data:`MAX_ROUNDS` rounds of ``num_samples`` proposals are not enough.
    """
    kept: list[np.ndarray] = []
    for number in range(MAX_ROUNDS):
        proposals, accepted = propose(jax.random.fold_in(rng_key, number), num_samples)
        kept.append(np.asarray(proposals)[np.asarray(accepted)])
        if sum(map(len, kept)) >= num_samples:
            return np.concatenate(kept)[:num_samples]
    raise RuntimeError(
        f"sample_accepted: {sum(map(len, kept))} of {MAX_ROUNDS * num_samples} proposals were accepted; {num_samples} "
        "are needed. Is the observation one that the simulator can produce?"
    )
