"""Whole models whose evidence is known: Gaussian processes, a mixture, eight schools, a conjugate regression.

Runs have fixed keys. "Within three standard errors" is of each of four runs: a false alarm has probability 1 % per
case under normality, which fixed keys rule out.
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random

from models import eight_schools, gaussian_process, linear_regression, static_targets
from numpyro_smc import AIS, DSMCS, SMCSampler, bidirectional, log_marginal_likelihood, resampling
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

RUNS = 4
MEANS = np.stack([np.linspace(-2.0, 1.0, 10), np.full(10, 2.0), np.r_[np.full(5, 3.0), np.full(5, -3.0)]])
MIXTURE = static_targets.gaussian_mixture(MEANS, 0.8, (0.6, 0.3, 0.1))
SIZES = {
    "smc": {"num_particles": 500},
    "ais": {"num_chains": 64, "num_temperatures": 200, "num_leapfrog": 5},
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


def assert_within_three_standard_errors(found, truth, largest_error):
    for each in found:
        assert each.verdict.startswith("Trustworthy")
        assert each.standard_error < largest_error
        assert abs(each.value - truth) < 3 * each.standard_error


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("name", ["rbf1", "rbf2"])
def test_gaussian_processes_have_their_exact_evidence(method, name):
    """30 latents. The published evidences are -13.9604 and -20.6808."""
    problem = gaussian_process.load_problem(name)
    truth = gaussian_process.log_evidence(problem)
    assert abs(truth - {"rbf1": -13.9604, "rbf2": -20.6808}[name]) < 1e-3
    args = jnp.asarray(problem.y, jnp.float32), jnp.asarray(problem.scale_tril, jnp.float32)
    assert_within_three_standard_errors(estimates(method, process, *args), truth, 0.35)


@pytest.mark.parametrize("method", SIZES)
def test_an_asymmetric_mixture_in_ten_dimensions_has_evidence_one(method):
    """Modes of weight 0.6, 0.3 and 0.1, from N(0, 9 I)."""
    assert_within_three_standard_errors(estimates(method, mixture, guide=wide), 0.0, 0.45)


def test_modes_of_an_asymmetric_mixture_keep_their_shares():
    """N = 500, 20 runs, mean shares within five standard errors (3e-6 for false alarms) and four points."""
    sampler = SMCSampler(mixture, 500, init_guide=(wide, {}))
    results = [sampler.run(random.key(i), progress_bar=False) for i in range(20)]
    shares = np.array([static_targets.mode_weights(MIXTURE, r.samples["z"], r.log_weights) for r in results])
    for number, weight in enumerate((0.6, 0.3, 0.1)):
        assert_mean(shares[:, number], weight)
    assert np.max(np.abs(shares.mean(0) - [0.6, 0.3, 0.1])) < 0.04
    assert_unbiased_evidence([r.log_evidence for r in results], 0.0)


SCHOOLS = tuple(jnp.asarray(values, jnp.float32) for values in eight_schools.load_problem())


@pytest.mark.parametrize("options", [{}, {"waste_free": 10}, {"persistent": True}], ids=["plain", "waste-free", "pool"])
def test_plain_waste_free_and_persistent_samplers_find_the_evidence_of_eight_schools(options):
    truth = eight_schools.integrals(*SCHOOLS).log_evidence
    assert_within_three_standard_errors(estimates("smc", eight_schools.model, *SCHOOLS, **options), truth, 0.3)


@cache
def schools_bounds():
    ais = AIS(eight_schools.model, num_chains=16, num_temperatures=400, num_leapfrog=5)
    return bidirectional(random.key(0), ais, *SCHOOLS, num_simulated=12)


def test_bounds_from_both_sides_are_tight_on_eight_schools_and_hold_its_evidence():
    """Twelve simulated sets of schools, each with its evidence by quadrature; 400 temperatures, 16 chains."""
    bounds = schools_bounds()
    truth = np.array([eight_schools.integrals(*args).log_evidence for args, _ in bounds.problems])
    assert bounds.mean_gap + 2 * bounds.mean_gap_error < 0.1
    assert "nearly exact" in bounds.verdict
    assert_unbiased_evidence(np.asarray(bounds.lower) - truth, 0.0)
    assert_unbiased_evidence(truth - np.asarray(bounds.upper), 0.0)


def test_bounds_from_both_sides_are_tight_on_a_conjugate_regression_and_hold_its_evidence():
    """Twelve simulated data sets of 20 rows, five weights; 400 temperatures, 16 chains."""
    x, y, noise_scale = linear_regression.random_problem(np.random.default_rng(1), 20, 5)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    ais = AIS(linear_regression.model, num_chains=16, num_temperatures=400, num_leapfrog=5)
    bounds = bidirectional(
        random.key(0), ais, x, y, noise_scale, num_simulated=12, simulate=lambda seen: ((x, seen["y"], noise_scale), {})
    )
    truth = np.array([linear_regression.log_evidence(*args) for args, _ in bounds.problems])
    assert bounds.mean_gap + 2 * bounds.mean_gap_error < 0.1
    assert_unbiased_evidence(np.asarray(bounds.lower) - truth, 0.0)
    assert_unbiased_evidence(truth - np.asarray(bounds.upper), 0.0)


BIASED = [name for name in resampling.available() if not resampling.resolve(name).unbiased]


@pytest.mark.parametrize("name", BIASED)
def test_no_annealed_sampler_gives_an_evidence_by_a_biased_scheme(name):
    assert BIASED
    with pytest.raises(ValueError, match=f"SMCSampler: resampler '{name}'"):
        log_marginal_likelihood(random.key(0), eight_schools.model, *SCHOOLS, method="smc", resampler=name)
    with pytest.raises(ValueError, match=f"DSMCS: the {name} scheme is biased"):
        DSMCS(8, 4, resampler=name)


def test_an_observation_that_is_missing_is_named_by_every_method():
    broken = SCHOOLS[0].at[2].set(jnp.nan), SCHOOLS[1]
    for method, sizes in {"importance": {"num_samples": 100}, **SIZES}.items():
        with pytest.raises(FloatingPointError, match="site 'y'"):
            log_marginal_likelihood(random.key(0), eight_schools.model, *broken, method=method, **sizes)
