"""A value outside the support has log density -inf, inside a scan too, in every joint density that is evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.scipy.special import exp1, gammainc
from jax.scipy.stats import poisson
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import MCMC
from numpyro.infer.util import log_density as numpyro_log_density

from numpyro_smc import IWELBO, ParticleFilter, ParticleGibbs, SMCSampler, importance
from numpyro_smc.programs import supports
from numpyro_smc.programs.sites import BatchPlates, log_density

HALF, EYE = jnp.array([0.5, 0.5]), jnp.eye(2)
EXP, SHIFT = dist.transforms.ExpTransform(), dist.transforms.AffineTransform(5.0, 2.0)

# name: (distribution, a value inside, values outside)
BOUNDED = {
    "uniform": (lambda: dist.Uniform(-1.0, 2.0), 0.5, [-3.0, 9.0]),
    "half normal": (lambda: dist.HalfNormal(1.2), 0.5, [-1.0]),
    "half cauchy": (lambda: dist.HalfCauchy(1.2), 0.5, [-1.0]),
    "exponential": (lambda: dist.Exponential(1.2), 0.5, [-1.0]),
    "gamma": (lambda: dist.Gamma(2.0, 1.2), 0.5, [-1.0]),
    "inverse gamma": (lambda: dist.InverseGamma(2.0, 1.2), 0.5, [-1.0]),
    "chi squared": (lambda: dist.Chi2(2.2), 0.5, [-1.0]),
    "beta": (lambda: dist.Beta(2.0, 1.2), 0.5, [-0.1, 1.1]),
    "beta proportion": (lambda: dist.BetaProportion(0.3, 1.2), 0.5, [-0.1, 1.1]),
    "kumaraswamy": (lambda: dist.Kumaraswamy(1.2, 2.0), 0.5, [-0.1, 1.1]),
    "pareto": (lambda: dist.Pareto(1.2, 2.0), 1.5, [0.1]),
    "weibull": (lambda: dist.Weibull(1.2, 2.0), 0.5, [-1.0]),
    "gompertz": (lambda: dist.Gompertz(1.2, 1.0), 0.5, [-1.0]),
    "levy": (lambda: dist.Levy(1.2, 1.0), 3.0, [0.1]),
    "log normal": (lambda: dist.LogNormal(1.2, 2.0), 0.5, [-1.0]),
    "log uniform": (lambda: dist.LogUniform(1.2, 9.0), 2.0, [0.1, 10.0, -1.0]),
    "von mises": (lambda: dist.VonMises(0.1, 1.2), 0.5, [-4.0, 4.0]),
    "folded": (lambda: dist.FoldedDistribution(dist.Normal(1.2, 1.0)), 0.5, [-1.0]),
    "truncated normal": (lambda: dist.TruncatedNormal(1.2, 2.0, low=0.2, high=2.0), 0.5, [0.0, 3.0]),
    "left truncated": (lambda: dist.LeftTruncatedDistribution(dist.Normal(1.2), low=0.2), 0.5, [0.0]),
    "right truncated": (lambda: dist.RightTruncatedDistribution(dist.Normal(1.2), high=0.7), 0.5, [1.0]),
    "truncated cauchy": (lambda: dist.TruncatedCauchy(1.2, 2.0, low=0.2), 0.5, [0.0]),
    "two power laws": (lambda: dist.DoublyTruncatedPowerLaw(-1.5, 1.2, 9.0), 2.0, [0.1, 10.0]),
    "power law": (lambda: dist.LowerTruncatedPowerLaw(-2.5, 1.2), 2.0, [0.1]),
    "relaxed bernoulli": (lambda: dist.RelaxedBernoulliLogits(1.0, 1.2), 0.5, [-0.1, 1.1]),
    "image of an interval": (lambda: dist.TransformedDistribution(dist.Uniform(0.0, 1.2), EXP), 1.5, [0.5, 99.0, -1.0]),
    "shifted interval": (lambda: dist.TransformedDistribution(dist.Uniform(0.0, 1.2), SHIFT), 5.5, [4.0, 99.0]),
    "shifted gamma": (lambda: dist.TransformedDistribution(dist.Gamma(2.0, 1.2), SHIFT), 5.5, [4.0]),
    "mixture": (
        lambda: dist.MixtureSameFamily(dist.Categorical(HALF), dist.HalfNormal(jnp.array([1.2, 2.2]))),
        0.5,
        [-1.0],
    ),
    "general mixture": (
        lambda: dist.MixtureGeneral(
            dist.Categorical(HALF), [dist.HalfNormal(1.2), dist.Uniform(-3.0, -2.0)], support=constraints.real
        ),
        -2.5,
        [-1.0, -4.0],
    ),
    "improper": (lambda: dist.ImproperUniform(constraints.positive, (), (2,)), jnp.array([1.0, 2.0]), [[1.0, -2.0]]),
    "product": (lambda: dist.Uniform(0.0, jnp.array([1.2, 1.2])).to_event(1), jnp.array([0.3, 0.7]), [[0.3, 1.8]]),
    "dirichlet": (
        lambda: dist.Dirichlet(jnp.array([2.2, 3.2])),
        jnp.array([0.3, 0.7]),
        [[0.3, 0.8], [-0.3, 1.3]],
    ),
    "lkj cholesky": (lambda: dist.LKJCholesky(2, 1.2), EYE, [2 * EYE]),
    "wishart": (lambda: dist.Wishart(4.2, EYE), EYE, [-EYE]),
    "poisson": (lambda: dist.Poisson(1.2), 2, [-1, 1.5]),
    "bernoulli": (lambda: dist.Bernoulli(0.4), 1, [2, -1, 0.5]),
    "bernoulli, logits": (lambda: dist.Bernoulli(logits=1.2), 1, [2, -1]),
    "binomial": (lambda: dist.Binomial(5, 0.4), 3, [6, -1, 2.5]),
    "binomial, logits": (lambda: dist.Binomial(5, logits=1.2), 3, [6, -1]),
    "beta binomial": (lambda: dist.BetaBinomial(1.2, 2.0, 5), 3, [6, -1]),
    "categorical": (lambda: dist.Categorical(HALF), 1, [2, -1]),
    "categorical, logits": (lambda: dist.Categorical(logits=HALF), 1, [2, -1]),
    "discrete uniform": (lambda: dist.DiscreteUniform(0, 5), 3, [6, -1]),
    "geometric": (lambda: dist.Geometric(0.4), 1, [-1, 0.5]),
    "negative binomial": (lambda: dist.NegativeBinomial2(1.2, 2.0), 1, [-1, 0.5]),
    "zero-inflated poisson": (lambda: dist.ZeroInflatedPoisson(0.3, 1.2), 1, [-1]),
    "zero-inflated": (lambda: dist.ZeroInflatedDistribution(dist.Poisson(1.2), gate=0.3), 1, [-1]),
    "ordered logistic": (lambda: dist.OrderedLogistic(1.2, jnp.array([-1.0, 1.0])), 1, [3, -1]),
    "multinomial": (lambda: dist.Multinomial(4, HALF), jnp.array([1, 3]), [[1, 2], [5, -1]]),
    "dirichlet multinomial": (lambda: dist.DirichletMultinomial(jnp.ones(2), 4), jnp.array([1, 3]), [[1, 2]]),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_outside_the_support_the_density_is_zero_and_its_gradient_finite(name):
    make, inside, outside = BOUNDED[name]
    through_a_scan = jax.tree.map(jnp.asarray, make())
    # NumPyro warns of values outside where it sees them, as in the components of a mixture.
    compiled = jax.jit if "mixture" in name else lambda function: function
    for fn in (make(), through_a_scan):
        density = compiled(lambda value, fn=fn: supports.log_prob(fn, value))
        np.testing.assert_allclose(
            density(jnp.asarray(inside)), compiled(make().log_prob)(jnp.asarray(inside)), rtol=1e-5
        )
        for value in map(jnp.asarray, outside):
            assert np.isneginf(density(value))
            if jnp.issubdtype(value.dtype, jnp.floating):
                assert np.isfinite(jax.grad(density)(value)).all()
    for value in outside:
        assert np.isneginf(jax.jit(supports.checked(through_a_scan).log_prob)(jnp.asarray(value)))


def test_supports_hold_for_elements_of_plates_inside_a_scan():
    scale = jnp.array([0.5, 1.0, 1.5])

    def model(y):
        def step(width, y_t):
            with numpyro.plate("series", 3):
                numpyro.sample("a", dist.TruncatedNormal(0.0, scale, low=-width, high=2.0), obs=y_t)
                numpyro.sample("b", dist.LogUniform(0.1 * width, 10.0), obs=jnp.abs(y_t) + 0.1)
                numpyro.sample("c", dist.Uniform(-width, 1.0), obs=y_t)
            return width + 1.0, None

        scan(step, 1.0, y)

    inside = jnp.array([[0.1, 0.2, -0.3], [0.4, 0.1, -1.9]])
    for y, is_inside in ((inside, True), (inside.at[0, 2].set(-1.2), False), (inside.at[1, 0].set(1.5), False)):
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(y)
        found = sum(log_density(trace[name], BatchPlates()) for name in "abc")
        expected = sum(
            dist.TruncatedNormal(0.0, scale, low=-w, high=2.0).log_prob(y_t).sum()
            + dist.LogUniform(0.1 * w, 10.0).log_prob(jnp.abs(y_t) + 0.1).sum()
            + dist.Uniform(-w, 1.0).log_prob(y_t).sum()
            for w, y_t in zip((1.0, 2.0), y, strict=True)
            if is_inside
        )
        np.testing.assert_allclose(found, expected if is_inside else -np.inf, rtol=1e-5)


def test_a_mask_hides_values_outside_and_validate_args_false_is_taken_at_its_word():
    lost = jax.tree.map(jnp.asarray, dist.Exponential(jnp.ones(2)).mask(jnp.array([True, False])).to_event(1))
    assert supports.log_prob(lost, jnp.array([0.5, -1.0])) == -0.5
    assert supports.log_prob(lost, jnp.array([-0.5, 1.0])) == -np.inf
    grey = dist.Bernoulli(logits=0.3, validate_args=False)
    np.testing.assert_allclose(supports.log_prob(grey, jnp.asarray(0.4)), grey.log_prob(0.4))


def bounded_by_the_latent(y):
    def step(carry, y_t):
        x = numpyro.sample("x", dist.Exponential(1.0))
        numpyro.sample("y", dist.Uniform(0.0, x), obs=y_t)
        return carry, None

    scan(step, 0.0, y)


def below_the_data(y):
    def step(carry, y_t):
        x = numpyro.sample("x", dist.Exponential(1.0))
        numpyro.sample("y", dist.Pareto(x, 2.0), obs=y_t)
        return carry, None

    scan(step, 0.0, y)


def counted(y):
    def step(carry, y_t):
        n = numpyro.sample("n", dist.Poisson(2.0))
        numpyro.sample("y", dist.Binomial(n, probs=0.5), obs=y_t)
        return carry, None

    scan(step, 0.0, y)


EXACT = {
    "uniform": (bounded_by_the_latent, jnp.array([0.4, 0.9]), lambda y: jnp.log(exp1(y)).sum()),
    "pareto": (below_the_data, jnp.array([0.8, 1.5]), lambda y: jnp.log(4.0 * gammainc(3.0, y) / y**3).sum()),
    "binomial": (counted, jnp.array([2, 1]), lambda y: poisson.logpmf(y, 1.0).sum()),
}


@pytest.mark.parametrize("name", EXACT)
def test_evidences_of_bounded_observations_in_a_scan_are_exact(name):
    model, y, exact = EXACT[name]
    found = importance(random.key(0), model, y, num_samples=20_000)
    assert abs(found.value - exact(y)) < 5 * found.standard_error
    filtered = jax.vmap(lambda key: ParticleFilter(model, 500).log_evidence(key, y))(random.split(random.key(1), 20))
    assert abs(jnp.mean(jnp.exp(filtered - exact(y))) - 1.0) < 5 * jnp.std(jnp.exp(filtered - exact(y))) / 20**0.5


def test_a_guide_with_more_than_the_models_support_is_welcome_and_trains():
    y = jnp.array([0.4, 0.9])

    def guide(y):
        center = numpyro.param("center", 1.0)

        def step(carry, _):
            numpyro.sample("x", dist.Normal(center, 1.5))
            return carry, None

        scan(step, 0.0, y)

    found = importance(random.key(0), bounded_by_the_latent, y, guide=guide, params={"center": 1.0}, num_samples=50_000)
    assert abs(found.value - jnp.log(exp1(y)).sum()) < 5 * found.standard_error
    loss, gradient = jax.value_and_grad(
        lambda center: IWELBO(50).loss(random.key(1), {"center": center}, bounded_by_the_latent, guide, y)
    )(1.0)
    assert np.isfinite(loss) and np.isfinite(gradient) and gradient != 0.0


def widening_walk(y):
    w = numpyro.sample("w", dist.Uniform(0.1, 3.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Uniform(x - w, x + w))
        numpyro.sample("y", dist.Uniform(x - 0.5, x + 0.5), obs=y_t)
        return x, None

    scan(step, 0.0, y)


WALK = jnp.array([0.2, 0.9, 1.4])
# On a grid of 400 widths and steps of 0.005 in x.
WALK_EVIDENCE, WALK_WIDTH = -3.448, 1.175


def test_densities_handed_to_numpyro_know_the_supports():
    values = {"w": 0.3, "x": jnp.array([0.2, 0.9, 1.4])}
    lost, kept = jax.jit(
        lambda: [
            numpyro_log_density(model, (WALK,), {}, values)[0]
            for model in (widening_walk, supports.Supported(widening_walk))
        ]
    )()
    assert np.isfinite(lost) and np.isneginf(kept)


@pytest.mark.slow
def test_particle_gibbs_and_tempering_stay_inside_the_support():
    mcmc = MCMC(ParticleGibbs(widening_walk, 30), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(random.key(0), WALK)
    draws = mcmc.get_samples()
    steps = np.abs(np.diff(np.concatenate([np.zeros((1000, 1)), draws["x"]], axis=1)))
    assert (steps.max(axis=1) <= np.asarray(draws["w"])).all()
    assert abs(draws["w"].mean() - WALK_WIDTH) < 0.15  # a third of a standard deviation; it was a whole one off
    runs = [SMCSampler(widening_walk, 1000).run(random.key(i), WALK, progress_bar=False) for i in range(6)]
    ratios = np.exp(np.array([run.log_evidence for run in runs]) - WALK_EVIDENCE)
    assert abs(ratios.mean() - 1.0) < 5 * ratios.std(ddof=1) / 6**0.5
