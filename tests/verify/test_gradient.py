"""The gradient check passes unbiased gradients and fails others. False alarms: 1e-6 for each case, at fixed seeds."""

import csv
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from numpyro_smc.verify import check_gradient

check = partial(check_gradient, random.key(0))
PARAMS = {"mean": jnp.array([0.5, -1.0]), "log_scale": 0.3}


def value(rng_key, params):
    """On average ``sum(mean ** 4) + ...``: differences of the second order would be off."""
    z = params["mean"] + jnp.exp(params["log_scale"]) * random.normal(rng_key, (2,))
    return jnp.sum(z**2) + jnp.sum(params["mean"] ** 4)


EXACT = {"mean": 2 * PARAMS["mean"] + 4 * PARAMS["mean"] ** 3, "log_scale": 4 * np.exp(0.6)}


def choice(rng_key, params, surrogate):
    """A coin with probability ``p`` of a gain: its draw hides the dependence from automatic differentiation."""
    probability = jax.nn.sigmoid(params)
    gain = jnp.where(random.uniform(rng_key) < probability, 2.0, -1.0)
    score = jnp.log(jnp.where(gain > 0, probability, 1 - probability))
    return gain + surrogate * (score - lax.stop_gradient(score)) * gain


def test_an_unbiased_gradient_passes_against_differences_and_against_the_exact_one():
    differences, exact = check(value, PARAMS), check(value, PARAMS, exact=EXACT)
    assert differences.passed is True and exact.passed is True
    assert differences.names == ("log_scale", "mean[0]", "mean[1]")
    np.testing.assert_allclose(differences.expected, exact.expected, atol=0.5)
    # The same draws on both sides: little of the noise is left.
    assert (differences.standard_error[1:] < 1e-3 * exact.standard_error[1:] + 1e-2).all()
    assert "No bias found" in repr(exact)


def test_a_stopped_gradient_fails_and_is_named():
    def stopped(rng_key, params):
        return value(rng_key, params | {"log_scale": lax.stop_gradient(params["log_scale"])})

    found = check(stopped, PARAMS)
    assert found.passed is False and "Biased: 'log_scale'" in repr(found)
    assert check(value, PARAMS, gradient=jax.grad(stopped, argnums=1)).passed is False


def test_a_wrong_sign_fails():
    wrong = check(value, PARAMS, gradient=lambda key, p: jax.tree.map(jnp.negative, jax.grad(value, 1)(key, p)))
    assert wrong.passed is False and (abs(wrong.z) > wrong.threshold).all()


@pytest.mark.parametrize(("surrogate", "passed"), [(1.0, True), (0.0, False), (-1.0, False)])
def test_differences_see_through_discrete_draws(surrogate, passed):
    found = check(partial(choice, surrogate=surrogate), jnp.asarray(0.4), num_replicates=4000)
    assert found.passed is passed and found.names == ("parameter",)


def test_the_threshold_is_shared_among_coordinates():
    found = check(value, PARAMS, level=0.0027)
    assert found.threshold == pytest.approx(3.32, abs=0.01)
    assert check(lambda key, p: p**2 * random.normal(key), jnp.asarray(1.0), level=0.0027).threshold == pytest.approx(
        3.0, abs=1e-3
    )


def test_heavy_tails_are_not_judged():
    found = check(lambda key, p: p * random.cauchy(key) ** 3, jnp.asarray(1.0), exact=jnp.asarray(0.0))
    assert found.passed is None and "Inconclusive" in repr(found)


def test_a_gradient_that_is_no_number_fails():
    def sometimes(rng_key, p):
        return jnp.where(random.uniform(rng_key) < 0.01, jnp.nan, 1.0) * p

    assert check(sometimes, jnp.asarray(1.0), exact=jnp.asarray(1.0)).passed is False


def test_what_jax_cannot_trace_is_called_one_by_one():
    def gradient(rng_key, p):
        return {"a": np.float32(float(random.normal(rng_key)) + 2 * p["a"])}

    params = {"a": jnp.asarray(0.7)}
    assert check(lambda key, p: p["a"] ** 2, params, gradient=gradient, num_replicates=60).passed is True


def test_table_and_plot(tmp_path):
    found = check(value, PARAMS)
    found.to_csv(tmp_path / "table.csv")
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [line["coordinate"] for line in lines] == list(found.names)
    assert len(found.plot().lines) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_replicates": 3}, "num_replicates is 3"),
        ({"step_size": 0.0}, "step_size must be a number in"),
        ({"level": 2.0}, "level must be a number in"),
        ({"exact": jnp.zeros(2)}, "exact holds 2 numbers, and there are 3 parameters"),
        ({"gradient": lambda key, p: p["mean"]}, "the gradient is structured as"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check(value, PARAMS, **options)
