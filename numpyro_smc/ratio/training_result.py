"""What a training did: the table of its epochs, its weights, and its file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numpyro_smc.engines.checkpoint import AnyLength, as_text, load_pytree, save_pytree
from numpyro_smc.ratio.description import as_json, first_difference
from numpyro_smc.ratio.ratio_network import RatioWeights
from numpyro_smc.ratio.steps import TrainingState
from numpyro_smc.reports.plots import new_axes

__all__ = ["RatioFit", "TrainingProgress"]


@dataclass(frozen=True)
class TrainingProgress:
    """A training after some epochs: everything that a restart needs.

    :ivar state: after the last epoch.
    :ivar best: trained weights after the best epoch.
    :ivar table: one row an epoch.
    """

    state: TrainingState
    best: dict[str, Any]
    table: tuple[dict[str, float], ...] = ()

    @property
    def monitored(self) -> list[float]:
        """The loss that decides, of every epoch: infinite where it is not finite."""
        losses = [row.get("validation_loss", row["loss"]) for row in self.table]
        return [loss if math.isfinite(loss) else math.inf for loss in losses]

    @property
    def best_epoch(self) -> int:
        """Number of the best epoch, from one."""
        return 1 + int(np.argmin(self.monitored))

    def followed_by(self, state: TrainingState, row: dict[str, float]) -> TrainingProgress:
        after = TrainingProgress(state, state.trained, (*self.table, row))
        is_best = after.best_epoch == len(after.table)
        return after if is_best else TrainingProgress(state, self.best, after.table)

    def save(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        texts = {"settings": as_text(json.dumps(settings)), "table": as_text(json.dumps(self.table))}
        save_pytree(path, {"state": self.state, "best": self.best, **texts})

    def load(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> TrainingProgress:
        """The training saved in ``path``, of the same network as this one.

        :raises ValueError: if it is of another network, or of other data or settings, naming what differs.
        """
        texts = {"settings": AnyLength("uint8"), "table": AnyLength("uint8")}
        like = {"state": self.state, "best": self.best, **texts}
        remedy = "Pass what wrote it, name another file, or delete this one."
        try:
            contents = load_pytree(path, like)
        except ValueError as error:
            raise ValueError(f"fit: checkpoint {error} {remedy}") from error
        difference = first_difference(json.loads(contents["settings"].tobytes()), as_json(settings))
        if difference is not None:
            name, one, other = difference
            raise ValueError(
                f"fit: checkpoint '{os.fspath(path)}' is of other simulations, other settings or another random key: "
                f"{name} is {one!r} in it, but {other!r} here. {remedy}"
            )
        table = tuple(json.loads(contents["table"].tobytes()))
        return TrainingProgress(contents["state"], contents["best"], table)


@dataclass(repr=False)
class RatioFit:
    """What :func:`~numpyro_smc.ratio.training.fit` did.

    :ivar weights: of the network: those of the best epoch, or of the last.
    :ivar table: one row an epoch: ``epoch`` (from one), ``loss`` and ``loss_sd`` over its batches, ``validation_loss``
        and ``validation_loss_sd``, ``learning_rate``, ``num_skipped`` (steps that were not finite), ``seconds``.
    :ivar best_epoch: the epoch of the lowest validation loss.
    :ivar ending: why the training ended.
    """

    weights: RatioWeights
    table: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    ending: str = ""

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the training."""
        return self.ending == "interrupted"

    @property
    def num_skipped(self) -> int:
        """Steps that were skipped because the loss or its gradient was not finite."""
        return int(sum(row["num_skipped"] for row in self.table))

    def losses(self, name: str = "validation_loss") -> np.ndarray:
        """A column of the table, ``[epochs]``."""
        return np.array([row.get(name, np.nan) for row in self.table])

    def __repr__(self) -> str:
        parts = [f"{len(self.table)} epochs ({self.ending})"]
        if self.table:
            best = self.table[self.best_epoch - 1]
            name = "validation_loss" if "validation_loss" in best else "loss"
            parts.append(f"{name.replace('_', ' ')} {best[name]:.4g} at the best, epoch {self.best_epoch}")
        if self.num_skipped:
            parts.append(f"{self.num_skipped} steps skipped")
        return f"RatioFit({'; '.join(parts)})"

    def plot(self, ax: Any = None) -> Any:
        """Losses over the epochs, with the best one marked.

        :param ax: Matplotlib axes; new ones by default.
        :return: the axes.
        """
        ax = new_axes() if ax is None else ax
        epochs = np.arange(1, len(self.table) + 1)
        for name, label in (("loss", "training"), ("validation_loss", "validation")):
            values = self.losses(name)
            if np.isfinite(values).any():
                ax.plot(epochs, values, label=label)
        ax.axvline(self.best_epoch, color="0.7", linewidth=0.8, zorder=0, label="best")
        ax.set(xlabel="epoch", ylabel="loss")
        ax.legend()
        return ax
