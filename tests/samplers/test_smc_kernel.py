"""The kernel under NumPyro's MCMC, against quadrature; everything MCMC does with samples.

Mean tests are at five standard errors over replicates with fixed keys: false alarms 6e-7 per case.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

from models import static_targets
from numpyro_smc.samplers.smc_kernel import SMCKernel
from tests.samplers import static_models as models
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

DATA = models.STUDENT_T_DATA
FIELDS = ("log_evidence", "log_evidence_se", "num_temperatures", "acceptance")


def model(y):
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    numpyro.deterministic("sum", s + m)
    with numpyro.plate("data", 8):
        numpyro.sample("y", dist.StudentT(3.0, m, s), obs=y)


KERNEL = SMCKernel(model)


def mcmc_of(kernel=KERNEL, num_samples=4, **options):
    sizes = {"num_warmup": 0, "num_chains": 500, "chain_method": "vectorized", "progress_bar": False, **options}
    return MCMC(kernel, num_samples=num_samples, **sizes)


@pytest.fixture(scope="module")
def mcmc():
    return mcmc_of()


@pytest.fixture(scope="module")
def runs(mcmc):
    """Samples by chain and evidence of 20 keys."""
    found = []
    for seed in range(20):
        mcmc.post_warmup_state = None
        mcmc.run(random.key(seed), DATA, extra_fields=FIELDS)
        found.append((mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True)))
    return found


def test_posterior_and_evidence_are_those_of_quadrature(runs):
    """500 chains of 4 draws, 20 keys."""
    exact = static_targets.student_t_integrals(DATA)
    for site in ("m", "s"):
        draws = np.array([samples[site] for samples, _ in runs], np.float64)
        assert draws.shape == (20, 500, 4)
        for draw in (0, 3):
            assert_mean(draws[:, :, draw].mean(1), exact.mean[site])
            assert_mean(((draws[:, :, draw] - exact.mean[site]) ** 2).mean(1), exact.variance[site])
    assert_unbiased_evidence([float(fields["log_evidence"][0, 0]) for _, fields in runs], exact.log_evidence)
    for samples, fields in runs:
        np.testing.assert_allclose(samples["sum"], samples["m"] + samples["s"], rtol=1e-5)
        for name in FIELDS:
            assert fields[name].shape == (500, 4) and (name == "acceptance" or np.ptp(fields[name]) == 0.0)
        assert 0.5 < fields["acceptance"].mean() < 0.98 and 0.0 < fields["log_evidence_se"][0, 0] < 0.3
        assert (np.diff(samples["m"], axis=1) != 0.0).mean() > 0.5  # every draw is a move


def test_a_run_is_continued_without_tempering_again(mcmc, runs, monkeypatch):
    mcmc.post_warmup_state = mcmc.last_state
    monkeypatch.setattr(mcmc.sampler, "init", None)
    state, evidence = mcmc.last_state, mcmc.last_state.log_evidence[0]
    mcmc.run(random.key(100), DATA, extra_fields=FIELDS)
    assert mcmc.get_extra_fields()["log_evidence"][0] == evidence
    # The next draw is one move from the last state, with MCMC's first key.
    state = state._replace(rng_key=random.split(random.key(100), 500)[0])
    move = jax.jit(lambda state: KERNEL.sample(state, (DATA,), {}))
    moved = move(state)
    np.testing.assert_allclose(mcmc.get_samples(group_by_chain=True)["m"][:, 0], moved.z["m"], rtol=1e-4)
    other = move(state._replace(rng_key=moved.rng_key))
    assert (other.z["m"] != moved.z["m"]).mean() > 0.5 and other.rng_key != moved.rng_key


def test_summary_progress_and_arviz(mcmc, runs, capsys):
    import arviz

    mcmc.print_summary()
    assert "r_hat" in capsys.readouterr().out
    status = KERNEL.get_diagnostics_str(mcmc.last_state)
    assert status.startswith("log evidence -1") and "temperatures, acc. prob=0." in status
    assert "temperatures, 500 particles" in repr(KERNEL.result)
    with pytest.warns(UserWarning, match="More chains|chain dimension to be longer than draw"):
        data = arviz.from_numpyro(mcmc, log_likelihood=True)
    assert data["posterior"]["m"].shape == (500, 4) and data["log_likelihood"]["y"].shape == (500, 4, 8)


def test_thinning_keeps_every_other_draw_and_traced_arguments_give_the_same():
    """Continued with another key, as MCMC does: the same moves, of which every second is kept."""
    draws = []
    for options in ({"num_samples": 4}, {"num_samples": 4, "thinning": 2, "jit_model_args": True}):
        mcmc = mcmc_of(SMCKernel(model, moves="rwmh", target_ess=0.3), num_chains=50, **options)
        mcmc.warmup(random.key(0), DATA)
        mcmc.run(random.key(1), DATA)
        draws.append(mcmc.get_samples(group_by_chain=True)["m"])
    assert draws[0].shape == (50, 4) and draws[1].shape == (50, 2)
    np.testing.assert_allclose(draws[0][:, 1::2], draws[1], rtol=1e-4)


def test_the_last_cloud_is_resampled_to_equal_weights():
    """Half the prior has no likelihood, and the one stage keeps weights: dead particles must not become chains."""
    kernel = SMCKernel(models.truncated, moves="rwmh", tempering=[1.0], ess_threshold=0.0)
    state = kernel.init(random.split(random.key(0), 100), 0, None, (jnp.array(0.3),), {})
    samples, log_weights = kernel.result.get_weighted_samples()
    assert np.isneginf(log_weights).any() and (state.z["x"] > 0.0).all()
    weights = np.exp(log_weights) / 100
    assert abs(state.z["x"].mean() - weights @ np.where(weights > 0.0, samples["x"], 0.0)) < 0.05
    assert isinstance(state.rng_key, jax.Array) and state.rng_key.shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 1}, "num_chains=number of particles, at least 2, chain_method='vectorized'"),
        ({"chain_method": "sequential"}, "chain_method='vectorized'"),
        ({"chain_method": jax.vmap}, "chain_method='vectorized'"),
        ({"num_warmup": 3}, "num_warmup=3 would do nothing"),
    ],
)
def test_runs_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mcmc_of(**{"num_chains": 2, **options}).run(random.key(0), DATA)


def test_options_are_checked_at_once_and_starts_of_ones_own_are_refused():
    with pytest.raises(ValueError, match="target_ess must lie"):
        SMCKernel(model, target_ess=2.0)
    with pytest.raises(ValueError, match="num_particles is the num_chains of MCMC"):
        SMCKernel(model, num_particles=10)
    with pytest.raises(ValueError, match="proper divisor of num_particles=3"):
        mcmc_of(SMCKernel(model, waste_free=2), num_chains=3).run(random.key(0), DATA)
    with pytest.raises(ValueError, match="init_params are not used"):
        mcmc_of(num_chains=2).run(random.key(0), DATA, init_params={"m": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"no result before MCMC\.run"):
        _ = SMCKernel(model).result
