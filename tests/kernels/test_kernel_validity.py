"""Particle-MCMC kernels leave posteriors invariant, for few particles; broken ones are found.

Geweke's test and simulation-based calibration of all latents, with false alarms of 1 in 1000 for each case that passes,
at fixed seeds. Mutants are made of the kernels themselves, by replacing one of their functions.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import random
from numpyro.infer import HMC
from numpyro.infer.util import log_density

from models import linear_gaussian
from numpyro_smc import ConditionalSMC, ParticleFilter, ParticleGibbs
from numpyro_smc.engines import particles
from numpyro_smc.kernels import conditional_smc, pseudo_marginal
from numpyro_smc.kernels.particle_metropolis import ParticleMetropolis
from numpyro_smc.verify import check_unbiased_evidence, geweke, sbc
from tests.kernels.validity_models import MODELS, random_path

hmc = partial(HMC, step_size=0.4, num_steps=3, trajectory_length=None)

KERNELS = {
    "Gibbs": {"ancestor_sampling": False},
    "Gibbs, ess": {"ancestor_sampling": False, "resample": "ess"},
    "Gibbs with ancestor sampling": {},
    "Gibbs with ancestor sampling, ess": {"resample": "ess"},
    "Gibbs with backward sampling": {"backward_sampling": True},
    "Gibbs with backward sampling, ess": {"backward_sampling": True, "resample": "ess"},
    "Metropolis": {"step_size": 0.7, "keep_paths": True},
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
every_kernel = pytest.mark.parametrize("name", KERNELS)


def kernel(name, num_particles=8):
    def on(model):
        if name == "Metropolis":
            return ParticleMetropolis(model, num_particles, **KERNELS[name])
        return ParticleGibbs(model, num_particles, parameter_kernel=hmc, **KERNELS[name])

    return on


# ---- kernels of parameters and path


@pytest.mark.parametrize(
    ("name", "model"), [("Gibbs with ancestor sampling, ess", "hidden Markov"), ("Metropolis", "stochastic volatility")]
)
def test_posteriors_of_parameters_and_paths_are_invariant(name, model):
    """1000 replicates."""
    found = geweke(random.key(0), kernel(name), MODELS[model], observed="y", num_replicates=1000, num_steps=10)
    assert found.passed, found


@pytest.mark.slow
@every_model
@every_kernel
def test_posteriors_are_invariant_in_many_replicates(name, model):
    """10,000 replicates of 20 steps: distribution functions that are off by 0.03 somewhere are found."""
    found = geweke(random.key(1), kernel(name), model, observed="y", num_replicates=10_000, num_steps=20)
    assert found.passed, found


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("name", [name for name in KERNELS if "backward" not in name])
def test_chains_from_elsewhere_reach_calibrated_posteriors(name, model):
    """1000 simulations. The ranks presume draws that are nearly independent, which the effective size shows."""
    thinning = 60 if name == "Metropolis" else 20
    sizes = {"num_simulations": 1000, "num_draws": 20, "num_warmup": 200, "thinning": thinning}
    found = sbc(random.key(2), kernel(name, 20), model, observed="y", **sizes)
    assert found.passed and found.is_independent, found


@pytest.mark.parametrize("num_chains", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_path_to_start_from_is_what_its_parameters_are_weighed_by(num_chains):
    """Else the first steps of the parameters would hold against them the path that a filter drew."""
    start = {"level": -0.3, "persistence": 1.0, "x": jnp.array([-3.0, -2.0, 4.0, 0.0, 1.0])}
    rng_key, y = random.key(0), jnp.array([0.3, -1.0, 0.5, 2.0, -0.1])
    if num_chains is not None:
        rng_key = random.split(rng_key, num_chains)
        start = {name: jnp.broadcast_to(value, (num_chains, *jnp.shape(value))) for name, value in start.items()}
    model = MODELS["stochastic volatility"]
    kernel = ParticleGibbs(model, 8, parameter_kernel=hmc)
    state = jax.jit(lambda rng_key, start, y: kernel.init(rng_key, 0, start, (y,), {}))(rng_key, start, y)
    persistence = 1.0 / (1.0 + math.exp(-1.0))
    values = {"level": -0.3, "persistence": persistence, "x": jnp.array([-3.0, -2.0, 4.0, 0.0, 1.0])}
    log_joint, _ = log_density(model, (y,), {}, values)
    log_joint += math.log(persistence * (1.0 - persistence))
    energies = jnp.atleast_1d(state.block_states[1].potential_energy)
    assert energies.tolist() == pytest.approx([-float(log_joint)] * len(energies), rel=1e-4)


# ---- the path's kernel, whole and broken

SIZES = {"observed": "y", "num_replicates": 2000, "num_steps": 10}
LINEAGES = {"ancestor_sampling": False}


def path_kernel(options):
    return lambda model: ConditionalSMC(model, 3, **options)


def without_pivot(*args, pivots=None, run=conditional_smc.run, **kwargs):
    """The reference's ancestors are drawn like all others."""
    return run(*args, **kwargs)


