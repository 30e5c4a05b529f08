"""Do marginals that were learned apart agree where they overlap?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_smc.ratio.grid import Grid
from numpyro_smc.reports.plots import new_axes

if TYPE_CHECKING:
    from numpyro_smc.ratio.estimator import RatioEstimator


@dataclass(frozen=True, repr=False)
class Consistency:
    r"""Earth mover's distances between the densities that pairs of marginals give to the elements they share.

    :ivar distances: ``[M, M]``, mean over observations; of one shared element, as a fraction of its range; not a number
        for marginals that share nothing, or more than one element.
    :ivar subsets: the marginals' elements.
    """

    distances: np.ndarray
    subsets: tuple[tuple[str, ...], ...]

    def __repr__(self) -> str:
        return (
            f"Consistency of {len(self.subsets)} marginals: mean distance {np.nanmean(self._pairs):.4f}, largest "
            f"{np.nanmax(self._pairs):.4f} of the range"
        )

    @property
    def _pairs(self) -> np.ndarray:
        return self.distances[np.triu_indices(len(self.subsets), 1)]

    def table(self) -> list[dict[str, Any]]:
        """One line a pair of marginals that share one element."""
        return [
            {"first": ", ".join(a), "second": ", ".join(b), "distance": float(self.distances[i, j])}
            for (i, a), (j, b) in itertools.combinations(enumerate(self.subsets), 2)
            if np.isfinite(self.distances[i, j])
        ]

    def plot(self, ax: Any = None) -> Any:
        """A heat map, in hundredths of the range.

        :return: the axes.
        """
        ax = new_axes(6.0, 5.0) if ax is None else ax
        image = ax.imshow(100 * self.distances, vmin=0, cmap="viridis")
        names = [", ".join(subset) for subset in self.subsets]
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
        ax.set_yticks(range(len(names)), names, fontsize="x-small")
        ax.figure.colorbar(image, ax=ax, label="distance / range, %")
        return ax


def consistency(
    estimator: RatioEstimator,
    x: Any,
    subsets: Sequence[Sequence[str]] | None = None,
    num: int = 50,
    context: Any = None,
) -> Consistency:
    """Compare marginals of one and two elements on grids, at several observations.

    :param x: ``[B, *event]``.
    :param subsets: the marginals, by names; by default all of one and two elements.
    :param num: cells of the grid for each element.
    :param context: of each observation, ``[B, C]``.
    :raises ValueError: for marginals that the estimator has not learned.
    """
    names = estimator.elements
    if subsets is None:
        subsets = [*itertools.combinations(names, 1), *itertools.combinations(names, 2)]
    total = np.zeros((len(subsets), len(subsets)))
    for i in range(len(x)):
        given = None if context is None else context[i]
        grids = [estimator.marginal(x[i], list(subset), given).grid(num) for subset in subsets]
        total += np.array([[_distance(first, second) for second in grids] for first in grids])
    return Consistency(total / len(x), tuple(map(tuple, subsets)))


def _distance(first: Grid, second: Grid) -> float:
    shared = [name for name in first.elements if name in second.elements]
    if len(shared) != 1:
        return np.nan
    masses = []
    for grid in (first, second):
        others = tuple(i for i, name in enumerate(grid.elements) if name != shared[0])
        masses.append(grid.masses().sum(others))
    return float(np.abs(np.cumsum(masses[0] - masses[1])).sum() / len(masses[0]))
