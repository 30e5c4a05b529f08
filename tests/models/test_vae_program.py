"""The autoencoders: parameter counts, densities, the plate, other networks and other guides."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.util import log_density
from numpyro.optim import Adam
from scipy.special import expit, log_softmax
from scipy.stats import norm

from models import vae
from models.images import load_images
from models.networks import elu_network, xavier_uniform
from numpyro_smc import IWELBO
from numpyro_smc.guides.auxiliary import AuxiliaryFlowGuide
from numpyro_smc.guides.flow import FlowGuide

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


def layers_of(network) -> list:
    return [layer for layer in network.layers if hasattr(layer, "weight") and hasattr(layer, "bias")]


@pytest.mark.parametrize("name", vae.LAYERS)
def test_elu_networks_have_the_sizes_of_inference_suboptimality(name):
    hidden = vae.LAYERS[name]
    networks = eqx.filter_eval_shape(lambda key: vae.elu_networks(key, 784, 50, 50, *hidden), jax.random.key(0))
    sizes = [[layer.weight.shape for layer in layers_of(network)] for network in networks]
    encoder, decoder = ([784, *hidden[0], 150], [50, *hidden[1], 784])
    assert sizes[0] == list(zip(encoder[1:], encoder[:-1], strict=True))
    assert sizes[1] == list(zip(decoder[1:], decoder[:-1], strict=True))


def test_elu_networks_start_glorot_uniform_and_are_the_written_ones():
    network = elu_network(jax.random.key(0), (30, 40, 20))
    first, second = layers_of(network)
    for layer in (first, second):
        limit = np.sqrt(6 / sum(layer.weight.shape))
        assert 0.95 * limit < jnp.abs(layer.weight).max() <= limit
        np.testing.assert_array_equal(layer.bias, np.zeros_like(layer.bias))
    hidden = first.weight @ jnp.arange(30.0)
    expected = second.weight @ np.where(hidden > 0, hidden, np.expm1(hidden))
    np.testing.assert_allclose(network(jnp.arange(30.0)), expected, rtol=1e-5, atol=1e-5)


def test_convolutional_networks_have_the_published_shapes():
    def build(key):
        return vae.convolutional_networks(key, latent_size=50, context_size=7)

    encoder, decoder = eqx.filter_eval_shape(build, jax.random.key(0))
    shapes = [
        [layer.weight.shape for layer in layers_of(network) if layer.weight.ndim > 1] for network in (encoder, decoder)
    ]
    assert shapes[0] == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (107, 1024)]
    assert shapes[1] == [(1024, 50), (128, 256, 4, 4), (64, 128, 4, 4), (3, 64, 4, 4)]

    def through(key):
        encoder, decoder = build(key)
        between = [1024, 128 * 6 * 6, 64 * 15 * 15, 3 * 32 * 32]
        image = jnp.zeros(50)
        found = []
        for layer in decoder.layers:
            image = layer(image)
            if hasattr(layer, "weight") and layer.weight.ndim > 1:
                found.append(image.size)
        assert found == between
        return encoder(image)

    assert jax.eval_shape(through, jax.random.key(0)).shape == (107,)


def test_convolutions_start_glorot_uniform():
    network = eqx.nn.Sequential([eqx.nn.ConvTranspose2d(6, 3, 4, 2, key=jax.random.key(0))])
    layer = xavier_uniform(jax.random.key(1), network).layers[0]
    limit = np.sqrt(6 / (16 * (6 + 3)))
    assert 0.95 * limit < jnp.abs(layer.weight).max() <= limit and not layer.bias.any()


@pytest.mark.parametrize("kind", ["affine", "coupling", "auxiliary"])
def test_flow_guides_take_the_encoder(kind):
    encoder, decoder = vae.elu_networks(jax.random.key(0), 5, 4, 3, (6,), ())
    program = vae.gaussian_encoder(encoder, 4)
    guide = AuxiliaryFlowGuide(program, 2, hidden=5) if kind == "auxiliary" else FlowGuide(program, kind, hidden=5)
    model = vae.gaussian_model(decoder, 4)
    params = initial_params(model, guide, X)
    assert {"encoder$params", "decoder$params"} <= set(params)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: IWELBO(2).loss(jax.random.key(2), p, model, guide, X, subsample_size=2))(params)

    found = gradient(params)
    context = layers_of(found["encoder$params"])[-1].bias
    assert (np.abs(context[:8]) > 0).all()
    assert (np.abs(context[8:]) > 0).all() == (kind != "affine")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_the_encoder_program_returns_the_published_moments():
    encoder, _ = vae.elu_networks(jax.random.key(0), 5, 2, 3, (), ())
    (weight,) = [layer.weight for layer in layers_of(encoder)]
    with handlers.seed(rng_seed=0):
        loc, scale, context = vae.gaussian_encoder(encoder, 2)(jnp.asarray(X))
    code = X @ np.asarray(weight).T
    np.testing.assert_allclose(loc, code[:, :2], atol=1e-6)
    np.testing.assert_allclose(scale, np.exp(0.5 * code[:, 2:4]), rtol=1e-5)  # half the log variance
    np.testing.assert_allclose(context, np.where(code > 0, code, np.expm1(code))[:, 4:], atol=1e-6)


def test_a_convolutional_autoencoder_learns_digits():
    """Eight of them, four times as large and in three equal colours. It starts at log 2 nats a number, or above."""
    digits = load_images(binarisation="threshold").train[:8].reshape(8, 1, 8, 8)
    x = jnp.asarray(np.tile(digits.repeat(4, 2).repeat(4, 3), (1, 3, 1, 1)).reshape(8, 3072))
    encoder, decoder = vae.convolutional_networks(jax.random.key(0), 2, 0, (4, 8, 16), (16, 8, 4))
    svi = SVI(*vae.gaussian_programs(encoder, decoder, 2), Adam(0.01), Trace_ELBO())
    losses = svi.run(jax.random.key(1), 30, x, progress_bar=False).losses / x.size
    assert 0.6 < losses[0] < 1.0
    assert losses[-5:].mean() < 0.75 * losses[0]
