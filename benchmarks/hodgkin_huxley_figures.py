"""Figures of :mod:`benchmarks.hodgkin_huxley`: currents and bounds over training, bounds by particles, potentials."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jax import Array, random
from numpyro.infer import SVI

from models import hodgkin_huxley as hh
from numpyro_smc import ParticleFilter

Points = Sequence[dict[str, Any]]


def learning(curves: Points, folder: Path, name: str) -> None:
    """Write ``{name}_currents.png`` and ``{name}_bounds.png``: over training, a panel per method."""
    methods = list(dict.fromkeys(point["method"] for point in curves))
    if not methods:
        return
    for quantity, label in (("current", "current (μA / cm²)"), ("bound", "own bound (nats per series)")):
        figure, axes = plt.subplots(
            1, len(methods), figsize=(1 + 3.6 * len(methods), 3.6), squeeze=False, sharey=True, layout="constrained"
        )
        for ax, method in zip(axes[0], methods, strict=True):
            own = [point for point in curves if point["method"] == method]
            for start in dict.fromkeys(point["init_current"] for point in own):
                line = [(p["step"], p[quantity]) for p in own if p["init_current"] == start]
                first = [(0, start)] if quantity == "current" else []
                ax.plot(*np.array([*first, *line]).T, label=f"from {start:g}")
            if quantity == "current":
                ax.axhline(hh.TRUE_CURRENT, color="0.3", lw=0.8, ls="--")
            else:
                ax.set_yscale("symlog", linthresh=100)
            ax.set(title=method, xlabel="step (of the twist too)")
        axes[0, 0].set_ylabel(label)
        axes[0, -1].legend(frameon=False, fontsize=8)
        figure.savefig(folder / f"{name}_{quantity}s.png", dpi=130)
        plt.close(figure)


def inference(curves: Points, folder: Path, name: str) -> None:
    """Write ``{name}_particles.png``: the bound by the number of particles, a panel per noise and subsampling."""
    cells = list(dict.fromkeys((point["noise"], point["subsample"]) for point in curves))
    if not cells:
        return
    figure, axes = plt.subplots(1, len(cells), figsize=(1 + 3.6 * len(cells), 3.6), squeeze=False, layout="constrained")
    for ax, cell in zip(axes[0], cells, strict=True):
        own = [point for point in curves if (point["noise"], point["subsample"]) == cell]
        for method in dict.fromkeys(point["method"] for point in own):
            line = [point for point in own if point["method"] == method]
            sizes = [point["particles"] for point in line]
            (drawn,) = ax.plot(sizes, [p["bound"] for p in line], marker="o", label=f"{method}, mean")
            ax.plot(sizes, [p["bound median"] for p in line], ls="--", color=drawn.get_color(), label="median")
        ax.set(xscale="log", xlabel="particles", title=f"noise {cell[0]:g} mV, every {cell[1]} steps")
        ax.set_yscale("symlog", linthresh=100)
    axes[0, 0].set_ylabel("bound (nats per series)")
    axes[0, -1].legend(frameon=False, fontsize=8)
    figure.savefig(folder / f"{name}_particles.png", dpi=130)
    plt.close(figure)


def posterior_bands(
    method: str,
    svi: SVI,
    params: dict[str, Any],
    fixed: dict[str, Array],
    states: np.ndarray,
    y: np.ndarray,
    program: dict[str, Any],
    options: argparse.Namespace,
) -> str:
    """The first test series' potential, its observations, and bands of 90 % by few and by many particles.

    Bands are those of paths drawn from independent runs of the filter, each path by its final weight.

    :return: the name of the file.
    """
    few, many = min(options.particles), max(options.particles)
    times = hh.STEP * np.arange(options.num_steps)
    seen = np.arange(options.num_steps) % program["subsample"] == 0
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for ax, size in zip(axes, (few, many), strict=True):
        particles = ParticleFilter(svi.model, size, guide=None if method == "fivo-bootstrap" else svi.guide)
        num_runs = 20
        v = []
        for key in random.split(random.key(5), num_runs):
            filtered = particles.run(key, y[0], fixed, params=params)
            paths = filtered.sample_posterior(random.fold_in(key, 1), max(options.num_paths // num_runs, 1))
            v.append(np.asarray(paths["x"])[..., 0])
        low, middle, high = hh.VOLTAGE_UNIT * np.quantile(np.concatenate(v), [0.05, 0.5, 0.95], 0)
        ax.fill_between(times, low, high, alpha=0.35, lw=0, color="tab:red", label="90 % band")
        ax.plot(times, middle, color="tab:red", lw=1, label="median")
        ax.plot(times, hh.VOLTAGE_UNIT * states[0, :, 0], color="k", lw=0.8, label="true")
        ax.plot(times[seen], hh.VOLTAGE_UNIT * y[0, seen, 0], ".", color="tab:blue", ms=4, label="observed")
        ax.set(ylabel="potential (mV)", title=f"{method}, {size} particles")
    axes[-1].set_xlabel("time (ms)")
    axes[0].legend(frameon=False, fontsize=8, ncols=4)
    name = f"potential_{method}_{program['noise']:g}_{program['subsample']}.png"
    figure.savefig(Path(options.output) / name, dpi=130)
    plt.close(figure)
    return name
