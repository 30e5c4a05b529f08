"""SMC2 against the exact posterior of every prefix: a Kalman filter at every point of a grid of the parameters.

Statistics are over 80 runs with fixed seeds, within five standard errors: each comparison would fail by chance with
probability 6e-7. All runs share one sampler, and so its compiled programs. Its proposals do not depend on the
particles, which makes the evidence, and means weighted with it, exactly unbiased at any number of particles.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from scipy.stats import multivariate_normal

from numpyro_smc.kernels import smc2_stages
from numpyro_smc.kernels.smc2 import SMC2
from numpyro_smc.kernels.smc2_checks import checked_increment
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

Y = np.array([0.9, 1.6, 0.4, 1.2, 2.6, 2.0, 0.7, -0.4, 0.3, 1.1], np.float32)
NOISE = 0.5
TIMES = (4, 9)


def autoregression(y):
    """Two parameters, whose prior matters as long as the series is short."""
    phi = numpyro.sample("phi", dist.Uniform(-0.5, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(-0.3, 0.5))
    numpyro.deterministic("variance", scale**2)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, scale))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_init", dist.Normal(0.3, 1.0)), y)


def exact_posteriors(y, size=100):
    """Log evidence, and means of phi, scale and the last state, for every prefix: ``[T, 4]``."""
    phi = np.linspace(-0.5, 1.0, size + 1)[:-1] + 0.75 / size
    log_scale = -0.3 + 0.5 * np.linspace(-5.0, 5.0, size)
    phi, log_scale = np.meshgrid(phi, log_scale, indexing="ij")
    scale, log_weights = np.exp(log_scale), -0.5 * ((log_scale + 0.3) / 0.5) ** 2
    prior = np.logaddexp.reduce(log_weights, axis=None)
    mean, variance, rows = np.full_like(phi, 0.3), np.ones_like(phi), []
    for observation in y:
        mean, variance = phi * mean, phi**2 * variance + scale**2
        spread, error = variance + NOISE**2, observation - mean
        log_weights = log_weights - 0.5 * np.log(2 * np.pi * spread) - 0.5 * error**2 / spread
        mean, variance = mean + variance / spread * error, variance * NOISE**2 / spread
        total = np.logaddexp.reduce(log_weights, axis=None)
        weights = np.exp(log_weights - total)
        rows.append([total - prior, *((weights * values).sum() for values in (phi, scale, mean))])
    return np.array(rows)


@pytest.fixture(scope="module")
def sampler():
    """Moves at every step, by a fixed random walk, and filters that are soon too small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smc2_stages, "cloud_scale", lambda z, weights, dense: jnp.diag(jnp.array([0.8, 0.3])))
        yield SMC2(
            autoregression,
            num_parameter_particles=24,
            num_state_particles=10,
            proposal="random_walk",
            parameter_ess_threshold=1.0,
            min_acceptance=0.22,
            max_state_particles=20,
        )


def run(sampler, seed=0, y=Y, **kwargs):
    return sampler.run(random.key(seed), y, progress_bar=False, **kwargs)


@pytest.fixture(scope="module")
def runs(sampler):
    return [run(sampler, seed) for seed in range(80)]


@pytest.fixture(scope="module")
def whole(runs):
    return runs[0]


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    return exact_posteriors(Y)


@pytest.mark.parametrize("t", TIMES)
def test_evidences_and_posterior_means_of_every_prefix_are_exact(runs, exact, t):
    log_evidence, *means = exact[t]
    estimates = np.array([result.log_evidence_increments[: t + 1].sum() for result in runs])
    assert_unbiased_evidence(estimates, log_evidence)
    for site, expected in zip(("phi", "scale", "x"), means, strict=True):
        errors = np.array([result.mean(site)[t] for result in runs]) - expected
        assert_mean(np.exp(estimates - log_evidence) * errors, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["independent", "random_walk"])
def test_posterior_means_are_right_with_proposals_fitted_to_the_particles(exact, proposal):
    """Over 60 runs; the biases of order 1/N are well below a standard error here."""
    sampler = SMC2(autoregression, 500, 16, proposal=proposal, min_acceptance=0.3, max_state_particles=32)
    results = [run(sampler, seed) for seed in range(60)]
    assert sampler.num_compiled() <= 7  # fewer where no run has doubled its state particles in time to move them
    for t in TIMES:
        assert_unbiased_evidence([result.log_evidence_increments[: t + 1].sum() for result in results], exact[t, 0])
        for site, expected in zip(("phi", "scale", "x"), exact[t, 1:], strict=True):
            assert_mean([result.mean(site)[t] for result in results], expected)


def test_state_particles_are_doubled_once_acceptance_is_low(runs):
    for result in runs:
        numbers = result.num_state_particles
        doubled = np.flatnonzero(np.diff(numbers, prepend=10))
        assert set(numbers) <= {10, 20} and len(doubled) <= 1
        low = np.flatnonzero(result.acceptance < 0.22)
        assert doubled.tolist() == low[:1].tolist()
    times = [np.flatnonzero(result.num_state_particles == 20)[0] for result in runs if 20 in result.num_state_particles]
    assert len(times) > 60 and np.std(times) > 1


