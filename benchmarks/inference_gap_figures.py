"""Figures of :mod:`benchmarks.inference_gap`: stacked gaps, gaps over training, and every image's two gaps."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Row = dict[str, Any]
GAPS = ("approximation", "amortisation")


def plot_all(rows: Sequence[Row], families: Sequence[str], folder: Path, name: str) -> list[str]:
    """Write ``{name}.png``, ``{name}_images.png`` and, for several numbers of epochs, ``{name}_training.png``.

    :return: the names of the files.
    """
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return []
    last = {row["experiment"]: row for row in sorted(rows, key=lambda row: row["epochs"])}
    figures = {name: stacked(list(last.values()), families), f"{name}_images": by_image(last, families, folder, name)}
    if len({row["epochs"] for row in rows}) > 1:
        figures[f"{name}_training"] = over_training(rows, families)
    for stem, figure in figures.items():
        figure.savefig(folder / f"{stem}.png", dpi=130)
        plt.close(figure)
    return [f"{stem}.png" for stem in figures]


def image_table(name: str, row: Row) -> str:
    """The file of a row's images, one a line."""
    return f"{name}_{row['experiment']}_{row['epochs']}.csv"


def stacked(rows: Sequence[Row], families: Sequence[str]) -> Any:
    """Approximation and amortisation gaps of every experiment and family."""
    bars = [(row, family) for row in rows for family in families if f"approximation {family}" in row]
    figure, ax = plt.subplots(figsize=(2 + 1.1 * len(bars), 4), layout="constrained")
    labels = [f"{row['experiment']}\nlocal {family}" for row, family in bars]
    base = np.zeros(len(bars))
    for gap in GAPS:
        heights = np.array([row[f"{gap} {family}"] for row, family in bars])
        errors = np.array([2 * row[f"{gap} {family} s.e."] for row, family in bars])
        ax.bar(labels, heights, bottom=base, yerr=errors, width=0.6, capsize=3, label=gap)
        base = base + heights
    ax.set_ylabel("gap (nats per image, ± 2 s.e.)")
    ax.legend(frameon=False)
    return figure


def over_training(rows: Sequence[Row], families: Sequence[str]) -> Any:
    """Both gaps against the epochs of training, a panel per experiment."""
    experiments = list(dict.fromkeys(row["experiment"] for row in rows))
    size = (4.5 * len(experiments), 3.6)
    figure, axes = plt.subplots(1, len(experiments), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, experiment in zip(axes[0], experiments, strict=True):
        trained = sorted((r for r in rows if r["experiment"] == experiment), key=lambda row: row["epochs"])
        epochs = [row["epochs"] for row in trained]
        for gap, style in zip((*GAPS, "inference"), ("-", "--", ":"), strict=True):
            for number, family in enumerate(families if gap != "inference" else [""]):
                column = f"{gap} {family}".strip()
                means, errors = ([row[key] for row in trained] for key in (column, f"{column} s.e."))
                color = "0.4" if gap == "inference" else f"C{number}"
                ax.errorbar(epochs, means, 2 * np.array(errors), ls=style, color=color, capsize=2, label=column)
        ax.set_xscale("log")
        ax.set_xticks(epochs, [str(number) for number in epochs])
        ax.set_title(experiment)
        ax.set_xlabel("epochs")
    axes[0, 0].set_ylabel("gap (nats per image, ± 2 s.e.)")
    axes[0, 0].legend(frameon=False)
    return figure


def by_image(last: dict[str, Row], families: Sequence[str], folder: Path, name: str) -> Any:
    """Amortisation against approximation gap of every image, a panel per experiment."""
    size = (3.8 * len(last), 3.6)
    figure, axes = plt.subplots(1, len(last), figsize=size, squeeze=False, layout="constrained")
    for ax, (experiment, row) in zip(axes[0], last.items(), strict=True):
        with open(folder / image_table(name, row), newline="") as file:
            images = list(csv.DictReader(file))
        for family in families:
            below, above = ([float(image[f"{gap}_{family}"]) for image in images] for gap in GAPS)
            ax.plot(below, above, ".", ms=4, alpha=0.7, label=family)
        ax.axline((0.0, 0.0), slope=1.0, color="0.7", lw=0.8)
        ax.set_title(experiment)
        ax.set_xlabel("approximation gap (nats)")
    axes[0, 0].set_ylabel("amortisation gap (nats)")
    axes[0, 0].legend(frameon=False)
    return figure
