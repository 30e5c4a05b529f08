"""Schedules of the optimiser's step: the published stages, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from numpyro_smc.engines.schedules import burda_schedule


def test_the_learning_rate_falls_in_eight_growing_stages():
    rate = jax.jit(burda_schedule(1e-3, steps_per_epoch=10))
    stages = {0: 0, 1: 1, 3: 1, 4: 2, 12: 2, 13: 3, 39: 3, 40: 4, 1092: 6, 1093: 7, 3279: 7, 10_000: 7}
    for epoch, stage in stages.items():
        assert float(rate(10 * epoch)) == pytest.approx(1e-3 * 10 ** (-stage / 7)), epoch
    assert float(rate(9)) > float(rate(10)) == float(rate(39)) > float(rate(40))
    assert sum(3**stage for stage in range(8)) == 3280


def test_stages_are_as_many_as_asked_for_and_end_at_a_tenth():
    found = [float(burda_schedule(0.2, 1, num_stages=3)(epoch)) for epoch in range(14)]
    np.testing.assert_allclose(found, np.repeat([0.2, 0.2 * 10**-0.5, 0.02], [1, 3, 10]), rtol=1e-6)
    assert float(burda_schedule(0.2, 1, num_stages=1)(100)) == pytest.approx(0.2)


def test_an_optimiser_steps_by_it():
    optim = optax.sgd(burda_schedule(1.0, 2, num_stages=2))
    state, steps = optim.init(jnp.zeros(())), []
    for _ in range(4):
        step, state = optim.update(jnp.ones(()), state)
        steps.append(-float(step))
    assert steps == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_what_makes_no_schedule_is_refused():
    with pytest.raises(ValueError, match="burda_schedule: base must be positive, got 0"):
        burda_schedule(0.0, 10)
    with pytest.raises(ValueError, match="burda_schedule: steps_per_epoch must be a positive integer, got 0"):
        burda_schedule(1e-3, 0)
    with pytest.raises(ValueError, match="num_stages must be a positive integer"):
        burda_schedule(1e-3, 10, num_stages=2.5)
