"""Every argument that makes no sense is refused by its name, before anything is trained."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_smc.ratio.estimator import RatioEstimator
from numpyro_smc.ratio.losses import BinaryLoss
from numpyro_smc.ratio.masks import UniformMask
from numpyro_smc.ratio.networks import mlp
from numpyro_smc.ratio.nre import NRE

KEY = random.key(0)
QUICK = {"max_epochs": 1, "batch_size": 100, "progress_bar": False}


def simulator():
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.Gamma(2.0, 4.0))
    numpyro.deterministic("x", a + b + noise * random.normal(numpyro.prng_key(), (2,)))


def nre(**options):
    options = {"context": ["noise"], "trunk": mlp(8, 0), "loss": "A", "masks": UniformMask(), **options}
    return NRE(simulator, ["a", "b"], **options)


@cache
def made():
    return nre()


@cache
def estimator():
    data, simulated = made().simulate(KEY, 50), made().simulator
    weights = made().network.init(KEY, data.theta, data.x, data.context)
    return RatioEstimator(simulated, made().network, weights, BinaryLoss())


class Empty:
    def sample(self, rng_key, num, size):
        return random.bernoulli(rng_key, 0.5, (num, size))


class Numbers(Empty):
    def sample(self, rng_key, num, size):
        return jnp.ones((num, size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be a number that is not negative, got -1\.0"),
        ({"learning_rate": "0.1"}, r"learning_rate must be a number that is not negative, got '0\.1'"),
        ({"learning_rate": float("nan")}, r"learning_rate must be a number that is not negative, got nan"),
        ({"clip_norm": -1.0}, r"clip_norm must be a positive number, got -1\.0\. None is for no limit"),
        ({"clip_norm": "10"}, r"clip_norm must be a positive number, got '10'"),
        ({"weight_decay": -0.1}, r"weight_decay must be a number that is not negative, got -0\.1"),
        ({"validation": "0.1"}, r"validation must be a part of the simulations between 0 and 1, RatioData, or None"),
        ({"validation": True}, r"validation must be a part of the simulations .* got True"),
        ({"validation": (np.zeros((5, 3)), np.zeros((5, 2)))}, r"validation must be a part of the simulations"),
        ({"validation": -0.5}, r"validation=-0\.5 of 300 simulations leaves none|validation=-0\.5"),
        ({"batch_size": 2.5}, r"batch_size must be a positive integer, got 2\.5"),
        ({"batch_size": -100}, r"batch_size must be a positive integer, got -100"),
        ({"patience": 0}, r"patience must be a positive integer, got 0"),
        ({"weights": {}}, r"weights must be RatioWeights, got \{\}"),
    ],
)
def test_options_of_the_training(options, message):
    with pytest.raises(ValueError, match=message):
        made().train(KEY, 300, **QUICK | options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nre(nonfinite="Drop"), r"NRE: nonfinite must be 'raise', 'drop' or a function, got 'Drop'"),
        (lambda: nre(nonfinite=None), r"NRE: nonfinite must be 'raise', 'drop' or a function, got None"),
        (lambda: nre(loss=BinaryLoss), r"NRE: loss must be a name or a loss of numpyro_smc\.ratio\.losses"),
        (lambda: nre(trunk=lambda x: x), r"NRE: trunk must be a Network, such as mlp\(\)"),
        (lambda: nre(embedding=mlp(8, 0)), r"NRE: embedding must be an Embedding, such as embedding_of"),
        (lambda: nre(masks=Empty()).train(KEY, 300, **QUICK), r"masks of .* keep no parameter"),
        (
            lambda: nre(masks=Numbers()).train(KEY, 300, **QUICK),
            r"must return booleans \[1000, 3\], but\s+returns float",
        ),
        (lambda: nre(masks=[[False, False, False]]), "keeps no parameter"),
        (lambda: NRE("simulator", ["a"]), r"NRE: the simulator must be a program, got 'simulator'"),
        (
            lambda: NRE(lambda y: None, ["a"]),
            r"NRE: the simulator takes no arguments, but needs y.* functools\.partial",
        ),
        (lambda: NRE(simulator, ["A"]), r"no site 'A'"),
        (lambda: nre(context=["nois"]), r"no site 'nois'"),
        (lambda: made().simulate(KEY, 10.0), r"num must be a positive integer, got 10\.0"),
        (lambda: made().train(KEY, data=(np.zeros((9, 2)), np.zeros((9, 2)))), r"parameters \[n, 3\]"),
        (lambda: made().train(KEY, data=np.zeros((9, 3))), r"data must be RatioData, StoredData, a tuple or a path"),
        (lambda: made().train(KEY, data=(np.zeros((9, 3)), np.zeros((9, 3)), np.zeros((9, 1)))), r"\('n', 2\)"),
        (lambda: made().train(KEY, data="no/such/folder"), r"no simulations in 'no/such/folder'"),
    ],
)
def test_what_makes_no_nre(make, message):
    with pytest.raises(ValueError, match=message):
        make()


X, CONTEXT = jnp.zeros(2), {"noise": 0.5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e: e.log_ratio(jnp.zeros(2), X, context=CONTEXT),
            r"parameters must be \[\.\.\., 3\], got shape \(2,\)",
        ),
        (lambda e: e.log_ratio({"a": 0.0}, X, context=CONTEXT), r"parameter 'b' has no value"),
        (lambda e: e.log_ratio({"a": 0.0, "b": X, "c": 0.0}, X, context=CONTEXT), r"theta has 'c', which is no param"),
        (lambda e: e.log_ratio({"a": 0.0, "b": jnp.zeros(3)}, X, context=CONTEXT), r"'b' has shape \(3,\), but \(2,\)"),
        (
            lambda e: e.log_ratio(jnp.zeros(3), jnp.zeros(3), context=CONTEXT),
            r"outputs of shape \(2,\), but got \(3,\)",
        ),
        (lambda e: e.log_ratio(jnp.zeros(3), X), r"pass context=\{'noise': \.\.\.\}"),
        (lambda e: e.log_ratio(jnp.zeros(3), X, [], CONTEXT), r"a marginal of no parameter was asked for"),
        (lambda e: e.log_ratio_given(X, np.zeros(3, bool), CONTEXT), r"a marginal of no parameter was asked for"),
        (lambda e: e.network.log_ratio(e.weights, jnp.zeros(3), X, jnp.zeros(3, bool), jnp.ones(1)), "keeps no param"),
        (
            lambda e: e.posterior_model(X, context={"nois": 0.5}),
            r"context has 'nois', which is no context\. Known: noise",
        ),
        (
            lambda e: e.posterior_model(X, context=jnp.ones(2)),
            r"the context has shape \(2,\); expected \[\.\.\., 1\], the",
        ),
        (lambda e: e.posterior_model(X, context={"noise": jnp.nan}), r"1 of 1 numbers of the context are not finite"),
        (
            lambda e: e.posterior_model(X.at[1].set(jnp.nan), context=CONTEXT),
            r"1 of 2 numbers of the observation are no",
        ),
        (lambda e: e.sample(KEY, X.at[1].set(jnp.inf), context=CONTEXT), r"of the observation are not finite"),
        (
            lambda e: e.sample_many(KEY, jnp.zeros((3, 2)), context=jnp.ones((2, 1))),
            r"one row for each of 3 observations",
        ),
        (lambda e: e.marginal(X, "c", CONTEXT), r"no parameter 'c'"),
    ],
)
def test_questions_that_make_no_sense(call, message):
    with pytest.raises(ValueError, match=message):
        call(estimator())


KEYS = [0, 1.5, None, "key", jnp.zeros(2), random.split(random.key(0), 3)]


@pytest.mark.parametrize("key", KEYS, ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        lambda key: made().train(key, 300, **QUICK),
        lambda key: made().simulate(key, 10),
        lambda key: made().simulate_to("never/made", key, 10),
        lambda key: made().train_rounds(key, X, 2, 300, context=CONTEXT),
        lambda key: estimator().sample(key, X, context=CONTEXT),
        lambda key: estimator().sample_many(key, X[None], context=jnp.ones((1, 1))),
        lambda key: estimator().simulate(key, 10),
        lambda key: estimator().prior(key, 10),
        lambda key: estimator().marginal(X, "a", CONTEXT).sir(key, 10),
        lambda key: estimator().marginal(X, "a", CONTEXT).sample(key, 10),
    ],
)
def test_keys_of_another_kind(call, key):
    with pytest.raises(TypeError, match=r"rng_key must be one random key"):
        call(key)


def test_trainings_that_diverge_raise():
    with (
        pytest.warns(UserWarning, match="steps had a non-finite loss"),
        pytest.raises(
            FloatingPointError, match=r"fit: none of the epochs had a finite loss .* Lower learning_rate=1e\+30"
        ),
    ):
        made().train(KEY, 300, learning_rate=1e30, **QUICK | {"max_epochs": 3})
    with pytest.warns(
        UserWarning, match=r"more than twice that of a ratio of one everywhere, 1\.386: the training div"
    ):
        made().train(KEY, 300, learning_rate=1e3, **QUICK)
