"""Every smoother against exact smoothing: Rauch-Tung-Striebel with two latent sites, forward-backward, a known twist.

Each fixture smooths the same runs of one filter by all methods. Means over R runs are within 5 standard errors of the
exact value: false alarms 6e-7 for each number compared.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.contrib.control_flow import scan

from models import drift_diffusion as dd
from models import linear_gaussian as lg
from numpyro_smc import FilterResult, ParticleFilter
from numpyro_smc.filtering.smoothing import paris
from numpyro_smc.filtering.smoothing.backward_draws import metropolis
from numpyro_smc.filtering.smoothing.kernel import backward_kernel, steps_of
from numpyro_smc.filtering.smoothing.methods import METHODS
from numpyro_smc.filtering.smoothing.online import OnlineSmoother
from numpyro_smc.filtering.smoothing.runs import summarise
from numpyro_smc.programs.replay import transition_density
from tests.statistics_of_estimates import assert_mean

T, LAG = 8, 2


def two_sites(y):
    """A drift z that pushes a position x; only x is observed."""
    z = numpyro.sample("z_0", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x_0", dist.Normal(0.5, 0.7))

    def step(carry, y_t):
        z, x = carry
        z = numpyro.sample("z", dist.Normal(0.8 * z + 0.3, 0.5))
        x = numpyro.sample("x", dist.Normal(0.5 * x + z, 0.4))
        numpyro.sample("y", dist.Normal(x, 0.6), obs=y_t)
        return (z, x), None

    scan(step, (z, x), y)


PARAMETERS = lg.LinearGaussian(
    *(jnp.array([0.0, 0.5]), jnp.diag(jnp.array([1.0, 0.49]))),
    *(jnp.array([[0.8, 0.0], [0.8, 0.5]]), jnp.array([0.3, 0.3]), jnp.array([[0.25, 0.25], [0.25, 0.41]])),
    *(jnp.array([[0.0, 1.0]]), jnp.array([[0.36]])),
)
SERIES = lg.simulate(random.key(3), PARAMETERS, T)[1][:, 0]


def moments(t, carry, values):
    """First and second moments of both sites, and a product of two steps."""
    z, x = values["z"], values["x"]
    return jnp.stack([z, x, z * z, x * x, z * carry[1]])


kalman = jax.jit(lg.kalman_filter)
rts = jax.jit(lg.rts_smoother)


def exact_moments(length):
    """The same of all steps given the first ``length`` observations, ``[T, 5]``; and of ``x_0``."""
    filtered = kalman(PARAMETERS, SERIES[:, None], jnp.arange(T) < length)
    smoothed = rts(PARAMETERS, filtered)
    means = np.concatenate([smoothed.initial_mean[None], smoothed.means])
    covariances = np.asarray(smoothed.covariances)
    before = np.concatenate([PARAMETERS.initial_covariance[None], filtered.covariances[:-1]])
    a = np.asarray(PARAMETERS.transition_matrix)
    predicted = np.asarray(filtered.predicted_covariances)
    gains = np.stack([p @ a.T @ np.linalg.inv(q) for p, q in zip(before, predicted, strict=True)])
    lagged = np.stack([p @ g.T for p, g in zip(covariances, gains, strict=True)])  # of s_t and s_{t-1}
    now, earlier = means[1:], means[:-1]
    second = np.diagonal(covariances, axis1=1, axis2=2) + now**2
    product = lagged[:, 0, 1] + now[:, 0] * earlier[:, 1]
    return np.column_stack([now, second, product]), float(means[0, 1])


EXACT, EXACT_INITIAL = exact_moments(T)
FILTER = ParticleFilter(two_sites, 300)
OPTIONS = {
    "ffbsm": ("ffbsm", {"batch_size": 128}),
    "paris": ("paris", {}),
    "backward_mcmc": ("backward_mcmc", {}),
    "backward_rejection": ("backward_rejection", {"max_trials": 4, "batch_size": 64}),
    "genealogy": ("genealogy", {}),
    "fixed_lag": ("fixed_lag", {"lag": LAG}),
    "fixed_lag, whole": ("fixed_lag", {"lag": T}),
}
SLOW_OPTIONS = {
    "backward": ("backward", {}),
    "paris, exact draws": ("paris", {"backward": "exact"}),
    "paris, rejection": ("paris", {"backward": "rejection", "max_trials": 3}),
    "paris, more draws": ("paris", {"num_backward_draws": 4, "num_mcmc_steps": 2}),
}


def smooth_all(particle_filter, args, functional, options, num_runs, seed):
    """Smoothed expectations ``[num_runs, T, ...]`` of the same runs, by name of the method."""

    def one(key):
        run_key, key = random.split(key)
        history = particle_filter._run(run_key, {}, args, {}, history=True)[1]
        sequence = particle_filter.read(random.split(run_key)[0], {}, args, {})
        found = {}
        for name, (method, given) in options.items():
            weights, wrong = METHODS[method](key, sequence, history, **given)
            expected = weights.expectation(sequence, steps_of(sequence, history), functional)
            initial = weights.initial_weights(particle_filter.num_particles)
            found[name] = (expected, initial, history.initial["values"], wrong)
        return found

    return jax.jit(lambda keys: lax.map(one, keys))(random.split(random.key(seed), num_runs))


@pytest.fixture(scope="module")
def runs():
    """100 runs of 300 particles."""
    return smooth_all(FILTER, (SERIES,), moments, OPTIONS, 100, seed=0)


def assert_all_means(values, exact):
    for index in np.ndindex(exact.shape):
        assert_mean(values[(slice(None), *index)], exact[index])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "fixed_lag"])
def test_smoothers_have_the_moments_of_the_rts_smoother(runs, name):
    """Means, second moments and products of successive steps: 40 numbers a method, false alarms 2.4e-5 each."""
    values, initial_weights, initial_values, wrong = runs[name]
    assert_all_means(np.asarray(values), EXACT)
    np.testing.assert_allclose(initial_weights.sum(1), 1.0, rtol=1e-4)
    assert_mean((initial_weights * initial_values["x_0"]).sum(1), EXACT_INITIAL)
    assert not wrong.any()


@pytest.mark.slow
def test_more_ways_to_draw_backwards_have_the_moments_of_the_rts_smoother():
    """400 runs of 1,000 particles, 40 numbers for each of 4 ways: false alarms 1e-4 in all."""
    found = smooth_all(ParticleFilter(two_sites, 1000), (SERIES,), moments, SLOW_OPTIONS, 400, seed=4)
    for values, _, _, wrong in found.values():
        assert_all_means(np.asarray(values), EXACT)
        assert not wrong.any()


def test_fixed_lag_has_the_moments_given_observations_up_to_the_lag(runs):
    values = np.asarray(runs["fixed_lag"][0])
    for t in range(T):
        assert_all_means(values[:, t], exact_moments(min(t + LAG + 1, T))[0][t])
    # and not those given all: the documented bias is there
    error = values.std(0, ddof=1) / 10.0
    assert (np.abs(values.mean(0) - EXACT) > 5.0 * error).any()


def test_all_pairs_have_less_variance_than_lineages_and_a_whole_lag_is_the_genealogy(runs):
    np.testing.assert_array_equal(runs["fixed_lag, whole"][0], runs["genealogy"][0])
    variance = {name: np.asarray(found[0])[:, 0, 1].var() for name, found in runs.items()}
    for name in ("ffbsm", "backward_mcmc", "backward_rejection", "paris"):
        assert variance[name] < 0.8 * variance["genealogy"], name
    assert variance["ffbsm"] < variance["backward_rejection"]


# ---- the methods of a result ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return FILTER.run(random.key(1), SERIES)


@pytest.fixture(scope="module")
def lineages(result):
    return result.smooth(moments, "genealogy", num_repeats=2)


def test_smoothing_weights_are_those_of_single_paths(result, lineages):
    """Paths are drawn by the weights of all pairs, or of the lineages: 2,000 of them, 16 means within 5 standard errors
    for each of 3 methods (false alarms 3e-5 in all)."""
    weights = np.exp(result.smoothing_log_weights(batch_size=77)) / FILTER.num_particles
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-4)
    by_pairs = {site: (weights * result.particles[site]).sum(1) for site in ("z", "x")}
    np.testing.assert_allclose(result.mean("z", np.log(weights * FILTER.num_particles)), by_pairs["z"], rtol=1e-4)
    by_lineages = {"z": lineages.runs[0, :, 0], "x": lineages.runs[0, :, 1]}
    for method, exact in (("backward", by_pairs), ("backward_rejection", by_pairs), ("genealogy", by_lineages)):
        paths = result.sample_posterior(random.key(2), 2000, method, max_trials=5)
        assert paths["x_0"].shape == (2000,)
        for site, values in exact.items():
            for t in range(T):
                assert_mean(paths[site][:, t], values[t])


def test_smooth_gives_means_with_errors_and_reports(result, tmp_path):
    """16 runs: Student's t at 8 standard errors, false alarms 8e-7 for each of 8 numbers."""
    smoothed = result.smooth("x", num_repeats=16)
    assert smoothed.value.shape == (T,) and smoothed.runs.shape == (16, T)
    z_scores = (smoothed.value - EXACT[:, 1]) / smoothed.standard_error
    assert (np.abs(z_scores) < 8.0).all()
    text = repr(smoothed)
    assert "x by backward_mcmc: 16 runs of 300 particles" in text and "x at step 7" in text
    assert len(smoothed.table()) == T and smoothed.table()[3]["step"] == 3
    smoothed.plot().figure.savefig(tmp_path / "smoothed.png")


