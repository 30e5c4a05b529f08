"""Static targets: normalised densities and their moments by quadrature, and the programs that are made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from models import static_targets
from tests.statistics_of_estimates import assert_mean

#: Means in two dimensions that the code of the published experiments draws with seed 0.
PUBLISHED_MEANS = [
    [1.8741601706, 1.8476397991],
    [2.7494213581, 2.5661211014],
    [3.8487102985, 3.6920092106],
    [2.6839871407, 0.8847806454],
    [3.3222749233, 1.7366652489],
    [3.3499832153, 3.3081338406],
    [3.1198415756, 4.2376580238],
    [4.1167774200, 2.7527217865],
]

TARGETS = {
    "mixture": lambda: static_targets.gaussian_mixture(PUBLISHED_MEANS),
    "bimodal": lambda: static_targets.bimodal(2),
    "asymmetric": lambda: static_targets.bimodal(2, weight=0.9, scale=0.6),
    "funnel": lambda: static_targets.Funnel(2, scale=1.2),
    "banana": lambda: static_targets.Banana(scale=1.5, curvature=0.7),
}


log_prob = jax.jit(lambda target, z: target.log_prob(z))
mode_weights = jax.jit(static_targets.mode_weights)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=TARGETS)
def case(request):
    """A target, points [S, 2] that cover it, and their volumes [S]."""
    grid = np.linspace(-12, 12, 401)
    first, second = (axis.ravel() for axis in np.meshgrid(grid, grid, indexing="ij"))
    volume = np.full(first.size, (grid[1] - grid[0]) ** 2)
    if request.param == "funnel":
        second, volume = second * np.exp(first / 2), volume * np.exp(first / 2)
    if request.param == "banana":
        second = second + 0.7 * first**2
    return TARGETS[request.param](), np.stack([first, second], -1), volume


def test_target_is_normalised_and_has_the_stated_moments(case):
    target, points, volume = case
    mass = np.exp(log_prob(target, points)) * volume
    mean = mass @ points
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(target.mean, mean, atol=1e-9)
    np.testing.assert_allclose(target.variance, mass @ (points - mean) ** 2, rtol=1e-8)


def test_draws_have_the_stated_moments(case):
    target = case[0]
    draws = jax.jit(lambda target, key: target.sample(key, (20_000,)))(target, jax.random.key(0))
    mean = np.asarray(target.mean)
    for k in range(2):
        assert_mean(draws[:, k], mean[k])
        assert_mean((np.asarray(draws)[:, k] - mean[k]) ** 2, target.variance[k])


def test_program_is_the_density_also_as_an_argument_of_a_compiled_function(case):
    target, points, _ = case
    z = points[:: len(points) // 6]
    joint = jax.jit(lambda target, z: log_density(static_targets.model, (target,), {}, {"z": z})[0])
    np.testing.assert_allclose([joint(target, one) for one in z], log_prob(target, z), rtol=1e-12)


def test_replicates_have_a_density_each():
    z = jnp.zeros((4, 2))
    program = handlers.substitute(static_targets.model, {"z": z})
    trace = handlers.trace(program).get_trace(TARGETS["banana"](), len(z))
    assert trace["log_density"]["fn"].log_prob(None).shape == trace["z"]["fn"].batch_shape == (len(z),)


def test_mixture_is_the_written_one():
    z = np.random.default_rng(0).normal(3, 2, (5, 2))
    expected = logsumexp([multivariate_normal(mean).logpdf(z) for mean in PUBLISHED_MEANS], axis=0) - np.log(8)
    np.testing.assert_allclose(log_prob(TARGETS["mixture"](), z), expected, rtol=1e-12)
    assert static_targets.draw_means(jax.random.key(0), 50).shape == (8, 50)


def test_funnel_has_any_number_of_dimensions():
    z = np.random.default_rng(0).normal(size=4)
    covariance = np.diag(np.exp([0, z[0], z[0], z[0]]) * [9, 1, 1, 1])
    expected = multivariate_normal(cov=covariance).logpdf(z)
    assert float(static_targets.Funnel(4).log_prob(z)) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(static_targets.Funnel(3).variance, [9, np.exp(4.5), np.exp(4.5)])


@pytest.mark.parametrize("scale", [0.05, 0.6])
def test_mode_weights_are_exact_under_the_target_however_the_modes_overlap(scale):
    target = static_targets.bimodal(1, weight=0.9, scale=scale)
    grid = jnp.linspace(-5, 6, 2001)[:, None]
    np.testing.assert_allclose(mode_weights(target, grid, log_prob(target, grid)), [0.9, 0.1], rtol=1e-9)


def test_mode_weights_count_the_draws_of_separate_modes():
    target = static_targets.bimodal(10, weight=0.9)
    z = jnp.zeros((4, 10)).at[0].set(1.0)
    np.testing.assert_allclose(mode_weights(target, z), [0.75, 0.25], atol=1e-12)


def test_guide_is_the_published_start():
    target, z = static_targets.bimodal(3), np.random.default_rng(0).normal(size=(2, 3))
    found = log_density(static_targets.guide, (target, 2), {}, {"z": z})[0]
    assert float(found) == pytest.approx(multivariate_normal(np.zeros(3), 9).logpdf(z).sum(), rel=1e-12)
    assert handlers.trace(handlers.seed(static_targets.guide, 0)).get_trace(target)["z"]["value"].shape == (3,)


def test_student_t_integrals_are_those_of_the_program():
    """Against Gauss-Legendre quadrature of the program's joint, in other coordinates."""
    y = static_targets.student_t_data()
    nodes, weights = np.polynomial.legendre.leggauss(200)
    m, s = 13 * nodes + 1, 8 * nodes + 8

    def log_joint(m, s):
        return log_density(static_targets.student_t_model, (y,), {}, {"m": m, "s": s})[0]

    grid = jax.jit(jax.vmap(jax.vmap(log_joint, (None, 0)), (0, None)))(m, s)
    mass = np.exp(grid) * np.outer(13 * weights, 8 * weights)
    found = static_targets.student_t_integrals(y)
    assert found.log_evidence == pytest.approx(np.log(mass.sum()), abs=1e-6)
    assert found.log_evidence == pytest.approx(-13.987, abs=5e-4)
    for name, values, marginal in (("m", m, mass.sum(1)), ("s", s, mass.sum(0))):
        marginal = marginal / marginal.sum()
        assert found.mean[name] == pytest.approx(marginal @ values, abs=1e-6)
        assert found.variance[name] == pytest.approx(marginal @ (values - marginal @ values) ** 2, abs=1e-6)
