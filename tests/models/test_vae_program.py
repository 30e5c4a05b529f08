"""The autoencoders: parameter counts, densities, the plate, and other networks."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import SVI, TraceGraph_ELBO
from numpyro.infer.util import log_density
from numpyro.optim import Adam
from scipy.special import expit, log_softmax
from scipy.stats import norm

from models import vae

X = np.array([[0, 1, 0, 1, 1], [1, 1, 0, 1, 0], [0, 0, 1, 1, 0]], dtype=np.float32)
SMALL = {
    "gaussian": lambda key: vae.make_gaussian_vae(key, 5, 3, 4),
    "categorical": lambda key: vae.make_categorical_vae(key, 5, 2, 3, 4),
}


def initial_params(model, guide, x):
    svi = SVI(model, guide, Adam(1e-3), TraceGraph_ELBO())
    return svi.get_params(svi.init(jax.random.key(1), x))


def make_case(kind: str):
    model, guide = SMALL[kind](jax.random.key(0))
    params = initial_params(model, guide, X)
    if kind == "categorical":
        params["prior_logits"] = jnp.sin(jnp.arange(6.0)).reshape(2, 3)
    return model, guide, params


def draw_latent(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 3)) if kind == "gaussian" else rng.integers(0, 3, (3, 2))


def forward(network, inputs) -> np.ndarray:
    for layer in network.layers[:-1]:
        inputs = np.tanh(inputs @ layer.weight.T + layer.bias)
    return np.asarray(inputs @ network.layers[-1].weight.T + network.layers[-1].bias)


def log_terms(kind: str, params, z) -> tuple[np.ndarray, np.ndarray]:
    """log p(x, z) and log q(z | x), each ``[N]``."""
    code = forward(params["encoder$params"], X)
    latent = z if kind == "gaussian" else np.eye(3)[z]
    probabilities = expit(forward(params["decoder$params"], latent.reshape(3, -1)))
    log_likelihood = np.sum(X * np.log(probabilities) + (1 - X) * np.log1p(-probabilities), -1)
    if kind == "gaussian":
        log_prior = norm.logpdf(z).sum(-1)
        log_q = norm(code[:, :3], np.exp(code[:, 3:])).logpdf(z).sum(-1)
    else:
        log_prior = (latent * log_softmax(params["prior_logits"], -1)).sum((-1, -2))
        log_q = (latent * log_softmax(code.reshape(3, 2, 3), -1)).sum((-1, -2))
    return log_prior + log_likelihood, log_q


@pytest.mark.parametrize("kind", SMALL)
def test_log_densities_are_the_written_ones(kind):
    model, guide, params = make_case(kind)
    z = draw_latent(kind)
    for program, expected in zip((model, guide), log_terms(kind, params, z), strict=True):
        found, _ = log_density(program, (X,), {}, params | {"z": jnp.asarray(z)})
        assert float(found) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_published_sizes():
    def count(programs, num_pixels):
        params = initial_params(*programs, np.zeros((1, num_pixels)))
        return {name: sum(leaf.size for leaf in jax.tree.leaves(value)) for name, value in params.items()}

    key = jax.random.key(0)
    assert count(vae.make_gaussian_vae(key), 784) == {
        "encoder$params": 784 * 200 + 200 + 200 * 200 + 200 + 200 * 400 + 400,
        "decoder$params": 2 * (200 * 200 + 200) + 200 * 784 + 784,
    }
    assert count(vae.make_categorical_vae(key, 768), 768) == {
        "encoder$params": 768 * 128 + 128 + 128 * 128 + 128 + 128 * 256 + 256,
        "decoder$params": 256 * 128 + 128 + 128 * 128 + 128 + 128 * 768 + 768,
        "prior_logits": 256,
    }


def test_weights_start_uniform_by_fan_in():
    encoder, decoder = vae.mlp_networks(jax.random.key(0), 30, 20, 40, 50)
    for layer in (*encoder.layers, *decoder.layers):
        limit = 1 / np.sqrt(layer.weight.shape[1])
        assert 0.9 * limit < jnp.abs(layer.weight).max() <= limit
        assert 0.7 * limit < jnp.abs(layer.bias).max() <= limit


@pytest.mark.parametrize("kind", SMALL)
def test_model_and_guide_share_their_subsample(kind):
    model, guide, params = make_case(kind)
    guide_trace = handlers.trace(handlers.substitute(handlers.seed(guide, 0), params)).get_trace(X, 2)
    model = handlers.replay(handlers.substitute(handlers.seed(model, 0), params), guide_trace)
    trace = handlers.trace(model).get_trace(X, 2)
    np.testing.assert_array_equal(trace["x"]["value"], X[guide_trace["data"]["value"]])
    assert trace["z"]["value"].shape == ((2, 3) if kind == "gaussian" else (2, 2))
    assert trace["z"]["fn"].batch_shape == guide_trace["z"]["fn"].batch_shape == trace["x"]["fn"].batch_shape == (2,)
    assert trace["z"]["scale"] == trace["x"]["scale"] == guide_trace["z"]["scale"] == 1.5


def test_any_modules_of_the_right_sizes_serve_as_encoder_and_decoder():
    class Scale(eqx.Module):
        weight: jax.Array

        def __call__(self, inputs):
            return self.weight @ inputs

    encoder, decoder = Scale(jnp.ones((4, 5))), Scale(jnp.ones((5, 2)))
    model, guide = vae.gaussian_programs(encoder, decoder, 2)
    params = initial_params(model, guide, X)
    assert params["encoder$params"].weight.shape == (4, 5)
    z = np.random.default_rng(0).normal(size=(3, 2))
    found, _ = log_density(guide, (X,), {}, params | {"z": jnp.asarray(z)})
    code = X.sum(-1, keepdims=True)
    assert float(found) == pytest.approx(norm(code, np.exp(code)).logpdf(z).sum(), rel=1e-5)
