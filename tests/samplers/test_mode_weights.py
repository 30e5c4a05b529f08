"""Shares of two modes, 90 % and 10 %, 12.6 scales apart in ten dimensions: 4,000 particles have them, chains do not."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC, NUTS

from models.static_targets import bimodal, mode_weights
from tests.samplers import static_models as models
from tests.samplers.static_models import SMCSampler, replicates
from tests.statistics_of_estimates import assert_mean

TARGET = bimodal(10, 0.9)


def program():
    numpyro.sample("z", TARGET)


def wide_guide():
    numpyro.sample("z", dist.Normal(jnp.zeros(10), 3.0).to_event(1))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["prior", "guide"])
def test_4000_particles_have_the_shares_within_3_points_and_know_their_error(start):
    """40 runs; the spread is about 1 point, so that of 40 runs two or more miss with probability 0.01."""
    if start == "guide":
        results = replicates(SMCSampler(program, 4000, init_guide=(wide_guide, {})), 40)
        shares = [float(mode_weights(TARGET, r.samples["z"], r.log_weights)[0]) for r in results]
        in_mode = [np.asarray(r.samples["z"]).mean(1) < 0.5 for r in results]
    else:
        results = replicates(SMCSampler(models.two_modes, 4000), 40)
        in_mode = [np.asarray(r.samples["z"]).mean(1) < 0.0 for r in results]
        shares = [np.exp(r.log_weights) @ mode / 4000 for r, mode in zip(results, in_mode, strict=True)]
    assert (np.abs(np.array(shares) - 0.9) < 0.03).sum() >= 39
    assert_mean(shares, 0.9)
    errors = [r.standard_error(mode) for r, mode in zip(results, in_mode, strict=True)]
    assert 0.6 < np.mean(errors) / np.std(shares) < 1.5


@pytest.mark.slow
def test_four_chains_of_nuts_miss_the_shares():
    """Every chain stays where it starts: shares are quarters, none of which is within 3 points of 90 %."""
    mcmc = MCMC(
        NUTS(program), num_warmup=500, num_samples=500, num_chains=4, chain_method="vectorized", progress_bar=False
    )
    for seed in range(5):
        mcmc.run(random.key(seed))
        share = float(mode_weights(TARGET, mcmc.get_samples()["z"])[0])
        print(f"key {seed}: NUTS share {share:.3f}")
        assert abs(share - 0.9) > 0.03
        assert abs(4 * share - round(4 * share)) < 0.01
