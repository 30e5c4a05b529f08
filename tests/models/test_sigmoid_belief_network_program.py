"""The sigmoid belief network: parameter counts, densities, and its exact evidence by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import SVI, TraceGraph_ELBO
from numpyro.infer.util import log_density
from numpyro.optim import Adam
from scipy.special import expit, logsumexp

from models import sigmoid_belief_network

MEAN = np.array([0.0, 0.2, 0.5, 1.0])
X = np.array([[0, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1]], dtype=np.float32)


def make_case(num_layers: int, width: int = 2, train_mean=MEAN):
    """Model, guide, and the parameters of each, those that start at a constant moved off it."""
    model, guide = sigmoid_belief_network.make_programs(jax.random.key(0), train_mean, num_layers, width)
    svi = SVI(model, guide, Adam(1e-3), TraceGraph_ELBO())
    params = svi.get_params(svi.init(jax.random.key(1), np.zeros((3, len(train_mean)))))
    theta = {"prior_logits": jnp.linspace(-1, 0.5, width), "generative$params": params.pop("generative$params")}
    assert not jnp.any(params.pop("prior_logits"))
    return model, guide, theta, params


def size(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_published_parameter_count():
    _, _, theta, phi = make_case(3, 200, np.full(784, 0.1))
    assert (size(theta), size(phi)) == (238_184, 237_400)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_initial_values(num_layers):
    _, _, theta, phi = make_case(num_layers, 50)
    assert set(phi) == {"inference$params"}
    generative, inference = theta["generative$params"], phi["inference$params"]
    assert [layer.weight.shape for layer in generative] == [(50, 50)] * (num_layers - 1) + [(4, 50)]
    assert [layer.weight.shape for layer in inference] == [(50, 4)] + [(50, 50)] * (num_layers - 1)
    np.testing.assert_allclose(expit(generative[-1].bias), np.clip(MEAN, 1e-4, 1 - 1e-4), rtol=1e-3)
    for layer in [*generative, *inference]:
        limit = 1 / np.sqrt(layer.weight.shape[1])
        assert 0.9 * limit < jnp.abs(layer.weight).max() <= limit
    for layer in [*generative[:-1], *inference]:
        assert 0.8 / np.sqrt(layer.weight.shape[1]) < jnp.abs(layer.bias).max() <= 1 / np.sqrt(layer.weight.shape[1])


def bernoulli(logits, values) -> float:
    probabilities = expit(np.asarray(logits, np.float64))
    return float(np.sum(values * np.log(probabilities) + (1 - values) * np.log1p(-probabilities)))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_log_densities_are_the_written_ones(num_layers):
    model, guide, theta, phi = make_case(num_layers)
    z = np.random.default_rng(0).integers(0, 2, (num_layers, 3, 2))
    sites = {f"z_{i}": jnp.asarray(z[i]) for i in range(num_layers)}

    generative = theta["generative$params"]
    expected = bernoulli(np.tile(theta["prior_logits"], (3, 1)), z[0])
    for layer, above, below in zip(generative, z, [*z[1:], X], strict=True):
        expected += bernoulli((2 * above - 1) @ layer.weight.T + layer.bias, below)
    assert float(log_density(model, (X,), {}, theta | sites)[0]) == pytest.approx(expected, rel=1e-5)

    inference, inputs, expected = phi["inference$params"], (X - MEAN + 1) / 2, 0.0
    for layer, values in zip(inference, z[::-1], strict=True):
        expected += bernoulli(inputs @ layer.weight.T + layer.bias, values)
        inputs = 2 * values - 1
    assert float(log_density(guide, (X,), {}, phi | sites)[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_log_evidence_sums_the_joint_over_all_states(num_layers):
    model, _, theta, _ = make_case(num_layers)
    states = np.array(list(itertools.product((0, 1), repeat=2 * num_layers))).reshape(-1, num_layers, 1, 2)

    @jax.jit
    def log_joint(state, x):
        sites = {f"z_{i}": state[i] for i in range(num_layers)}
        return log_density(model, (x,), {}, theta | sites)[0]

    joint = np.array([[log_joint(state, x[None]) for x in X] for state in states])
    found = sigmoid_belief_network.log_evidence(theta, X)
    np.testing.assert_allclose(found, logsumexp(joint, 0), rtol=1e-5)


def test_evidence_of_all_images_sums_to_one():
    _, _, theta, _ = make_case(3)
    images = np.array(list(itertools.product((0.0, 1.0), repeat=4)))
    assert float(jnp.exp(sigmoid_belief_network.log_evidence(theta, images)).sum()) == pytest.approx(1, rel=1e-5)


def test_model_and_guide_share_their_subsample():
    model, guide, theta, phi = make_case(3)
    guide_trace = handlers.trace(handlers.substitute(handlers.seed(guide, 0), phi)).get_trace(X, 2)
    model = handlers.replay(handlers.substitute(handlers.seed(model, 0), theta), guide_trace)
    trace = handlers.trace(model).get_trace(X, 2)
    np.testing.assert_array_equal(trace["x"]["value"], X[guide_trace["data"]["value"]])
    for name in ("z_0", "z_1", "z_2"):
        assert trace[name]["value"].shape == (2, 2)
        assert trace[name]["scale"] == trace["x"]["scale"] == guide_trace[name]["scale"] == 1.5
        assert trace[name]["fn"].batch_shape == guide_trace[name]["fn"].batch_shape == (2,)


def test_model_simulates_images_when_its_observation_is_released():
    model, _, theta, _ = make_case(3)
    released = handlers.uncondition(handlers.substitute(model, theta))
    trace = handlers.trace(handlers.seed(released, 0)).get_trace(np.full((5, 4), np.nan))
    assert trace["x"]["value"].shape == (5, 4)
    assert set(np.unique(trace["x"]["value"])) <= {0, 1}