def without_reset(*args, build=conditional_smc.build, **kwargs):
    """Weights are carried on through resampling."""
    resample = build(*args, **kwargs)

    def unreset(rng_key, log_weights, *rest):
        found = resample(rng_key, log_weights, *rest)
        return found._replace(log_weights=jnp.where(found.resampled, log_weights[found.ancestors], found.log_weights))

    return unreset


def without_density(sequence):
    """Ancestor sampling by the weights alone."""

    def pivots(rng_key, t, inputs, state):
        return random.categorical(rng_key, state.log_weights, axis=0).astype(jnp.int32)

    return pivots


slow = pytest.mark.slow
MUTANTS = [
    pytest.param("run", without_pivot, LINEAGES, id="missing pivot"),
    pytest.param("build", without_reset, LINEAGES, id="weights that are not reset", marks=slow),
    pytest.param("pin", lambda sequence, path: None, LINEAGES, id="reference that is not pinned", marks=slow),
    pytest.param("ancestor_pivots", without_density, {}, id="ancestors without density", marks=slow),
    pytest.param("ancestor_pivots", without_density, {"resample": "ess"}, id="the same, ess", marks=slow),
]


@pytest.mark.parametrize(
    "options", [LINEAGES, pytest.param({"resample": "ess"}, marks=slow), pytest.param({}, marks=slow)], ids=str
)
def test_the_posterior_of_a_path_is_invariant_under_three_particles(options):
    found = geweke(random.key(1), path_kernel(options), random_path, **SIZES)
    assert found.passed, found


@pytest.mark.parametrize(("function", "mutant", "options"), MUTANTS)
def test_a_broken_conditional_smc_is_found(monkeypatch, function, mutant, options):
    monkeypatch.setattr(conditional_smc, function, mutant)
    found = geweke(random.key(1), path_kernel(options), random_path, **SIZES)
    assert not found.passed, found


# ---- pseudo-marginal Metropolis, broken


def wrong_sign(self, *args, propose=pseudo_marginal.Target.propose):
    proposal = propose(self, *args)
    return proposal._replace(log_ratio=-proposal.log_ratio)


def fresh_estimate(self, rng_key, current, *args, propose=pseudo_marginal.Target.propose):
    """The current place is estimated anew for each comparison."""
    fresh_key, rng_key = random.split(rng_key)
    fresh = self.at(fresh_key, self.split(current.z)[0])
    return propose(self, rng_key, current._replace(log_evidence=fresh.log_evidence), *args)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [wrong_sign, fresh_estimate])
def test_a_broken_metropolis_is_found(monkeypatch, mutant):
    monkeypatch.setattr(pseudo_marginal.Target, "propose", mutant)
    found = geweke(random.key(1), kernel("Metropolis", 3), MODELS["linear-Gaussian"], **SIZES)
    assert not found.passed, found


# ---- the evidence

SCALES = {"coefficient": 0.9, "transition_scale": 0.6, "emission_scale": 1.0, "initial_scale": 1.3}


def without_number(log_weights, normalise=particles.normalise):
    """Sums of weights in the place of means."""
    normalised, increment, ess = normalise(log_weights)
    return normalised, increment + math.log(log_weights.shape[0]), ess


@pytest.mark.parametrize("dropped", [False, True])
def test_an_evidence_without_its_number_of_particles_is_found(monkeypatch, dropped):
    """Which kernels of parameters cannot: a constant factor leaves their acceptance as it is."""
    parameters = linear_gaussian.ar1_parameters(**SCALES)
    y = linear_gaussian.simulate(random.key(3), parameters, 10)[1]
    if dropped:
        monkeypatch.setattr(particles, "normalise", without_number)
    particle_filter = ParticleFilter(linear_gaussian.ar1_model, 20)
    exact = linear_gaussian.log_evidence(parameters, y)
    found = check_unbiased_evidence(random.key(0), particle_filter, y[:, 0], exact=exact, **SCALES)
    assert found.passed is not dropped, found