def test_weights_of_an_exchange_are_ratios_of_the_evidences(sampler, runs):
    state = runs[0].progress.state
    log_weights = jnp.log(jnp.arange(24.0) / 11.5)  # one of them dead
    before = sampler._start(random.key(5), 10, (Y,), {})._replace(log_weights=log_weights)
    after, change = sampler._exchange(random.key(1), np.asarray(len(Y)), before, 20, (Y,), {})
    new, old = after.particles.filtered.log_evidence, before.particles.filtered.log_evidence
    assert after.particles.filtered.values["x"].shape == state.particles.filtered.values["x"].shape == (24, 20)
    expected = log_weights + new - old
    np.testing.assert_allclose(change, jax.nn.logsumexp(expected) - jnp.log(24.0), rtol=1e-5)
    np.testing.assert_allclose(after.log_weights, expected - change, rtol=1e-4, atol=1e-4)
    assert after.log_weights[0] == -jnp.inf and (new < -5.0).all()


def test_an_exchange_counts_in_the_evidence_of_its_step(sampler, whole, monkeypatch):
    exchange, step = sampler._exchange, np.flatnonzero(whole.num_state_particles == 20)[0]

    def and_more(*args):
        state, change = exchange(*args)
        return state, change + 100.0

    monkeypatch.setattr(sampler, "_exchange", and_more)
    gained = run(sampler).log_evidence_increments - whole.log_evidence_increments
    np.testing.assert_allclose(gained, 100.0 * (np.arange(len(Y)) == step), atol=1e-4)


def test_every_stage_of_every_step_has_a_key_of_its_own(sampler, monkeypatch):
    keys = []

    def noted(stage):
        return lambda rng_key, *args: keys.append(tuple(random.key_data(rng_key).tolist())) or stage(rng_key, *args)

    stages = ("_start", "_advance", "_rejuvenate", "_exchange")
    for name in stages:
        monkeypatch.setattr(sampler, name, noted(getattr(sampler, name)))
    run(sampler)
    assert len(keys) == len(set(keys)) == 1 + 2 * len(Y) + 1


def test_parameters_weigh_the_same_once_they_were_resampled(sampler):
    result = run(sampler, until=2)
    assert set(result.num_state_particles) == {10} and np.isfinite(result.acceptance).all()
    np.testing.assert_array_equal(result.log_weights, np.zeros(24))
    assert len(np.unique(result.samples["phi"])) > 12


def test_independent_proposals_count_the_way_back():
    key, mean = random.key(0), jnp.array([1.0, -2.0])
    scale = jnp.array([[2.0, 0.0], [-0.7, 0.5]])
    z, direction = random.normal(key, (2, 2))
    proposed, log_ratio = smc2_stages._propose("independent", z, direction, mean, scale)
    law = multivariate_normal(mean, np.asarray(scale) @ np.asarray(scale).T)
    np.testing.assert_allclose(proposed, mean + scale @ direction, rtol=1e-5)
    np.testing.assert_allclose(log_ratio, law.logpdf(z) - law.logpdf(proposed), rtol=1e-4)


def test_chunks_are_the_whole(sampler):
    chunked = SMC2(autoregression, 24, 10, batch_size=8, parameter_ess_threshold=0.01)
    result = run(chunked, until=1)
    np.testing.assert_allclose(result.log_evidence, run(sampler, until=1, seed=0).log_evidence, rtol=1e-5)


# ---- programs, interruptions, streams -------------------------------------------------------------------------------


def test_the_number_of_programs_does_not_depend_on_steps_or_runs(sampler, runs):
    """To look and to start; to advance and to move for each of two sizes; and one exchange."""
    assert all(result.num_steps == len(Y) for result in runs)
    assert sampler.num_compiled() == 7


def assert_same(result, expected):
    np.testing.assert_array_equal(result.progress.history, expected.progress.history)
    jax.tree.map(np.testing.assert_array_equal, result.progress.state, expected.progress.state)
    jax.tree.map(np.testing.assert_array_equal, result.get_samples(), expected.get_samples())


def test_an_interrupted_run_resumes_to_the_bit(sampler, whole, tmp_path, monkeypatch):
    path, moved, calls = tmp_path / "run.npz", sampler._rejuvenate, []

    def interrupt(*args):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return moved(*args)

    monkeypatch.setattr(sampler, "_rejuvenate", interrupt)
    stopped = run(sampler, checkpoint=path, checkpoint_every=2)
    assert stopped.interrupted and stopped.num_steps == 5 and "first 5 of 10 steps (interrupted)" in repr(stopped)
    monkeypatch.setattr(sampler, "_rejuvenate", moved)
    assert_same(run(sampler, seed=99, checkpoint=path), whole)
    assert_same(sampler.load(path, Y), whole)
    assert sampler.num_compiled() == 7
    other = SMC2(autoregression, 24, 4)
    with pytest.raises(ValueError, match=r"is of another sampler\.\n  found    num_parameter_particles=24"):
        other.load(path, Y)
    with pytest.raises(ValueError, match=r"resume: the result is of another sampler"):
        other.resume(stopped, Y)


