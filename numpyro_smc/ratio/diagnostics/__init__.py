"""Checks of a trained ratio: calibration of its posteriors, consistency of its marginals, power of its classifier."""

from numpyro_smc.ratio.diagnostics.calibration import coverage, marginal_coverage, sbc, tarp
from numpyro_smc.ratio.diagnostics.consistency import Consistency, consistency
from numpyro_smc.ratio.diagnostics.local_c2st import LocalTest, local_c2st
from numpyro_smc.ratio.diagnostics.power import ClassifierReport, mean_ratio, roc

__all__ = [
    "ClassifierReport",
    "Consistency",
    "LocalTest",
    "consistency",
    "coverage",
    "local_c2st",
    "marginal_coverage",
    "mean_ratio",
    "roc",
    "sbc",
    "tarp",
]