def test_an_additive_functional_is_the_sum_of_its_steps(result, lineages):
    assert lineages.value.shape == (T, 5)
    total = result.smooth(moments, "genealogy", num_repeats=2, additive=True)
    np.testing.assert_allclose(total.runs, lineages.runs.sum(1), rtol=1e-4)
    assert total.value.shape == (5,) and "moments[0]" in repr(total)
    assert total.plot().get_ylabel() == "moments"
    single = result.smooth("x_0", "fixed_lag", num_repeats=1)
    assert single.value.shape == () and np.isnan(single.standard_error)


def test_a_stream_smooths_as_the_whole_series_does():
    """The same draws, carried forward or seen from the end, give the same sum."""
    smoother = OnlineSmoother(FILTER, moments)
    state = smoother.init(random.key(5), SERIES[:1])
    for y_t in SERIES:
        state = smoother.update(state, y_t)
    assert smoother._compiled_update.num_compiled() == 2  # without and with a statistic
    result = FILTER.run(random.key(5), SERIES)
    sequence = FILTER.read(random.split(random.key(5))[0], {}, (SERIES,), {})
    kernel = backward_kernel(sequence, result.history, "smooth")
    found, _ = paris.backward_pairs(state.rng_key, kernel, metropolis(1), 2)
    whole = found.expectation(sequence, kernel.steps, moments).sum(0)
    np.testing.assert_allclose(state.value, whole, rtol=2e-3)
    assert "moments" in repr(smoother)


