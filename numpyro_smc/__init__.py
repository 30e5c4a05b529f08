"""Sequential Monte Carlo and modern variational inference on ordinary NumPyro programs."""

from numpyro_smc.elbo.fivo import FIVO
from numpyro_smc.elbo.sixo import SIXO
from numpyro_smc.engines.alternation import alternating
from numpyro_smc.engines.training import FitResult, fit
from numpyro_smc.filtering.evidence import log_evidence
from numpyro_smc.filtering.filter import ParticleFilter
from numpyro_smc.filtering.result import FilterResult
from numpyro_smc.filtering.streaming import FilterState
from numpyro_smc.programs import resampling
from numpyro_smc.programs.bootstrap import bootstrap
from numpyro_smc.programs.twist import gauss_hermite, twist

__version__ = "0.1.0"

__all__ = [
    "FIVO",
    "SIXO",
    "FilterResult",
    "FilterState",
    "FitResult",
    "ParticleFilter",
    "alternating",
    "bootstrap",
    "fit",
    "gauss_hermite",
    "log_evidence",
    "resampling",
    "twist",
]
