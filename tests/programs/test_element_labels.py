"""Labels of elements: what depends on what is read off programs, and never less than is true."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import lax, random

from numpyro_smc.programs.elements.labels import MIXED, along
from numpyro_smc.programs.elements.tracing import trace

X = random.normal(random.key(0), (3, 4))
INDEX = jnp.array([2, 0])


def covariance(x):
    return x[:, :, None] * x[:, None] + jnp.eye(4)


# Functions of [elements, 4], and the elements that their results depend on: 0 none, -1 several.
EACH = {
    "sum of each": (lambda x: x.sum(1), [1, 2, 3]),
    "stacked on another axis": (lambda x: jnp.stack([x[:, 0], 10 + x[:, 1]])[1], [1, 2, 3]),
    "product with a matrix": (lambda x: (x @ jnp.ones((4, 2)))[:, 0], [1, 2, 3]),
    "taken apart and put together": (lambda x: jnp.concatenate([x[:1] * 2, x[1:]])[:, 0], [1, 2, 3]),
    "scan over the other axis": (lambda x: lax.scan(lambda c, v: (c + v, c), jnp.zeros(3), x.T)[0], [1, 2, 3]),
    "loop": (lambda x: lax.fori_loop(0, 4, lambda i, c: c + x[:, i], jnp.zeros(3)), [1, 2, 3]),
    "while until a number": (
        lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1][:, 0],
        [1, 2, 3],
    ),
    "gather at known places": (lambda x: x[INDEX, 0], [3, 1]),
    "row set to a constant": (lambda x: x.at[0].set(1.0)[:, 0], [0, 2, 3]),
    "added to some places": (lambda x: jnp.zeros(5).at[1:4].add(x[:, 0]), [0, 1, 2, 3, 0]),
    "look-up by an element": (lambda x: jnp.arange(9.0)[(x[:, 0] > 0).astype(int)], [1, 2, 3]),
    "take along an axis": (lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1)[:, None], 1)[:, 0], [1, 2, 3]),
    "softmax of each": (lambda x: jax.nn.softmax(x, 1)[:, 0], [1, 2, 3]),
    "Cholesky factors": (lambda x: jnp.linalg.cholesky(covariance(x))[:, 3, 3], [1, 2, 3]),
    "sorted within": (lambda x: jnp.sort(x, 1)[:, 0], [1, 2, 3]),
    "rolled": (lambda x: jnp.roll(x[:, 0], 1), [3, 1, 2]),
    "padded": (lambda x: jnp.pad(x[:, 0], (1, 0)), [0, 1, 2, 3]),
    "vmap": (jax.vmap(lambda v: v @ v), [1, 2, 3]),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(x).sum(1)), [1, 2, 3]),
    "convolution": (
        lambda x: lax.conv_general_dilated(x[:, None], jnp.ones((1, 1, 2)), (1,), "SAME")[:, 0, 0],
        [1, 2, 3],
    ),
    "multivariate normal": (dist.MultivariateNormal(jnp.zeros(4), jnp.eye(4)).log_prob, [1, 2, 3]),
    "categorical": (lambda x: dist.Categorical(logits=x).log_prob(jnp.zeros(3, int)), [1, 2, 3]),
    "mixture": (
        lambda x: dist.MixtureSameFamily(dist.Categorical(logits=x), dist.Normal(x, 1.0)).log_prob(0.0),
        [1, 2, 3],
    ),
    "sum over elements": (lambda x: x.sum(0), [MIXED] * 4),
    "difference from the mean": (lambda x: x[:, 0] - x.mean(), [MIXED] * 3),
    "matrix of couplings": (lambda x: jnp.ones((3, 3)) @ x[:, 0], [MIXED] * 3),
    "cumulative sum": (lambda x: jnp.cumsum(x[:, 0]), [MIXED] * 3),
    "scan over elements": (lambda x: lax.scan(lambda c, v: (c + v, c), jnp.zeros(4), x)[0], [MIXED] * 4),
    "branch by one element": (
        lambda x: lax.cond(x[0, 0] > 0, lambda x: x[:, 0], lambda x: 2 * x[:, 0], x),
        [1, MIXED, MIXED],
    ),
    "chosen by the first": (lambda x: jnp.where(x[0, 0] > 0, x[:, 0], 0.0), [1, MIXED, MIXED]),
    "loop until the largest is large": (
        lambda x: lax.while_loop(lambda x: jnp.max(x) < 5, lambda x: x + 1, x)[:, 0],
        [MIXED] * 3,
    ),
    "neighbors": (lambda x: x[:, 0] + jnp.roll(x[:, 0], 1), [MIXED] * 3),
    "integer counts": (lambda x: jnp.sum((x > 0).astype(int), 0), [MIXED] * 4),
    "sorted across": (lambda x: jnp.sort(x[:, 0]), [MIXED] * 3),
    "unknown to the rules": (lambda x: jnp.fft.fft(x, axis=1).real[:, 0], [MIXED] * 3),
}


@pytest.mark.parametrize("name", EACH)
def test_labels_say_which_elements_results_depend_on(name):
    function, expected = EACH[name]
    found = trace(function, X)(along(X.shape, 0))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", EACH)
def test_labels_never_claim_less_than_perturbations_show(name):
    function, _ = EACH[name]
    labels = np.asarray(trace(function, X)(along(X.shape, 0)))
    base = np.asarray(function(X))
    for element in range(3):
        for seed in range(4):
            moved = np.asarray(function(X.at[element].add(3 * random.normal(random.key(seed), (4,)))))
            touched = moved != base
            assert np.all(np.isin(labels[touched], (element + 1, MIXED)))


def test_an_index_that_runs_over_time_is_not_taken_for_the_one_of_the_first_step():
    buffer = along((3, 5), 1)
    labels = trace(lambda x, t: x[:, t], jnp.zeros((3, 5)), jnp.asarray(0))(buffer, None)
    np.testing.assert_array_equal(labels, [MIXED] * 3)


def test_labels_are_found_under_jit_where_data_are_not_known():
    found = []

    def program(data):
        found.append(trace(lambda x: (x * data).sum(1) + data.sum(), X)(along(X.shape, 0)))
        return data.sum()

    jax.jit(program)(jnp.ones((3, 4)))
    np.testing.assert_array_equal(found[0], [1, 2, 3])
