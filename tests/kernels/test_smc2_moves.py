"""SMC2 says when its moves are hardly ever accepted, in a warning and in its result."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan

from numpyro_smc import SMC2
from numpyro_smc.kernels.smc2_checks import stuck, warn_of_stuck_parameters

Y = jnp.asarray(np.sin(np.arange(6) / 3.0), jnp.float32)


def model(y, width):
    """Two parameters of which one determines the other up to ``width``."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(a, width))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * x + 0.1 * (a + b), 0.2))
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def run(width):
    sampler = SMC2(model, 40, 10, parameter_ess_threshold=1.0, max_state_particles=10)
    return sampler.run(random.key(0), Y, width, progress_bar=False)


def test_moves_that_are_never_accepted_are_warned_of_and_stand_in_the_result():
    with pytest.warns(UserWarning, match=r"SMC2: at \d of the 6 steps whose parameters were moved, first at step 0"):
        result = run(1e-6)
    assert "not to be trusted: at" in repr(result) and np.nanmin(result.acceptance) < 0.01


def test_a_run_that_moves_says_nothing():
    result = run(1.0)
    assert np.nanmin(result.acceptance) > 0.05 and "not to be trusted" not in repr(result)


def test_steps_without_moves_are_not_stuck():
    assert stuck(np.array([np.nan, 0.0, 0.2])).tolist() == [False, True, False]
    warn_of_stuck_parameters(np.array([np.nan, 0.2]))
