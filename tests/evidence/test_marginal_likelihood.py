"""One face, four methods, one answer: the Student-t toy."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_smc.evidence.ais import AIS
from numpyro_smc.evidence.marginal_likelihood import _built, log_marginal_likelihood

Y = jnp.asarray(np.random.RandomState(0).standard_t(3, 8) * 0.7 + 1, jnp.float32)
LOG_EVIDENCE = -13.98703  # by quadrature


def toy(y, noise=0.0):
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    location = numpyro.sample("location", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.StudentT(3.0, location, scale + noise).expand([8]).to_event(1), obs=y)


def guide(y, noise=0.0):
    numpyro.sample("scale", dist.LogNormal(-0.2, numpyro.param("spread", 0.4)))
    numpyro.sample("location", dist.Normal(1.0, 0.6))


ANNEALING = {"num_chains": 128, "num_temperatures": 20, "num_leapfrog": 4}
CASES = {
    "importance": {"num_samples": 4000, "guide": guide, "params": {"spread": 0.6}},
    "ais": {"guide": guide, "params": {"spread": 0.6}, **ANNEALING},
    "bidirectional": {"guide": guide, "params": {"spread": 0.6}, "num_simulated": 2, **ANNEALING},
    "smc": {"num_particles": 500},
}


@pytest.mark.parametrize("method", CASES)
def test_every_method_finds_the_evidence_of_the_student_t_toy(method):
    """Within five stated standard errors, which are below 0.15 (SMC from the prior) or 0.06 (from the guide)."""
    found = log_marginal_likelihood(random.key(1), toy, Y, method=method, **CASES[method])
    assert found.method == method and found.per_datapoint.shape == ()
    assert found.standard_error < (0.15 if method == "smc" else 0.06)
    assert abs(found.value - LOG_EVIDENCE) < 5 * found.standard_error
    assert found.verdict.startswith("No sign of trouble" if method in ("ais", "smc") else "Trustworthy")
    assert found.bound == "lower"
    if method == "bidirectional":
        assert "simulated problems" in found.verdict and found.certificate.gap.shape == (2,)


def test_other_keywords_go_to_the_programs():
    options = {"num_samples": 500, "guide": guide, "params": {"spread": 0.6}}
    values = [log_marginal_likelihood(random.key(1), toy, Y, **options, noise=n).value for n in (0.0, 1.0)]
    assert abs(values[0] - values[1]) > 0.1


def test_samplers_are_kept_for_equal_options_and_built_anew_for_others():
    options = {"num_temperatures": 5, "schedule": [0.0, 0.5, 1.0]}
    assert _built(AIS, toy, None, options) is _built(AIS, toy, None, dict(options))
    assert _built(AIS, toy, None, options) is not _built(AIS, toy, guide, options)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="unknown method 'laplace'"):
        log_marginal_likelihood(random.key(0), toy, Y, method="laplace")
