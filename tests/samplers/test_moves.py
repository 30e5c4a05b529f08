"""Moves of a cloud: the trajectory of Hamiltonian Monte Carlo is BlackJAX's, and what is not a number is rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.mcmc import integrators
from jax import random

from numpyro_smc.samplers.moves import MOVES, Tuning, _trajectory, move_cloud
from tests.statistics_of_estimates import assert_mean


def bent(x):
    return -0.5 * jnp.sum(x**2 * jnp.array([1.0, 4.0, 0.5])) + jnp.sin(x[0] * x[2])


@pytest.mark.parametrize("num_integration_steps", [1, 7])
def test_a_trajectory_is_as_many_leapfrog_steps_of_blackjax(num_integration_steps):
    position, momentum = random.normal(random.key(0), (2, 3))
    state = expected = integrators.IntegratorState(position, momentum, *jax.value_and_grad(bent)(position))
    one_step = jax.jit(integrators.velocity_verlet(bent, lambda momentum, position=None: 0.5 * jnp.sum(momentum**2)))
    for _ in range(num_integration_steps):
        expected = one_step(expected, 0.2)
    end = jax.jit(_trajectory(bent, None, num_integration_steps))(state, 0.2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), end, expected)
    assert abs(end.position - position).max() > 0.1


@pytest.mark.parametrize("name", ["hmc", "mala", "rwmh"])
def test_positions_whose_density_is_not_a_number_are_never_moved_to(name):
    """A normal variable below 1, of which 2,000 particles make 40 moves; five standard errors: false alarms 6e-7."""

    def log_density(x):
        return -0.5 * x[0] ** 2 + 0.0 * jnp.log(1.0 - x[0])

    start = -jnp.abs(random.normal(random.key(1), (2000, 1)))
    tuning = Tuning(jnp.log(0.7), jnp.array([1.3]))
    run = jax.jit(lambda key: move_cloud(key, MOVES[name](), start, log_density, tuning, 40, tune_step_size=False))
    moved = run(random.key(2))
    assert (moved.path[0] < 1.0).all() and 0.3 < moved.acceptance < 0.95
    density, mass = np.exp(-0.5) / np.sqrt(2 * np.pi), 0.8413447
    assert_mean(moved.path[0][:, 0], -density / mass)
    assert_mean(moved.path[0][:, 0] ** 2, 1.0 - density / mass)