# ---- discrete states, plates, twists -------------------------------------------------------------------------------

TRANSITION = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.05, 0.15, 0.8]])
LOCATIONS = np.array([-1.0, 0.0, 1.5])
HIDDEN_Y = np.array([0.4, -0.7, 1.9, 1.1, -1.2])


def hidden_markov(y):
    log_rows, locations = jnp.log(jnp.asarray(TRANSITION)), jnp.asarray(LOCATIONS)

    def step(k, y_t):
        k = numpyro.sample("k", dist.Categorical(logits=log_rows[k]))
        numpyro.sample("y", dist.Normal(locations[k], 0.8), obs=y_t)
        return k, None

    scan(step, 0, y)


def forward_backward():
    """Joint smoothing probabilities of successive states ``[T, 3, 3]``, the first state being 0."""
    likelihood = np.exp(-0.5 * ((HIDDEN_Y[:, None] - LOCATIONS) / 0.8) ** 2)
    forward, backward = [np.eye(3)[0]], [np.ones(3)]
    for row in likelihood:
        forward.append(forward[-1] @ TRANSITION * row)
    for row in likelihood[:0:-1]:
        backward.append(TRANSITION @ (row * backward[-1]))
    later = backward[::-1]
    joint = np.stack([forward[t][:, None] * TRANSITION * likelihood[t] * later[t] for t in range(len(HIDDEN_Y))])
    return joint / joint.sum((1, 2), keepdims=True)


