"""Checks of one's own estimators and samplers, each with a verdict whose false-alarm rate is stated."""

from numpyro_smc.verify.calibration import Calibration, sbc
from numpyro_smc.verify.gradient import GradientCheck, check_gradient
from numpyro_smc.verify.successive_conditional import geweke
from numpyro_smc.verify.unbiased_evidence import EvidenceCheck, check_unbiased_evidence

__all__ = [
    "Calibration",
    "EvidenceCheck",
    "GradientCheck",
    "check_gradient",
    "check_unbiased_evidence",
    "geweke",
    "sbc",
]
