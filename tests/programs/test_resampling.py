"""Resampling: exact properties on large clouds, laws of offspring and of conditional versions on small ones.

Statistical tests compare within five standard errors: of the cells each compares, a share of 6e-7 would fail by chance.
Seeds are fixed.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_smc.programs.resample import build, replace_dead
from numpyro_smc.programs.resampling import available, multinomial, register, registry, resolve, systematic
from numpyro_smc.programs.resampling.inverse_cdf import draw_one, scaled_weights, search
from numpyro_smc.programs.resampling.registry import Scheme

SCHEMES = ("killing", "multinomial", "residual", "ssp", "stratified", "systematic")
CONDITIONAL = tuple(name for name in SCHEMES if resolve(name).conditional)
ANY_SIZE = tuple(name for name in SCHEMES if name != "killing")


@cache
def draw(name):
    """``(rng_key, log_weights, num_samples) -> ancestors``, compiled once per shape."""
    return jax.jit(resolve(name).ancestors, static_argnums=2)


@cache
def draw_many(name):
    """As :func:`draw`, over a leading axis of keys."""
    return jax.jit(jax.vmap(resolve(name).ancestors, in_axes=(0, None, None)), static_argnums=2)


@cache
def draw_many_conditional(name):
    """As :func:`draw_many`, over keys and pivots."""
    return jax.jit(jax.vmap(resolve(name).conditional, in_axes=(0, None, None, 0, 0)), static_argnums=2)


def half_dead_cloud(seed, size):
    """Log weights over many orders of magnitude, of which a random half, both ends included, are dead."""
    rng = np.random.default_rng(seed)
    log_weights = 3 * rng.standard_normal(size, np.float32)
    log_weights[rng.random(size) < 0.5] = -np.inf
    log_weights[[0, 1, -2, -1]] = -np.inf
    return log_weights


def offspring(ancestors, size):
    """Counts, shape ``[replicates, size]``, from ancestors ``[replicates, n]``."""
    return np.sum(np.asarray(ancestors)[:, :, None] == np.arange(size), axis=1)


def assert_valid(ancestors, log_weights):
    ancestors, log_weights = np.asarray(ancestors), np.asarray(log_weights)
    assert ancestors.dtype == np.int32
    assert ancestors.min() >= 0
    assert ancestors.max() < log_weights.shape[0]
    assert np.all(log_weights[ancestors] > -np.inf)


# The dead, the ends of the unit interval, and clouds with nothing to choose


@pytest.mark.parametrize(
    ("name", "size", "num_keys"),
    [*((name, 100_000, 12) for name in SCHEMES), ("systematic", 1_000_000, 2), ("ssp", 1_000_000, 2)],
)
def test_dead_particles_are_never_chosen(name, size, num_keys):
    for seed in range(num_keys):
        log_weights = half_dead_cloud(seed, size)
        assert_valid(draw(name)(jax.random.key(100 + seed), log_weights, size), log_weights)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_keeps_its_pivot_and_never_chooses_the_dead(name):
    size, rows = 10_000, np.arange(20)
    log_weights = half_dead_cloud(0, size)
    pivots = np.flatnonzero(log_weights > -np.inf)[rows * 231]
    keys, slots = jax.random.split(jax.random.key(2), 20), rows * 499
    ancestors = np.asarray(draw_many_conditional(name)(keys, log_weights, size, pivots, slots))
    assert_valid(ancestors, log_weights)
    assert np.array_equal(ancestors[rows, slots], pivots)

    all_dead = np.full(size, -np.inf, np.float32)
    ancestors = np.asarray(draw_many_conditional(name)(keys, all_dead, size, pivots, slots))
    assert_valid(ancestors, np.zeros(size))
    assert np.array_equal(ancestors[rows, slots], pivots)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # bisection and sort: both run anywhere
def test_a_search_at_every_rounding_boundary_finds_only_the_living(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    log_weights = half_dead_cloud(3, 100_000)
    weights = scaled_weights(log_weights)
    cumulative = jnp.cumsum(weights)
    positions = jnp.concatenate([cumulative, jnp.nextafter(cumulative, -1.0), jnp.nextafter(cumulative, jnp.inf)])
    plain = jnp.searchsorted(cumulative, positions[positions < cumulative[-1]], side="right")
    assert jnp.any(weights[plain] == 0)  # the cloud is hard: a plain search does choose the dead
    assert_valid(search(weights, jnp.maximum(positions, 0.0), cumulative[-1]), log_weights)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_position_belongs_to_the_particle_that_begins_there(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    weights = jnp.array([0.0, 2.0, 0.0, 1.0, 3.0, 0.0])
    owners = search(weights, jnp.array([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 6)  # and, past the ends, the nearest
    assert np.array_equal(owners, [1, 1, 1, 3, 4, 4, 4, 4])


def test_scaled_weights_are_exact_zeros_for_the_dead_and_one_for_the_largest():
    assert np.array_equal(scaled_weights(np.full(3, -np.inf)), np.zeros(3))
    weights = scaled_weights(np.array([-np.inf, 700.0, 699.0, -np.inf]))
    assert np.array_equal(weights[jnp.array([0, 1, 3])], [0, 1, 0])
    np.testing.assert_allclose(weights[2], np.exp(-1), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_ends_of_the_unit_interval_choose_living_particles(monkeypatch, name):
    def choose(uniform, cloud):
        monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(), dtype=float: jnp.full(shape, uniform, dtype))
        return resolve(name).ancestors(jax.random.key(0), cloud, 1000)

    choose = jax.jit(jax.vmap(choose, (0, None)))
    uniforms = np.array([0.0, 1.0 - 2.0**-24, 1.0])  # one itself is excluded, but scaling may round up to it
    for cloud in (half_dead_cloud(4, 1000), np.zeros(1000), np.where(np.arange(1000) == 500, 0.0, -np.inf)):
        assert_valid(choose(uniforms, cloud.astype(np.float32)), cloud)


@pytest.mark.parametrize("bad", [-np.inf, np.nan, np.inf])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_cloud_without_usable_weights_stays_as_it_is(name, bad):
    log_weights = np.where(np.arange(5) == 2, bad, -np.inf)
    for num_samples in (5,) if name == "killing" else (5, 12):
        ancestors = draw(name)(jax.random.key(0), log_weights, num_samples)
        assert np.array_equal(ancestors, np.arange(num_samples) % 5)


@pytest.mark.parametrize("living", [0, 2, 4])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_single_living_particle_has_all_the_offspring(name, living):
    log_weights = np.where(np.arange(5) == living, -40.0, -np.inf)
    for num_samples in (5,) if name == "killing" else (5, 12):
        ancestors = draw(name)(jax.random.key(1), log_weights, num_samples)
        assert np.array_equal(ancestors, np.full(num_samples, living))


@pytest.mark.parametrize("name", SCHEMES)
def test_one_particle_is_its_own_ancestor(name):
    assert np.array_equal(draw(name)(jax.random.key(0), np.array([-3.0]), 1), [0])


# The scale of the weights, transformations of JAX


@pytest.mark.parametrize("shift", [-4096.0, -69.0, 69.0, 4096.0])  # weights scaled by 1e-30 and 1e30, and far beyond
@pytest.mark.parametrize("name", SCHEMES)
def test_ancestors_do_not_depend_on_the_scale_of_the_weights(name, shift):
    log_weights = np.round(half_dead_cloud(5, 1000) * 512) / 512  # coarse enough for the shift to be exact
    key = jax.random.key(6)
    assert np.array_equal(draw(name)(key, log_weights, 1000), draw(name)(key, log_weights + np.float32(shift), 1000))


@pytest.mark.parametrize("name", SCHEMES)
def test_vmap_agrees_with_a_loop_over_clouds(name):
    clouds = np.stack([half_dead_cloud(7, 1000), np.full(1000, -np.inf), np.zeros(1000), half_dead_cloud(8, 1000)])
    clouds = clouds.astype(np.float32)
    keys = jax.random.split(jax.random.key(9), 4)
    together = jax.jit(jax.vmap(lambda key, cloud: resolve(name).ancestors(key, cloud, 1000)))(keys, clouds)
    apart = [draw(name)(key, cloud, 1000) for key, cloud in zip(keys, clouds, strict=True)]
    assert np.array_equal(together, apart)


def test_vmap_keeps_the_repair_of_dead_choices_a_branch():
    nested = jax.vmap(jax.vmap(lambda key, cloud: systematic(key, cloud, 8), (0, None)), (None, 0))
    lowered = jax.jit(nested).lower(jax.random.split(jax.random.key(0), 3), jnp.zeros((2, 8))).as_text()
    assert lowered.count("stablehlo.case") == 1


@pytest.mark.parametrize("name", SCHEMES)
def test_no_gradient_flows_through_the_choice_of_ancestors(name):
    def total(log_weights):
        ancestors = resolve(name).ancestors(jax.random.key(11), log_weights, 20)
        return jnp.sum(log_weights[ancestors]), ancestors

    gradient, ancestors = jax.jit(jax.grad(total, has_aux=True))(half_dead_cloud(10, 20))
    assert np.array_equal(gradient, np.bincount(ancestors, minlength=20))


def test_several_clouds_without_vmap_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \[N\]. Use jax.vmap"):
        systematic(jax.random.key(0), jnp.zeros((2, 3)), 3)


# Offspring counts


@pytest.mark.parametrize("name", ["killing", "residual", "ssp", "stratified", "systematic"])
def test_equal_weights_give_every_particle_one_offspring(name):
    size = 100_000
    for seed in range(10):
        assert np.array_equal(draw(name)(jax.random.key(seed), np.full(size, -2.5), size), np.arange(size))


SMALL_CLOUD = np.array([0.02, 0.31, 0.0, 0.09, 0.4, 0.05, 0.13])
SMALL_LOG_WEIGHTS = np.log(SMALL_CLOUD, where=SMALL_CLOUD > 0, out=np.full(7, -np.inf))


@cache
def small_cloud_offspring(name, num_samples):
    """Counts of offspring of :data:`SMALL_CLOUD`, 20,000 replicates."""
    keys = jax.random.split(jax.random.key(14 + num_samples), 20_000)
    return offspring(draw_many(name)(keys, SMALL_LOG_WEIGHTS, num_samples), 7)


@pytest.mark.parametrize("name", ["residual", "ssp", "stratified", "systematic"])
def test_offspring_counts_keep_their_bounds(name):
    weights = np.random.default_rng(13).dirichlet(np.full(7, 0.5), 20_000)
    keys, log_weights = jax.random.split(jax.random.key(13), 20_000), np.log(weights, dtype=np.float32)
    ancestors = jax.jit(jax.vmap(lambda key, cloud: resolve(name).ancestors(key, cloud, 12)))(keys, log_weights)
    counts, expected, rounding = offspring(ancestors, 7), 12 * weights, 1e-5
    if name == "residual":
        assert np.all(counts >= np.floor(expected - rounding))
    else:
        assert np.abs(counts - expected).max() < (2 if name == "stratified" else 1) + rounding


@pytest.mark.parametrize("name", ["residual", "ssp"])
def test_rounding_of_expected_offspring_leaves_no_slot_to_the_dead(name):
    num_samples, miscounts = 4_000_000, []
    for seed in range(12):
        log_weights = half_dead_cloud(seed, 1000)
        weights = scaled_weights(log_weights)
        expected = num_samples * weights / weights.sum()
        miscounts.append(abs(np.asarray(expected, np.float64).sum() - num_samples))
        assert_valid(draw(name)(jax.random.key(seed), log_weights, num_samples), log_weights)
    assert max(miscounts) > 0.5  # in float32 some cloud is miscounted by one, whichever way its sums are ordered


@pytest.mark.parametrize(("name", "num_samples"), [("killing", 7), *((name, n) for name in ANY_SIZE for n in (3, 12))])
def test_offspring_counts_are_unbiased(name, num_samples):
    counts = small_cloud_offspring(name, num_samples)  # false alarms: 7 cells in each of 11 cases, 4e-5 in all
    standard_errors = counts.std(axis=0, ddof=1) / np.sqrt(len(counts))
    assert np.all(np.abs(counts.mean(axis=0) - num_samples * SMALL_CLOUD) <= 5 * standard_errors + 1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 50])
def test_one_drawn_in_two_stages_follows_the_weights(size):
    # 20,000 draws: every frequency within 5 standard errors; nothing dead is drawn, the padding neither
    log_weights = 2.0 * jax.random.normal(jax.random.key(size), (size,))
    log_weights = log_weights.at[1::3].set(-jnp.inf) + 300.0
    drawn = jax.jit(jax.vmap(lambda key: draw_one(key, log_weights)))(jax.random.split(jax.random.key(1), 20000))
    expected = np.asarray(jax.nn.softmax(log_weights))
    found = np.bincount(drawn, minlength=size) / 20000
    assert found.shape == (size,) and not found[expected == 0].any()
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20000) + 1e-9)


def test_one_drawn_of_none_alive_is_the_first():
    assert int(draw_one(jax.random.key(0), jnp.full(7, -jnp.inf))) == 0


def test_killing_refuses_another_number_of_samples():
    for function in (resolve("killing").ancestors, partial(resolve("killing").conditional, pivot_in=0, pivot_out=0)):
        with pytest.raises(ValueError, match="killing: num_samples is 4, but there are 3 particles"):
            function(jax.random.key(0), jnp.zeros(3), 4)


# Conditional versions, by Bayes' rule


def assert_same_frequencies(first, second, num_codes):
    """Codes of two samples of equal size have equal frequencies, within five standard errors of each difference."""
    first, second = (np.bincount(np.ravel(codes), minlength=num_codes) for codes in (first, second))
    assert np.all(np.abs(first - second) <= 5 * np.sqrt(first + second + 1))


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_law_with_pivots_drawn_at_random_is_the_unconditional_law(name):
    """A pivot drawn from the weights and the other slots given it are together a draw of the shifted ancestors.

    Compared in the law of all slots (at most 243 living cells), of the offspring of each particle, and of the pivot's
    slot jointly with each other slot. False alarms: 2e-4 per scheme at most.
    """
    weights = np.array([0.08, 0.55, 0.0, 0.37])
    size, num_samples, replicates = 4, 4 if name == "killing" else 5, 80_000
    log_weights = np.where(weights > 0, np.log(weights + (weights == 0)), -np.inf)
    key_free, key_pinned = jax.random.split(jax.random.key(17))
    rng = np.random.default_rng(18)
    rows, slots = np.arange(replicates), np.arange(num_samples)

    free = np.asarray(draw_many(name)(jax.random.split(key_free, replicates), log_weights, num_samples))
    shifts = rng.integers(num_samples, size=(replicates, 1))
    free = np.take_along_axis(free, (slots - shifts) % num_samples, axis=1)

    pivot_in, pivot_out = rng.choice(size, replicates, p=weights), rng.integers(num_samples, size=replicates)
    keys = jax.random.split(key_pinned, replicates)
    pinned = np.asarray(draw_many_conditional(name)(keys, log_weights, num_samples, pivot_in, pivot_out))
    assert np.array_equal(pinned[rows, pivot_out], pivot_in)

    assert_same_frequencies(free @ size**slots, pinned @ size**slots, size**num_samples)
    cells = np.arange(size) * (num_samples + 1)
    assert_same_frequencies(cells + offspring(free, size), cells + offspring(pinned, size), size * (num_samples + 1))
    for distance in range(1, num_samples):
        others = (pivot_out + distance) % num_samples
        pairs = (ancestors[rows, pivot_out] * size + ancestors[rows, others] for ancestors in (free, pinned))
        assert_same_frequencies(*pairs, size**2)


# The log probability of multinomial ancestors


def test_log_prob_is_that_of_independent_ancestors_and_its_gradient_the_score():
    log_weights = jnp.array([0.3, -jnp.inf, 2.0, -1.2])
    ancestors = jnp.array([2, 2, 0, 3, 2])
    log_prob = resolve("multinomial").log_prob
    value, gradient = jax.value_and_grad(partial(log_prob, ancestors))(log_weights)
    weights = jax.nn.softmax(log_weights)
    np.testing.assert_allclose(value, jnp.log(weights)[ancestors].sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, jnp.array([1, 0, 3, 1]) - 5 * weights, atol=1e-6)


def test_log_prob_is_finite_and_flat_when_every_particle_is_dead():
    log_prob = resolve("multinomial").log_prob
    value, gradient = jax.value_and_grad(partial(log_prob, jnp.arange(3)))(jnp.full(3, -jnp.inf))
    assert value == 0
    assert np.array_equal(gradient, np.zeros(3))


# The registry


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_SCHEMES", dict(registry._SCHEMES))


def first_particle(rng_key, log_weights, num_samples):
    return jnp.zeros(num_samples, jnp.int32)


def test_the_six_schemes_are_known_and_unbiased():
    assert set(SCHEMES) < set(available())
    assert available() == tuple(sorted(available()))
    assert all(resolve(name).name == name and resolve(name).unbiased and resolve(name).cost for name in SCHEMES)
    assert [name for name in SCHEMES if resolve(name).log_prob] == ["multinomial"]
    assert [name for name in SCHEMES if not resolve(name).conditional] == ["ssp"]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=rf"Unknown resampler 'foo'\. Known: {', '.join(available())}; register"):
        resolve("foo")


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="The resampler is a int; expected a name"):
        resolve(3)


def test_a_function_is_a_scheme_of_its_own_name_that_promises_nothing():
    scheme = resolve(first_particle)
    assert scheme == Scheme("first_particle", first_particle)
    assert not scheme.unbiased
    assert scheme.conditional is None
    assert resolve(partial(first_particle)).name == "partial"


def test_a_registered_function_and_a_scheme_resolve_to_the_scheme():
    assert resolve(multinomial) is resolve("multinomial")
    assert resolve(resolve("ssp")) is resolve("ssp")


def test_a_registered_scheme_is_found_by_name(own_registry):
    scheme = register(Scheme("first", first_particle))
    assert register(scheme) is scheme  # twice the same is no conflict
    assert resolve("first") is scheme
    assert "first" in available()


def test_a_name_that_is_taken_is_refused(own_registry):
    with pytest.raises(ValueError, match="'systematic' is already registered"):
        register(Scheme("systematic", first_particle))
    assert resolve("systematic").ancestors is systematic


def test_dead_particles_become_copies_without_weight_or_gradient():
    replaced = replace_dead(build("systematic", "never"))
    log_weights = jnp.array([[0.3, -200.0], [-jnp.inf, 0.7], [-jnp.inf, 0.1]])
    positions = jnp.array([[1.0, jnp.inf], [jnp.nan, 2.0], [jnp.inf, 3.0]])

    def total(positions):
        new = replaced(jax.random.key(0), log_weights, {"z": positions}, jnp.asarray(1), jnp.asarray(True))
        return jnp.sum(new.particles["z"]), new

    gradient, new = jax.grad(total, has_aux=True)(positions)
    assert np.array_equal(new.particles["z"], [[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]])
    assert np.array_equal(new.log_weights, np.array([[0.3, -np.inf], [-np.inf, 0.7], [-np.inf, 0.1]], np.float32))
    assert np.array_equal(gradient, [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert not np.any(new.resampled) and np.array_equal(new.ancestors[:, 0], [0, 1, 2])
