"""The transforms: log-determinants against autodiff, inverses, extremes, batches, and what they refuse."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions.transforms import ComposeTransform, PermuteTransform

from numpyro_smc.guides.transforms import AffineCouplingTransform, PlanarTransform, SylvesterTransform
from numpyro_smc.guides.transforms.affine_coupling import coupling_flow
from numpyro_smc.guides.transforms.amortised import Network
from numpyro_smc.guides.transforms.autoregressive import iaf_flow
from numpyro_smc.guides.transforms.monotone import root
from numpyro_smc.guides.transforms.planar import planar_flow
from numpyro_smc.guides.transforms.sylvester import sylvester_flow

NUM_ROWS, SIZE = 3, 4


def normal(seed, *shape, scale=1.0):
    return scale * random.normal(random.key(seed), shape)


def small_network(num_inputs, num_outputs, scale=1.0):
    shapes = ((num_inputs, 5), (5, num_outputs))
    layers = [
        {"weight": normal(i, *s, scale=scale), "bias": normal(9, s[1], scale=scale)} for i, s in enumerate(shapes)
    ]
    return Network(layers, jnp.tanh)


def planar(scale=1.0):
    u, w, b = normal(1, NUM_ROWS, SIZE), normal(2, NUM_ROWS, SIZE), normal(3, NUM_ROWS)
    return PlanarTransform(2.0 * scale * (u + w), 0.5 * scale * w, scale * b)


def sylvester(scale=1.0):
    reflections, bias = normal(4, NUM_ROWS, 3, SIZE), normal(7, NUM_ROWS, 3)
    first = normal(5, NUM_ROWS, 3, 3)
    second = jnp.where(jnp.eye(3, dtype=bool), -first, normal(6, NUM_ROWS, 3, 3))  # products of -1 without the bound
    return SylvesterTransform(scale * reflections, scale * first, scale * second, scale * bias)


def coupling(log_scale, scale=1.0, kept=(True, False, False, True)):
    return AffineCouplingTransform(small_network(4, 4, scale), kept, log_scale, normal(8, NUM_ROWS, 2))


def iaf():
    context = normal(8, NUM_ROWS, 2)
    with handlers.seed(rng_seed=3), handlers.trace() as trace:
        iaf_flow("flow", SIZE, context, hidden=6)
    params = {name: jax.tree.map(lambda x: x + 0.3 * normal(1, *x.shape), s["value"]) for name, s in trace.items()}
    with handlers.substitute(data=params):
        return iaf_flow("flow", SIZE, context, hidden=6)


def composed():
    return ComposeTransform(
        [coupling("tanh"), PermuteTransform(jnp.array([2, 0, 3, 1])), planar(), sylvester(), *iaf()]
    )


TRANSFORMS = {
    "sigmoid coupling": lambda: coupling("sigmoid"),
    "tanh coupling": lambda: coupling("tanh", kept="second"),
    "exp coupling": lambda: coupling("exp", 0.5, kept="first"),
    "own coupling": lambda: coupling(lambda c: jnp.log(1.0 + c**2)),
    "planar": planar,
    "sylvester": sylvester,
    "composed": composed,
}


def blocks(fn, x):
    """Jacobians of the rows, ``[NUM_ROWS, SIZE, SIZE]``."""
    rows = jnp.arange(NUM_ROWS)
    return jax.jacfwd(fn)(x)[rows, :, rows]


@pytest.mark.parametrize("is_double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_log_determinant_and_inverse_are_those_of_automatic_differentiation(name, is_double):
    with jax.enable_x64(is_double):
        transform = TRANSFORMS[name]()
        x = normal(0, NUM_ROWS, SIZE)

        # Without fused products float32 loses more than the tolerance in the inverse.
        @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
        def everything(x):
            y, intermediates = transform.call_with_intermediates(x)
            return {
                "plain y": transform(x),
                "y": y,
                "jacobian": blocks(transform, x),
                "log_det": transform.log_abs_det_jacobian(x, y, intermediates),
                "plain log_det": transform.log_abs_det_jacobian(x, y),
                "x": transform.inv(y),
                "inverse jacobian": blocks(transform.inv, y),
            }

        found = everything(x)
        assert all(value.dtype == (jnp.float64 if is_double else jnp.float32) for value in found.values())
        np.testing.assert_array_equal(found["plain y"], found["y"])
        jacobian = np.asarray(found["jacobian"], np.float64)
        expected = np.linalg.slogdet(jacobian)[1]
        tolerance = 1e-11 if is_double else 1e-5
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found["log_det"], expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(found["plain log_det"], expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(found["x"], x, rtol=0, atol=tolerance)
        np.testing.assert_allclose(
            found["inverse jacobian"], np.linalg.inv(jacobian), rtol=100 * tolerance, atol=100 * tolerance
        )


@pytest.mark.parametrize("name", ["tanh coupling", "own coupling", "planar", "sylvester"])
def test_transforms_are_pytrees_and_batches_are_rows(name):
    transform, x = TRANSFORMS[name](), normal(0, NUM_ROWS, SIZE)
    leaves, structure = jax.tree.flatten(transform)
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert hash(structure) == hash(jax.tree.structure(rebuilt)) and structure == jax.tree.structure(rebuilt)
    whole = jax.jit(lambda transform, x: transform(x))(rebuilt, x)
    shared = "coupling" in name
    axes = jax.tree.map(lambda leaf: None if shared and leaf is not transform.context else 0, transform)
    rows = jax.vmap(lambda transform, row: transform(row), (axes, 0))(transform, x)
    np.testing.assert_allclose(whole, rows, atol=1e-6)
    single = normal(1, SIZE)  # one vector, many transforms
    assert transform.forward_shape((SIZE,)) == transform(single).shape == (NUM_ROWS, SIZE)
    np.testing.assert_allclose(transform(single), transform(jnp.broadcast_to(single, (NUM_ROWS, SIZE))), atol=1e-6)
    many = dist.TransformedDistribution(dist.Normal(0.0, 1.0).expand([SIZE]).to_event(1), [transform])
    assert many.batch_shape == (NUM_ROWS,) and many.event_shape == (SIZE,)
    value, intermediates = many.sample_with_intermediates(random.key(0), (2,))
    assert value.shape == (2, NUM_ROWS, SIZE)
    np.testing.assert_allclose(many.log_prob(value), many.log_prob(value, intermediates), atol=2e-5)


@pytest.mark.parametrize(
    "name",
    ["sigmoid coupling", "tanh coupling", "exp coupling", "stretching planar", "squeezing planar", "sylvester"],
)
def test_extreme_inputs_and_parameters_give_finite_values_and_gradients(name):
    make = {
        "sigmoid coupling": lambda scale: coupling("sigmoid", scale),
        "tanh coupling": lambda scale: coupling("tanh", scale),
        "exp coupling": lambda scale: coupling("exp", scale),
        "stretching planar": planar,
        "squeezing planar": lambda scale: PlanarTransform(-planar(scale).u, planar(scale).w, planar(scale).b),
        "sylvester": sylvester,
    }[name]

    @jax.jit
    def values_and_gradients(transform, x):
        def total(transform, x):
            y, log_det = transform.call_with_intermediates(x)
            return jnp.sum(y) + jnp.sum(log_det)

        def total_inverse(transform, y):
            x = transform.inv(y)
            return jnp.sum(x) + jnp.sum(transform.log_abs_det_jacobian(x, y))

        return (
            jax.value_and_grad(total, (0, 1))(transform, x),
            jax.value_and_grad(total_inverse, (0, 1))(transform, x),
        )

    for parameter_scale in (0.0, 1e-20, 1.0, 100.0):
        for scale in (0.0, 1.0, 1e4):
            found = values_and_gradients(make(parameter_scale), normal(0, NUM_ROWS, SIZE, scale=scale))
            finite = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), found)
            assert all(jax.tree.leaves(finite)), (parameter_scale, scale, finite)


def test_planar_and_sylvester_are_the_published_formulas():
    x = np.asarray(normal(0, NUM_ROWS, SIZE), np.float64)
    transform = planar()
    u, w, b = (np.asarray(leaf, np.float64) for leaf in (transform.u, transform.w, transform.b))
    along = np.sum(u * w, -1)
    slope = 1e-3 + (1 - 1e-3) * np.log1p(np.exp(along + np.log(np.e - 1)))
    u_hat = u + ((slope - 1 - along) / np.sum(w**2, -1))[:, None] * w
    expected = x + u_hat * np.tanh(np.sum(w * x, -1) + b)[:, None]
    np.testing.assert_allclose(transform(x), expected, atol=1e-5)

    transform = sylvester()
    for row in range(NUM_ROWS):
        reflections, first, second, bias = (np.asarray(leaf[row], np.float64) for leaf in jax.tree.leaves(transform))
        q = np.eye(SIZE)
        for v in reflections:
            q = q @ (np.eye(SIZE) - 2 * np.outer(v, v) / (v @ v))
        q = q[:, :3]
        first, second = (np.triu(r, 1) + np.diag(0.999 * np.tanh(np.diag(r))) for r in (first, second))
        expected = x[row] + q @ first @ np.tanh(second @ q.T @ x[row] + bias)
        np.testing.assert_allclose(transform(jnp.asarray(x, jnp.float32))[row], expected, atol=1e-5)


def test_no_diagonal_makes_a_sylvester_transform_singular():
    transform = SylvesterTransform(jnp.ones((1, 2)), 9.0 * jnp.eye(2), -9.0 * jnp.eye(2), jnp.zeros(2))
    expected = 2 * np.log1p(-((0.999 * np.tanh(9.0)) ** 2))
    np.testing.assert_allclose(transform.log_abs_det_jacobian(jnp.zeros(2), jnp.zeros(2)), expected, rtol=1e-4)


def test_the_monotone_equation_is_solved_and_differentiated_to_second_order():
    with jax.enable_x64(True):
        height, slope, offset, y = jnp.array([-0.999, 3.0, -2.0, 1e3]), jnp.array([1.0, -0.3, 0.49, 1e-4]), 0.3, 0.7

        def first(y):
            return jax.grad(lambda y: root(height, slope, jnp.full(4, offset), jnp.full(4, y)).sum())(y)

        alpha = root(height, slope, jnp.full(4, offset), jnp.full(4, y))
        t = jnp.tanh(slope * alpha + offset)
        np.testing.assert_allclose(alpha + height * t, y, atol=1e-12)
        steepness = 1 + height * slope * (1 - t**2)
        np.testing.assert_allclose(first(y), (1 / steepness).sum(), rtol=1e-10)
        curvature = -2 * height * slope**2 * t * (1 - t**2)
        np.testing.assert_allclose(jax.grad(first)(y), (-curvature / steepness**3).sum(), rtol=1e-9)
        by_height = jax.jacfwd(lambda height: root(height, slope, jnp.full(4, offset), jnp.full(4, y)))(height)
        np.testing.assert_allclose(by_height, jnp.diag(-t / steepness), atol=1e-12)


FLOWS = {"planar": planar_flow, "coupling": coupling_flow, "iaf": iaf_flow, "sylvester": sylvester_flow}


@pytest.mark.parametrize("context", [None, (NUM_ROWS, 2)], ids=["shared", "amortised"])
@pytest.mark.parametrize("name", FLOWS)
def test_named_flows_start_near_the_identity_and_see_the_context(name, context):
    x = normal(0, NUM_ROWS, 5)
    context = None if context is None else normal(1, *context)

    def build(context):
        with handlers.seed(rng_seed=0):
            return FLOWS[name]("flow", 5, context)

    @jax.jit
    def moved_and_gradient(context):
        def total(context):
            y = ComposeTransform(build(context))(x)
            return jnp.sum(y[:, 0]), y

        return jax.grad(total, has_aux=True)(context) if context is not None else (None, total(context)[1])

    gradient, y = moved_and_gradient(context)
    change = np.abs(y - (x[:, ::-1] if name == "iaf" else x))  # which reverses the coordinates in between
    assert 1e-6 < change.max() < 0.15 * np.abs(x).max()
    if context is not None:
        assert (np.abs(gradient).max(axis=1) > 1e-7).all()


def test_inverse_autoregressive_flow_is_autoregressive():
    first, permutation, second = iaf()
    x = normal(0, NUM_ROWS, SIZE)
    for transform in (first, second):
        jacobian = blocks(transform, x)
        np.testing.assert_array_equal(np.triu(jacobian, 1), np.zeros_like(jacobian))
        assert (np.abs(jacobian)[:, *np.tril_indices(SIZE, -1)] > 0).all()
        scales = np.diagonal(jacobian, axis1=1, axis2=2)
        np.testing.assert_allclose(np.log(scales).sum(-1), transform.log_abs_det_jacobian(x, transform(x)), atol=1e-5)
    np.testing.assert_array_equal(permutation(x), x[:, ::-1])


def test_an_equinox_module_conditions_a_coupling_and_gets_gradients():
    module = eqx.nn.MLP(4, 4, 8, 1, activation=jnp.tanh, key=random.key(0))
    context = normal(8, 2)
    transform = AffineCouplingTransform(
        lambda kept, context: jnp.vectorize(module, signature="(i)->(o)")(jnp.concatenate([kept, context], -1)),
        context=context,
    )
    x = normal(0, NUM_ROWS, SIZE)
    np.testing.assert_allclose(transform.inv(transform(x)), x, atol=1e-5)

    vector = eqx.nn.MLP(2, 4, 8, 1, activation=jnp.tanh, key=random.key(0))  # a pytree with functions in it
    coupling = AffineCouplingTransform(vector, "second")
    assert len(jax.tree.leaves(coupling)) == 4
    gradient = jax.jit(jax.grad(lambda coupling: coupling(x[0]).sum()))(coupling)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert len(ravel_pytree(gradient)[0]) == sum(leaf.size for leaf in jax.tree.leaves(coupling))


def test_what_does_not_fit_is_refused_by_name():
    vector = jnp.ones(3)
    with pytest.raises(ValueError, match=r"5 coordinates\. Pass 5 booleans"):
        AffineCouplingTransform(lambda kept: kept)(jnp.ones(5))
    with pytest.raises(ValueError, match="kept has 2 entries, but the vectors have 3"):
        AffineCouplingTransform(lambda kept: kept, (True, False))(vector)
    with pytest.raises(ValueError, match="keep some coordinates and move others"):
        AffineCouplingTransform(lambda kept: kept, (True, True))
    with pytest.raises(ValueError, match="kept must be 'first', 'second' or booleans, got 'third'"):
        AffineCouplingTransform(lambda kept: kept, "third")
    with pytest.raises(ValueError, match="scale must be one of"):
        AffineCouplingTransform(lambda kept: kept, scale="softplus")
    with pytest.raises(ValueError, match=r"returned shape \(1,\) for 2 coordinates to move"):
        AffineCouplingTransform(lambda kept: kept, (True, False, False))(vector)
    with pytest.raises(ValueError, match="two coordinates at the least"):
        coupling_flow("flow", 1)
    with pytest.raises(ValueError, match="u and w must be vectors of the same length"):
        PlanarTransform(jnp.ones(2), vector, 0.0)
    with pytest.raises(ValueError, match="b has no axis of coordinates"):
        PlanarTransform(jnp.ones((4, 3)), jnp.ones((4, 3)), vector)
    with pytest.raises(ValueError, match="u and w have 3 coordinates"):
        dist.TransformedDistribution(dist.Normal(jnp.zeros(2), 1.0).to_event(1), [PlanarTransform(vector, vector, 0.0)])
    with pytest.raises(ValueError, match="expected reflections"):
        SylvesterTransform(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 2)), jnp.ones(2))
    with pytest.raises(ValueError, match="M = 4 directions do not fit in the D = 3"):
        SylvesterTransform(jnp.ones((2, 3)), jnp.ones((4, 4)), jnp.ones((4, 4)), jnp.ones(4))
    with pytest.raises(ValueError, match="the reflections have 3 coordinates"):
        SylvesterTransform(jnp.ones((2, 3)), jnp.eye(2), jnp.eye(2), jnp.ones(2)).forward_shape((2,))
    with pytest.raises(ValueError, match="5 coordinates need at least as many hidden units, got hidden=4"):
        iaf_flow("flow", 5, hidden=4)
