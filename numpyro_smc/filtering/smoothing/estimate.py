"""A smoothed expectation with its Monte Carlo error."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from numpyro_smc.reports.plots import new_axes


@dataclass(frozen=True, repr=False)
class SmoothedEstimate:
    """What :meth:`~numpyro_smc.FilterResult.smooth` and :meth:`~numpyro_smc.FilterResult.score` estimate.

    - **value** - mean over independent runs of the filter, a pytree as the functional returned it: ``[T, ...]`` of
      each step, ``[...]`` of an additive functional, and structured like ``params`` of a score.
    - **standard_error** - of the mean, from the spread of the runs; not a number for a single run. Biases, of order 1/N
      and those of a method, are not in it.
    - **runs** - the estimates of the single runs, with a leading axis.
    - **what**, **method**, **num_particles**, **num_repeats** - what was estimated, and how.
    - **per_step** - whether the leading axis of the value is time.
    """

    value: Any
    standard_error: Any
    runs: Any
    what: str
    method: str
    num_particles: int
    num_repeats: int
    per_step: bool

    def table(self) -> list[dict[str, Any]]:
        """One row per element: its place, value and standard error."""
        rows = []
        values, _ = jax.tree_util.tree_flatten_with_path(self.value)
        for (path, value), error in zip(values, jax.tree.leaves(self.standard_error), strict=True):
            name = jax.tree_util.keystr(path) or self.what
            for index in np.ndindex(np.shape(value)):
                place = {"step": index[0]} if self.per_step else {}
                element = index[1:] if self.per_step else index
                label = f"{name}{list(element)}" if element else name
                rows.append(place | {"name": label, "value": float(value[index]), "s.e.": float(error[index])})
        return rows

    def __repr__(self) -> str:
        rows = self.table()
        runs = f"{self.num_repeats} run" + "s" * (self.num_repeats > 1)
        head = f"SmoothedEstimate of {self.what} by {self.method}: {runs} of {self.num_particles} particles"
        lines = [
            f"  {row['name']}"
            + (f" at step {row['step']}" if self.per_step else "")
            + f": {row['value']:.4g} +- {row['s.e.']:.2g}"
            for row in (rows if len(rows) <= 8 else rows[:4] + rows[-4:])
        ]
        if len(rows) > 8:
            lines.insert(4, f"  ... {len(rows) - 8} more")
        return "\n".join([head, *lines])

    def plot(self, *, ax: Any = None) -> Any:
        """Values over the steps with a band of two standard errors; of a sum or a score, points with error bars.

        Returns the matplotlib axes.
        """
        ax = new_axes(9.0) if ax is None else ax
        if not self.per_step:
            rows = self.table()
            places = np.arange(len(rows))
            ax.errorbar(places, [r["value"] for r in rows], [2 * r["s.e."] for r in rows], fmt="o", capsize=3)
            ax.set_xticks(places, [row["name"] for row in rows], rotation=30)
            ax.set_ylabel(self.what)
            return ax
        values, _ = jax.tree_util.tree_flatten_with_path(self.value)
        for (path, value), error in zip(values, jax.tree.leaves(self.standard_error), strict=True):
            mean, width = (np.asarray(x).reshape(len(value), -1) for x in (value, 2 * np.nan_to_num(error)))
            for i in range(min(mean.shape[1], 8)):
                label = jax.tree_util.keystr(path) or self.what
                (line,) = ax.plot(mean[:, i], lw=1.2, label=label if i == 0 else None)
                low, high = mean[:, i] - width[:, i], mean[:, i] + width[:, i]
                ax.fill_between(np.arange(len(mean)), low, high, color=line.get_color(), alpha=0.25, lw=0)
        ax.set_xlabel("step")
        ax.legend(frameon=False)
        return ax
