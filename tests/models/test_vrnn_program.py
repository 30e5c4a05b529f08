"""The recurrent model: it simulates, scores, respects lengths, and stays finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.util import log_density
from numpyro.optim import Adam
from scipy.stats import norm

from models import vrnn

T, B, K, Z = 5, 2, 4, 3
LENGTHS = np.array([5, 3])


def make_programs(emission: str = "bernoulli", **settings):
    return vrnn.make_programs(jax.random.key(0), K, Z, 6, emission, num_steps=T, num_series=B, **settings)


def make_data(emission: str) -> tuple[jax.Array, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(T, B, K))
    return jnp.asarray(rng.normal(size=(T, B, Z))), (y > 0).astype(float) if emission == "bernoulli" else y


def log_joint(program, z, y, lengths=None):
    """Log density per time and series, summed over sites."""

    @jax.jit
    def run(z, y):
        sites = handlers.trace(handlers.seed(handlers.substitute(program, {"z": z}), 0)).get_trace(y, lengths)
        return sum(site["fn"].log_prob(site["value"]) for site in sites.values() if site["type"] == "sample")

    return run(z, y)


@pytest.mark.parametrize("emission", ["bernoulli", "normal"])
def test_model_simulates_with_its_own_observations_fed_back(emission):
    model, _ = make_programs(emission)
    samples = Predictive(model, num_samples=2)(jax.random.key(1))
    assert samples["z"].shape == (2, T, B, Z)
    assert samples["y"].shape == (2, T, B, K)
    z, y = (samples[name][0] for name in ("z", "y"))
    fed_back = log_joint(model, z, y)
    other = log_joint(model, z, y.at[0, :, 0].set(1 - y[0, :, 0]))
    assert jnp.all(fed_back[1:] != other[1:])  # what is seen at the first step moves every later density


@pytest.mark.parametrize("emission", ["bernoulli", "normal"])
def test_log_density_is_that_of_the_written_recursion(emission):
    model, _ = make_programs(emission)
    z, y = make_data(emission)
    trace = handlers.trace(handlers.seed(model, jax.random.key(0))).get_trace(y)
    cell, prior, emit = (trace[f"{name}$params"]["value"] for name in ("transition_rnn", "prior_net", "emission_net"))

    def forward(network, inputs):
        hidden = np.maximum(network.layers[0].weight @ inputs + network.layers[0].bias, 0)
        return network.layers[1].weight @ hidden + network.layers[1].bias

    def gru(inputs, h):
        gates, recurrent = cell.weight_ih @ inputs + cell.bias, cell.weight_hh @ h
        (reset, update, new), (reset_h, update_h, new_h) = np.split(gates, 3), np.split(recurrent, 3)

        def sigmoid(a):
            return 1 / (1 + np.exp(-a))

        reset, update = sigmoid(reset + reset_h), sigmoid(update + update_h)
        new = np.tanh(new + reset * (new_h + cell.bias_n))
        return new + update * (h - new)

    expected = 0.0
    for b in range(B):
        h = np.zeros(6)
        for t in range(T):
            loc, raw = np.split(forward(prior, h), 2)
            expected += norm(loc, np.log1p(np.exp(raw + 0.5))).logpdf(z[t, b]).sum()
            out = forward(emit, np.concatenate([h, z[t, b]]))
            if emission == "bernoulli":
                expected += np.sum(y[t, b] * out - np.log1p(np.exp(out)))
            else:
                expected += norm(out, 1.0).logpdf(y[t, b]).sum()
            h = gru(np.concatenate([y[t, b], z[t, b]]), h)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    found, _ = log_density(model, (y,), {}, params | {"z": z})
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("which", "emission"), [("model", "bernoulli"), ("model", "normal"), ("guide", "bernoulli")])
def test_padding_adds_nothing_and_is_never_read(which, emission):
    program = make_programs(emission)[("model", "guide").index(which)]
    z, y = make_data(emission)
    valid = np.arange(T)[:, None] < LENGTHS
    padded = np.where(valid[..., None], y, np.nan)
    found = log_joint(program, z, padded, LENGTHS)
    np.testing.assert_array_equal(found[~valid], 0.0)
    for b, length in enumerate(LENGTHS):
        alone = log_joint(program, z[:length, b : b + 1], y[:length, b : b + 1])
        np.testing.assert_allclose(found[:length, b], alone[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("emission", ["bernoulli", "normal"])
def test_gradients_are_finite_under_masks(emission):
    model, guide = make_programs(emission)
    _, y = make_data(emission)
    padded = np.where((np.arange(T)[:, None] < LENGTHS)[..., None], y, np.nan)
    svi = SVI(model, guide, Adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), padded, LENGTHS)
    params = svi.get_params(state)

    def loss(params):
        return Trace_ELBO().loss(jax.random.key(1), params, model, guide, padded, LENGTHS)

    gradients = jax.jit(jax.grad(loss))(params)
    assert set(gradients) >= {"transition_rnn$params", "proposal_rnn$params", "prior_net$params", "proposal_net$params"}
    for name, gradient in gradients.items():
        leaves = jax.tree.leaves(gradient)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in leaves), name
        assert any(jnp.any(leaf != 0) for leaf in leaves), name


def test_emission_is_centred_at_the_training_mean():
    mean = np.array([0.0, 0.1, 0.5, 0.9])
    z, y = (array * 0 for array in make_data("bernoulli"))
    model, _ = make_programs(output_mean=mean)
    plain, _ = make_programs()

    def first_logits(program):
        sites = handlers.trace(handlers.seed(handlers.substitute(program, {"z": z}), 0)).get_trace(y)
        return sites["y"]["fn"].base_dist.base_dist.logits[0, 0]

    clipped = np.clip(mean, 1e-4, 1 - 1e-4)
    np.testing.assert_allclose(
        first_logits(model) - first_logits(plain), np.log(clipped / (1 - clipped)), rtol=1e-4, atol=1e-5
    )


def test_unknown_emission_is_refused():
    with pytest.raises(ValueError, match="emission='poisson'"):
        make_programs("poisson")
