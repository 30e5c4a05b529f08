"""Sums of many terms in single precision, and offspring of clouds so large that single precision does not hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_smc.programs.resampling.inverse_cdf import scaled_weights, search, strata
from numpyro_smc.programs.resampling.offspring import _LARGE, expected_offspring_up_to, search_strata
from numpyro_smc.programs.resampling.stratified import stratified
from numpyro_smc.programs.resampling.systematic import systematic
from numpyro_smc.programs.weights import add_compensated, sum_of_steps

SIZE = 1_000_000


def cloud(kind, size=SIZE):
    rng = np.random.default_rng(0)
    log_weights = 1.5 * rng.normal(size=size)
    if kind == "two values":
        log_weights = np.log(np.where(np.arange(size) < size // 2, 1 / 3, 1 / 7))
    if kind == "half of them dead":
        log_weights[rng.uniform(size=size) < 0.5] = -np.inf
        log_weights[-7:] = -np.inf
    if kind == "heavy":
        log_weights = -0.6 * np.log(rng.uniform(size=size))
    return np.asarray(log_weights, np.float32)


def expected(log_weights):
    weights = np.exp(np.asarray(log_weights, np.float64))
    return len(weights) * weights / weights.sum()


@pytest.mark.parametrize("kind", ["lognormal", "two values", "half of them dead", "heavy"])
@pytest.mark.parametrize(("scheme", "bound"), [(systematic, 1.0), (stratified, 2.0)])
def test_offspring_of_a_million_particles_are_within_the_schemes_bound(kind, scheme, bound):
    log_weights = cloud(kind)
    ancestors = np.asarray(jax.jit(scheme, static_argnums=2)(random.key(1), jnp.asarray(log_weights), SIZE))
    offspring = np.bincount(ancestors, minlength=SIZE)
    assert np.abs(offspring - expected(log_weights)).max() < bound
    assert (np.diff(ancestors) >= 0).all() and not offspring[np.isneginf(log_weights)].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lognormal", "two values", "half of them dead", "heavy"])
def test_offspring_of_ten_million_particles_are_within_one(kind):
    log_weights = cloud(kind, 10_000_000)
    ancestors = np.asarray(jax.jit(systematic, static_argnums=2)(random.key(1), jnp.asarray(log_weights), 10_000_000))
    assert np.abs(np.bincount(ancestors, minlength=10_000_000) - expected(log_weights)).max() < 1.0


def test_expected_offspring_are_summed_exactly():
    log_weights = cloud("lognormal")
    whole, fraction = expected_offspring_up_to(scaled_weights(jnp.asarray(log_weights)), SIZE)
    exact = np.cumsum(expected(log_weights))
    assert np.abs(np.asarray(whole, np.float64) + np.asarray(fraction) - exact).max() < 5e-3
    assert whole.dtype == jnp.int32 and (fraction >= 0).all() and (fraction <= 1).all()


def test_both_ways_agree_where_single_precision_still_does():
    weights = scaled_weights(jnp.asarray(cloud("lognormal", _LARGE + 1)))
    for offsets in (jnp.float32(0.37), random.uniform(random.key(0), (_LARGE + 1,))):
        large, small = (
            search_strata(weights, offsets, _LARGE + 1),
            search(weights, strata(offsets, _LARGE + 1), _LARGE + 1),
        )
        assert (np.asarray(large) != np.asarray(small)).mean() < 0.01 and np.abs(large - small).max() <= 30


@pytest.mark.parametrize("value", [-jnp.inf, jnp.nan])
def test_a_large_cloud_without_a_living_particle_keeps_its_places(value):
    ancestors = systematic(random.key(0), jnp.full(_LARGE + 1, value), _LARGE + 1)
    np.testing.assert_array_equal(ancestors, np.arange(_LARGE + 1))


def test_one_living_particle_has_all_offspring():
    log_weights = jnp.full(_LARGE + 1, -jnp.inf).at[12_345].set(3.0)
    np.testing.assert_array_equal(systematic(random.key(0), log_weights, _LARGE + 1), 12_345)


TERMS = np.asarray(-1.4 - np.random.default_rng(1).exponential(size=30_001), np.float32)


def test_sums_of_many_terms_are_those_in_double_precision():
    exact = np.sum(TERMS.astype(np.float64))
    assert sum_of_steps(jnp.asarray(TERMS)) == np.float32(exact)
    total, _ = jax.lax.scan(lambda s, term: (add_compensated(*s, term), None), (0.0, 0.0), jnp.asarray(TERMS))
    assert abs(total[0] - exact) <= np.spacing(np.float32(abs(exact)))
    columns = jnp.stack([jnp.asarray(TERMS), jnp.ones(len(TERMS))], axis=1)
    np.testing.assert_allclose(sum_of_steps(columns), [exact, len(TERMS)], rtol=1e-7)


def test_impossible_steps_and_gradients_are_those_of_a_plain_sum():
    terms = jnp.asarray(TERMS[:100])
    assert sum_of_steps(terms.at[3].set(-jnp.inf)) == -jnp.inf and jnp.isnan(sum_of_steps(terms.at[3].set(jnp.nan)))
    np.testing.assert_array_equal(jax.grad(lambda x: sum_of_steps(x**2))(terms), 2 * terms)
    total, lost = add_compensated(jnp.float32(-3.0), jnp.float32(0.0), -jnp.inf)
    assert add_compensated(total, lost, 1.0)[0] == -jnp.inf
