"""Programs as users write them: they run under NumPyro unchanged, and under particle methods with the exact answers.

Statistical tests: the mean over 400 independent runs of ``exp(log Z - exact)`` within 5 standard errors of 1, the
reference's own error included; false alarms 6e-7 per program and problem.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive
from numpyro.infer.util import log_density
from numpyro.optim import Adam

from numpyro_smc import FIVO, ParticleFilter, bootstrap
from tests.programs import user_programs
from tests.programs.user_programs import PROGRAMS, UserProgram

NUM_RUNS = 400

every_program = pytest.mark.parametrize("name", PROGRAMS)


def scan_sites(trace) -> dict:
    return {name: site for name, site in trace.items() if site["type"] == "sample"}


def numpyro_log_weights(program: UserProgram, values, num_particles: int) -> np.ndarray:
    """Log weights of whole paths as NumPyro itself computes them: log p(x, y) - log q(x), or log p(y | x) without guide."""
    params = program.params

    def one(path):
        def total(model, which):
            seeded = handlers.seed(handlers.substitute(model, data=params | path), 0)
            trace = handlers.trace(seeded).get_trace(*program.args, **program.kwargs)
            found = 0.0
            for name, site in scan_sites(trace).items():
                if name in params or not which(site):
                    continue
                log_prob = site["fn"].log_prob(site["value"])
                if site["is_observed"] and program.num_observed is not None:
                    log_prob = log_prob[: program.num_observed]
                found = found + jnp.sum(log_prob * (1.0 if site["scale"] is None else site["scale"]))
            return found

        if program.guide is None:
            return total(program.model, lambda site: site["is_observed"])
        return total(program.model, lambda site: True) - total(program.guide, lambda site: True)

    return np.array([one(jax.tree.map(lambda v, n=n: v[n], values)) for n in range(num_particles)])


@every_program
def test_log_weights_are_those_of_numpyros_own_densities(name):
    """Two particles that are never resampled: their weights are sums over the sites of NumPyro's trace."""
    program = PROGRAMS[name]
    particle_filter = ParticleFilter(program.model, 2, guide=program.guide, resample="never")
    result = particle_filter.run(jax.random.key(0), *program.args, params=program.params, **program.kwargs)
    steps = jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), result.history.steps["values"])
    values = result.history.initial["values"] | steps
    latents = {key: value for key, value in values.items() if key not in observed_names(program)}
    found = result.log_weights[-1] + result.log_evidence
    found = program.scale * np.asarray(found).reshape(2, -1).sum(1)
    np.testing.assert_allclose(found, numpyro_log_weights(program, latents, 2), rtol=1e-4, atol=1e-3)


def observed_names(program: UserProgram) -> set[str]:
    params = program.params
    seeded = handlers.seed(handlers.substitute(program.model, data=params), 0)
    trace = handlers.trace(seeded).get_trace(*program.args, **program.kwargs)
    return {key for key, site in trace.items() if site["type"] != "sample" or site["is_observed"]}


@every_program
def test_evidence_estimate_is_unbiased(name):
    program = PROGRAMS[name]
    exact = program.exact()
    particle_filter = ParticleFilter(program.model, program.num_particles, guide=program.guide)

    def run(key):
        return particle_filter.log_evidence(key, *program.args, params=program.params, **program.kwargs)

    log_z = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), NUM_RUNS)), float)
    assert log_z.std(0).max() < 0.7, "too noisy for the normal approximation"
    ratio = np.exp(log_z - exact.log_evidence)
    error = np.sqrt(ratio.var(0, ddof=1) / NUM_RUNS + np.square(exact.standard_error)) + 1e-4  # single precision
    assert np.all(np.abs(ratio.mean(0) - 1) < 5 * error), (ratio.mean(0), error, log_z.std(0))
