"""Simulations that fail: posteriors are those of the program, in which a finite output says something."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy.special import expit

from numpyro_smc.programs.simulator import Simulator
from numpyro_smc.ratio.datasets import RatioData
from numpyro_smc.ratio.diagnostics import mean_ratio, roc
from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.finiteness import Finiteness
from numpyro_smc.ratio.losses import BinaryLoss
from numpyro_smc.ratio.masks import UniformMask
from numpyro_smc.ratio.networks import mlp
from numpyro_smc.ratio.nre import NRE
from numpyro_smc.ratio.ratio_network import RatioNetwork
from numpyro_smc.ratio.stored_data import StoredData

SMALL = {"batch_size": 200, "progress_bar": False}
GRID = np.linspace(-4, 4, 801)
NORMAL = np.exp(-0.5 * GRID**2)


def failing():
    """Fails with probability sigmoid(3 theta)."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    fails = numpyro.sample("fails", dist.Bernoulli(logits=3 * theta))
    numpyro.deterministic("x", jnp.where(fails == 1, jnp.nan, theta + numpyro.sample("e", dist.Normal(0.0, 0.5))))


def failing_pair():
    """Fails where the sum of two parameters is high; the output is of the first alone."""
    a, b = numpyro.sample("a", dist.Normal(0.0, 1.0)), numpyro.sample("b", dist.Normal(0.0, 1.0))
    x = a + numpyro.sample("e", dist.Normal(0.0, 0.5))
    numpyro.deterministic("x", jnp.where(a + b > 0.5, jnp.inf, x))


def failing_with_context():
    theta, c = numpyro.sample("theta", dist.Normal(0.0, 1.0)), numpyro.sample("c", dist.Uniform(0.0, 4.0))
    fails = numpyro.sample("fails", dist.Bernoulli(logits=c * theta))
    numpyro.deterministic("x", jnp.where(fails == 1, jnp.nan, theta + numpyro.sample("e", dist.Normal(0.0, 0.5))))


class KnownGivenFinite:
    """Stands for a network trained on finite simulations of ``failing``: the exact log ratio."""

    size, has_masks, marginals, log_parameters, constant = 1, False, None, None, None

    def features(self, weights, x, context=None):
        return jnp.asarray(x)[..., None]

    def log_ratio_of_features(self, weights, theta, features, mask=None):
        law = NORMAL * expit(-3 * GRID) / (NORMAL * expit(-3 * GRID)).sum()
        evidence = jax.nn.logsumexp(dist.Normal(GRID, 0.5).log_prob(features), b=law, axis=-1)
        return dist.Normal(theta, 0.5).log_prob(features)[..., 0] - evidence


def moments(weights, values=GRID):
    mean = (weights * values).sum() / weights.sum()
    return float(mean), float(np.sqrt((weights * (values - mean) ** 2).sum() / weights.sum()))


def learned(simulator, params, num=12_000, masks=None, marginals=None, **options):
    nre = NRE(simulator, params, nonfinite="drop", masks=masks, marginals=marginals, **options)
    data = nre.simulate(random.key(0), num)
    return Finiteness.beside(nre.network), Finiteness.beside(nre.network).train(random.key(1), data, nre.masks)


@pytest.fixture(scope="module")
def estimator():
    _, weights = learned(failing, ["theta"])
    reading = Simulator(failing, ["theta"])
    return RatioEstimator(reading, KnownGivenFinite(), (), BinaryLoss(), finiteness=weights, nonfinite="drop")


@pytest.mark.parametrize("x", [[0.9], [0.2, 1.0, 0.7]])
def test_the_posterior_is_corrected_by_the_probability_of_a_finite_output(estimator, x):
    # Each of several observations was finite; without the correction the means are 0.72 and 0.58.
    likelihood = np.prod([np.exp(-2 * (value - GRID) ** 2) * expit(-3 * GRID) for value in x], axis=0)
    exact = moments(NORMAL * likelihood)
    x_obs = jnp.array(x if len(x) > 1 else x[0])
    found = moments(estimator.marginal(x_obs, "theta").grid(801, [(-4.005, 4.005)]).density)
    np.testing.assert_allclose(found, exact, atol=0.05)
    without = moments(NORMAL * np.prod([np.exp(-2 * (value - GRID) ** 2) for value in x], axis=0))
    assert abs(without[0] - exact[0]) > 0.25
    draws = estimator.sample(random.key(2), x_obs, num_particles=2000).get_samples()["theta"]
    assert abs(draws.mean() - found[0]) < 5 * found[1] / np.sqrt(1000)
    copies = estimator.marginal(x_obs, "theta").sir(random.key(3), 2000)
    assert abs(copies.mean() - found[0]) < 5 * found[1] / np.sqrt(500)


