"""The score by Fisher's identity against differentiated Kalman filters, and against differentiated particle filters."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.contrib.control_flow import scan

from numpyro_smc import FIVO, ParticleFilter, bootstrap
from numpyro_smc.filtering.score import chosen_names, score_of
from numpyro_smc.filtering.smoothing.runs import repeat
from tests.statistics_of_estimates import assert_mean

PARAMS = {"a": 0.7, "fading": 0.6, "initial_scale": 1.4, "transition_scale": 0.5, "emission_scale": 0.8}
SERIES = jnp.array([1.2, 0.4, 2.1, -0.3, 0.9, 1.6])


def everywhere(y):
    """Parameters before the scan, in the carry of each particle, in the carry that all share, and in both densities."""
    params = {name: numpyro.param(name, value) for name, value in PARAMS.items()}
    x = numpyro.sample("x_0", dist.Normal(0.3, params["initial_scale"]))

    def step(carry, y_t):
        predicted, push = carry
        x = numpyro.sample("x", dist.Normal(predicted + push, params["transition_scale"]))
        numpyro.sample("y", dist.Normal(x, params["emission_scale"]), obs=y_t)
        return (params["a"] * x, params["fading"] * push), None

    scan(step, (params["a"] * x, params["fading"]), y)


def exact_log_evidence(params, y, initial_mean=0.3):
    """The Kalman filter of ``everywhere``."""
    mean, variance, total = initial_mean, params["initial_scale"] ** 2, 0.0
    push = params["fading"]
    for y_t in y:
        mean = params["a"] * mean + push
        variance = params["a"] ** 2 * variance + params["transition_scale"] ** 2
        push = params["fading"] * push
        spread = variance + params["emission_scale"] ** 2
        total = total + dist.Normal(mean, jnp.sqrt(spread)).log_prob(y_t)
        gain = variance / spread
        mean, variance = mean + gain * (y_t - mean), (1.0 - gain) * variance
    return total


METHODS = {
    "ffbsm": {"batch_size": 70},
    "backward_mcmc": {},
    "paris": {},
    "genealogy": {},
}


@pytest.fixture(scope="module")
def runs():
    """Scores of 150 runs of 200 particles by each method, ``{name: [150]}``."""
    particle_filter = ParticleFilter(everywhere, 200)
    params = {name: jnp.asarray(value) for name, value in PARAMS.items()}
    question = score_of(particle_filter, tuple(PARAMS))

    def one(key):
        whole = (params, (SERIES,), {})
        found = {}
        for method, options in METHODS.items():
            answer = repeat(particle_filter, "score", question, key, key, whole, 1, method, options)[0]
            found[method] = jax.tree.map(lambda leaf: leaf[0], answer)
        return found

    return jax.jit(lambda keys: lax.map(one, keys))(random.split(random.key(0), 150))


@pytest.mark.parametrize("method", METHODS)
def test_the_score_is_the_gradient_of_the_kalman_filter(runs, method):
    """Means of 150 runs within 5 standard errors for each of 5 parameters: false alarms 3e-6 a method."""
    exact = jax.jit(jax.grad(exact_log_evidence))(PARAMS, SERIES)
    for name, value in exact.items():
        assert_mean(runs[method][name], float(value))


def test_smoothing_by_all_pairs_has_less_variance_than_lineages(runs):
    for name in PARAMS:
        assert runs["ffbsm"][name].var() < 0.7 * runs["genealogy"][name].var(), name


def hidden_markov(y):
    stay = numpyro.param("stay", 0.6)
    locations = numpyro.param("locations", jnp.array([-1.0, 1.5]))

    def step(k, y_t):
        k = numpyro.sample("k", dist.Bernoulli(jnp.where(k == 1, stay, 1.0 - stay)))
        numpyro.sample("y", dist.Normal(locations[k], 0.8), obs=y_t)
        return k, None

    scan(step, 0, y)


def test_the_score_by_lineages_is_the_stop_gradient_estimate_of_the_same_run():
    """Not on average: with discrete states the two are the same sums, in another order."""
    params = {"stay": jnp.asarray(0.6), "locations": jnp.array([-1.0, 1.5])}
    key = random.key(4)
    loss = FIVO(50, resampler="systematic", resampling_gradient="stop_gradient")
    guide = bootstrap(hidden_markov)
    differentiated = jax.jit(jax.grad(lambda p: -loss.loss(key, p, hidden_markov, guide, SERIES)))(params)
    result = ParticleFilter(hidden_markov, 50).run(key, SERIES, params=params)
    score = result.score(method="genealogy", num_repeats=1)
    for name in params:
        np.testing.assert_allclose(score.value[name], differentiated[name], rtol=1e-3, atol=1e-4)
    assert np.isnan(score.standard_error["stay"])
    assert "score by genealogy: 1 run of 50 particles" in repr(score) and "['locations'][1]" in repr(score)
    assert score.plot().get_ylabel() == "score"
    assert chosen_names(params, "stay") == ("stay",)


def with_latent(y, scale, after=False):
    """The coefficient is a global latent with a prior; the likelihood stands in the step or after the scan."""
    a = numpyro.sample("a", dist.Normal(5.0, 0.1))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(a * x, 0.5))
        if not after:
            numpyro.sample("y", dist.Normal(x, scale), obs=y_t)
        return x, x

    _, x = scan(step, 0.0, y)
    if after:
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


def test_given_latents_have_no_prior_in_their_score_and_likelihoods_may_stand_after_the_scan():
    """8 runs of 2,000 particles within 9 standard errors (Student's t: false alarms 4e-5); the prior would add 430.

    Both programs draw the same runs.
    """
    same = {"a": 0.7, "fading": 0.0, "initial_scale": 1e-3, "transition_scale": 0.5, "emission_scale": 0.7}
    exact = jax.jit(jax.grad(lambda params: exact_log_evidence(params, SERIES, 0.0)))(same)["a"]
    scores = []
    for after in (False, True):
        result = ParticleFilter(with_latent, 2000).run(random.key(0), SERIES, 0.7, after, params={"a": 0.7})
        scores.append(result.score(method="genealogy", num_repeats=8))
    np.testing.assert_allclose(scores[0].runs["a"], scores[1].runs["a"], rtol=1e-3)
    assert abs(scores[0].value["a"] - exact) < 9.0 * scores[0].standard_error["a"] < 2.0


def plated(y):
    a = numpyro.param("a", 0.7)
    with numpyro.plate("series", 2):
        x = numpyro.sample("x_0", dist.Normal(0.3, 1.4))

    def step(x, inputs):
        t, y_t = inputs
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Normal(a * x + 0.6 ** (t + 1.0), 0.5))
            numpyro.sample("y", dist.Normal(x, 0.8), obs=y_t)
        return x, None

    scan(step, x, (jnp.arange(len(y)), y))


def test_scores_of_series_under_a_plate_are_summed():
    """60 runs of 200 particles within 5 standard errors: false alarms 2e-6 (Student's t)."""
    y = jnp.stack([SERIES[:4], 1.5 - SERIES[2:]], axis=1)
    each = jax.jit(jax.vmap(jax.grad(exact_log_evidence), (None, 1)))(PARAMS, y)["a"]
    exact = each.sum()
    assert abs(each).min() > 0.2 * abs(exact)  # neither is negligible
    result = ParticleFilter(plated, 200).run(random.key(0), y, params={"a": 0.7})
    score = result.score(num_repeats=60)
    assert abs(score.value["a"] - exact) < 5.0 * score.standard_error["a"]
    assert score.standard_error["a"] < 0.1 * abs(exact)


def test_what_has_no_score_is_refused():
    result = ParticleFilter(hidden_markov, 10).run(random.key(0), SERIES)
    with pytest.raises(ValueError, match="no real params to differentiate in"):
        result.score()

    def counted(y):
        numpyro.param("number", 3)
        hidden_markov(y)

    params = {"stay": 0.6, "locations": jnp.array([-1.0, 1.5]), "number": 3}
    result = ParticleFilter(counted, 10).run(random.key(0), SERIES, params=params)
    with pytest.raises(ValueError, match=r"'level' is not among the params of this run \(locations, number, stay\)"):
        result.score("level")
    with pytest.raises(ValueError, match="'number' is not real"):
        result.score(["number"])

    def lagged(y):
        a = numpyro.param("a", 0.5)

        def step(carry, y_t):
            x = numpyro.sample("x", dist.Normal(a * carry[0] + 0.2 * carry[1], 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return (x, carry[0]), None

        scan(step, (0.0, 0.0), y)

    with pytest.raises(ValueError, match=r"score: .*resampling_gradient='stop_gradient'"):
        ParticleFilter(lagged, 10).run(random.key(0), SERIES, params={"a": 0.5}).score(method="genealogy")
