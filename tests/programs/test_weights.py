"""Log-weight arithmetic: exact on small cases, invariant to scale, safe where particles are dead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_smc.programs.weights import effective_sample_size, log_mean_exp, normalise


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_weights_are_normalised_to_mean_one_at_every_scale(scale):
    log_weights = jnp.log(jnp.array([1.0, 2.0, 3.0, 0.0])) + np.log(scale)
    normalised, log_mean, ess = normalise(log_weights)
    np.testing.assert_allclose(jnp.exp(normalised), [2 / 3, 4 / 3, 2.0, 0.0], rtol=1e-5)
    np.testing.assert_allclose(log_mean, np.log(1.5) + np.log(scale), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ess, 36 / 14, rtol=1e-5)


def test_batches_are_separate_problems():
    log_weights = jnp.log(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
    np.testing.assert_allclose(log_mean_exp(log_weights), [np.log(2.0), -np.inf])
    np.testing.assert_allclose(effective_sample_size(log_weights), [1.6, 0.0], rtol=1e-6)


def test_gradients_are_the_normalised_weights_and_zero_for_the_dead():
    log_weights = jnp.array([0.0, jnp.log(3.0), -jnp.inf])
    gradient = jax.grad(log_mean_exp)(log_weights)
    np.testing.assert_allclose(gradient, [0.25, 0.75, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(log_mean_exp)(jnp.full(3, -jnp.inf)), 0.0)
    np.testing.assert_allclose(jax.jacfwd(log_mean_exp)(log_weights), gradient, rtol=1e-6)


def test_a_weight_that_is_not_a_number_shows_in_the_result():
    for fn in (normalise, jax.jit(normalise)):
        _, log_mean, ess = fn(jnp.array([0.0, jnp.nan, 1.0]))
        assert np.isnan(log_mean) and np.isnan(ess)
