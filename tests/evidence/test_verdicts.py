"""What a verdict takes for granted is said in it, and draws that floating-point numbers do not resolve are refused."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_smc import importance, log_marginal_likelihood


def conjugate():
    numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 2.0)), 1.0), obs=1.0)


LOG_EVIDENCE = float(dist.Normal(0.0, 5**0.5).log_prob(1.0))


def guide():
    numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.8), numpyro.param("scale", 1.0)))


def verdict(model, guide=None, **params):
    return importance(random.key(0), model, guide=guide, params=params, num_samples=500)


REFUSED = (
    "Not to be trusted: the guide's draws of site 'z' are nearly all one and the same number. It is narrower than "
    "floating-point numbers resolve, and its density there is not that of its draws. Widen the guide, or train it in "
    "float64."
)


@pytest.mark.parametrize("scale", [1e-10, 1e-7])
def test_a_guide_narrower_than_float32_resolves_is_refused_by_site(scale):
    found = verdict(conjugate, guide, loc=0.8, scale=scale)
    assert found.verdict == REFUSED and found.unresolved == {"z"}


def test_one_element_of_many_is_enough():
    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("w", dist.Exponential(1.0))
        numpyro.sample("y", dist.Normal(z.sum(), 1.0), obs=1.0)

    def narrow():
        numpyro.sample("z", dist.Normal(1.0, jnp.array([1.0, 1e-9, 0.5])).to_event(1))
        numpyro.sample("w", dist.Exponential(1.2))

    with pytest.warns(UserWarning, match="Pareto k"):
        assert verdict(model, narrow).unresolved == {"z"}


def test_what_has_atoms_by_right_is_not_refused():
    """Point masses, discrete sites, and a narrow prior: there the densities of model and draws cancel."""

    def model():
        numpyro.sample("k", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(1e4, 1e-5)), 1.0), obs=1e4)

    def point():
        numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("z", dist.Delta(1e4))

    assert verdict(model).verdict.startswith("Trustworthy")
    assert verdict(model, point).unresolved == frozenset()


def test_a_small_but_resolved_guide_is_accepted_and_right():
    def model():
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1e-6)), 1e-6), obs=1e-6)

    def narrow():
        numpyro.sample("z", dist.Normal(5e-7, 0.8e-6))

    found = verdict(model, narrow)
    exact = dist.Normal(0.0, 2**0.5 * 1e-6).log_prob(1e-6)
    assert found.verdict.startswith("Trustworthy") and abs(found.value - exact) < 5 * found.standard_error


IF_REACHED = "(95%) if the guide reaches everywhere the posterior does, which no weight can tell,"
UNLESS_MISSED = "(95%) unless the draws have missed a mode, which they cannot tell,"


@pytest.mark.parametrize(
    ("method", "options", "unseen"),
    [
        ("importance", {"num_samples": 500}, IF_REACHED),
        ("ais", {"num_chains": 32, "num_temperatures": 20}, UNLESS_MISSED),
        ("smc", {"num_particles": 200, "moves": "rwmh"}, UNLESS_MISSED),
    ],
)
def test_what_weights_cannot_see_stands_in_every_verdict(method, options, unseen):
    found = log_marginal_likelihood(random.key(0), conjugate, method=method, options=options)
    assert unseen in found.verdict and "Not to be trusted" not in found.verdict
    assert abs(found.value - LOG_EVIDENCE) < 5 * found.standard_error
