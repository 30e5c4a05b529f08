"""Tempered SMC against closed forms: evidence, posterior, standard error, effective sample sizes.

Mean tests are at five standard errors over replicates with fixed keys: false alarms 6e-7 per case. Adaptation has a
bias of order 1/N, which the replicates here cannot resolve at their N.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from tests.samplers import static_models as models
from tests.samplers.static_models import replicates, sampler
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

VARIANTS = {
    "hmc": {},
    "nuts": {"moves": "nuts"},
    "rwmh, multinomial": {"moves": "rwmh", "resampler": "multinomial", "dense_mass": True, "batch_size": 100},
    "waste-free": {"moves": "rwmh", "waste_free": 20},
    "persistent": {"moves": "rwmh", "persistent": True},
}


def assert_posterior(results, site, mean, scale):
    """Mean and variance, by the weighted particles."""
    values = [np.asarray(result.samples[site], np.float64) for result in results]
    weights = [np.exp(result.log_weights) / len(result.log_weights) for result in results]
    means = np.array([w @ v for w, v in zip(weights, values, strict=True)])
    squares = np.array([w @ (v - np.asarray(mean)) ** 2 for w, v in zip(weights, values, strict=True)])
    for i in np.ndindex(means.shape[1:]):
        assert_mean(means[(slice(None), *i)], float(np.asarray(mean)[i]))
        assert_mean(squares[(slice(None), *i)], float(np.asarray(scale)[i]) ** 2)


def test_evidence_is_unbiased_with_a_schedule_and_fixed_moves_of_the_user():
    """N = 64, 300 runs, 10 temperatures, some of which resample and some carry weights."""
    chosen = sampler(models.conjugate, 64, schedule=True, moves=models.random_walk, tune=(), step_size=0.4)
    results = replicates(chosen, 300, *models.CONJUGATE)
    assert 0.1 < np.mean([result.resampled.mean() for result in results]) < 0.9
    assert_unbiased_evidence([r.log_evidence for r in results], models.conjugate_evidence(*models.CONJUGATE))


@pytest.mark.parametrize("variant", VARIANTS)
def test_evidence_and_posterior_of_a_conjugate_model(variant):
    """N = 400, 40 runs."""
    results = replicates(sampler(models.conjugate, 400, **VARIANTS[variant]), 40, *models.CONJUGATE)
    assert_unbiased_evidence([r.log_evidence for r in results], models.conjugate_evidence(*models.CONJUGATE))
    assert_posterior(results, "x", *models.conjugate_posterior(*models.CONJUGATE))
    for result in results:
        assert (abs(result.ess[:-1] / 400 - 0.5) < 0.02).all() and result.ess[-1] / 400 > 0.48
        assert result.betas[-1] == 1.0 and (np.diff(result.betas) > 0.0).all()


@pytest.mark.parametrize("variant", ["hmc", "rwmh, multinomial", "waste-free", "persistent"])
def test_the_interval_of_the_standard_error_covers(variant):
    """100 problems, nominal 95 %. With exact coverage fewer than 86 have probability 2e-4."""
    chosen, covered = sampler(models.conjugate, 400, **VARIANTS[variant]), 0
    for seed in range(100):
        draws = np.random.default_rng(seed)
        scales = draws.uniform(0.5, 3.0, 2), draws.uniform(0.1, 0.5, 2)
        y = draws.normal(0.5, np.hypot(*scales))
        args = [array.astype(np.float32) for array in (y, *scales)]
        result = chosen.run(random.key(1000 + seed), *args, progress_bar=False)
        covered += abs(result.log_evidence - models.conjugate_evidence(*args)) < 1.96 * result.log_evidence_se
    assert covered >= 86


def test_student_t_toy_has_its_evidence_from_the_prior_and_from_a_guide():
    """N = 1000, 20 runs each; the value is by quadrature, to 1e-4."""
    from_prior = replicates(sampler(models.student_t, 1000, moves="rwmh"), 20, models.STUDENT_T_DATA)
    assert_unbiased_evidence([r.log_evidence for r in from_prior], -13.98703)
    params = {"log_scale": jnp.array(-0.3), "centre": jnp.array(1.2)}
    chosen = models.SMCSampler(
        models.student_t, 1000, moves="rwmh", init_guide=(models.student_t_guide, params), target_ess=0.8
    )
    from_guide = replicates(chosen, 20, models.STUDENT_T_DATA)
    assert_unbiased_evidence([r.log_evidence for r in from_guide], -13.98703)
    assert max(len(r.betas) for r in from_guide) < min(len(r.betas) for r in from_prior) + 2
    means = [[float(r.mean("m")) for r in results] for results in (from_prior, from_guide)]
    assert_mean(means[0], np.mean(means[1]), reference_error=np.std(means[1], ddof=1) / 20**0.5)


def test_simplex_and_positive_sites_in_plates_have_their_conjugate_posterior():
    """N = 64, 200 runs, 10 temperatures."""
    results = replicates(sampler(models.counts, 64, schedule=True, moves="rwmh"), 200, *models.COUNTS)
    assert_unbiased_evidence([r.log_evidence for r in results], models.counts_evidence(*models.COUNTS))
    concentration = np.array([1.0, 2.0, 0.7]) + np.asarray(models.COUNTS[0])
    mean = concentration / concentration.sum()
    assert_posterior(results, "p", mean, (mean * (1 - mean) / (concentration.sum() + 1)) ** 0.5)
    shape = 1.0 + np.asarray(models.COUNTS[1])
    assert_posterior(results, "rate", shape / 1.5, shape**0.5 / 1.5)


def test_a_hierarchical_model_against_quadrature():
    """N = 500, 30 runs."""
    exact, mean = models.schools_by_quadrature(*models.SCHOOLS)
    results = replicates(sampler(models.schools, 500), 30, *models.SCHOOLS)
    assert_unbiased_evidence([r.log_evidence for r in results], exact)
    assert_mean([float(r.mean("tau")) for r in results], mean)


def test_modes_of_weight_90_and_10_in_ten_dimensions_keep_their_shares():
    """N = 2000, 20 runs. The mean share is within 3 points, and within five standard errors."""
    results = replicates(sampler(models.two_modes, 2000, moves="mala"), 20)
    shares = [float(r._weights @ (r.samples["z"].mean(1) < 0.0)) for r in results]
    assert abs(np.mean(shares) - 0.9) < 0.03
    assert_mean(shares, 0.9)
    assert_unbiased_evidence([r.log_evidence for r in results], models.two_modes_evidence())


def test_particles_without_likelihood_die_at_once_and_are_counted():
    """N = 400, 100 runs; half the prior has likelihood zero."""
    results = replicates(sampler(models.truncated, 400, moves="rwmh"), 100, jnp.array(0.3))
    assert_unbiased_evidence([r.log_evidence for r in results], models.truncated_evidence(0.3))
    assert all((r.samples["x"] > 0.0).all() for r in results)
    with pytest.raises(ValueError, match=r"some draw of the start has no likelihood.*Use log_evidence"):
        results[0].path_sampling()


@pytest.mark.parametrize("model", ["conjugate", "counts"])
def test_ranks_of_the_truth_are_uniform_at_64_particles(model):
    """Truth and data from the prior predictive, 200 data sets; chi-squared over 4 bins at p = 1e-5 (25.9)."""
    draws, ranks = np.random.default_rng(7), []
    chosen = sampler(models.counts, 64, schedule=True, moves="rwmh")
    if model == "conjugate":
        chosen = sampler(models.conjugate, 64, schedule=True, moves=models.random_walk, tune=(), step_size=0.4)
    for seed in range(200):
        if model == "conjugate":
            _, prior_scale, noise = models.CONJUGATE
            site, truth = "x", draws.normal(0.5, prior_scale)
            args = draws.normal(truth, noise).astype(np.float32), prior_scale, noise
        else:
            site, truth = "rate", draws.exponential(2.0, 3)
            args = models.COUNTS[0], draws.poisson(truth).astype(np.int32)
        result = chosen.run(random.key(seed), *args, progress_bar=False)
        weights = np.exp(result.log_weights) / 64
        ranks.append(float(weights @ (np.asarray(result.samples[site])[:, 0] < truth[0])))
    observed = np.histogram(ranks, [0.0, 0.25, 0.5, 0.75, 1.0 + 1e-6])[0]
    assert ((observed - 50.0) ** 2 / 50.0).sum() < 25.9
