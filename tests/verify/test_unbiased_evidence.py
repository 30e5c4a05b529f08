"""The evidence check passes unbiased estimators, fails biased ones, and says where it cannot tell.

False alarms of the passing cases: 6e-7 for each element, at fixed seeds.
"""

import csv
import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_smc.verify import check_unbiased_evidence

EXACT = -6.588
check = partial(check_unbiased_evidence, random.key(0))


def lognormal(rng_key, scale=0.5, offset=0.0):
    """Unbiased for any scale; without the second term, too large by ``exp(scale ** 2 / 2)``."""
    return EXACT + scale * random.normal(rng_key) - 0.5 * scale**2 + offset


def importance(num_particles, log_mean, rng_key):
    """The evidence of y = 1 with z ~ N(0, 1), y ~ N(z, 0.6), by draws from the prior."""
    z = random.normal(rng_key, (num_particles,))
    return log_mean(-0.5 * ((1.0 - z) / 0.6) ** 2 - math.log(0.6 * math.sqrt(2 * math.pi)))


def mean(log_weights):
    return jnp.log(jnp.mean(jnp.exp(log_weights)))


def test_an_unbiased_estimator_passes():
    found = check(lognormal, exact=EXACT)
    assert found.passed is True and abs(found.z) < 5
    assert found.relative_variance == pytest.approx(math.expm1(0.25), rel=0.2)
    assert "No bias found; one above" in found.verdict and "EvidenceCheck of 1000 estimates" in repr(found)


def test_the_numbers_are_the_mean_and_its_standard_error():
    found = check(lognormal, exact=EXACT)
    ratios = np.exp(found.log_estimates - EXACT)
    assert found.ratio == pytest.approx(ratios.mean()) and found.log_estimates.shape == (1000,)
    assert found.standard_error == pytest.approx(ratios.std(ddof=1) / math.sqrt(1000), rel=1e-4)


@pytest.mark.parametrize("offset", [0.125, -0.15, math.log(10)], ids=["Jensen's", "too small", "dropped log N"])
def test_biased_estimators_fail(offset):
    found = check(lognormal, exact=EXACT, offset=offset)
    assert found.passed is False and found.verdict.startswith("Biased: off by")


def test_an_estimator_is_compared_with_another():
    many = partial(importance, 200, mean)
    assert check(partial(importance, 10, mean), reference=many).passed is True
    exact = -0.5 / 1.36 - 0.5 * math.log(2 * math.pi * 1.36)
    assert check(partial(importance, 10, mean), exact=exact).passed is True


def test_the_noise_of_the_reference_counts():
    against_itself, exact = check(lognormal, reference=lognormal), check(lognormal, exact=EXACT)
    assert against_itself.standard_error == pytest.approx(math.sqrt(2) * exact.standard_error, rel=0.15)


def test_the_mean_of_log_weights_is_no_evidence():
    many = partial(importance, 200, mean)
    assert check(partial(importance, 10, jnp.mean), reference=many).passed is False


def test_a_dropped_number_of_particles_shows_only_against_another_number():
    def total(log_weights):
        return mean(log_weights) + math.log(len(log_weights))

    same = partial(importance, 10, total)
    more = partial(importance, 100, total)
    assert check(partial(importance, 10, total), reference=same).passed is True
    assert check(partial(importance, 10, total), reference=more).passed is False


def test_heavy_tails_are_not_judged():
    found = check(lognormal, scale=4.0, exact=EXACT)
    assert found.passed is None and "Inconclusive" in found.verdict and found.pareto_k > 0.7


def test_heavy_tails_of_the_reference_are_not_judged_either():
    assert check(lognormal, reference=partial(lognormal, scale=4.0)).passed is None


def test_each_element_of_a_batch_is_checked():
    def batch(rng_key):
        return jnp.stack([lognormal(rng_key), lognormal(rng_key, 0.2, 0.1)])

    found = check(batch, exact=EXACT)
    assert [line["verdict"] for line in found.table()] == ["unbiased", "biased"] and found.passed is False
    assert found.ratio.shape == (2,)


def test_estimators_without_variance_are_judged_by_rounding():
    assert check(lambda key: jnp.asarray(EXACT), exact=EXACT).passed is True
    assert check(lambda key: jnp.asarray(EXACT) + 1e-3, exact=EXACT).passed is False


def test_estimates_that_vanish_now_and_then_count_as_zero():
    def sometimes(rng_key):
        return jnp.where(random.uniform(rng_key) < 0.5, EXACT + math.log(2), -jnp.inf)

    assert check(sometimes, exact=EXACT).passed is True


def test_estimates_that_are_no_numbers_fail():
    def sometimes(rng_key):
        return jnp.where(random.uniform(rng_key) < 0.01, jnp.nan, EXACT)

    assert check(sometimes, exact=EXACT).passed is False


def test_what_jax_cannot_trace_is_called_one_by_one():
    found = check(lambda key: float(lognormal(key)), exact=EXACT, num_replicates=50)
    traced = check(lognormal, exact=EXACT, num_replicates=50)
    np.testing.assert_allclose(found.log_estimates, traced.log_estimates, rtol=1e-6)


def test_a_method_log_evidence_is_found():
    class Filter:
        def log_evidence(self, rng_key, y, *, params):
            return lognormal(rng_key) + y * params

    assert check(Filter(), 2.0, exact=EXACT + 6.0, params=3.0).passed is True


def test_table_and_plot(tmp_path):
    found = check(lognormal, exact=EXACT)
    found.to_csv(tmp_path / "table.csv")
    (line,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert line["verdict"] == "unbiased" and float(line["ratio"]) == pytest.approx(float(found.ratio))
    assert len(found.plot().patches) > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either exact=, the log evidence, or reference="),
        ({"exact": 1.0, "reference": lognormal}, "either exact="),
        ({"exact": 1.0, "num_replicates": 10}, "num_replicates is 10"),
        ({"exact": -math.inf}, "must be finite"),
        ({"reference": lambda key: -jnp.inf}, "must be finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check(lognormal, **options)
