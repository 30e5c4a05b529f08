"""Densities on grids: how much probability they hold, where it is highest, and pictures of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from numpyro_smc.reports.plots import new_axes

#: Probability within one, two and three standard deviations of a Gaussian.
LEVELS = (0.6827, 0.9545, 0.9973)


@dataclass(frozen=True, repr=False)
class Grid:
    r"""A posterior density at the centres of cells; it unpacks into ``points, density``.

    :ivar axes: cell centres of each of k parameters, ``[num]``.
    :ivar density: normalised over the grid, ``[num] * k``.
    :ivar elements: names of the parameters.
    """

    axes: tuple[np.ndarray, ...]
    density: np.ndarray
    elements: tuple[str, ...]
    _total: float
    _is_calibrated: bool

    @classmethod
    def of(cls, axes: Any, log_density: np.ndarray, elements: tuple[str, ...], is_calibrated: bool) -> Grid:
        """From an unnormalised log density."""
        volume = float(np.prod([axis[1] - axis[0] if len(axis) > 1 else 1.0 for axis in axes]))
        highest = log_density.max()
        if not np.isfinite(highest):
            raise FloatingPointError(f"Marginal.grid: the log density of {', '.join(elements)} is {highest}.")
        scaled = np.exp(log_density - highest)
        mass = scaled.sum() * volume
        return cls(tuple(axes), scaled / mass, elements, float(np.exp(highest) * mass), is_calibrated)

    def __iter__(self) -> Any:
        yield self.axes[0] if len(self.axes) == 1 else self.axes
        yield self.density

    def __repr__(self) -> str:
        total = f", total probability {self._total:.4f}" if self._is_calibrated else ""
        return f"Grid of {', '.join(self.elements)}: {' x '.join(str(len(axis)) for axis in self.axes)} cells{total}"

    @property
    def total_probability(self) -> float:
        r""":math:`\int p(\theta_b) \hat r(\theta_b, x)\, d\theta_b` over the grid: one, if the ratio is right.

        :raises ValueError: for a loss that learns the ratio up to a factor only (NRE-B).
        """
        if not self._is_calibrated:
            raise ValueError(
                "total_probability: the loss learns the ratio up to a factor c(x) only, so this number means nothing. "
                "Train with loss='A', 'C' or 'balanced'."
            )
        return self._total

    def masses(self) -> np.ndarray:
        """Probability of each cell; they sum to one."""
        return self.density / self.density.sum()

    def rank(self, value: Any) -> float:
        """Probability of all cells whose density is higher than that at a point: its highest-density level.

        Uniform over the unit interval for draws from the posterior.

        :param value: ``[k]``.
        """
        cells = [
            int(np.clip(np.rint((v - axis[0]) / (axis[1] - axis[0])), 0, len(axis) - 1))
            for v, axis in zip(np.ravel(value), self.axes, strict=True)
        ]
        masses = self.masses()
        return float(masses[masses > masses[tuple(cells)]].sum())

    def thresholds(self, levels: Any = LEVELS) -> np.ndarray:
        """Densities whose superlevel sets hold the given probabilities."""
        ordered = np.sort(self.density.ravel())[::-1]
        cumulative = np.cumsum(ordered) / ordered.sum()
        return ordered[np.minimum(np.searchsorted(cumulative, levels), len(ordered) - 1)]

    def plot(self, ax: Any = None, levels: Any = LEVELS, color: str = "C0") -> Any:
        """The density of one parameter, or highest-density contours of two.

        :param ax: Matplotlib axes; new ones by default.
        :return: the axes.
        :raises ValueError: for three parameters.
        """
        if len(self.axes) > 2:
            raise ValueError(f"plot: a grid of {len(self.axes)} parameters has no picture; ask for one or two.")
        ax = new_axes() if ax is None else ax
        if len(self.axes) == 1:
            ax.plot(self.axes[0], self.density, color=color)
            ax.set(xlabel=self.elements[0], ylim=(0, None))
            return ax
        heights = np.unique(self.thresholds(levels))
        ax.contour(*self.axes, self.density.T, levels=heights, colors=color)
        ax.set(xlabel=self.elements[0], ylabel=self.elements[1])
        return ax