def test_diagnostics_draw_their_pairs_given_a_finite_output(estimator):
    pairs = estimator.simulate(random.key(4), 3000)
    assert len(pairs.x) == 3000 and np.isfinite(pairs.x).all()
    law = NORMAL * expit(-3 * GRID)
    mean, sd = moments(law)
    assert abs(pairs.theta.mean() - mean) < 5 * sd / np.sqrt(3000)
    value, error = roc(estimator, random.key(5), 3000).mean_ratio
    assert abs(value - 1) < 5 * error + 0.05
    value, error = mean_ratio(estimator, random.key(6), jnp.array([0.0, 0.9]), 20_000)
    assert (abs(value - 1) < 5 * error + 0.05).all()


def test_marginals_are_corrected_by_the_probability_given_their_parameters_alone():
    from scipy.stats import norm

    finiteness, weights = learned(failing_pair, ["a", "b"], 20_000, masks=UniformMask())
    theta = jnp.stack([jnp.linspace(-1.5, 1.5, 7), jnp.full(7, 2.0)], -1)
    of_a = finiteness.log_factor(weights, theta, jnp.array([True, False]))
    share = norm.cdf(0.5 / np.sqrt(2))
    np.testing.assert_allclose(np.exp(of_a), norm.cdf(0.5 - theta[:, 0]) / share, atol=0.09)
    of_both = np.exp(finiteness.log_factor(weights, theta, jnp.array([True, True])))
    assert (of_both[np.asarray(theta.sum(1)) > 1] < 0.1).all()  # b = 2 fails nearly always
    fixed, weights = learned(failing_pair, ["a", "b"], 20_000, marginals=[["a"], ["b"]])
    found = np.exp(fixed.log_factor(weights, theta))
    np.testing.assert_allclose(found[:, 0], norm.cdf(0.5 - theta[:, 0]) / share, atol=0.09)
    np.testing.assert_allclose(found[:, 1], norm.cdf(-1.5) / share, atol=0.05)


def test_a_context_is_integrated_over_because_the_ratio_holds_the_rest():
    # Training pairs parameters with contexts of other rows, so that r = p(theta | x, c, f) / p(theta | f).
    finiteness, weights = learned(failing_with_context, ["theta"], 20_000, context=["c"])
    theta = np.linspace(-2, 2, 9)
    of_theta = expit(-np.linspace(0.01, 3.99, 200) * theta[:, None]).mean(1)
    np.testing.assert_allclose(np.exp(finiteness.log_factor(weights, theta[:, None])), of_theta / 0.5, atol=0.08)


def test_training_corrects_its_posteriors_and_saves_what_it_learned(tmp_path):
    nre = NRE(failing, ["theta"], loss="A", trunk=mlp(32, 1), nonfinite="drop")
    found = nre.train(random.key(0), 8000, max_epochs=15, **SMALL)
    exact = moments(NORMAL * np.exp(-2 * (0.5 - GRID) ** 2) * expit(-3 * GRID))
    values = moments(found.marginal(0.5, "theta").grid(801, [(-4.005, 4.005)]).density)
    np.testing.assert_allclose(values, exact, atol=0.1)  # 0.41 without the correction, -0.02 with it
    found.save(tmp_path / "ratio")
    again = nre.load(tmp_path / "ratio")
    theta = GRID[::100, None]
    np.testing.assert_array_equal(again.log_ratio(theta, 0.5), found.log_ratio(theta, 0.5))


def test_nothing_that_fails_changes_nothing():
    def sound():
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.deterministic("x", theta + numpyro.sample("e", dist.Normal(0.0, 0.5)))

    options = {"max_epochs": 1, **SMALL}
    one, other = (
        NRE(sound, ["theta"], trunk=mlp(8, 0), nonfinite=policy).train(random.key(0), 600, **options)
        for policy in ("drop", "raise")
    )
    np.testing.assert_array_equal(one.log_ratio(GRID[:, None], 0.3), other.log_ratio(GRID[:, None], 0.3))


# Data that lack their failures, or are of another law


def rows(num=3000, **changes):
    draws = jax.vmap(Simulator(failing, ["theta"]).simulate)(random.split(random.key(7), num))
    return np.asarray(draws.theta), np.asarray(draws.x)


def test_failures_count_wherever_the_data_come_from(tmp_path):
    nre = NRE(failing, ["theta"], trunk=mlp(8, 0), nonfinite="drop")
    stored = nre.simulate_to(tmp_path, random.key(0), 1000, part_size=300, progress_bar=False)
    kept, lost = len(stored), len(stored.first(2000).failed)
    assert kept + lost == 1000 and lost > 300
    train, validation = stored.split(random.key(1), 0.5)
    assert len(train.first(2000).failed) + len(validation.failed) == lost
    for data in (stored, tmp_path, rows()):
        found = nre.train(random.key(0), data=data, max_epochs=1, **SMALL | {"validation": None, "batch_size": 50})
        share = np.exp(float(found.finiteness.log_share))
        assert abs(share - 0.5) < 0.05


