"""Numbers that should be uniform on the unit interval: ranks, levels of credible regions, p-values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from numpyro_smc.reports.plots import new_axes
from numpyro_smc.reports.tables import write_csv

_TERMS = np.arange(1, 101)
_SHOWN = 8  # columns in a plot or a repr: those that deviate most


@dataclass(frozen=True, repr=False)
class Uniformity:
    r"""Values that are uniform if all is right, and how far they are from it.

    With the empirical distribution function :math:`F_n`, the distance is :math:`D = \sup_u |F_n(u) - u|`; its p-value
    is that of Kolmogorov and Smirnov, with Stephens' correction for finite :math:`n`.

    :ivar title: what is checked.
    :ivar values: ``[n, k]``.
    :ivar names: of the k columns.
    :ivar meaning: what it means if the curve lies above the diagonal, and below.
    :ivar level: probability of a false alarm of :attr:`passed`, shared among the columns.
    """

    title: str
    values: np.ndarray
    names: tuple[str, ...]
    meaning: tuple[str, str] = ("above the diagonal", "below the diagonal")
    level: float = 0.01

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names) or not len(self.values):
            raise ValueError(f"Uniformity: values must be [n, {len(self.names)}], got shape {self.values.shape}.")
        if not ((self.values >= 0) & (self.values <= 1)).all():
            raise ValueError("Uniformity: values must lie between 0 and 1.")

    def __repr__(self) -> str:
        verdict = "uniform" if self.passed else "not uniform"
        lines = [f"{self.title}: {len(self.values)} simulations, {verdict} at level {self.level:g}"]
        table = self.table()
        for i in self._shown():
            lines.append(
                f"  {table[i]['name']}: largest deviation {table[i]['deviation']:+.3f} ({table[i]['reading']}), p = "
                f"{table[i]['p-value']:.3g}"
            )
        if len(table) > _SHOWN:
            lines.append(f"  and {len(table) - _SHOWN} more, of larger p-values")
        return "\n".join(lines)

    def _shown(self) -> np.ndarray:
        """Columns in a plot or a repr, in their order."""
        return np.sort(np.argsort(-np.abs(self.deviations), kind="stable")[:_SHOWN])

    @property
    def deviations(self) -> np.ndarray:
        """The largest signed deviation of the distribution function from the diagonal, of each column."""
        ordered = np.sort(self.values, axis=0)
        steps = np.arange(1, len(ordered) + 1)[:, None] / len(ordered)
        above, below = (steps - ordered).max(0), (ordered - steps + 1 / len(ordered)).max(0)
        return np.where(above >= below, above, -below)

    @property
    def p_values(self) -> np.ndarray:
        """Of each column, ``[k]``."""
        root = np.sqrt(len(self.values))
        scaled = (root + 0.12 + 0.11 / root) * np.abs(self.deviations)
        terms = (-1.0) ** (_TERMS - 1) * np.exp(-2.0 * _TERMS**2 * scaled[:, None] ** 2)
        return np.where(scaled < 0.2, 1.0, np.clip(2.0 * terms.sum(-1), 0.0, 1.0))

    @property
    def passed(self) -> bool:
        """:meth:`is_uniform` at :attr:`level`."""
        return self.is_uniform()

    def is_uniform(self, level: float | None = None) -> bool:
        """Whether no column is rejected at ``level``, shared among the columns (Bonferroni); :attr:`level` if none."""
        return bool((self.p_values >= (self.level if level is None else level) / len(self.names)).all())

    def distribution(self, levels: Any) -> np.ndarray:
        """The empirical distribution functions at given levels, ``[len(levels), k]``."""
        return (self.values[None] <= np.asarray(levels)[:, None, None]).mean(1)

    def table(self) -> list[dict[str, Any]]:
        """One line a column."""
        rows = zip(self.names, self.deviations, self.p_values, strict=True)
        return [
            {"name": name, "deviation": float(d), "reading": self.meaning[0 if d >= 0 else 1], "p-value": float(p)}
            for name, d, p in rows
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`table`."""
        write_csv(path, self.table())

    def plot(self, ax: Any = None) -> Any:
        """Distribution functions beside the diagonal, with the band that 95 % of uniform samples stay in.

        :param ax: Matplotlib axes; new ones by default.
        :return: the axes.
        """
        ax = new_axes(4.5, 4.5) if ax is None else ax
        root = np.sqrt(len(self.values))
        width = 1.358 / (root + 0.12 + 0.11 / root)
        ax.fill_between([0, 1], [-width, 1 - width], [width, 1 + width], color="0.85", lw=0, label="95 % of uniform")
        levels = np.linspace(0, 1, 201)
        curves = self.distribution(levels)
        for i in self._shown():
            ax.plot(levels, curves[:, i], label=self.names[i])
        ax.plot([0, 1], [0, 1], color="0.4", lw=0.8)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level", ylabel="share of simulations", title=self.title)
        ax.legend(frameon=False, fontsize="small")
        return ax


def levels_of_ranks(places: Any, below: Any, equal: Any, num_draws: int) -> np.ndarray:
    r"""Ranks of values among draws, as levels that are exactly uniform where value and draws are exchangeable.

    A value above :math:`b` and equal to :math:`e` of :math:`n` draws gets :math:`(b + u (e + 1)) / (n + 1)`: any of the
    ranks that it may have, and a place in the gap. So discrete values are uniform too.

    :param places: independent uniform :math:`u`. **below**, **equal** - :math:`b` and :math:`e`; all of one shape.
    """
    return (np.asarray(below) + np.asarray(places) * (np.asarray(equal) + 1)) / (num_draws + 1)
