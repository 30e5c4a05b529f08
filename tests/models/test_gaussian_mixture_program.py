"""The Gaussian mixture: densities, the exact posterior by Bayes' rule, the errors, and fresh data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import SVI, RenyiELBO, TraceGraph_ELBO
from numpyro.infer.util import log_density
from numpyro.optim import Adam
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import norm

from models import gaussian_mixture

C = 20
X = jnp.asarray([-3.0, 41.0, 96.0, 188.0])
Z = np.array([0, 5, 10, 18])


def make_case():
    """Guide, and parameters of model and guide off their initial values."""
    guide = gaussian_mixture.make_guide(jax.random.key(0))
    svi = SVI(gaussian_mixture.model, guide, Adam(1e-3), TraceGraph_ELBO())
    params = svi.get_params(svi.init(jax.random.key(1), X))
    return guide, params | {"prior_logits": jnp.sin(jnp.arange(C))}


def encode(network, x) -> np.ndarray:
    first, last = network.layers
    return np.tanh(np.asarray(x)[:, None] @ first.weight.T + first.bias) @ last.weight.T + last.bias


def test_parameters_and_their_initial_values():
    guide = gaussian_mixture.make_guide(jax.random.key(0))
    svi = SVI(gaussian_mixture.model, guide, Adam(1e-3), TraceGraph_ELBO())
    params = svi.get_params(svi.init(jax.random.key(1), X))
    assert set(params) == {"prior_logits", "encoder$params"}
    np.testing.assert_array_equal(params["prior_logits"], np.zeros(C))
    first, last = params["encoder$params"].layers
    assert [leaf.shape for leaf in (first.weight, first.bias, last.weight, last.bias)] == [
        (16, 1),
        (16,),
        (20, 16),
        (20,),
    ]
    assert 0.7 < max(jnp.abs(first.weight).max(), jnp.abs(first.bias).max()) <= 1  # fan-in 1
    assert 0.23 < jnp.abs(last.weight).max() <= 0.25  # fan-in 16
    assert jnp.all(jnp.abs(last.bias) <= 0.25) and jnp.all(last.bias != 0)


def test_log_densities_are_the_written_ones():
    guide, params = make_case()
    found, _ = log_density(gaussian_mixture.model, (X,), {}, params | {"z": Z})
    expected = log_softmax(params["prior_logits"])[Z].sum() + norm(10 * Z, 5).logpdf(X).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    found, _ = log_density(guide, (X,), {}, params | {"z": Z})
    expected = log_softmax(encode(params["encoder$params"], X), -1)[np.arange(4), Z].sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_exact_posterior_is_the_normalised_joint():
    _, params = make_case()
    probabilities = softmax(params["prior_logits"])
    log_joint = np.log(probabilities) + norm(10 * np.arange(C), 5).logpdf(np.asarray(X)[:, None])
    expected = np.exp(log_joint - logsumexp(log_joint, -1, keepdims=True))
    np.testing.assert_allclose(gaussian_mixture.exact_posterior(X, probabilities), expected, rtol=1e-4, atol=1e-7)


def test_true_probabilities_are_proportional_to_five_plus_the_index():
    probabilities = gaussian_mixture.true_probabilities()
    assert float(probabilities.sum()) == pytest.approx(1.0)
    np.testing.assert_allclose(probabilities[1:] / probabilities[0], (5 + np.arange(1, C)) / 5, rtol=1e-5)


def test_errors_are_euclidean_distances_of_probabilities():
    _, params = make_case()
    truth = np.asarray(gaussian_mixture.true_probabilities())
    expected = np.linalg.norm(softmax(params["prior_logits"]) - truth)
    assert float(gaussian_mixture.prior_error(params)) == pytest.approx(expected, rel=1e-5)
    assert float(gaussian_mixture.prior_error({"prior_logits": jnp.log(truth) + 3})) == pytest.approx(0, abs=1e-6)
    difference = softmax(encode(params["encoder$params"], X), -1) - gaussian_mixture.exact_posterior(X, truth)
    expected = np.sqrt((np.asarray(difference) ** 2).sum(-1)).mean()
    assert float(jax.jit(gaussian_mixture.posterior_error)(params, X)) == pytest.approx(expected, rel=1e-4)


def test_posterior_error_is_zero_where_the_encoder_is_the_posterior():
    # One observation: the posterior stands in the last bias.
    _, params = make_case()
    target = jnp.log(gaussian_mixture.exact_posterior(X[:1], gaussian_mixture.true_probabilities())[0] + 1e-30)
    zero = jax.tree.map(jnp.zeros_like, params["encoder$params"])
    exact = eqx.tree_at(lambda network: network.layers[1].bias, zero, target)
    assert float(gaussian_mixture.posterior_error({"encoder$params": exact}, X[:1])) == pytest.approx(0, abs=1e-6)


def test_simulated_clusters_have_the_true_proportions():
    x = gaussian_mixture.simulate(jax.random.key(2), 20_000)
    clusters = np.arange(C)
    mean = float(gaussian_mixture.true_probabilities() @ (10 * clusters))
    variance = 25 + float(gaussian_mixture.true_probabilities() @ (10 * clusters) ** 2) - mean**2
    assert x.shape == (20_000,)
    assert float(x.mean()) == pytest.approx(mean, abs=5 * np.sqrt(variance / 20_000))
    assert float(x.var()) == pytest.approx(variance, rel=0.05)


def test_weights_are_per_datapoint_and_subsampling_scales_them():
    guide, params = make_case()
    guide = handlers.substitute(handlers.seed(guide, 0), params)
    guide_trace = handlers.trace(guide).get_trace(X, 2)
    model = handlers.replay(handlers.seed(gaussian_mixture.model, 0), guide_trace)
    trace = handlers.trace(model).get_trace(X, 2)
    np.testing.assert_array_equal(trace["x"]["value"], X[guide_trace["data"]["value"]])
    assert trace["z"]["value"].shape == (2,)
    assert trace["z"]["scale"] == trace["x"]["scale"] == guide_trace["z"]["scale"] == 2

    # With one cluster per datapoint all but certain, many particles give each datapoint its own evidence.
    uniform = params | {"encoder$params": jax.tree.map(jnp.zeros_like, params["encoder$params"])}
    loss = RenyiELBO(0.0, num_particles=4000)
    bound = -loss.loss(
        jax.random.key(0), uniform, gaussian_mixture.model, gaussian_mixture.make_guide(jax.random.key(0)), X
    )
    log_joint = log_softmax(params["prior_logits"]) + norm(10 * np.arange(C), 5).logpdf(np.asarray(X)[:, None])
    assert float(bound) == pytest.approx(float(logsumexp(log_joint, -1).sum()), abs=0.5)
