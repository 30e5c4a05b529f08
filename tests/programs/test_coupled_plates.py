"""The elements of a plate are independent problems only where the program proves it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from scipy import stats

import numpyro_smc
from numpyro_smc import AIS, DSMCS, FIVO, IWELBO, OVIS, ParticleFilter, ParticleMetropolis, bootstrap, importance, twist
from tests.programs.coupled_programs import (
    CASES,
    COUPLED,
    Y,
    exact_regional_epidemic,
    exact_trends,
    kalman,
    regional_epidemic,
    totals,
    trends,
)

NOT_INDEPENDENT = "does not make independent problems"


def assert_evidence(log_evidences, exact):
    """The mean of the estimates is the evidence, within five standard errors (false alarms: 6e-7)."""
    ratios = np.exp(np.asarray(log_evidences, float) - exact)
    assert abs(ratios.mean() - 1.0) < 5 * ratios.std(ddof=1) / np.sqrt(len(ratios))


def evidences(model, *args, num_particles=400, runs=40, **options):
    particle_filter = ParticleFilter(model, num_particles, history=False, **options)
    run = jax.jit(jax.vmap(lambda key: particle_filter.log_evidence(key, *args)))
    return run(random.split(random.key(1), runs))


def independent(y):
    def step(x, y_t):
        with numpyro.plate("dim", 2):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.6))
            numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        return x, None

    scan(step, jnp.zeros(2), y)


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_elements_are_one_problem_with_the_right_evidence(name):
    model, exact, site = COUPLED[name]
    with pytest.warns(UserWarning, match=f"plate 'dim' {NOT_INDEPENDENT}.*'{site}'"):
        found = evidences(model, Y)
    assert found.shape == (40,)
    assert_evidence(found, exact())


def test_regions_that_infect_each_other_are_one_problem():
    with pytest.warns(UserWarning, match=f"plate 'region' {NOT_INDEPENDENT}.*'new'"):
        found = evidences(regional_epidemic, jnp.asarray(CASES))
    assert_evidence(found, exact_regional_epidemic())


def test_an_element_seen_only_through_another_has_the_right_filtered_mean():
    rotation = np.array([[0.5, 0.8], [-0.8, 0.5]])
    seen = jnp.stack([Y[:, 0], jnp.zeros(5)], 1)

    def model(y):
        def step(x, y_t):
            mean = jnp.asarray(rotation, jnp.float32) @ x
            with numpyro.plate("dim", 2):
                x = numpyro.sample("x", dist.Normal(mean, 0.4))
                numpyro.sample("y", dist.Normal(x, 0.2).mask(jnp.array([True, False])), obs=y_t)
            return x, None

        scan(step, jnp.zeros(2), y)

    _, exact = kalman(rotation, 0.16 * np.eye(2), np.array([[1.0, 0.0]]), 0.04 * np.eye(1), np.asarray(seen)[:, :1])
    with pytest.warns(UserWarning, match=NOT_INDEPENDENT):
        result = ParticleFilter(model, 20_000).run(random.key(0), seen)
    np.testing.assert_allclose(result.mean("x"), exact, atol=0.02)


def test_a_guide_that_couples_elements_makes_them_one_problem():
    def guide(y):
        def step(x, y_t):
            with numpyro.plate("dim", 2):
                x = numpyro.sample("x", dist.Normal(0.7 * y_t + 0.1 * x.sum(), 0.5))
            return x, None

        scan(step, jnp.zeros(2), y)

    with pytest.warns(UserWarning, match=f"{NOT_INDEPENDENT}.*'x'"):
        found = evidences(independent, Y, guide=guide)
    assert found.shape == (40,)
    assert_evidence(found, kalman(0.8 * np.eye(2), 0.36 * np.eye(2), np.eye(2), 0.09 * np.eye(2), Y)[0])


def test_bounds_and_kernels_take_the_coupled_evidence():
    model, exact, _ = COUPLED["vector autoregression"]
    with pytest.warns(UserWarning, match=f"FIVO: plate 'dim' {NOT_INDEPENDENT}"):
        loss = FIVO(2000).loss(random.key(0), {}, model, bootstrap(model), Y)
    assert abs(-loss - exact()) < 0.5

    def with_prior(y):
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))

        def step(x, y_t):
            with numpyro.plate("dim", 2):
                x = numpyro.sample("x", dist.Normal(x.mean(), 0.6))
                numpyro.sample("y", dist.Normal(x, noise), obs=y_t)
            return x, None

        scan(step, jnp.zeros(2), y)

    kernel = ParticleMetropolis(with_prior, num_particles=10)
    with pytest.warns(UserWarning, match=NOT_INDEPENDENT):
        kernel.init(random.key(0), 0, None, (Y,), {})


def test_coupled_and_subsampled_is_refused():
    def model(y):
        dims = numpyro.plate("dim", 4, subsample_size=2)
        with dims:
            start = numpyro.sample("start", dist.Normal(0.0, 1.0))

        def step(x, y_t):
            with dims:
                x = numpyro.sample("x", dist.Normal(x.mean(), 0.6))
                numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return x, None

        scan(step, start, y)

    with pytest.raises(ValueError, match=f"plate 'dim' {NOT_INDEPENDENT}.*'x'.*subsampled"):
        ParticleFilter(model, 10).run(random.key(0), Y)


@pytest.mark.parametrize("layout", ["component first", "series first", "in the middle"])
def test_the_axis_of_a_carry_that_runs_over_the_plate_is_found(layout):
    exact, means = exact_trends()
    particle_filter = ParticleFilter(trends, 2000)
    result = particle_filter.run(random.key(0), Y, layout)
    assert result.log_evidence.shape == (2,)
    runs = [particle_filter.run(random.key(k), Y, layout).log_evidence for k in range(12)]
    for element in range(2):
        assert_evidence([run[element] for run in runs], exact[element])
    np.testing.assert_allclose(result.mean("level")[-1], means, atol=0.05)
    assert result.forecast(random.key(1), 2, num_samples=5)["level"].shape == (5, 2, 2)


def test_two_layouts_of_one_carry_give_the_same_numbers():
    results = [
        ParticleFilter(trends, 50).run(random.key(0), Y, layout) for layout in ("component first", "series first")
    ]
    np.testing.assert_array_equal(*(result.log_evidence for result in results))
    paths = [result.sample_posterior(random.key(1), 5, "backward")["slope"] for result in results]
    np.testing.assert_allclose(*paths, rtol=1e-5)


def test_a_flat_carry_is_one_problem():
    def flat(y):
        def step(carry, y_t):
            level, slope = carry[:2], carry[2:]
            with numpyro.plate("series", 2):
                level = numpyro.sample("level", dist.Normal(level + slope, 0.5))
                slope = numpyro.sample("slope", dist.Normal(0.9 * slope, 0.3))
                numpyro.sample("y", dist.Normal(level, 0.4), obs=y_t)
            return jnp.concatenate([level, slope]), None

        scan(step, jnp.zeros(4), y)

    with pytest.warns(UserWarning, match=r"entry 0 of the scan's carry \(shape \(4,\)\)"):
        found = evidences(flat, Y, num_particles=1000)
    assert_evidence(found, exact_trends()[0].sum())


def test_a_twist_of_several_elements_is_refused():
    def guide(y):
        def step(x, y_t):
            with numpyro.plate("dim", 2):
                x = numpyro.sample("x", dist.Normal(0.8 * x, 0.6))
            twist("r", x - x.sum())
            return x, None

        scan(step, jnp.zeros(2), y)

    with pytest.raises(ValueError, match="twist 'r' at one element of plate 'dim' depends on other elements"):
        ParticleFilter(independent, 10, guide=guide).run(random.key(0), Y)


# ---- deterministic sites beside the plate


@pytest.fixture(scope="module")
def filtered_totals():
    return ParticleFilter(totals, 300).run(random.key(0), Y)


@pytest.mark.parametrize("method", ["genealogy", "backward", "backward_mcmc"])
def test_deterministic_sites_are_those_of_the_path(filtered_totals, method):
    paths = filtered_totals.sample_posterior(random.key(1), 40, method)
    x = np.asarray(paths["x"])
    np.testing.assert_allclose(paths["total"], x.sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(paths["both"], np.stack([x, 10 + x], 2), rtol=1e-6)
    np.testing.assert_allclose(paths["season"], np.broadcast_to(np.arange(3.0), (40, 5, 3)))
    np.testing.assert_allclose(paths["change"][:, 1:], np.diff(x, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ask", ["mean", "smooth", "plot"])
def test_sites_of_several_elements_have_no_weights(filtered_totals, ask):
    with pytest.raises(ValueError, match=r"'total'.*sample_posterior"):
        getattr(filtered_totals, ask)("total")
    assert set(filtered_totals.particles) == {"x", "change"}


def test_forecasts_of_totals_are_of_one_path(filtered_totals):
    ahead = filtered_totals.forecast(random.key(2), 3, num_samples=6)
    np.testing.assert_allclose(ahead["total"], ahead["x"].sum(-1), rtol=1e-5)


def test_functionals_that_join_elements_are_refused(filtered_totals):
    with pytest.raises(ValueError, match="at one element of plate 'series' depends on other elements"):
        filtered_totals.smooth(lambda t, x, values: values["x"] - values["x"].mean())
    own = filtered_totals.smooth(lambda t, x, values: values["x"] - x, num_repeats=2)
    assert own.value.shape == (5, 2)


# ---- programs without a sequence

X = jnp.array([0.3, -0.5, 1.0, 0.2])
CENTER = np.eye(4) - 0.25
EXACT_CENTERED = stats.multivariate_normal.logpdf(np.asarray(X), np.zeros(4), CENTER @ CENTER.T + 0.25 * np.eye(4))


def centered(x):
    with numpyro.plate("data", 4):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z - z.mean(), 0.5), obs=x)


def chained_prior(x):
    """The prior of one site at each element depends on the other site at the next."""
    with numpyro.plate("data", 4):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        w = numpyro.sample("w", dist.Normal(jnp.roll(z, 1), 1.0))
        numpyro.sample("x", dist.Normal(w, 0.5), obs=x)


def smoothed_likelihood(x):
    """A penalty on differences of neighbors, as a factor inside the plate."""
    with numpyro.plate("data", 4):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        numpyro.factor("smooth", -0.5 * jnp.diff(z, append=z[-1:]) ** 2)


def _smoothed_evidence():
    # exp of minus half a square is a density of one more observation, of zero, but for its constant.
    difference = np.diff(np.eye(4), axis=0)
    observe = np.concatenate([np.eye(4), difference])
    covariance = observe @ observe.T + np.diag([0.25] * 4 + [1.0] * 3)
    data = np.concatenate([np.asarray(X), np.zeros(3)])
    return stats.multivariate_normal.logpdf(data, np.zeros(7), covariance) + 1.5 * np.log(2 * np.pi)


STATIC = {
    "centered": (centered, ["z"], EXACT_CENTERED, "x"),
    "prior over neighbors": (
        chained_prior,
        ["z", "w"],
        stats.multivariate_normal.logpdf(np.asarray(X), np.zeros(4), 2.25 * np.eye(4)),
        "w",
    ),
    "penalty in a factor": (smoothed_likelihood, ["z"], _smoothed_evidence(), "smooth"),
}


def guide_of(names):
    def guide(x):
        with numpyro.plate("data", 4):
            for name in names:
                numpyro.sample(name, dist.Normal(0.5 * x, 1.0))

    return guide


@pytest.mark.parametrize("name", STATIC)
def test_evidences_of_coupled_elements_are_of_the_whole(name):
    model, names, exact, site = STATIC[name]
    guide = guide_of(names)
    with pytest.warns(UserWarning, match=f"importance: plate 'data' {NOT_INDEPENDENT}.*'{site}'"):
        found = importance(random.key(0), model, X, guide=guide, num_samples=50_000)
    assert abs(found.value - exact) < 5 * float(np.sum(found.standard_error)) + 1e-3
    with pytest.warns(UserWarning, match=f"IWELBO: plate 'data' {NOT_INDEPENDENT}"):
        loss = IWELBO(64).loss(random.key(0), {}, model, guide, X)
    # A lower bound within its noise: it was two nats above.
    assert -loss < exact + 0.5


@pytest.mark.parametrize("loss", [OVIS(8), DSMCS(num_transitions=2, num_particles=4)])
def test_every_bound_takes_coupled_elements_together(loss):
    guide = guide_of(["z"])
    svi = SVI(centered, loss.wrap(guide) if isinstance(loss, DSMCS) else guide, numpyro.optim.Adam(0.01), loss)
    with pytest.warns(UserWarning, match=f"plate 'data' {NOT_INDEPENDENT}"):
        svi.evaluate(svi.init(random.key(0), X), X)


def test_annealed_importance_sampling_takes_coupled_elements_together():
    with pytest.warns(UserWarning, match=NOT_INDEPENDENT):
        found = AIS(centered, num_temperatures=20, num_chains=8).run(random.key(0), X)
    assert np.shape(found.per_datapoint) == ()


def test_a_plate_named_for_weights_of_its_own_is_refused_where_elements_are_coupled():
    with pytest.raises(ValueError, match=f"IWELBO: plates names 'data', but plate 'data' {NOT_INDEPENDENT}.*'x'"):
        IWELBO(4, plates=["data"]).loss(random.key(0), {}, centered, guide_of(["z"]), X)


def test_local_optimisation_of_coupled_data_is_refused():
    with pytest.raises(ValueError, match=f"LocalOptimizer: plate 'data' {NOT_INDEPENDENT}.*'x'"):
        numpyro_smc.LocalOptimizer("ffg", init="zeros").run(random.key(0), centered, X)


def test_a_guide_with_one_network_over_all_elements_is_one_problem():
    def model(x):
        with numpyro.plate("data", 4):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with numpyro.plate("data", 4):
            first = numpyro.sample("first", dist.Normal(0.5 * x, 1.0), infer={"is_auxiliary": True})
            numpyro.sample("z", dist.Normal(first.mean(), 1.0))

    def model_with(x):
        model(x)
        with numpyro.plate("data", 4):
            numpyro.sample("first", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match=f"{NOT_INDEPENDENT}.*'z'"):
        IWELBO(4).loss(random.key(0), {}, model_with, guide, X)


def test_networks_that_read_each_element_alone_stay_independent():
    weights = random.normal(random.key(0), (3, 2))

    def model(x):
        with numpyro.plate("data", 4):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(jax.nn.softmax(z @ weights)[..., 0], 0.5), obs=x)

    def guide(x):
        with numpyro.plate("data", 4):
            numpyro.sample("z", dist.Normal(x[:, None] * jnp.ones(3), 1.0).to_event(1))

    weights_of = numpyro_smc.importance(random.key(0), model, X, guide=guide, num_samples=10)
    assert np.shape(weights_of.per_datapoint) == (4,)


def test_masked_and_blocked_programs_are_proved_as_they_run():
    model = handlers.mask(COUPLED["vector autoregression"][0], mask=True)
    with pytest.warns(UserWarning, match=NOT_INDEPENDENT):
        assert ParticleFilter(model, 10, history=False).run(random.key(0), Y).log_evidence.shape == ()
