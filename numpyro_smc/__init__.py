"""Sequential Monte Carlo and modern variational inference on ordinary NumPyro programs."""

from numpyro_smc import verify
from numpyro_smc.elbo.dais import DAIS
from numpyro_smc.elbo.dreg import DReG
from numpyro_smc.elbo.dsmcs import DSMCS
from numpyro_smc.elbo.fivo import FIVO
from numpyro_smc.elbo.iwelbo import IWELBO
from numpyro_smc.elbo.ovis import OVIS
from numpyro_smc.elbo.reinforce import DecayingAverage, Reinforce
from numpyro_smc.elbo.rws import RWS
from numpyro_smc.elbo.sixo import SIXO
from numpyro_smc.elbo.sticking_the_landing import STL
from numpyro_smc.elbo.tvo import TVO
from numpyro_smc.elbo.vimco import VIMCO
from numpyro_smc.engines.alternation import StepwiseOptim, alternating
from numpyro_smc.engines.schedules import burda_schedule, log_schedule
from numpyro_smc.engines.training import FitResult, fit
from numpyro_smc.evidence.ais import AIS
from numpyro_smc.evidence.bidirectional import BoundsFromBothSides, bidirectional
from numpyro_smc.evidence.estimate import Evidence
from numpyro_smc.evidence.importance import importance
from numpyro_smc.evidence.marginal_likelihood import log_marginal_likelihood
from numpyro_smc.filtering.evidence import log_evidence
from numpyro_smc.filtering.filter import ParticleFilter
from numpyro_smc.filtering.result import FilterResult
from numpyro_smc.filtering.smoothing.estimate import SmoothedEstimate
from numpyro_smc.filtering.smoothing.online import OnlineSmoother
from numpyro_smc.filtering.streaming import FilterState
from numpyro_smc.guides.auto_dsmcs import AutoDSMCS
from numpyro_smc.guides.auxiliary import AuxiliaryFlowGuide, extend_guide, extend_model
from numpyro_smc.guides.flow import FlowGuide, flow
from numpyro_smc.guides.gap_result import InferenceGap
from numpyro_smc.guides.inference_gap import inference_gap
from numpyro_smc.guides.local import LocalOptimizer, LocalOptimum
from numpyro_smc.kernels.conditional_smc import ConditionalSMC
from numpyro_smc.kernels.particle_gibbs import ParticleGibbs
from numpyro_smc.kernels.particle_metropolis import ParticleMetropolis
from numpyro_smc.kernels.smc2 import SMC2
from numpyro_smc.kernels.smc2_result import SMC2Result
from numpyro_smc.programs import resampling
from numpyro_smc.programs.bootstrap import bootstrap
from numpyro_smc.programs.twist import gauss_hermite, twist
from numpyro_smc.ratio.corner import corner
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.masks import PoissonMask, RestrictedMask, SelectionMask, SizesMask, UniformMask
from numpyro_smc.ratio.nre import NRE
from numpyro_smc.ratio.posterior import RatioPosterior
from numpyro_smc.reports.c2st import TwoSampleTest, c2st
from numpyro_smc.reports.gradient_statistics import GradientStatistics, gradient_statistics
from numpyro_smc.reports.posterior_gap import ActiveUnits, BoundGap, active_units, kl_q_p
from numpyro_smc.samplers.result import SMCResult
from numpyro_smc.samplers.smc_kernel import SMCKernel
from numpyro_smc.samplers.smc_sampler import SMCSampler

__version__ = "0.1.0"

__all__ = [
    "AIS",
    "DAIS",
    "DSMCS",
    "FIVO",
    "IWELBO",
    "NRE",
    "OVIS",
    "RWS",
    "SIXO",
    "SMC2",
    "STL",
    "TVO",
    "VIMCO",
    "ActiveUnits",
    "AutoDSMCS",
    "AuxiliaryFlowGuide",
    "BoundGap",
    "BoundsFromBothSides",
    "ConditionalSMC",
    "DReG",
    "DecayingAverage",
    "Evidence",
    "FilterResult",
    "FilterState",
    "FitResult",
    "FlowGuide",
    "GradientStatistics",
    "InferenceGap",
    "LocalOptimizer",
    "LocalOptimum",
    "OnlineSmoother",
    "ParticleFilter",
    "ParticleGibbs",
    "ParticleMetropolis",
    "PoissonMask",
    "RatioEstimator",
    "RatioPosterior",
    "Reinforce",
    "RestrictedMask",
    "SMC2Result",
    "SMCKernel",
    "SMCResult",
    "SMCSampler",
    "SelectionMask",
    "SizesMask",
    "SmoothedEstimate",
    "StepwiseOptim",
    "TwoSampleTest",
    "UniformMask",
    "active_units",
    "alternating",
    "bidirectional",
    "bootstrap",
    "burda_schedule",
    "c2st",
    "corner",
    "extend_guide",
    "extend_model",
    "fit",
    "flow",
    "gauss_hermite",
    "gradient_statistics",
    "importance",
    "inference_gap",
    "kl_q_p",
    "log_evidence",
    "log_marginal_likelihood",
    "log_schedule",
    "resampling",
    "twist",
    "verify",
]
