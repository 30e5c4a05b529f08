"""Annealed importance sampling against evidences that are known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy import special, stats

from numpyro_smc.evidence import annealing
from numpyro_smc.evidence.ais import AIS, Problem, temperatures
from numpyro_smc.evidence.estimate import Evidence
from numpyro_smc.programs.density import Pair
from numpyro_smc.programs.guide_target import GuideTarget
from numpyro_smc.programs.sites import BatchPlates
from tests.evidence import conjugate
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

NUM = conjugate.NUM
SETTINGS = conjugate.SETTINGS


@pytest.fixture(scope="module")
def x():
    return conjugate.data(7, NUM)


@pytest.fixture(scope="module")
def from_prior():
    return conjugate.FROM_PRIOR


@pytest.fixture(scope="module")
def result(from_prior, x):
    return from_prior.run(random.key(1), x)


@pytest.fixture(scope="module")
def result_of_guide(x):
    return AIS(conjugate.model, conjugate.guide, **SETTINGS).run(random.key(1), x)


def test_the_mean_weight_of_every_data_point_is_unbiased(result, x):
    """400 data points with 16 chains each; five standard errors."""
    assert result.per_datapoint.shape == (NUM,)
    assert_unbiased_evidence(result.per_datapoint - conjugate.exact(x), 0.0)


def test_the_standard_error_is_that_of_repeated_runs(result, x):
    """The z scores of 400 data points, centred by the first-order shortfall: sd within 0.2 of one (5.7 s.e. of it)."""
    scores = (
        result.per_datapoint + result.per_datapoint_error**2 / 2 - conjugate.exact(x)
    ) / result.per_datapoint_error
    assert abs(float(jnp.std(scores)) - 1.0) < 0.2


def test_the_stated_interval_covers_at_least_nominally(result, x):
    """Each of 400 data points is one problem; fewer than 369 would be improbable (1e-3) at a coverage of 95%."""
    covered = 0
    for value, error, truth in zip(result.per_datapoint, result.per_datapoint_error, conjugate.exact(x), strict=True):
        one = Evidence("ais", result.num_samples, value, error, jnp.asarray(9.0), BatchPlates())
        low, high = one.interval(0.95)
        covered += low <= float(truth) <= high
    assert covered >= stats.binom.ppf(1e-3, NUM, 0.95)


def test_the_value_is_the_sum_over_data_points_and_lies_below_the_truth(result, x):
    np.testing.assert_allclose(result.value, float(np.sum(np.asarray(result.per_datapoint, np.float64))), rtol=1e-6)
    np.testing.assert_allclose(result.standard_error**2, np.sum(np.asarray(result.per_datapoint_error) ** 2), rtol=1e-4)
    truth = float(jnp.sum(conjugate.exact(x)))
    assert result.value - 3 * result.standard_error < truth < result.interval(0.999)[1]
    assert result.bound == "lower"


def test_a_fitted_guide_is_a_better_start_than_the_prior_at_equal_temperatures(result, result_of_guide, x):
    errors = [jnp.mean((r.per_datapoint - conjugate.exact(x)) ** 2) for r in (result, result_of_guide)]
    assert errors[1] < 0.5 * errors[0]
    assert jnp.mean(result_of_guide.ess) > jnp.mean(result.ess)
    assert_unbiased_evidence(result_of_guide.per_datapoint - conjugate.exact(x), 0.0)


def test_acceptance_is_reported_per_temperature_and_near_its_target_where_steps_are_limited_by_it(result):
    assert result.acceptance.shape == result.step_sizes.shape == (SETTINGS["num_temperatures"] - 1, NUM)
    assert 0.6 < float(jnp.mean(result.acceptance)) < 0.98


def test_a_second_run_compiles_nothing(from_prior, result, x):
    from_prior.run(random.key(2), x + 0.5)
    assert from_prior._tune.num_compiled() == from_prior._forward.num_compiled() == 1


def test_steps_come_from_the_pilot_alone_and_are_the_same_for_every_batch_of_chains(from_prior, result, x):
    problem = Problem({}, (x,), {}, random.key(0))
    path = from_prior._tune(random.key(3), problem)
    again = from_prior._tune(random.key(3), problem)
    jax.tree.map(np.testing.assert_array_equal, path, again)
    jax.tree.map(np.testing.assert_array_equal, path.reversed().reversed(), path)
    runs = [from_prior._forward(random.key(i), problem, path).log_weights for i in (4, 5)]
    assert not np.allclose(*runs)


def test_batches_of_data_and_of_chains_give_the_same_evidence(x):
    """60 data points in batches of 25, whose last overlaps; mean error within five standard errors of zero."""
    few = x[:60]
    ais = AIS(conjugate.model, **SETTINGS, batch_size=25, chain_batch_size=8)
    found = ais.run(random.key(2), few)
    assert found.per_datapoint.shape == (60,)
    assert found.betas.shape == (SETTINGS["num_temperatures"] + 1, 60)
    scores = (found.per_datapoint - conjugate.exact(few)) / found.per_datapoint_error
    assert np.max(np.abs(scores)) < 6.0
    assert ais._forward.num_compiled() == 1


def test_batching_refuses_programs_that_it_would_change():
    def with_centre(x, centre):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.mean(centre), 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def of_fixed_size(x):
        with numpyro.plate("data", 6):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.resize(x, 6))

    with pytest.raises(ValueError, match="densities of the first batch differ"):
        AIS(with_centre, batch_size=4).run(random.key(0), jnp.zeros(6), jnp.arange(6.0))
    with pytest.raises(ValueError, match=r"plates \['data'\] have sizes"):
        AIS(of_fixed_size, batch_size=4).run(random.key(0), jnp.zeros(6))


def test_the_mean_weight_is_unbiased_on_a_banana():
    """The banana N(a; 0, 1) N(b; a^2 / 2 - 1, 0.4), times e^2, from a wide prior; 300 replicates, five s.e."""

    def model(zeros):
        with numpyro.plate("replicates", len(zeros)):
            a = numpyro.sample("a", dist.Normal(0.0, 2.0))
            b = numpyro.sample("b", dist.Normal(0.0, 2.0))
            prior = dist.Normal(0.0, 2.0).log_prob(a) + dist.Normal(0.0, 2.0).log_prob(b)
            banana = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(0.5 * a**2 - 1.0, 0.4).log_prob(b)
            numpyro.factor("banana", 2.0 + banana - prior)

    ais = AIS(model, num_chains=8, num_temperatures=15, num_leapfrog=4, schedule="adaptive")
    found = ais.run(random.key(0), jnp.zeros(300))
    assert_unbiased_evidence(found.per_datapoint, 2.0)
    betas = np.asarray(found.betas)
    assert (betas[0] == 0.0).all() and (betas[-1] == 1.0).all() and (np.diff(betas, axis=0) >= 0.0).all()
    assert np.ptp(betas[5]) > 0.0


@pytest.mark.parametrize("step_size", [0.8, 2.5])
def test_the_transition_leaves_its_bridging_density_invariant(step_size):
    """Exact draws from the conjugate bridge at beta = 0.4: means and covariances of 40,000 chains after one move."""
    beta = 0.4
    zeros = jnp.zeros((1, 2)) + jnp.array([0.7, -0.4])
    pair = Pair(conjugate.model, conjugate.guide, (zeros,), {}, random.key(0), user="test", num_particles=2)

    @jax.jit
    def move(rng_key):
        target = GuideTarget(pair, {}, random.key(1))

        def bridge(z):
            ends = target.ends({"z": z[None]})
            return jnp.sum((1 - beta) * ends.base + beta * ends.target)

        precision = -jax.hessian(bridge)(jnp.zeros(2))
        mean = jnp.linalg.solve(precision, jax.grad(bridge)(jnp.zeros(2)))
        exact = dist.MultivariateNormal(mean, precision_matrix=precision)
        draw_key, move_key = random.split(rng_key)
        chains = annealing.chains_at(target, {"z": exact.sample(draw_key, (40_000, 1))})
        scale = {"z": jnp.array([[0.5, 0.4]])}
        moved, acceptance = annealing.hmc(move_key, target, chains, jnp.full(1, beta), jnp.full(1, step_size), scale, 3)
        return moved.position["z"][:, 0], mean, exact.covariance_matrix, acceptance

    z, mean, covariance, acceptance = move(random.key(2))
    assert 0.05 < float(acceptance.mean()) < 0.999
    for i in range(2):
        assert_mean(z[:, i], float(mean[i]))
        for j in range(2):
            assert_mean((z[:, i] - mean[i]) * (z[:, j] - mean[j]), float(covariance[i, j]))


def test_temperatures_of_the_schedules():
    for name in ("linear", "sigmoid", "adaptive"):
        betas = temperatures(name, 10)
        assert betas[0] == 0.0 and betas[-1] == 1.0 and (np.diff(betas) > 0).all()
    first = (special.expit(-3.0) - special.expit(-4.0)) / (special.expit(4.0) - special.expit(-4.0))
    np.testing.assert_allclose(temperatures("sigmoid", 8)[[1, 4, 7]], [first, 0.5, 1.0 - first], atol=1e-12)
    np.testing.assert_allclose(temperatures([0.0, 0.3, 1.0], 99), [0.0, 0.3, 1.0])
    for wrong in ("cubic", [0.0, 0.5, 0.4, 1.0], [0.1, 0.5, 1.0]):
        with pytest.raises(ValueError, match="AIS"):
            temperatures(wrong, 10)


def test_temperatures_at_equal_distances_follow_the_spread():
    betas = jnp.linspace(0.0, 1.0, 201)
    even = annealing.equal_steps(betas, jnp.ones(201))
    np.testing.assert_allclose(even, betas, atol=1e-5)
    steep = annealing.equal_steps(betas, 1.0 / (0.01 + betas))
    np.testing.assert_allclose(steep[100], 0.0905, rtol=0.25)  # (e^{log(101) / 2} - 1) / 100, a tenth of it shared out
    assert steep[100] < 0.13


def test_discrete_latents_are_refused_by_name():
    def mixture(x):
        with numpyro.plate("data", len(x)):
            component = numpyro.sample("component", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(2.0 * component, 1.0), obs=x)

    with pytest.raises(ValueError, match="'component' is discrete"):
        AIS(mixture).run(random.key(0), jnp.zeros(3))


def test_latents_that_the_guide_does_not_cover_are_refused_by_name():
    def location_and_scale(y):
        scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        location = numpyro.sample("location", dist.Normal(0.0, 2.0))
        numpyro.sample("y", dist.Normal(location, scale), obs=y)

    with pytest.raises(ValueError, match="never samples site 'location'"):
        AIS(location_and_scale, lambda y: numpyro.sample("scale", dist.LogNormal(0.0, 1.0))).run(random.key(0), 0.3)


def test_densities_that_are_not_finite_are_reported_with_their_site(from_prior, result, x):
    with pytest.raises(FloatingPointError, match=r"AIS: 1 of 400 elements.*site 'x' of the model"):
        from_prior.run(random.key(1), x.at[3, 1].set(jnp.nan))


@pytest.mark.parametrize(
    "options",
    [{"num_chains": 0}, {"num_temperatures": 1}, {"chain_batch_size": 3, "num_chains": 16}, {"target_acceptance": 1.0}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="AIS"):
        AIS(conjugate.model, **options)


def test_step_sizes_that_are_driven_to_zero_are_counted_in_a_warning():
    def without_gradient(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        broken = jnp.where(z > -1e9, z, jnp.sqrt(-1.0 - z**2))  # finite, but its gradient is not a number
        numpyro.sample("x", dist.Normal(broken, 1.0), obs=x)

    ais = AIS(without_gradient, num_chains=64, num_temperatures=4, num_leapfrog=1)
    with pytest.warns(UserWarning, match="step sizes of 1 of 1 elements were driven to zero"):
        found = ais.run(random.key(0), 0.5)
    assert found.verdict.startswith("Not to be trusted") and "accept under" in found.verdict
    # No chain moves: what is left is importance sampling from the prior.
    assert abs(found.value - float(dist.Normal(0.0, 2.0**0.5).log_prob(0.5))) < 5 * found.standard_error
