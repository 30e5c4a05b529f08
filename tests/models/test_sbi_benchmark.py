"""The benchmark's tasks: observations and references from files or exactly, and exact posteriors as programs."""

import os

import jax
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

from models import bernoulli_glm
from models.sbi_benchmark import TASKS, load_reference, posterior_model
from numpyro_smc.reports.c2st import c2st

CLOSED = [name for name, task in TASKS.items() if task.sample_posterior is not None]


@pytest.fixture(autouse=True)
def _no_directory(monkeypatch, request):
    if "slow" not in request.keywords:
        monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)


def write(folder, name: str, num_samples: int = 30) -> dict[str, np.ndarray]:
    """A file of the stated format."""
    length = int(np.prod(TASKS[name].observation_shape))
    dim = 5 if name == "slcp" else length
    rng = np.random.default_rng(0)
    arrays = {"observations": rng.normal(size=(10, length)), "true_parameters": rng.normal(size=(10, dim))}
    arrays |= {f"reference_posterior_{number}": rng.normal(size=(num_samples, dim)) for number in (1, 2, 3)}
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)
    return arrays


@pytest.mark.parametrize("name", TASKS)
def test_exact_posterior_is_prior_times_likelihood_of_the_simulators_sites(name):
    task = TASKS[name]
    trace = handlers.trace(handlers.seed(task.simulator, jax.random.key(1))).get_trace()
    theta, x = trace["theta"]["value"], trace["x"]["value"]
    assert x.shape == task.observation_shape
    assert trace["x"]["type"] == "deterministic" or not trace["x"]["is_observed"]
    found, sites = log_density(posterior_model(task), (x,), {}, {"theta": theta})
    assert list(sites) == ["theta", "log_likelihood"]
    expected = trace["theta"]["fn"].log_prob(theta) + task.log_likelihood(theta, x)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert np.isfinite(expected)


@pytest.mark.parametrize("name", CLOSED)
def test_without_a_file_observation_and_exact_draws_are_computed(name):
    first, again, second = (load_reference(name, number, num_samples=200) for number in (1, 1, 2))
    assert first.samples.shape == (200, len(first.true_parameter))
    assert first.observation.shape == TASKS[name].observation_shape
    assert first.source == "simulated observation 1, exact draws"
    np.testing.assert_array_equal(first.samples, again.samples)
    assert np.any(first.observation != second.observation) and np.any(first.samples != second.samples)
    assert len(np.unique(first.samples, axis=0)) == 200


def test_bernoulli_glm_without_a_file_is_sampled_by_nuts():
    """Against importance sampling from a widened Gaussian around the mode; five standard errors of ten means, NUTS's
    counted with a third of its draws: false alarms 6e-6."""
    reference = load_reference("bernoulli_glm", num_samples=400)
    assert reference.samples.shape == (400, 10) and reference.source == "simulated observation 1, NUTS"
    design, precision = bernoulli_glm.design_matrix().astype(float), bernoulli_glm.prior_precision()
    mode = np.zeros(10)
    for _ in range(20):  # Newton's method: the log density is concave
        share = 1 / (1 + np.exp(-design @ mode))
        hessian = (design.T * (share * (1 - share))) @ design + precision
        mode = mode + np.linalg.solve(hessian, reference.observation - design.T @ share - precision @ mode)
    noise = np.random.default_rng(0).normal(size=(40_000, 10))
    theta = mode + 1.2 * noise @ np.linalg.cholesky(np.linalg.inv(hessian)).T
    log_weights = np.asarray(TASKS["bernoulli_glm"].log_likelihood(theta, reference.observation), np.float64)
    log_weights += (noise**2).sum(1) / 2 - np.einsum("ni,ij,nj->n", theta, precision, theta) / 2
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    mean = weights @ theta
    variance = weights @ (theta - mean) ** 2
    errors = np.sqrt(variance * (3 / 400 + (weights**2).sum()))
    assert 1 / (weights**2).sum() > 2000
    assert np.all(np.abs(reference.samples.mean(0) - mean) < 5 * errors)
    np.testing.assert_allclose(reference.samples.var(0), variance, rtol=0.5)


