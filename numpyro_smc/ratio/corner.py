"""All marginals of one and two parameters in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_smc.ratio.grid import LEVELS

if TYPE_CHECKING:
    from numpyro_smc.ratio.estimator import RatioEstimator


def corner(
    estimator: RatioEstimator,
    x_obs: Any,
    params: Sequence[str] | None = None,
    *,
    num: int = 60,
    truth: Any = None,
    levels: Sequence[float] = LEVELS,
    context: Any = None,
) -> Any:
    """Marginal densities on the diagonal, highest-density contours of pairs below it; no sampling.

    Contours enclose 68.27, 95.45 and 99.73 % of the probability. The estimator must know the marginals: train with
    ``masks=UniformMask()``, or with the subsets of one and two among ``marginals``.

    :param x_obs: the observation.
    :param params: names of sites or elements; all by default.
    :param num: cells of the grids for each parameter.
    :param truth: values to mark, one for each element drawn.
    :return: a Matplotlib figure.
    :raises ValueError: for marginals that were not learned, or whose prior has no density in closed form.
    """
    import matplotlib.pyplot as plt

    chosen = estimator.simulator.mask(params)
    names = np.asarray(estimator.elements)[chosen].tolist()
    size = len(names)
    marked = None if truth is None else np.ravel(truth)
    if marked is not None and len(marked) != size:
        raise ValueError(f"corner: truth has {len(marked)} values; expected one for each of {', '.join(names)}.")
    figure, axes = plt.subplots(size, size, figsize=(1.0 + 1.7 * size,) * 2, squeeze=False, layout="constrained")
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            ax = axes[i, j]
            if j > i:
                ax.set_visible(False)
                continue
            subset = [row] if i == j else [column, row]
            grid = estimator.marginal(x_obs, subset, context).grid(num)
            grid.plot(ax, levels)
            _label(ax, i, j, names)
            if marked is not None:
                ax.axvline(marked[j], color="C3", lw=0.8)
                if i != j:
                    ax.axhline(marked[i], color="C3", lw=0.8)
    return figure


def _label(ax: Any, row: int, column: int, names: list[str]) -> None:
    ax.set(xlabel=names[column] if row == len(names) - 1 else "", ylabel=names[row] if row != column == 0 else "")
    ax.tick_params(labelsize="x-small", labelbottom=row == len(names) - 1, labelleft=row != column == 0)
