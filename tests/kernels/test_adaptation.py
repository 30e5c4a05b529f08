"""Adaptive Metropolis on a Gaussian target: the covariance that it learns, the acceptance that it reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from numpyro_smc.kernels.adaptation import adapt, start

TRIL = np.array([[2.0, 0.0, 0.0], [0.5, 0.3, 0.0], [-0.01, 0.02, 0.05]])
NUM_WARMUP, NUM_STEPS = 1000, 3000


@pytest.fixture(scope="module")
def chains():
    """Adaptations and acceptance probabilities of 50 chains, with and without the covariance."""

    def log_density(z):
        return -0.5 * jnp.sum(jnp.linalg.solve(jnp.asarray(TRIL), z) ** 2)

    def chain(rng_key, covariance):
        def step(state, timed):
            z, adaptation = state
            i, key = timed
            direction_key, accept_key = random.split(key)
            proposal = z + adaptation.scale_tril @ random.normal(direction_key, (3,))
            accept_prob = jnp.minimum(jnp.exp(log_density(proposal) - log_density(z)), 1.0)
            accepted = random.uniform(accept_key) < accept_prob
            z = jnp.where(accepted, proposal, z)
            adaptation = adapt(adaptation, i, z, accepted, accept_prob, 0.25, covariance)
            return (z, adaptation), (adaptation.scale_tril, accept_prob)

        first = jnp.ones(3), start(jnp.ones(3), 1.0, jnp.asarray(NUM_WARMUP))
        return lax.scan(step, first, (jnp.arange(NUM_STEPS), random.split(rng_key, NUM_STEPS)))[1]

    keys = random.split(random.key(0), 50)
    return {
        covariance: jax.jit(jax.vmap(lambda key, covariance=covariance: chain(key, covariance)))(keys)
        for covariance in (True, False)
    }


@pytest.mark.parametrize("covariance", [True, False])
def test_frozen_proposals_are_accepted_as_often_as_wanted(chains, covariance):
    """Means over 50 chains of 2000 iterations with a proposal that no longer changes: 0.25, up to 0.03."""
    scale_tril, accept_prob = chains[covariance]
    assert abs(float(accept_prob[:, NUM_WARMUP:].mean()) - 0.25) < 0.03
    frozen = np.asarray(scale_tril[:, NUM_WARMUP - 1 :])
    assert (frozen == frozen[:, :1]).all() and (scale_tril[:, NUM_WARMUP - 2] != scale_tril[:, NUM_WARMUP - 1]).any()
    assert (np.triu(frozen[:, 0], 1) == 0.0).all()


def test_the_covariance_of_the_target_is_learned(chains):
    """Scales that differ by a factor of 40, correlated, from a start of three standard deviations: 1000 iterations.

    A covariance like the target's, times about :math:`2.38^2 / 3 = 1.9`.
    """
    found = np.asarray(chains[True][0][:, -1], np.float64)
    whitened = np.linalg.solve(TRIL, found)
    covariance = (whitened @ whitened.swapaxes(1, 2)).mean(0)
    spread = np.linalg.eigvalsh(covariance)
    assert spread[-1] / spread[0] < 1.5 and 1.4 < spread.mean() < 3.5


def test_without_the_covariance_only_the_scale_changes(chains):
    found = np.asarray(chains[False][0][:, -1])
    np.testing.assert_allclose(found, found[:, :1, :1] * np.eye(3), atol=1e-6)


def test_first_proposals_have_the_step_size_that_was_asked_for():
    first = start(jnp.ones(3), 0.2, jnp.asarray(0))
    np.testing.assert_allclose(first.scale_tril, 0.2 * np.eye(3), rtol=1e-6)
    np.testing.assert_allclose(first.step_size, 0.2, rtol=1e-6)
    same = adapt(first, jnp.asarray(0), jnp.zeros(3), jnp.asarray(True), jnp.asarray(1.0), 0.2, True)
    assert all((new == old).all() for new, old in zip(same, first, strict=True))


def test_a_chain_that_does_not_move_keeps_its_covariance_and_a_bounded_scale():
    state = start(jnp.ones(2), 0.5, jnp.asarray(2000))
    still = jax.jit(lambda state, i: adapt(state, i, jnp.ones(2), jnp.asarray(False), jnp.asarray(0.0), 0.2, True))
    for i in range(200):
        state = still(state, jnp.asarray(i))
    np.testing.assert_allclose(state.scale_tril, state.scale_tril[0, 0] * np.eye(2), rtol=1e-5)
    assert 0.5 / 20.0 < state.scale_tril[0, 0] < 0.5 / 10.0
    later = still(state, jnp.asarray(1000))  # half the warm-up
    np.testing.assert_allclose(later.scale_tril, 0.5 / 2.0 * np.eye(2), rtol=1e-4)
    moved = adapt(state, jnp.asarray(200), jnp.zeros(2), jnp.asarray(True), jnp.asarray(1.0), 0.2, True)
    assert moved.num_moves == 1 and moved.log_scale > state.log_scale