def pair_indicators(t, k, values):
    return jax.nn.one_hot(3 * k + values["k"], 9)


def test_smoothers_have_the_pair_probabilities_of_forward_backward():
    """60 runs of 300 particles; the pairs of probability above 1%: some 25 a method, false alarms 3e-5 in all."""
    options = {name: OPTIONS[name] for name in ("ffbsm", "backward_mcmc")}
    particle_filter = ParticleFilter(hidden_markov, 300)
    found = smooth_all(particle_filter, (jnp.asarray(HIDDEN_Y),), pair_indicators, options, 60, seed=1)
    exact = forward_backward().reshape(-1, 9)
    for values, *_ in found.values():
        assert (np.asarray(values)[:, exact == 0.0] == 0.0).all()
        np.testing.assert_allclose(values.sum(-1), 1.0, rtol=1e-4)
        for t, pair in zip(*np.nonzero(exact > 0.01), strict=True):
            assert_mean(values[:, t, pair], exact[t, pair])


def plated(y):
    with numpyro.plate("series", 2):
        x = numpyro.sample("x_0", dist.Normal(0.0, 1.3))

    def step(x, y_t):
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.6))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, x, y)


PLATED_Y = jnp.stack([SERIES[:5], -SERIES[3:8]], axis=1)


def test_series_under_a_plate_are_smoothed_each_by_itself():
    """60 runs of 200 particles, 3 methods of 20 numbers: false alarms 4e-5 in all."""
    names = ("ffbsm", "paris", "backward_rejection")
    options = {name: OPTIONS[name] for name in names}

    def squares(t, x, values):
        return jnp.stack([values["x"], values["x"] * x], axis=-1)

    found = smooth_all(ParticleFilter(plated, 200), (PLATED_Y,), squares, options, 60, seed=2)
    parameters = lg.ar1_parameters(0.9, 0.6, 1.0, 1.3)
    for series in range(2):
        filtered = kalman(parameters, PLATED_Y[:, series, None])
        smoothed = rts(parameters, filtered)
        means = np.append(smoothed.initial_mean, smoothed.means[:, 0])
        before = np.append(1.3**2, filtered.covariances[:-1, 0, 0])
        lagged = smoothed.covariances[:, 0, 0] * before * 0.9 / filtered.predicted_covariances[:, 0, 0]
        exact = np.column_stack([means[1:], lagged + means[1:] * means[:-1]])
        for name in names:
            assert_all_means(np.asarray(found[name][0])[:, :, series], exact)


def test_a_functional_that_sums_over_the_plate_is_refused():
    result = ParticleFilter(plated, 10).run(random.key(0), PLATED_Y)
    with pytest.raises(ValueError, match=r"plates \['series'\] of shape \(2,\).*Do not sum"):
        result.smooth(lambda t, x, values: values["x"].sum())


def test_the_optimal_twist_gives_smoothing_weights_at_once():
    """300 runs of 100 particles; 4 steps, means and second moments: false alarms 5e-6."""
    drift, y, num_steps = 0.4, 5.0, 4
    guide = dd.make_guide(dd.prior_proposal, dd.analytic_twist)
    twisted = ParticleFilter(dd.model, 100, guide=guide)

    def first_two(t, x, values):
        return jnp.stack([values["x"], values["x"] ** 2])

    args = (y, num_steps, None, drift)
    found = smooth_all(twisted, args, first_two, {"twist": ("twist", {})}, 300, seed=3)["twist"][0]
    n = np.arange(1, num_steps + 1)
    mean = n * drift + n / (num_steps + 1) * (y - (num_steps + 1) * drift)
    variance = n - n**2 / (num_steps + 1)
    assert_all_means(np.asarray(found), np.column_stack([mean, variance + mean**2]))
    with pytest.raises(ValueError, match="needs a filter with a guide whose scan body states a twist"):
        FILTER.run(random.key(0), SERIES).smooth("x", "twist", num_repeats=1)


