"""The evidence as an integral over temperatures."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from numpyro_smc.samplers.progress import Progress


class LogEvidence(NamedTuple):
    """An estimate of the log evidence.

    - **value**, **standard_error** - Monte Carlo error only.
    - **correction** - what the second-order term added: of the size of the quadrature's error without it. The error
      that is left is smaller, and in no standard error. 0 where there is no quadrature.
    """

    value: float
    standard_error: float
    correction: float = 0.0


class Thermodynamics(NamedTuple):
    """Log likelihoods of a run by temperature, from 0 to the last: **temperatures**, **mean** and **variance**.

    - **quadrature_variance** - Monte Carlo variance of their integral.
    """

    temperatures: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    quadrature_variance: float

    @classmethod
    def of(cls, progress: Progress) -> Thermodynamics:
        """From the reports of a run of at least one stage."""

        def from_zero(first: str, later: str) -> np.ndarray:
            return np.concatenate([progress.column(first)[:1], progress.column(later)]).astype(np.float64)

        return cls(
            np.concatenate([[0.0], progress.column("temperature").astype(np.float64)]),
            from_zero("previous_mean", "log_likelihood"),
            from_zero("previous_variance", "log_likelihood_variance"),
            float(progress.column("quadrature_variance")[-1]),
        )

    def integral(self) -> LogEvidence:
        """See :meth:`SMCResult.path_sampling`."""
        if np.isneginf(self.mean[0]):
            raise ValueError(
                "path_sampling: some draw of the start has no likelihood, so the mean log likelihood at temperature 0 "
                "is minus infinity. Use log_evidence, which allows for such draws, or write what rules them out into "
                "the support of the prior."
            )
        steps = np.diff(self.temperatures)
        correction = float(-(steps**2) @ np.diff(self.variance) / 12.0)
        value = float(steps @ (self.mean[:-1] + self.mean[1:]) / 2.0) + correction
        return LogEvidence(value, math.sqrt(self.quadrature_variance), correction)
