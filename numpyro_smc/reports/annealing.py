"""What the runs of an annealed sampler did, transition by transition."""

from typing import Any, NamedTuple

import numpy as np
from jax import Array

from numpyro_smc.engines.path import Schedule
from numpyro_smc.reports.plots import new_axes
from numpyro_smc.reports.summaries import mean_and_error


class AnnealingDiagnostics(NamedTuple):
    """Runs of an annealed sampler.

    - **log_evidence** - of each run, ``[num_mc, *plates]``.
    - **ess** - effective sample size after each transition, before any resampling, ``[num_mc, K, *plates]``.
    - **resampled** - whether particles were resampled before it, of the same shape.
    - **schedule** - betas, step sizes, mass and refreshment; **num_particles** - N.
    """

    log_evidence: Array
    ess: Array
    resampled: Array
    schedule: Schedule
    num_particles: int

    def __repr__(self) -> str:
        per_run = np.asarray(self.log_evidence, np.float64)
        per_run = per_run.reshape(len(per_run), -1).sum(1)
        mean, error = mean_and_error(per_run)
        return (
            f"AnnealingDiagnostics of {len(per_run)} runs: mean log evidence {mean:.5g} \u00b1 {error:.2g}, "
            f"effective sample size {np.mean(self.ess):.3g} of {self.num_particles} (lowest "
            f"{np.min(np.mean(self.ess, axis=0), initial=np.inf):.3g}), resampled before {np.mean(self.resampled):.0%} "
            f"of {self.schedule.step_sizes.size} transitions"
        )

    def plot(self, ax: Any = None) -> Any:
        """Effective sample size over the path, with the resampled fraction of the runs.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = new_axes() if ax is None else ax
        betas = np.asarray(self.schedule.betas)[1:]
        ess = np.asarray(self.ess).reshape(len(self.ess), len(betas), -1).mean(-1)
        ax.plot(betas, ess.mean(0), marker=".", label="mean effective sample size")
        ax.fill_between(betas, ess.min(0), ess.max(0), alpha=0.25, lw=0, label="range over runs")
        ax.set(xlabel="beta", ylim=(0, 1.05 * self.num_particles))
        ax.legend(frameon=False)
        return ax