def with_inputs_of_the_past(y, with_control):
    def step(x, y_t):
        if with_control:
            numpyro.sample("control", dist.Normal(2.0 * x, 0.1))
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.6))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def test_latents_of_a_step_that_are_given_have_no_weight_in_smoothing_either():
    """Their density depends on the state before, and the filter leaves it out."""

    def log_density(with_control, values):
        params = {"control": jnp.linspace(-1.0, 1.0, T)} if with_control else {}
        args = (SERIES, with_control)
        sequence = ParticleFilter(with_inputs_of_the_past, 1).read(random.key(0), params, args, {})
        # the carry leaf that differs between particles, and none that does not
        return transition_density(sequence, 0, SERIES[0], {"model": [jnp.asarray(0.4)]}, {"model": []}, values)

    x = {"x": jnp.asarray(0.7)}
    np.testing.assert_allclose(log_density(True, x | {"control": jnp.asarray(-1.0)}), log_density(False, x), rtol=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


def lagged_model(y):
    def step(carry, y_t):
        newer, older = carry
        x = numpyro.sample("x", dist.Normal(0.5 * newer + 0.3 * older, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return (x, newer), None

    scan(step, (0.0, 0.0), y)


def test_carries_with_lags_have_lineages_but_no_backward_kernel():
    result = ParticleFilter(lagged_model, 50).run(random.key(0), SERIES)
    for ask in (
        lambda: result.smooth("x"),
        lambda: result.sample_posterior(random.key(0), 10, "backward_rejection"),
    ):
        with pytest.raises(ValueError, match=r"also depends on the old one.*'genealogy'"):
            ask()
    assert np.isfinite(result.smooth("x", "fixed_lag", num_repeats=1).value).all()


def test_bounds_that_are_exceeded_or_unknown_are_errors(result):
    with pytest.raises(ValueError, match="exceeds log_bound"):
        result.sample_posterior(random.key(0), 50, "backward_rejection", log_bound=-9.0)
    loose = result.sample_posterior(random.key(0), 50, "backward_rejection", log_bound=3.0)
    assert loose["x"].shape == (50, T)

    def varying_scale(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, jnp.exp(0.1 * x)))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(ValueError, match=r"site 'x' depends on the state before the step\. Give log_bound"):
        ParticleFilter(varying_scale, 10).run(random.key(0), SERIES).smooth("x", "backward_rejection")


def test_bad_requests_name_what_exists(result):
    with pytest.raises(ValueError, match="unknown method='kalman'"):
        result.smooth("x", "kalman")
    with pytest.raises(TypeError, match="method='ffbsm' has the options batch_size, but was given lag"):
        result.smooth("x", "ffbsm", lag=3)
    with pytest.raises(TypeError, match="method='genealogy' has no options"):
        result.smooth("x", "genealogy", lag=3)
    with pytest.raises(KeyError, match=r"No site 'w' in this filter\. Known: x, x_0, z, z_0"):
        result.smooth("w")
    with pytest.raises(ValueError, match="num_backward_draws of at least 2"):
        result.smooth("x", "paris", num_backward_draws=1)
    with pytest.raises(ValueError, match="Unknown backward='gibbs'"):
        result.smooth("x", "paris", backward="gibbs")
    mixing = ParticleFilter(two_sites, 300, resampler="optimal_transport")
    assert mixing.scheme.mixes
    mixed = FilterResult(mixing, result.rng_key, result.program, result.log_evidence, result.history)
    for method in ("genealogy", "fixed_lag", "backward_mcmc", "paris"):
        with pytest.raises(ValueError, match="mixes particles"):
            mixed.smooth("x", method)
    with pytest.raises(ValueError, match="mixes particles"):
        OnlineSmoother(mixing, moments)


def test_runs_that_lost_all_particles_are_an_error():
    answers = (jnp.ones((3, T)), jnp.array([-3.0, -jnp.inf, -2.0]), jnp.zeros(3, bool))
    with pytest.raises(FloatingPointError, match="1 of 3 runs of the filter lost all particles"):
        summarise("smooth", answers, "x", "ffbsm", 10, True)