def lacking(theta, x):
    good = np.isfinite(x)
    return theta[good], x[good]


def shifted(theta, x):
    return theta + 0.3, x


def correlated():
    a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.deterministic("x", a + random.normal(numpyro.prng_key(), (2,)))


@pytest.mark.parametrize(
    ("data", "policy", "message"),
    [
        (lambda: lacking(*rows()), "drop", r"parameter 'theta' is not distributed in the data as in the simulator's p"),
        (lambda: lacking(*rows()), "raise", r"keep simulations that failed, as rows that are not finite"),
        (lambda: shifted(*rows()), "drop", r"parameter 'theta' is not distributed in the data"),
        (
            lambda: RatioData(*rows(), nonfinite="drop"),
            "raise",
            r"simulations that failed were left out of the data.* Build the NRE with nonfinite='drop'",
        ),
    ],
)
def test_data_of_another_law_are_refused(data, policy, message):
    with pytest.raises(ValueError, match=message):
        NRE(failing, ["theta"], nonfinite=policy).train(random.key(0), data=data(), max_epochs=1, **SMALL)


def test_parameters_that_depend_on_each_other_are_told_from_independent_ones():
    noise = np.random.default_rng(0).normal(size=(4000, 2))
    theta = np.stack([noise[:, 0], 0.8 * noise[:, 0] + 0.6 * noise[:, 1]], 1)  # both elements are standard normal
    with pytest.raises(ValueError, match="a combination of the parameters is not distributed"):
        NRE(correlated, ["a"]).train(random.key(0), data=(theta, theta), max_epochs=1, **SMALL)
    repeated = np.repeat(noise[:400], 10, axis=0)  # few parameters, many outputs each: of the prior all the same
    nre = NRE(correlated, ["a"], trunk=mlp(8, 0))
    nre.train(random.key(0), data=(repeated, repeated), max_epochs=1, **SMALL)


def test_simulations_of_a_truncated_prior_need_their_box():
    nre = NRE(correlated, ["a"], trunk=mlp(8, 0))
    from numpyro_smc.ratio.truncation import Box

    box = Box(jnp.array([-0.5, -jnp.inf]), jnp.array([0.5, jnp.inf]), float(np.log(0.3829)))
    data = nre.simulate(random.key(0), 1000, box=box)
    with pytest.raises(ValueError, match=r"parameter 'a\[0\]' is not distributed .* pass box="):
        nre.train(random.key(0), data=data, max_epochs=1, **SMALL)
    assert nre.train(random.key(0), data=data, box=box, max_epochs=1, **SMALL).box is box


def test_stored_simulations_without_a_record_of_their_failures_are_refused(tmp_path):
    theta, x = lacking(*rows(500))
    np.savez(tmp_path / "part_00000.npz", theta=theta, x=x, num_asked_for=np.array(500))
    assert StoredData(tmp_path).lacks_failures
    with pytest.raises(ValueError, match="without a record of their parameters"):
        NRE(failing, ["theta"], nonfinite="drop").train(random.key(0), data=tmp_path, max_epochs=1, **SMALL)


def test_a_residual_ratio_is_no_posterior():
    nre = NRE(failing, ["theta"], loss="A", nonfinite="drop")
    with pytest.raises(ValueError, match=r"NRE\.train: with log_weight the network learns what another ratio lacks"):
        nre.train(random.key(0), 600, log_weight=lambda *_: 0.0)


# A function in place of failures


def test_observations_are_put_to_the_function_that_replaced_failures():
    def simulator():
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        x = theta + numpyro.sample("e", dist.Normal(0.0, 0.5))
        numpyro.deterministic("x", jnp.where(theta > 1, jnp.inf, x)[None])

    def clipped(x):
        return np.clip(np.nan_to_num(x, posinf=2.0), -2, 2)

    nre = NRE(simulator, ["theta"], loss="A", trunk=mlp(16, 1), nonfinite=clipped)
    found = nre.train(random.key(0), 1000, max_epochs=2, **SMALL)
    theta = jnp.array([[0.3], [1.5]])
    np.testing.assert_array_equal(
        found.log_ratio(theta, jnp.array([jnp.inf])), found.log_ratio(theta, jnp.array([2.0]))
    )
    assert np.isfinite(found.simulate(random.key(1), 500).x).all()
    with pytest.raises(ValueError, match="of the observation are not finite"):
        RatioEstimator(found.simulator, found.network, found.weights, found.loss).log_ratio(theta, jnp.array([jnp.nan]))


def test_the_classifier_beside_knows_what_the_ratio_knows():
    network = RatioNetwork(3, has_masks=True, log_parameters=[True, False, False], constant=[False, False, True])
    beside = Finiteness.beside(network).network
    assert (beside.has_masks, beside.log_parameters, beside.constant) == (
        True,
        network.log_parameters,
        network.constant,
    )