@pytest.mark.parametrize("folder", [".", "sbibm"])
@pytest.mark.parametrize("name", ["slcp", "two_moons"])
def test_files_are_preferred(tmp_path, monkeypatch, folder, name):
    arrays = write(tmp_path / folder, name)
    monkeypatch.setenv("NUMPYRO_SMC_DATA", str(tmp_path))
    reference = load_reference(name, 2, num_samples=20)
    np.testing.assert_array_equal(reference.observation.ravel(), arrays["observations"][1])
    np.testing.assert_array_equal(reference.true_parameter, arrays["true_parameters"][1])
    np.testing.assert_array_equal(reference.samples, arrays["reference_posterior_2"][:20])
    assert reference.observation.shape == TASKS[name].observation_shape
    assert reference.source == f"{name}.npz, observation 2"


def test_observations_without_published_draws_are_sampled_exactly_where_that_is_possible(tmp_path):
    arrays = write(tmp_path, "gaussian_mixture")
    write(tmp_path, "slcp")
    reference = load_reference("gaussian_mixture", 4, tmp_path, num_samples=500)
    assert reference.source == "gaussian_mixture.npz, observation 4, exact draws"
    assert np.all(np.abs(reference.samples.mean(0) - arrays["observations"][3]) < 0.2)
    with pytest.raises(ValueError, match=r"slcp\.npz has no 20 draws from the posterior of observation 4"):
        load_reference("slcp", 4, tmp_path, num_samples=20)
    with pytest.raises(ValueError, match="has no 31 draws from the posterior of observation 1"):
        load_reference("slcp", 1, tmp_path, num_samples=31)


@pytest.mark.parametrize("named", [True, False])
def test_missing_file_of_slcp_is_named_with_its_source(tmp_path, named):
    looked = "nor in its folder sbibm" if named else "no directory was given"
    with pytest.raises(FileNotFoundError, match=rf"slcp\.npz is missing: .*{looked}.*sbi-benchmark/sbibm.*data_dir"):
        load_reference("slcp", data_dir=tmp_path if named else None)


def test_files_of_another_format_are_refused(tmp_path):
    np.savez(tmp_path / "two_moons.npz", observations=np.zeros((10, 2)))
    with pytest.raises(ValueError, match=r"two_moons\.npz has no array true_parameters"):
        load_reference("two_moons", data_dir=tmp_path)
    np.savez(tmp_path / "two_moons.npz", observations=np.zeros((10, 3)), true_parameters=np.zeros((10, 2)))
    with pytest.raises(ValueError, match=r"have shape \(10, 3\); expected \(10, 2\)"):
        load_reference("two_moons", data_dir=tmp_path)


def test_unknown_names_and_numbers_are_refused():
    with pytest.raises(ValueError, match="name='sir'; expected one of two_moons, slcp"):
        load_reference("sir")
    with pytest.raises(ValueError, match="number=11; expected 1 to 10"):
        load_reference("two_moons", 11)


@pytest.mark.slow
@pytest.mark.skipif(
    "NUMPYRO_SMC_DATA" not in os.environ, reason="NUMPYRO_SMC_DATA names no directory with the published files"
)
@pytest.mark.parametrize("name", ["two_moons", "gaussian_mixture"])
def test_exact_draws_are_not_told_from_the_published_ones(name):
    reference = load_reference(name)
    exact = TASKS[name].sample_posterior(jax.random.key(0), reference.observation, 10_000)
    assert 0.48 < float(c2st(reference.samples, exact)) < 0.52


@pytest.mark.slow
@pytest.mark.skipif(
    "NUMPYRO_SMC_DATA" not in os.environ, reason="NUMPYRO_SMC_DATA names no directory with the published files"
)
def test_controls_of_the_two_sample_test_on_two_moons():
    """Halves of the reference cannot be told apart; draws from the prior can."""
    samples = load_reference("two_moons").samples
    assert 0.49 < float(c2st(samples[:5000], samples[5000:])) < 0.51
    assert float(c2st(samples, np.random.default_rng(0).uniform(-1, 1, samples.shape))) > 0.95
