"""The Gaussian toy: its densities, its closed forms against each other, and one weight per datapoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import SVI, RenyiELBO
from numpyro.infer.util import log_density
from numpyro.optim import Adam
from scipy.stats import norm

from models import gaussian_toy

N, D = 6, 3


def make_case() -> tuple[jax.Array, dict[str, jax.Array], np.ndarray]:
    """Data, parameters off the optimum, and latents."""
    x = gaussian_toy.simulate(jax.random.key(0), N, D)
    params = gaussian_toy.perturbed_optimum(jax.random.key(1), x, noise=0.5)
    return x, params, np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def log_joint(program, params, z, *args) -> float:
    return float(log_density(handlers.seed(program, 0), args, {}, params | {"z": jnp.asarray(z)})[0])


def test_log_densities_are_the_written_ones():
    x, params, z = make_case()
    expected = norm(params["mu"], 1).logpdf(z).sum() + norm(z, 1).logpdf(x).sum()
    assert log_joint(gaussian_toy.model, params, z, x) == pytest.approx(expected, rel=1e-5)
    expected = norm(np.asarray(x) @ np.asarray(params["A"]) + params["b"], 2 / 3).logpdf(z).sum()
    assert log_joint(gaussian_toy.guide, params, z, x) == pytest.approx(expected, rel=1e-5)


def test_log_evidence_is_the_joint_over_the_posterior_of_the_optimum():
    x, _, z = make_case()
    params = gaussian_toy.optimum(x)
    log_posterior = norm(np.asarray(x) @ np.asarray(params["A"]) + params["b"], np.sqrt(0.5)).logpdf(z).sum()
    log_evidence = gaussian_toy.log_evidence(x, params["mu"])
    assert log_evidence.shape == (N,)
    found = log_joint(gaussian_toy.model, params, z, x) - log_posterior
    assert found == pytest.approx(float(log_evidence.sum()), rel=1e-5)


def test_optimum_maximises_the_evidence():
    x, _, _ = make_case()
    slope = jax.grad(lambda mu: gaussian_toy.log_evidence(x, mu).sum())(gaussian_toy.optimum(x)["mu"])
    np.testing.assert_allclose(slope, 0.0, atol=1e-5)


def test_perturbation_has_the_asked_size_and_is_independent_by_parameter():
    x = gaussian_toy.simulate(jax.random.key(0), 40, 30)
    best = gaussian_toy.optimum(x)
    perturbed = gaussian_toy.perturbed_optimum(jax.random.key(1), x, noise=0.01)
    assert {name: value.shape for name, value in perturbed.items()} == {"mu": (30,), "A": (30, 30), "b": (30,)}
    noise = {name: (perturbed[name] - best[name]) / 0.01 for name in best}
    assert 0.9 < noise["A"].std() < 1.1  # 900 draws: 4.2 standard errors
    assert not np.allclose(noise["mu"], noise["b"], atol=0.1)


def test_parameters_start_between_1_5_and_2_5():
    x, _, _ = make_case()
    svi = SVI(gaussian_toy.model, gaussian_toy.guide, Adam(1e-3), RenyiELBO(0.0, num_particles=2))
    params = svi.get_params(svi.init(jax.random.key(0), x))
    assert set(params) == {"mu", "A", "b"}
    assert all(jnp.all((value >= 1.5) & (value <= 2.5)) for value in params.values())
    assert not np.allclose(params["mu"], params["b"])


def test_weights_are_per_datapoint():
    x = gaussian_toy.simulate(jax.random.key(0), 40, D)
    params = gaussian_toy.optimum(x)
    exact = float(gaussian_toy.log_evidence(x, params["mu"]).sum())
    params["b"] += 0.5
    loss = RenyiELBO(0.0, num_particles=4000)
    bound = -loss.loss(jax.random.key(0), params, gaussian_toy.model, gaussian_toy.guide, x)
    # About five standard deviations; one weight for all 40 datapoints would be fifteen nats below.
    assert float(bound) == pytest.approx(exact, abs=1.0)


def test_model_and_guide_share_their_subsample():
    x, params, _ = make_case()
    guide, model = (
        handlers.substitute(handlers.seed(program, 0), params) for program in (gaussian_toy.guide, gaussian_toy.model)
    )
    guide_trace = handlers.trace(guide).get_trace(x, 2)
    trace = handlers.trace(handlers.replay(model, guide_trace)).get_trace(x, 2)
    np.testing.assert_array_equal(trace["x"]["value"], x[guide_trace["data"]["value"]])
    assert trace["z"]["value"].shape == (2, D)
    assert trace["z"]["scale"] == trace["x"]["scale"] == guide_trace["z"]["scale"] == N / 2


def test_simulated_data_have_variance_two_around_one_mean():
    x = gaussian_toy.simulate(jax.random.key(3), 4000, 5)
    np.testing.assert_allclose(x.var(0), 2.0, rtol=0.12)  # 5 standard errors
    assert x.mean(0).std() > 0.3
