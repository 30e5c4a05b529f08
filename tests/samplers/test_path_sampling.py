"""Thermodynamic integration and standard errors from the genealogy, against a conjugate model.

Mean tests are at five standard errors over replicates with fixed keys: false alarms 6e-7 per case.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_smc.samplers.thermodynamics import Thermodynamics
from tests.samplers import static_models as models
from tests.samplers.static_models import SMCSampler, replicates
from tests.statistics_of_estimates import assert_mean

LADDER = np.linspace(0.0, 1.0, 21) ** 2
DENSE = SMCSampler(models.conjugate, 200, moves="rwmh", num_moves=10, tempering=LADDER)
EVIDENCE = models.conjugate_evidence(*models.CONJUGATE)


def exact(temperatures):
    """Mean and variance of the log likelihood of the conjugate model at each temperature."""
    y, prior_scale, noise = (np.asarray(a, np.float64) for a in models.CONJUGATE)
    variance = 1.0 / (prior_scale**-2 + np.asarray(temperatures)[:, None] / noise**2)
    mean = variance * (0.5 / prior_scale**2 + np.asarray(temperatures)[:, None] * y / noise**2)
    distance = (y - mean) ** 2
    means = -0.5 * np.log(2 * np.pi * noise**2) - (variance + distance) / (2 * noise**2)
    variances = (2 * variance**2 + 4 * variance * distance) / (4 * noise**4)
    return Thermodynamics(np.asarray(temperatures), means.sum(1), variances.sum(1), 0.0)


def test_the_integral_of_exact_moments_is_the_evidence_and_the_second_order_term_helps():
    errors = []
    for num_temperatures in (30, 60, 120):
        value, _, correction = exact(np.linspace(0.0, 1.0, num_temperatures + 1) ** 4).integral()
        assert abs(value - EVIDENCE) < 0.2 * abs(correction)
        errors.append(abs(value - EVIDENCE))
    assert errors[1] < errors[0] / 8 and errors[2] < errors[1] / 8  # fourth order: towards 1/16
    assert errors[2] < 1e-4


def test_path_sampling_estimates_the_integral_with_its_standard_error():
    """N = 200, 20 temperatures, 100 runs. With exact coverage of 95 %, fewer than 86 of 100 have probability 2e-4."""
    results = replicates(DENSE, 100, *models.CONJUGATE)
    moments = exact(np.concatenate([[0.0], results[0].betas]))
    expected = moments.integral().value
    estimates = [r.path_sampling() for r in results]
    assert_mean([estimate.value for estimate in estimates], expected)
    covered = [abs(value - expected) < 1.96 * error for value, error, _ in estimates]
    assert sum(covered) >= 86
    spread = np.std([estimate.value for estimate in estimates])
    assert 0.7 < np.mean([estimate.standard_error for estimate in estimates]) / spread < 1.5
    for stage in (0, 7, 20):
        assert_mean([r.thermodynamics.mean[stage] for r in results], moments.mean[stage])
        # The variance of N correlated draws is a little small: O(1 / N).
        sample = [r.thermodynamics.variance[stage] for r in results]
        assert abs(np.mean(sample) / moments.variance[stage] - 1.0) < 0.05
    assert results[0].stepping_stone()[:2] == (results[0].log_evidence, results[0].log_evidence_se)


def test_from_a_guide_the_path_is_that_of_the_importance_weight():
    def guide(y, prior_scale, noise):
        with numpyro.plate("dimension", 2):
            numpyro.sample("x", dist.Normal(jnp.array([1.2, -1.5]), 1.0))

    chosen = SMCSampler(models.conjugate, 400, moves="rwmh", target_ess=0.9, init_guide=(guide, {}))
    estimates = [r.path_sampling() for r in replicates(chosen, 20, *models.CONJUGATE)]
    assert max(abs(estimate.correction) for estimate in estimates) < 0.1
    # What the quadrature leaves, at most a tenth of its correction, counts as an error of the reference.
    assert_mean([estimate.value for estimate in estimates], EVIDENCE, reference_error=0.01)


@pytest.mark.slow
def test_the_standard_error_of_a_share_is_that_of_modes_which_no_move_leaves():
    """N = 500, 60 runs; the spread of 60 runs is known to 9 %."""
    chosen = SMCSampler(models.two_modes, 500, moves="mala")
    results = replicates(chosen, 60)
    in_mode = [np.asarray(r.samples["z"]).mean(1) < 0.0 for r in results]
    shares = [np.exp(r.log_weights) @ mode / 500 for r, mode in zip(results, in_mode, strict=True)]
    errors = [r.standard_error(mode) for r, mode in zip(results, in_mode, strict=True)]
    assert 0.6 < np.mean(errors) / np.std(shares) < 1.5
    # What the moves mix within a mode is as good as independent draws.
    within = [
        r.standard_error(np.where(mode, np.asarray(r.samples["z"])[:, 0] + 1.5, 0.0))
        for r, mode in zip(results, in_mode, strict=True)
    ]
    assert 0.5 < np.mean(within) / (0.3 * 0.9**0.5 / 500**0.5) < 2.0
    with pytest.raises(ValueError, match="values has 3 rows; expected one for each of the 500 particles"):
        results[0].standard_error(np.zeros(3))


def test_path_sampling_of_an_interrupted_run_is_refused(monkeypatch):
    result = DENSE.run(random.key(0), *models.CONJUGATE, progress_bar=False)
    monkeypatch.setattr(result, "interrupted", True)
    with pytest.raises(ValueError, match="interrupted before temperature 1; resume it"):
        result.path_sampling()
