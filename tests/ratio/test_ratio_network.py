"""The network of the log ratio: parity with PyTorch, masks, marginals, standardisation, and what it refuses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_smc.ratio.networks import embedding_of, mlp
from numpyro_smc.ratio.ratio_network import RatioNetwork, RatioWeights, Standardization

THETA = random.normal(random.key(0), (50, 3)) * jnp.array([1.0, 5.0, 0.2]) + jnp.array([0.0, 3.0, -1.0])
X = random.normal(random.key(1), (50, 2, 2)) + 4.0
CONTEXT = random.uniform(random.key(2), (50, 1))
SMALL = mlp(8, 1)


@pytest.fixture(scope="module")
def masked():
    network = RatioNetwork(3, SMALL, has_masks=True)
    return network, network.init(random.key(3), THETA, X)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-3), (np.float64, 1e-5)])
def test_log_ratios_of_given_weights_are_those_of_pytorch(dtype, tolerance):
    """Eight hidden layers of ELUs, four masks: absolutely in single, relatively in double precision."""
    golden = np.load(Path(__file__).parent / "data" / "torch_perceptron.npz")
    with jax.enable_x64(dtype == np.float64):
        layers = [
            {"weight": jnp.asarray(golden[f"weight_{i}"].T, dtype), "bias": jnp.asarray(golden[f"bias_{i}"], dtype)}
            for i in range(9)
        ]
        theta = Standardization(jnp.asarray(golden["mean"], dtype), jnp.asarray(golden["scale"], dtype))
        x = Standardization(jnp.zeros((4, 2), dtype), jnp.ones((4, 2), dtype))
        weights = RatioWeights({"trunk": layers, "embedding": {}}, {"theta": theta, "x": x})
        network = RatioNetwork(5, mlp(32, 7), has_masks=True, standardize_x=False)
        masks = golden["masks"][:, None]
        found = network.log_ratio(weights, golden["theta"].astype(dtype), golden["x"].astype(dtype), masks)
    found = np.asarray(found)
    assert found.dtype == dtype and found.shape == (4, 12)
    scale = 1 if dtype == np.float32 else np.maximum(abs(golden["log_ratio"]), 1)
    assert np.max(abs(found - golden["log_ratio"]) / scale) < tolerance


def test_the_trunk_sees_masked_parameters_mask_output_and_context():
    network = RatioNetwork(3, SMALL, has_masks=True, context_size=1)
    weights = network.init(random.key(3), THETA, X, CONTEXT)
    mask = np.array([True, False, True])

    def standardized(values):
        values = np.asarray(values, np.float64)
        return (values - values.mean(0)) / values.std(0, ddof=1)

    parts = [np.where(mask, standardized(THETA), 0), np.broadcast_to([1, -1, 1], (50, 3))]
    parts += [standardized(X).reshape(50, 4), standardized(CONTEXT)]
    expected = SMALL.apply(weights.trained["trunk"], jnp.asarray(np.concatenate(parts, 1), jnp.float32))[:, 0]
    found = network.log_ratio(weights, THETA, X, mask, CONTEXT)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_dropped_parameters_have_no_influence_whatever_they_are(masked):
    network, weights = masked
    mask = jnp.array([True, False, True])
    broken = THETA.at[:, 1].set(jnp.nan)
    found = network.log_ratio(weights, broken, X, mask)
    assert np.array_equal(found, network.log_ratio(weights, THETA, X, mask))
    gradient = jax.grad(lambda theta: network.log_ratio(weights, theta, X, mask).sum())(broken)
    assert np.isfinite(gradient).all() and np.all(gradient[:, 1] == 0) and np.all(gradient[:, 0] != 0)
    all_kept = network.log_ratio(weights, THETA, X)
    assert np.array_equal(all_kept, network.log_ratio(weights, THETA, X, jnp.ones(3, bool)))
    assert abs(all_kept - found).max() > 1e-3


def test_leading_axes_broadcast_and_features_are_shared(masked):
    network, weights = masked
    one_by_one = jnp.stack([network.log_ratio(weights, theta, X[:4]) for theta in THETA[:5]])
    np.testing.assert_allclose(network.log_ratio(weights, THETA[:5, None], X[:4]), one_by_one, rtol=1e-4, atol=1e-6)
    features = network.features(weights, X[:4])
    assert features.shape == (4, 4)
    shared = network.log_ratio_of_features(weights, THETA[:5, None], features)
    np.testing.assert_allclose(shared, one_by_one, rtol=1e-4, atol=1e-6)


def test_fixed_marginals_are_independent_networks_over_one_embedding():
    network = RatioNetwork(3, SMALL, embedding_of(SMALL, 2), marginals=["=1", "110"])
    weights = network.init(random.key(4), THETA, X)
    found = network.log_ratio(weights, THETA, X)
    assert found.shape == (50, 4)
    z, features = weights.standardization["theta"](THETA), network.features(weights, X)
    assert features.shape == (50, 2)
    for m, mask in enumerate(network.marginals):
        trunk = jax.tree.map(lambda leaf, m=m: leaf[m], weights.trained["trunk"])
        alone = SMALL.apply(trunk, jnp.where(jnp.array(mask), z, 0), features)[:, 0]
        np.testing.assert_allclose(found[:, m], alone, rtol=1e-4, atol=1e-5)
        gradient = jax.grad(lambda theta, m=m: network.log_ratio(weights, theta, X[0])[m])(THETA[0])
        assert np.array_equal(gradient != 0, mask)


def test_standardisation_is_of_the_data_and_constant_outputs_stay_finite():
    x = X.at[:, 0, 1].set(2.0)
    network = RatioNetwork(3, SMALL)
    weights = network.init(random.key(5), THETA, x)
    moments = weights.standardization
    np.testing.assert_allclose(moments["theta"](THETA).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(moments["theta"](THETA).std(0, ddof=1), 1, rtol=1e-5)
    assert moments["x"].scale[0, 1] == 1 and np.isfinite(network.log_ratio(weights, THETA, x)).all()
    raw = RatioNetwork(3, SMALL, standardize_x=False)
    assert np.array_equal(raw.features(raw.init(random.key(5), THETA, x), x), x.reshape(50, 4))


def test_positive_parameters_are_standardised_on_the_log_scale():
    theta = jnp.exp(3 * THETA)
    network = RatioNetwork(3, SMALL, log_parameters=[True, False, True])
    weights = network.init(random.key(6), theta, X)
    on_logs = RatioNetwork(3, SMALL)
    logs = theta.at[:, [0, 2]].set(3 * THETA[:, jnp.array([0, 2])])
    expected = on_logs.log_ratio(on_logs.init(random.key(6), logs, X), logs, X)
    np.testing.assert_allclose(network.log_ratio(weights, theta, X), expected, rtol=1e-3, atol=1e-5)


def test_scalar_outputs_are_seen_too():
    network = RatioNetwork(3, SMALL)
    weights = network.init(random.key(7), THETA, X[:, 0, 0])
    assert network.log_ratio(weights, THETA, 1.5).shape == (50,)


def built(theta=THETA, x=X, context=None, **options):
    network = RatioNetwork(3, SMALL, **options)
    return network, network.init(random.key(0), theta, x, context)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: built(has_masks=True, marginals="=1"), r"has_masks=True .* exclude each other"),
        (lambda: built(marginals=["10"]), r"one entry per parameter, 3"),
        (lambda: built(log_parameters=[True]), r"log_parameters has 1 entries, but there are 3"),
        (lambda: built(log_parameters=[False, True, False]), r"log_parameters includes number 1, which is not always"),
        (lambda: built(theta=THETA[:, :2]), r"parameters \[n, 3\] .* got shapes \(50, 2\)"),
        (lambda: built(theta=THETA.at[:, 1].set(2.0)), r"parameter number 1 is 2 in all simulations"),
        (lambda: built(context_size=2), r"a context \[..., 2\] is needed, got none"),
        (lambda: built(embedding=embedding_of(SMALL, 2)._replace(apply=lambda w, x: x)), r"one vector per output"),
        (lambda: apply(mask=jnp.ones(3, bool)), r"takes no masks; build it with has_masks=True"),
        (lambda: apply(theta=THETA[:, :2]), r"parameters must be \[..., 3\], got shape \(50, 2\)"),
        (lambda: apply(x=X[:, 0]), r"trained on outputs of shape \(2, 2\), but got \(50, 2\)"),
        (lambda: apply(context=CONTEXT), r"has no context; build it with context_size"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def apply(theta=THETA, x=X, **options):
    network, weights = built()
    return network.log_ratio(weights, theta, x, **options)
