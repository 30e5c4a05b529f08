"""Whole models whose evidence is known: Gaussian processes, a mixture, eight schools, a conjugate regression.

Twenty runs of each method: the mean of their evidences is within five of its standard errors (false alarms 6e-7), and
at most two runs are further off than three of the standard errors they state (2e-5).
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random

from models import eight_schools, gaussian_process, linear_regression, static_targets
from numpyro_smc import AIS, DSMCS, SMCSampler, bidirectional, log_marginal_likelihood, resampling
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

RUNS = 20
MEANS = np.stack([np.linspace(-2.0, 1.0, 10), np.full(10, 2.0), np.r_[np.full(5, 3.0), np.full(5, -3.0)]])
MIXTURE = static_targets.gaussian_mixture(MEANS, 0.8, (0.6, 0.3, 0.1))
SIZES = {
    "smc": {"num_particles": 500},
    "ais": {"num_chains": 32, "num_temperatures": 400, "num_leapfrog": 5, "schedule": "adaptive"},
}


def process(y, scale_tril):
    gaussian_process.model(scale_tril, y, whiten=True)


def mixture():
    numpyro.sample("z", MIXTURE)


def wide():
    static_targets.guide(MIXTURE)


def estimates(method, model, *args, **options):
    keys = [random.key(i) for i in range(RUNS)]
    return [log_marginal_likelihood(key, model, *args, method=method, **SIZES[method], **options) for key in keys]


def assert_right(found, truth, largest_error):
    """In the mean, by their own standard errors, and with errors that are worth having."""
    assert_unbiased_evidence([each.value for each in found], truth)
    assert sum(abs(each.value - truth) > 3 * each.standard_error for each in found) <= 2
    assert all(each.standard_error < largest_error for each in found)
    assert all(each.verdict.startswith("No sign of trouble") for each in found)


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("name", ["rbf1", "rbf2"])
def test_gaussian_processes_have_their_exact_evidence(method, name):
    """30 latents. The published evidences are -13.9604 and -20.6808."""
    problem = gaussian_process.load_problem(name)
    truth = gaussian_process.log_evidence(problem)
    assert abs(truth - {"rbf1": -13.9604, "rbf2": -20.6808}[name]) < 1e-3
    args = jnp.asarray(problem.y, jnp.float32), jnp.asarray(problem.scale_tril, jnp.float32)
    assert_right(estimates(method, process, *args), truth, 0.5)


def test_an_asymmetric_mixture_in_ten_dimensions_has_evidence_one_by_annealed_importance_sampling():
    """Modes of weight 0.6, 0.3 and 0.1, from N(0, 9 I)."""
    assert_right(estimates("ais", mixture, guide=wide), 0.0, 0.7)


def test_tempered_samplers_keep_the_evidence_of_an_asymmetric_mixture_and_the_shares_of_its_modes():
    """N = 500. Mean shares are within five standard errors, and within four points."""
    sampler = SMCSampler(mixture, 500, init_guide=(wide, {}))
    results = [sampler.run(random.key(i), progress_bar=False) for i in range(RUNS)]
    assert_unbiased_evidence([result.log_evidence for result in results], 0.0)
    assert sum(abs(result.log_evidence) > 3 * result.log_evidence_se for result in results) <= 2
    shares = np.array([static_targets.mode_weights(MIXTURE, r.samples["z"], r.log_weights) for r in results])
    for number, weight in enumerate((0.6, 0.3, 0.1)):
        assert_mean(shares[:, number], weight)
    assert np.max(np.abs(shares.mean(0) - [0.6, 0.3, 0.1])) < 0.04


SCHOOLS = tuple(jnp.asarray(values, jnp.float32) for values in eight_schools.load_problem())


@pytest.mark.parametrize("options", [{"waste_free": 10}, {"persistent": True}], ids=["waste-free", "persistent"])
def test_waste_free_and_persistent_samplers_find_the_evidence_of_eight_schools(options):
    truth = eight_schools.integrals(*SCHOOLS).log_evidence
    assert_right(estimates("smc", eight_schools.model, *SCHOOLS, **options), truth, 0.3)


def assert_tight_and_right(bounds, log_evidence):
    """The gap is below 0.1 nat, and both bounds are those of the evidences of the simulated data."""
    truth = np.array([log_evidence(*args) for args, _ in bounds.problems])
    assert bounds.mean_gap + 2 * bounds.mean_gap_error < 0.1
    assert "nearly exact" in bounds.verdict
    assert_unbiased_evidence(np.asarray(bounds.lower) - truth, 0.0)
    assert_unbiased_evidence(truth - np.asarray(bounds.upper), 0.0)


CERTIFIED = {"num_chains": 16, "num_temperatures": 2000, "num_leapfrog": 5, "schedule": "adaptive"}


@pytest.mark.slow
def test_bounds_from_both_sides_are_tight_on_eight_schools():
    """96 simulated sets of schools, each with its evidence by quadrature."""
    bounds = bidirectional(random.key(0), AIS(eight_schools.model, **CERTIFIED), *SCHOOLS, num_simulated=96)
    assert_tight_and_right(bounds, lambda *args: eight_schools.integrals(*args).log_evidence)


@pytest.mark.slow
def test_bounds_from_both_sides_are_tight_on_a_conjugate_regression():
    """96 simulated data sets of 20 rows, five weights."""
    x, y, noise_scale = linear_regression.random_problem(np.random.default_rng(1), 20, 5)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def simulate(seen):
        return (x, seen["y"], noise_scale), {}

    ais = AIS(linear_regression.model, **CERTIFIED)
    bounds = bidirectional(random.key(0), ais, x, y, noise_scale, num_simulated=96, simulate=simulate)
    assert_tight_and_right(bounds, linear_regression.log_evidence)


BIASED = [name for name in resampling.available() if not resampling.resolve(name).unbiased]


@pytest.mark.parametrize("name", BIASED)
def test_no_annealed_sampler_gives_an_evidence_by_a_biased_scheme(name):
    assert BIASED
    with pytest.raises(ValueError, match=f"SMCSampler: resampler '{name}'"):
        log_marginal_likelihood(random.key(0), eight_schools.model, *SCHOOLS, method="smc", resampler=name)
    with pytest.raises(ValueError, match=f"DSMCS: the {name} scheme is biased"):
        DSMCS(8, 4, resampler=name)
