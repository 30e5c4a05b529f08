"""Plots of sequences: bands over time with the data."""

from typing import Any

import numpy as np


def new_axes(width: float = 6.0, height: float = 3.5) -> Any:
    """Matplotlib axes of a new figure."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def plot_filter(bands: Any, data: Any, name: str, probability: float, ax: Any = None) -> Any:
    """Lower, median and upper curve over time, with the data as points.

    :param bands: ``[3, T, ...]``; every further element is a curve of its own, the first eight are drawn.
    :param data: ``[T, ...]``, or ``None``.
    :param ax: matplotlib axes; made if not given.
    :return: the axes.
    """
    ax = new_axes(9.0) if ax is None else ax
    curves = np.asarray(bands).reshape(3, np.shape(bands)[1], -1)
    times = np.arange(curves.shape[1])
    for i in range(min(curves.shape[2], 8)):
        label = f"{name}: median and {probability:.0%} band" if i == 0 else None
        (line,) = ax.plot(times, curves[1, :, i], lw=1.2, label=label)
        ax.fill_between(times, curves[0, :, i], curves[2, :, i], color=line.get_color(), alpha=0.25, lw=0)
    if data is not None:
        points = np.asarray(data).reshape(len(data), -1)[:, :8]
        ax.plot(np.arange(len(points)), points, ".", ms=3, color="0.3", label=None)
    ax.set_xlabel("step")
    ax.legend(frameon=False)
    return ax