def test_a_stream_goes_on_as_if_it_had_never_stopped(sampler, whole, tmp_path):
    unknown = np.where(np.arange(len(Y)) < 3, Y, np.nan)
    first = run(sampler, y=unknown, until=3)
    assert first.num_steps == 3 and np.isfinite(first.log_evidence)
    np.testing.assert_array_equal(first.mean("x"), whole.mean("x")[:3])
    first.save(tmp_path / "stream.npz")
    known = np.where(np.arange(len(Y)) < 7, Y, np.nan)
    second = sampler.resume(tmp_path / "stream.npz", known, until=7, progress_bar=False)
    assert_same(sampler.resume(second, Y, progress_bar=False), whole)
    assert sampler.num_compiled() == 7
    with pytest.raises(ValueError, match=r"7 steps have been taken in already, and 3 is fewer"):
        sampler.resume(second, Y, until=3)
    with pytest.raises(ValueError, match=r"until=11, but the series has 10 steps"):
        sampler.resume(second, Y, until=11)


# ---- results --------------------------------------------------------------------------------------------------------


def test_a_result_answers_questions(runs):
    result = next(one for one in runs if np.std(one.log_weights) > 0)  # at rest after an exchange, or all moved
    assert result.log_evidence == result.log_evidence_increments.sum() == result.table()[-1]["log evidence"]
    draws = result.get_samples(4000)
    assert {name: value.shape for name, value in draws.items()} == dict.fromkeys(
        ("phi", "scale", "variance", "x"), (4000,)
    )
    np.testing.assert_allclose(draws["variance"], draws["scale"] ** 2, rtol=1e-5)
    for name, value in draws.items():
        spread = result.standard_deviation(name)[-1]
        np.testing.assert_allclose(np.mean(value), result.mean(name)[-1], atol=5 * spread / 4000**0.5)
    low, middle = result.quantile("phi", [0.05, 0.5])
    assert low.shape == (10,) and (low < middle).all() and (np.abs(middle - result.mean("phi")) < 0.3).all()
    weights = np.exp(result.log_weights) / 24
    order = np.argsort(result.samples["phi"])
    place = np.searchsorted(np.cumsum(weights[order]), 0.5)
    np.testing.assert_allclose(middle[-1], result.samples["phi"][order][place], atol=0.02)
    assert "24 parameter particles" in repr(result) and "phi: " in repr(result)
    data = result.to_arviz()
    assert data["posterior"]["x"].shape == (1, 24) and data["sample_stats"]["ess"].shape == (1, 1, 10)
    assert len(result.plot().get_lines()) == 1 and len(result.plot("x", Y).get_lines()) == 2
    with pytest.raises(KeyError, match=r"No site 'z' here\. Known: phi, scale, variance, x"):
        result.mean("z")
    with pytest.raises(ValueError, match="recorded at every step are the levels"):
        result.quantile("phi", 0.1)


def test_progress_is_shown_by_step(sampler, capsys):
    sampler.run(random.key(0), Y, until=2)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "log evidence=" in shown and "state particles=" in shown


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_impossible_observation_is_named_by_its_step(sampler, value):
    with pytest.raises(FloatingPointError, match="all particles have weight zero at step 2: no parameter explains"):
        run(sampler, y=np.where(np.arange(len(Y)) == 2, value, Y).astype(np.float32))


def test_weights_that_are_not_numbers_are_told_from_zeros():
    assert checked_increment(np.float32(-1.5), 3, 2) == -1.5
    with pytest.raises(FloatingPointError, match="at step 2 the weights of 3 filters are not numbers"):
        checked_increment(-np.inf, 3, 2)


def chain(prior, **kwargs):
    def model(y):
        level = 0.0 if prior is None else numpyro.sample("level", prior, **kwargs)

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x + level, 1.0))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chain(None), "SMC2: the model has no global latent"),
        (chain(dist.Poisson(1.0)), "SMC2: the global latent site 'level' is discrete"),
        (chain(dist.ImproperUniform(dist.constraints.real, (), ())), "SMC2: the prior of site 'level' is improper"),
        (lambda y: numpyro.sample("y", dist.Normal(), obs=y), "SMC2: the model has no numpyro.contrib.control_flow.sc"),
    ],
)
def test_models_that_it_cannot_take_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        run(SMC2(model, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resampler": lambda rng_key, log_weights, n: jnp.arange(n)}, "SMC2: .* not known to be unbiased"),
        ({"num_parameter_particles": 1}, "num_parameter_particles must be 2 or more"),
        ({"num_moves": 0}, "SMC2: num_moves must be a positive integer"),
        ({"proposal": "gaussian"}, "unknown proposal='gaussian'. Known: 'independent', 'random_walk'"),
        ({"parameter_ess_threshold": 0.0}, r"parameter_ess_threshold must lie in \(0, 1\]"),
        ({"min_acceptance": 1.5}, r"min_acceptance must be a number in \[0, 1\)"),
        ({"max_state_particles": 10}, "max_state_particles=10 is below num_state_particles=100"),
        ({"batch_size": 0}, "SMC2: batch_size must be a positive integer"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SMC2(autoregression, **options)
