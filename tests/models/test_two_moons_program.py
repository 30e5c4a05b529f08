"""Two moons: the density against quadrature and simulations, and the closed-form posterior against the density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from scipy.stats import norm

from models import rejection, two_moons

THETA = jnp.array([0.35, -0.6])
X = jnp.array([-0.3, 0.4])


def simulate(rng_key, num_simulations: int, theta=None):
    program = two_moons.model if theta is None else handlers.substitute(two_moons.model, {"theta": theta})
    keys = jax.random.split(rng_key, num_simulations)
    return jax.jit(jax.vmap(lambda key: handlers.seed(program, key)()))(keys)


def grid_density(centre, half_width: float, num_points: int, of):
    """Cell centres ``[num_points^2, 2]`` of a square, and their log densities."""
    axis = (jnp.arange(num_points) + 0.5) / num_points * 2 - 1
    points = centre + half_width * jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return points, of(points), (2 * half_width / num_points) ** 2


def test_density_of_the_data_integrates_to_one():
    centre = two_moons.shift(THETA) + jnp.array([0.25, 0.0])
    _, log_density, cell = grid_density(centre, 0.2, 300, lambda x: two_moons.log_likelihood(THETA, x))
    assert float(jnp.exp(log_density).sum() * cell) == pytest.approx(1, abs=2e-3)


def test_density_falls_with_the_length_of_the_crescent_at_its_radius():
    """At 0.09 and 0.11 the radius is equally likely; the angle's share of a disc's area is 1 / (pi r)."""
    centre = two_moons.shift(THETA) + jnp.array([0.25, 0.0])
    angle = jnp.array([0.6, 0.8])
    near, far = (float(two_moons.log_likelihood(THETA, centre + radius * angle)) for radius in (0.09, 0.11))
    assert near - far == pytest.approx(np.log(0.11 / 0.09), abs=1e-4)
    assert near == pytest.approx(norm.logpdf(0.09, 0.1, 0.01) - np.log(np.pi * 0.09), abs=1e-4)


def test_simulations_have_the_density():
    """20,000 simulations in 16 cells of the crescent against the density's integrals; five standard errors each."""
    x = np.asarray(simulate(jax.random.key(0), 20_000, THETA))
    centre = two_moons.shift(THETA) + jnp.array([0.25, 0.0])
    points, log_density, cell = grid_density(centre, 0.2, 300, lambda x: two_moons.log_likelihood(THETA, x))
    edges = [np.asarray(centre)[i] + np.array([-0.2, -0.06, 0.03, 0.07, 0.2]) for i in (0, 1)]
    expected = np.histogram2d(*np.asarray(points).T, bins=edges, weights=np.exp(log_density) * cell)[0]
    found = np.histogram2d(*x.T, bins=edges)[0] / len(x)
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / len(x)) + 2e-3)


def test_posterior_draws_have_the_posterior_density():
    """20,000 draws in 5x5 cells against the density on a grid; five standard errors each: false alarms 2e-5."""
    draws = two_moons.sample_posterior(jax.random.key(1), X, 20_000)
    points, log_density, _ = grid_density(jnp.zeros(2), 1.0, 500, lambda theta: two_moons.log_likelihood(theta, X))
    weights = np.asarray(jax.nn.softmax(log_density))
    edges = np.array([-1, -0.6, -0.2, 0.1, 0.4, 1])
    expected = np.histogram2d(*np.asarray(points).T, bins=[edges, edges], weights=weights)[0]
    found = np.histogram2d(*draws.T, bins=[edges, edges])[0] / len(draws)
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / len(draws)) + 2e-3)
    assert np.sum(expected > 0.01) >= 4


def test_both_moons_have_half_of_the_posterior_unless_the_prior_cuts_one():
    draws = two_moons.sample_posterior(jax.random.key(2), X, 10_000)
    assert abs(np.mean(draws.sum(1) > 0) - 0.5) < 5 * 0.005


def test_posterior_draws_lie_in_the_prior_when_it_cuts():
    """One coordinate would be 1 near the middle of either crescent."""
    draws = two_moons.sample_posterior(jax.random.key(3), jnp.array([-0.2, 0.95]), 5_000)
    assert np.abs(draws).max() <= 1 and np.mean(np.abs(draws).max(1) > 0.99) > 0.01


def test_impossible_data_have_no_likelihood_and_no_gradient():
    far = two_moons.shift(THETA) + jnp.array([0.1, 0.0])  # to the left of the crescent's centre
    value, gradient = jax.value_and_grad(two_moons.log_likelihood)(THETA, far)
    assert value == -jnp.inf and jnp.all(gradient == 0)


def test_data_that_the_simulator_cannot_produce_are_refused(monkeypatch):
    monkeypatch.setattr(rejection, "MAX_ROUNDS", 3)
    with pytest.raises(RuntimeError, match="0 of 30 proposals were accepted; 10 are needed"):
        two_moons.sample_posterior(jax.random.key(0), jnp.array([2.0, 0.0]), 10)


def test_sites_are_the_parameter_and_two_nuisances():
    trace = handlers.trace(handlers.seed(two_moons.model, jax.random.key(0))).get_trace()
    assert {n: s["type"] for n, s in trace.items()} == {
        "theta": "sample",
        "angle": "sample",
        "radius": "sample",
        "x": "deterministic",
    }
    assert trace["theta"]["value"].shape == trace["x"]["value"].shape == (2,)
