"""Eight schools: its quadrature against integrals of the program's own density, and its published data."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.util import log_density
from scipy import integrate, stats

from models import eight_schools

PROBLEM = eight_schools.load_problem()


def test_the_density_is_that_of_the_formulas():
    latents = {"mu": jnp.array(3.0), "tau": jnp.array(6.0), "theta": jnp.linspace(-4.0, 15.0, 8)}
    value = log_density(eight_schools.model, PROBLEM, {}, latents)[0]
    expected = stats.norm.logpdf(3.0, 0, 5) + stats.halfnorm.logpdf(6.0, scale=10)
    expected += stats.norm.logpdf(latents["theta"], 3.0, 6.0).sum()
    expected += stats.norm.logpdf(PROBLEM.y, latents["theta"], PROBLEM.scale).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_one_school_has_the_integrals_of_its_density():
    """With one school everything but tau and mu is one more Gaussian; scipy integrates both, to 1e-7."""
    y, scale = PROBLEM.y[:1], PROBLEM.scale[:1]
    found = eight_schools.integrals(y, scale)

    def integral(function):
        def density(mu, tau):
            likelihood = stats.norm.pdf(y[0], mu, np.hypot(tau, scale[0]))
            return function(mu, tau) * likelihood * stats.norm.pdf(mu, 0, 5) * stats.halfnorm.pdf(tau, scale=10)

        return integrate.dblquad(density, 0, 80, -50, 60, epsabs=1e-9, epsrel=1e-7)[0]

    evidence = integral(lambda mu, tau: 1.0)
    np.testing.assert_allclose(found.log_evidence, np.log(evidence), atol=1e-6)
    for index, name in enumerate(("mu", "tau")):
        mean = integral(lambda *at, index=index: at[index]) / evidence
        variance = integral(lambda *at, index=index, mean=mean: (at[index] - mean) ** 2) / evidence
        np.testing.assert_allclose([found.mean[name], found.variance[name]], [mean, variance], rtol=1e-5)


def test_the_evidence_of_eight_schools_is_that_of_the_marginal_gaussian_averaged_over_tau():
    """Simpson's rule of 2,001 points in tau itself, of the eight-dimensional Gaussian that is left."""
    tau = np.linspace(0.0, 80.0, 2001)
    log_joint = [
        stats.multivariate_normal.logpdf(PROBLEM.y, cov=25.0 + np.diag(t**2 + PROBLEM.scale**2))
        + stats.halfnorm.logpdf(t, scale=10)
        for t in tau
    ]
    expected = np.log(integrate.simpson(np.exp(log_joint), x=tau))
    found = eight_schools.integrals(*PROBLEM)
    np.testing.assert_allclose(found.log_evidence, expected, atol=1e-7)
    finer = eight_schools.integrals(*PROBLEM, num_points=2000)
    np.testing.assert_allclose(found.log_evidence, finer.log_evidence, atol=1e-8)
    np.testing.assert_allclose(list(found.mean.values()), list(finer.mean.values()), rtol=1e-7)


def test_simulated_schools_have_the_moments_of_the_model():
    from numpyro.infer import Predictive

    draws = Predictive(eight_schools.model, num_samples=20_000)(jax.random.key(0), None, PROBLEM.scale)
    expected = 25.0 + 100.0 + PROBLEM.scale**2
    np.testing.assert_allclose(np.var(draws["y"], axis=0), expected, rtol=0.1)
