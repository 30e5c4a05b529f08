"""Learning rates by epoch, as functions of the losses so far: a restarted training needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["ConstantRate", "CosineRate", "LearningRate", "PlateauRate", "learning_rate_schedule"]


@runtime_checkable
class LearningRate(Protocol):
    """A rule for the learning rate of the next epoch."""

    def rate(self, initial: float, losses: Sequence[float], max_epochs: int) -> float | None:
        """The rate.

        :param initial: of the first epoch.
        :param losses: validation loss of each epoch so far.
        :param max_epochs: planned number of epochs.
        :return: the rate, or ``None`` to end the training.
        """
        ...


@dataclass(frozen=True)
class ConstantRate:
    """The initial rate throughout."""

    def rate(self, initial: float, losses: Sequence[float], max_epochs: int) -> float | None:
        return initial


@dataclass(frozen=True)
class CosineRate:
    """Half a cosine, from the initial rate to ``lowest`` after the last epoch."""

    lowest: float = 1e-6

    def rate(self, initial: float, losses: Sequence[float], max_epochs: int) -> float | None:
        return self.lowest + (initial - self.lowest) * (1 + math.cos(math.pi * len(losses) / max_epochs)) / 2


@dataclass(frozen=True)
class PlateauRate:
    """The rate times ``factor`` whenever more than ``patience`` epochs bring nothing; at ``lowest``, the training ends.

    :param factor: of a reduction.
    :param patience: epochs.
    :param threshold: what counts as better: a loss below ``1 - threshold`` times the best.
    :param lowest: smallest rate.
    """

    factor: float = 0.5
    patience: int = 7
    threshold: float = 1e-2
    lowest: float = 1e-6

    def rate(self, initial: float, losses: Sequence[float], max_epochs: int) -> float | None:
        rate, best, num_bad = initial, math.inf, 0
        for loss in losses:
            if loss < best * (1 - self.threshold):
                best, num_bad = loss, 0
            else:
                num_bad += 1
            if num_bad > self.patience:
                rate, num_bad = max(rate * self.factor, self.lowest), 0
        return None if losses and rate <= self.lowest else rate


def learning_rate_schedule(name: str) -> LearningRate:
    """The rule of a name: ``"constant"``, ``"cosine"`` or ``"plateau"``.

    :raises ValueError: for an unknown name.
    """
    rules: dict[str, LearningRate] = {"constant": ConstantRate(), "cosine": CosineRate(), "plateau": PlateauRate()}
    if name not in rules:
        raise ValueError(
            f"fit: schedule must be one of {list(rules)}, a LearningRate or an optax schedule, got {name!r}."
        )
    return rules[name]
