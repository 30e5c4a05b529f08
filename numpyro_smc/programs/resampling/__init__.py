"""Resampling: which particles the next generation descends from."""

from numpyro_smc.programs.resampling.bernoulli import bernoulli
from numpyro_smc.programs.resampling.diffusion import diffusion
from numpyro_smc.programs.resampling.gapped_straight_through import gapped_straight_through
from numpyro_smc.programs.resampling.gumbel_softmax import gumbel_softmax
from numpyro_smc.programs.resampling.killing import conditional as _conditional_killing
from numpyro_smc.programs.resampling.killing import killing
from numpyro_smc.programs.resampling.multinomial import conditional as _conditional_multinomial
from numpyro_smc.programs.resampling.multinomial import log_prob as _log_prob_multinomial
from numpyro_smc.programs.resampling.multinomial import multinomial
from numpyro_smc.programs.resampling.optimal_transport import optimal_transport
from numpyro_smc.programs.resampling.registry import Scheme, available, register, resolve
from numpyro_smc.programs.resampling.residual import conditional as _conditional_residual
from numpyro_smc.programs.resampling.residual import residual
from numpyro_smc.programs.resampling.soft import soft
from numpyro_smc.programs.resampling.ssp import ssp
from numpyro_smc.programs.resampling.stratified import conditional as _conditional_stratified
from numpyro_smc.programs.resampling.stratified import stratified
from numpyro_smc.programs.resampling.systematic import conditional as _conditional_systematic
from numpyro_smc.programs.resampling.systematic import systematic

__all__ = [
    "Scheme",
    "available",
    "bernoulli",
    "diffusion",
    "gapped_straight_through",
    "gumbel_softmax",
    "killing",
    "multinomial",
    "optimal_transport",
    "register",
    "residual",
    "resolve",
    "soft",
    "ssp",
    "stratified",
    "systematic",
]

register(Scheme("killing", killing, _conditional_killing, unbiased=True, cost="O(N log N); needs num_samples == N"))
register(
    Scheme(
        "multinomial",
        multinomial,
        _conditional_multinomial,
        unbiased=True,
        log_prob=_log_prob_multinomial,
        cost="O(N log N); most variance",
    )
)
register(Scheme("residual", residual, _conditional_residual, unbiased=True, cost="O(N log N); twice multinomial"))
register(Scheme("ssp", ssp, unbiased=True, cost="O(N) in sequence; slow on accelerators"))
register(Scheme("stratified", stratified, _conditional_stratified, unbiased=True, cost="O(N log N)"))
register(Scheme("systematic", systematic, _conditional_systematic, unbiased=True, cost="O(N log N); cheapest"))

# Schemes with options, at their defaults: name them to use these, or call them for others.
register(bernoulli())
register(diffusion())
register(gapped_straight_through())
register(gumbel_softmax())
register(optimal_transport())
register(soft())
