"""Networks against plain formulas, and other libraries' modules as embeddings."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import random

from numpyro_smc.ratio.networks import ACTIVATIONS, elu, embedding_of, from_equinox, from_flax, mlp, residual_mlp

X = random.normal(random.key(0), (4, 3, 2))


def num_weights(weights):
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


def test_the_perceptron_has_the_published_number_of_weights():
    assert num_weights(mlp(256, 7).init(random.key(0), 18, 1)) == 465_665
    assert num_weights(residual_mlp(16, 3).init(random.key(0), 5, 2)) == 5 * 16 + 16 + 6 * (16 * 16 + 16) + 16 * 2 + 2


def test_weights_start_uniform_with_a_bound_that_falls_with_the_inputs():
    """Standard deviations within five standard errors: a uniform law's squared deviation has relative sd 0.894."""
    for inputs, layer in zip((18, 64, 64), mlp(64, 1).init(random.key(1), 18, 64), strict=True):
        for values in layer.values():
            assert abs(values).max() <= inputs**-0.5
        ratio = float(jnp.mean(jnp.square(layer["weight"])) * 3 * inputs)
        assert abs(ratio - 1) < 5 * 0.894 / np.sqrt(layer["weight"].size)


def test_the_residual_perceptron_is_its_formula():
    network = residual_mlp(8, 2, "tanh", layer_norm=True)
    weights = network.init(random.key(2), 3, 2)
    weights = jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(random.key(3), leaf.shape), weights)
    inputs = np.asarray(random.normal(random.key(4), (5, 3)))

    def linear(layer, units):
        return units @ np.asarray(layer["weight"]) + np.asarray(layer["bias"])

    units = linear(weights["first"], inputs)
    for block in weights["blocks"]:
        inner = units
        for half in block:
            inner = (inner - inner.mean(1, keepdims=True)) / np.sqrt(inner.var(1, keepdims=True) + 1e-5)
            inner = np.tanh(inner * np.asarray(half["norm"]["scale"]) + np.asarray(half["norm"]["shift"]))
            inner = linear(half["linear"], inner)
        units = units + inner
    np.testing.assert_allclose(network.apply(weights, inputs), linear(weights["last"], units), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [mlp(16, 1), residual_mlp(16, 1)])
def test_parts_that_broadcast_stand_for_their_concatenation(network):
    weights = network.init(random.key(5), 6, 2)
    one, other = random.normal(random.key(6), (7, 4, 1)), random.normal(random.key(7), (4, 5))
    whole = jnp.concatenate([one, jnp.broadcast_to(other, (7, 4, 5))], axis=-1)
    np.testing.assert_allclose(network.apply(weights, one, other), network.apply(weights, whole), rtol=1e-5, atol=1e-6)
    assert network.apply(weights, whole[0, 0]).shape == (2,)


def test_elu_has_the_values_and_derivatives_of_the_textbook():
    units = jnp.array([-30.0, -1.0, -1e-3, 0.5, 3.0])
    np.testing.assert_allclose(elu(units), jnp.where(units > 0, units, jnp.expm1(units)), rtol=1e-6)
    below = jnp.minimum(units, 0)
    np.testing.assert_allclose(jax.vmap(jax.grad(elu))(units), jnp.exp(below), rtol=1e-5, atol=1e-7)
    second = jax.vmap(jax.jacfwd(jax.grad(elu)))(units)
    np.testing.assert_allclose(second, jnp.where(units > 0, 0, jnp.exp(below)), rtol=1e-5, atol=1e-7)


def test_a_network_embeds_flattened_outputs():
    network = mlp(8, 1)
    embedding = embedding_of(network, 3)
    weights = embedding.init(random.key(8), X)
    np.testing.assert_allclose(embedding.apply(weights, X), network.apply(weights, X.reshape(4, 6)))
    assert embedding.apply(weights, X).shape == (4, 3)


class Linen(linen.Module):
    has_norm: bool = False

    @linen.compact
    def __call__(self, x):
        flat = linen.Dense(5)(x.reshape(len(x), -1))
        return linen.BatchNorm(use_running_average=False)(flat) if self.has_norm else flat


class Nnx(nnx.Module):
    def __init__(self, rngs, layer=nnx.Linear):
        self.layer = layer(6, 5, rngs=rngs) if layer is nnx.Linear else layer(6, rngs=rngs)

    def __call__(self, x):
        return self.layer(x.reshape(len(x), -1))


class Equinox(equinox.Module):
    layer: equinox.nn.Linear
    scale: float = 2.0

    def __call__(self, x):
        return self.scale * self.layer(x.reshape(-1))


@pytest.mark.parametrize(
    "embedding",
    [
        from_flax(Linen()),
        from_flax(Nnx(nnx.Rngs(0))),
        from_equinox(Equinox(equinox.nn.Linear(6, 5, key=random.key(0)))),
        from_equinox(lambda key: Equinox(equinox.nn.Linear(6, 5, key=key))),
    ],
    ids=["linen", "nnx", "equinox", "equinox of a key"],
)
def test_modules_of_other_libraries_are_trained(embedding):
    weights = embedding.init(random.key(9), X)
    assert embedding.apply(weights, X).shape == (4, 5)
    gradient = jax.jit(jax.grad(lambda weights: jnp.square(embedding.apply(weights, X)).sum()))(weights)
    assert num_weights(gradient) == 6 * 5 + 5
    assert all(float(abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_a_function_of_a_key_starts_from_other_weights_each_time():
    embedding = from_equinox(lambda key: Equinox(equinox.nn.Linear(6, 5, key=key)))
    one, other = (embedding.apply(embedding.init(random.key(seed), X), X) for seed in (0, 1))
    assert abs(one - other).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_flax(Linen(has_norm=True)).init(random.key(0), X), r"Linen has a state .*'batch_stats'"),
        (lambda: from_flax(Nnx(nnx.Rngs(0), nnx.BatchNorm)), r"Nnx has a state .*'mean'"),
        (lambda: from_equinox(equinox.nn.BatchNorm(6, "batch", mode="batch")), r"BatchNorm has a state"),
        (lambda: from_flax(3), r"must be a flax linen.Module or nnx.Module, got int"),
        (lambda: from_equinox(lambda key: 3), r"must be an equinox.Module, got int"),
        (lambda: from_equinox(3), r"must be an equinox.Module or make one"),
        (lambda: mlp(activation="softmax"), r"activation must be one of .*'elu'.*, got 'softmax'"),
        (lambda: mlp(width=0), r"width must be a positive integer, got 0"),
        (lambda: residual_mlp(num_blocks=0), r"num_blocks must be a positive integer, got 0"),
    ],
)
def test_what_cannot_be_trained_here_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation_is_usable(name):
    network = mlp(4, 1, name)
    assert jnp.isfinite(network.apply(network.init(random.key(0), 2, 1), jnp.ones((3, 2)))).all()
