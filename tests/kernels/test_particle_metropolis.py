"""Pseudo-marginal Metropolis against the exact posterior of a linear-Gaussian model, and everything MCMC does with it.

The exact posterior is Kalman's filter and smoother on a grid of both parameters, in float64. Chains are independent
replicates: 128 of them, five standard errors of the mean over chains, false alarms 6e-7 per number.
"""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC
from numpyro.infer.gibbs import DiscreteGibbs, Gibbs

from numpyro_smc.kernels.evidence_variance import runs_at
from numpyro_smc.kernels.particle_metropolis import ParticleMetropolis
from numpyro_smc.kernels.pseudo_marginal import Place
from tests.statistics_of_estimates import assert_mean

NOISE = 0.5
DATA = np.concatenate(
    [
        [-1.22, -0.44, -1.14, 0.03, -1.04, -2.14, -2.27, -2.08, -2.1, -1.48],
        [-1.59, -1.08, -0.34, -0.74, -0.34, 0.57, 0.04, -1.05, 0.89, 0.47],
    ],
    dtype=np.float32,
)
FIELDS = ("log_evidence", "accept_prob", "potential_energy", "log_prior")


class Traces:
    """A count that is no part of the program that counts: else every trace would make it another program."""

    count = 0

    def __fingerprint__(self):
        return ()


TRACES = Traces()


def model(y):
    TRACES.count += 1
    a = numpyro.sample("a", dist.Uniform(-1.0, 1.0))
    q = numpyro.sample("q", dist.HalfNormal(1.0))
    numpyro.deterministic("ratio", q / NOISE)
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(a * x, q))
        numpyro.deterministic("double", 2.0 * x)
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        return x, None

    scan(step, x_0, y)


def kalman(a, q, y=DATA):
    """Log evidence, and smoothed mean and variance of each state: of arrays of parameters at once."""
    mean, variance = np.zeros_like(a), np.ones_like(a)
    log_evidence, filtered, predicted = np.zeros_like(a), [(mean, variance)], []
    for y_t in y.astype(np.float64):
        mean, variance = a * mean, a**2 * variance + q**2
        predicted.append((mean, variance))
        total = variance + NOISE**2
        log_evidence = log_evidence - 0.5 * (np.log(2 * np.pi * total) + (y_t - mean) ** 2 / total)
        gain = variance / total
        mean, variance = mean + gain * (y_t - mean), (1 - gain) * variance
        filtered.append((mean, variance))
    smoothed = [filtered[-1]]
    for (m, v), (pm, pv) in zip(filtered[-2::-1], predicted[::-1], strict=True):
        gain = v * a / pv
        smoothed.append((m + gain * (smoothed[-1][0] - pm), v + gain**2 * (smoothed[-1][1] - pv)))
    means, variances = np.array(smoothed[::-1]).swapaxes(0, 1)
    return log_evidence, means, variances


class Exact:
    """Posterior means and variances by quadrature."""

    def __init__(self):
        a, q = np.meshgrid(np.linspace(-1, 1, 402)[1:-1], np.linspace(0.0, 3.0, 402)[1:-1], indexing="ij")
        log_evidence, means, variances = kalman(a, q)
        weights = np.exp(log_evidence - log_evidence.max() - q**2 / 2)
        weights /= weights.sum()
        self.mean, self.variance = {}, {}
        for name, values in {"a": a, "q": q}.items():
            self.mean[name] = (weights * values).sum()
            self.variance[name] = (weights * (values - self.mean[name]) ** 2).sum()
        mean = (weights * means).sum((1, 2))
        variance = (weights * (variances + means**2)).sum((1, 2)) - mean**2
        self.mean |= {"x_0": mean[0], "x": mean[1:]}
        self.variance |= {"x_0": variance[0], "x": variance[1:]}


@pytest.fixture(scope="module")
def exact():
    return Exact()


def assert_posterior(draws, exact, names=("a", "q")):
    """Means and variances over chains, ``[chains, draws, ...]``, are the exact ones."""
    for name in names:
        values = np.asarray(draws[name], np.float64)
        columns = values.reshape(*values.shape[:2], -1)
        for i, (mean, variance) in enumerate(
            zip(np.ravel(exact.mean[name]), np.ravel(exact.variance[name]), strict=True)
        ):
            assert_mean(columns[..., i].mean(1), mean)
            assert_mean(((columns[..., i] - mean) ** 2).mean(1), variance)


def mcmc_of(kernel, **options):
    sizes = {"num_warmup": 500, "num_samples": 500, "num_chains": 128, "chain_method": "vectorized"}
    return MCMC(kernel, **{**sizes, "progress_bar": False, **options})


def chains_of(kernel, seed=0, num_warmup=500, num_samples=500, num_chains=128):
    """Parameters in their supports, and states, ``[chains, samples]``, without what MCMC adds."""
    state = kernel.init(random.split(random.key(seed), num_chains), num_warmup, None, (DATA,), {})

    def step(state, _):
        state = kernel.sample(state, (DATA,), {})
        return state, state._replace(noise=None, adapt_state=state.adapt_state.step_size)

    states = jax.jit(lambda state: lax.scan(step, state, None, length=num_warmup + num_samples)[1])(state)
    states = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1)[:, num_warmup:], states)
    return {"a": 2.0 * jax.nn.sigmoid(states.z["a"]) - 1.0, "q": jnp.exp(states.z["q"])}, states


# ---- parameters and paths -------------------------------------------------------------------------------------------

KERNEL = ParticleMetropolis(model, 16, keep_paths=True)


@pytest.fixture(scope="module")
def mcmc():
    """After a warm-up, so that all runs are one compiled program."""
    mcmc = mcmc_of(KERNEL)
    mcmc.warmup(random.key(0), DATA, extra_fields=FIELDS)
    mcmc.run(random.key(1), DATA, extra_fields=FIELDS)
    return mcmc


def test_parameters_and_paths_have_the_exact_posterior(mcmc, exact):
    """16 particles, log evidences of standard deviation about 1.6: the estimate's noise must not show."""
    samples = mcmc.get_samples(group_by_chain=True)
    assert samples["x"].shape == (128, 500, 20) and samples["x_0"].shape == (128, 500)
    assert_posterior(samples, exact, ("a", "q", "x_0", "x"))
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert np.std(fields["log_evidence"]) > 1.0 and 0.1 < fields["accept_prob"].mean() < 0.22


def test_deterministic_sites_belong_to_their_sample(mcmc):
    samples = mcmc.get_samples()
    np.testing.assert_allclose(samples["ratio"], samples["q"] / NOISE, rtol=1e-5)
    np.testing.assert_allclose(samples["double"], 2.0 * samples["x"], rtol=1e-5)


def test_a_path_and_an_evidence_stay_with_their_parameters(mcmc):
    """Where the parameters do not move, nothing does."""
    samples, fields = mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True)
    # Near one, `a` may move by less than its rounding.
    moved = (np.diff(samples["a"], axis=1) != 0.0) | (np.diff(samples["q"], axis=1) != 0.0)
    for values in (samples["x"][:, :, 0], samples["x"][:, :, -1], fields["log_evidence"]):
        np.testing.assert_array_equal(np.diff(values, axis=1) != 0.0, moved)
    total = fields["log_prior"] + fields["log_evidence"]
    np.testing.assert_allclose(fields["potential_energy"], -total, rtol=1e-6)


def test_a_run_is_continued_from_its_last_state_without_reading_the_model_again(mcmc):
    adaptation, num_traces = np.array(mcmc.last_state.adapt_state.scale_tril), TRACES.count
    assert (mcmc.last_state.i == 1000).all() and (np.abs(adaptation - np.eye(2)) > 1e-3).any()
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(random.key(2), DATA, extra_fields=FIELDS)
    assert TRACES.count == num_traces and KERNEL._compiled_start.num_compiled() == 1
    np.testing.assert_array_equal(mcmc.last_state.adapt_state.scale_tril, adaptation)
    assert (mcmc.last_state.i == 1500).all() and mcmc.get_samples()["a"].shape == (64_000,)
    rates = mcmc.get_extra_fields(group_by_chain=True)["accept_prob"].mean(1)
    assert np.corrcoef(rates, mcmc.last_state.mean_accept_prob)[0, 1] > 0.5


def test_summary_progress_and_arviz(mcmc, capsys):
    import arviz

    mcmc.print_summary()
    shown = capsys.readouterr().out
    assert "r_hat" in shown and "x[19]" in shown and "ratio" not in shown
    last = jax.tree.map(lambda leaf: leaf[0], mcmc.last_state)
    assert KERNEL.get_diagnostics_str(last).startswith("steps of size ")
    assert ", log evidence -2" in KERNEL.get_diagnostics_str(last) and "acc. prob=0." in KERNEL.get_diagnostics_str(
        last
    )
    data = arviz.from_numpyro(mcmc, log_likelihood=True)
    assert data["posterior"]["x"].shape == (128, 500, 20) and data["log_likelihood"]["y"].shape == (128, 500, 20)


# ---- correlated draws, screens --------------------------------------------------------------------------------------


def autoregression(params, y):
    """A screen: the series as if it were observed without noise, and wrong about the scale."""
    scale = jnp.sqrt(params["q"] ** 2 + 0.6)
    return dist.Normal(params["a"] * y[:-1], scale).log_prob(y[1:]).sum()


def test_correlated_and_screened_proposals_leave_the_posterior_exact(exact):
    """8 particles, resampled in the order of their states at every step."""
    draws, states = chains_of(
        ParticleMetropolis(model, 8, correlation=0.97, resample="always", screen=autoregression, step_size=0.5)
    )
    assert_posterior(draws, exact)
    some = {name: values[:3, -1] for name, values in draws.items()}
    screened = [autoregression({name: values[i] for name, values in some.items()}, DATA) for i in range(3)]
    np.testing.assert_allclose(states.log_screen[:3, -1], screened, rtol=1e-4)
    stopped = np.asarray(states.accept_prob == 0.0).mean()
    assert 0.2 < stopped < 0.8  # by the first stage


# ---- chains, starts, options ----------------------------------------------------------------------------------------


def tiny(y):
    """One parameter, no initial state."""
    q = numpyro.sample("q", dist.HalfNormal(1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x, q))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        return x, None

    scan(step, 0.0, y)


TINY = ParticleMetropolis(tiny, 4)


def test_vectorised_parallel_and_sequential_chains_are_the_same():
    """With a progress bar where chains follow each other, and arguments traced."""
    draws = {}
    for method, options in {
        "vectorized": {},
        "parallel": {},
        "sequential": {"progress_bar": True, "jit_model_args": True},
    }.items():
        mcmc = mcmc_of(TINY, num_warmup=6, num_samples=6, thinning=2, num_chains=2, chain_method=method, **options)
        mcmc.run(random.key(0), DATA[:3], extra_fields=("log_evidence",))
        draws[method] = mcmc.get_samples(group_by_chain=True)["q"]
        assert draws[method].shape == (2, 3) and mcmc.get_extra_fields()["log_evidence"].shape == (6,)
    np.testing.assert_allclose(draws["parallel"], draws["vectorized"], rtol=1e-4)
    np.testing.assert_allclose(draws["sequential"], draws["vectorized"], rtol=1e-4)


def test_chains_start_at_given_unconstrained_values():
    keys, z = random.split(random.key(0), 2), {"q": jnp.array([0.3, -1.0])}
    state = TINY.init(keys, 0, z, (DATA[:3],), {})
    np.testing.assert_array_equal(state.z["q"], z["q"])
    prior = dist.HalfNormal(1.0).log_prob(jnp.exp(z["q"])) + z["q"]
    np.testing.assert_allclose(state.log_prior, prior, rtol=1e-5)
    assert jnp.isfinite(state.log_evidence).all() and (state.adapt_state.scale_tril == 1.0).all()
    with pytest.raises(ValueError, match=r"ParticleMetropolis: .* 'q': 'q' missing; 'r' unknown"):
        TINY.init(keys, 0, {"r": jnp.zeros(2)}, (DATA[:3],), {})


def test_a_chain_that_starts_at_nothing_leaves_for_anything():
    """Starts are not checked under transformations. What is not a number must not stay in the adaptation."""
    state = TINY.init(random.key(0), 6, {"q": jnp.array(0.3)}, (DATA[:3],), {})
    sample = jax.jit(lambda state, y: TINY.sample(state, (y,), {}))
    nowhere = state._replace(log_evidence=-jnp.inf)
    stuck = sample(nowhere, jnp.full(3, jnp.inf))
    assert (
        stuck.accept_prob == 0.0 and stuck.z["q"] == state.z["q"] and jnp.isfinite(stuck.adapt_state.scale_tril).all()
    )
    free = sample(nowhere, DATA[:3])
    assert free.accept_prob == 1.0 and free.z["q"] != state.z["q"] and jnp.isfinite(free.log_evidence)


@pytest.mark.parametrize("plates", [False, True])
def test_data_about_parameters_count_once(plates):
    """Nothing is latent but the parameter: the estimate is exact, in one problem and in two independent ones."""

    def program(y):
        q = numpyro.sample("q", dist.HalfNormal(1.0))
        numpyro.sample("about", dist.Normal(q, 0.1), obs=0.4)

        def step(total, y_t):
            with handlers.mask(mask=True) if not plates else numpyro.plate("series", 2):
                numpyro.sample("y", dist.Normal(q + total, 1.0), obs=y_t)
            return total + 1.0, None

        scan(step, 0.0, y)

    y = np.array([[0.3, -0.2], [1.0, 1.4], [2.2, 3.0]], np.float32) if plates else DATA[:3]
    place = ParticleMetropolis(program, 2).target((y,), {}).at(random.key(0), {"q": jnp.log(0.5)})
    times = np.arange(3.0)[:, None] if plates else np.arange(3.0)
    expected = dist.Normal(0.5 + times, 1.0).log_prob(y).sum() + dist.Normal(0.5, 0.1).log_prob(0.4)
    np.testing.assert_allclose(place.log_evidence, expected, rtol=1e-5)
    np.testing.assert_allclose(place.log_prior, dist.HalfNormal(1.0).log_prob(0.5) + np.log(0.5), rtol=1e-5)


def test_starts_that_explain_nothing_are_refused():
    keys = random.split(random.key(0), 2)
    with pytest.raises(ValueError, match=r"at the given init_params the log_prior is not finite \(chain 1\)"):
        TINY.init(keys, 0, {"q": jnp.array([0.3, 200.0])}, (DATA[:3],), {})
    with pytest.raises(ValueError, match=r"at 100 draws from the prior the log_evidence is not finite \(chain 0\)"):
        TINY.init(keys, 6, None, (np.full(3, np.inf, np.float32),), {})


def test_kernels_travel_by_pickle():
    other = pickle.loads(pickle.dumps(TINY))
    assert repr(other) == "ParticleMetropolis(tiny, num_particles=4)" and other._compiled_start.num_compiled() == 0
    assert repr(ParticleMetropolis(tiny, 8, correlation=0.9)).endswith("num_particles=8, correlation=0.9)")


def test_tuning_doubles_particles_until_the_evidence_is_quiet_enough():
    kernel = ParticleMetropolis(tiny, 8)
    tuned, report = kernel.tune(random.key(1), DATA[:8], target_variance=3.0, at={"q": 0.8}, num_runs=200)
    assert tuned.num_particles == report.chosen == 16 and kernel.num_particles == 8
    eight, sixteen = report.table()
    assert sixteen["variance"] <= 3.0 < eight["variance"] and 0.0 < sixteen["s.e."] < 0.5
    assert eight["log evidence"] < sixteen["log evidence"] < float(kalman_from(0.8, np.array(0.8), DATA[:8]))
    assert "16 particles for a target of 3" in repr(report) and "*     16 particles: variance" in repr(report)
    assert report.plot().get_ylabel() == "variance of the log evidence"


@pytest.mark.slow
def test_tuning_halves_particles_at_a_parameter_of_its_own():
    """From the middle of a pilot's chain."""
    tuned, report = ParticleMetropolis(tiny, 32).tune(random.key(1), DATA[:8], target_variance=3.0, num_pilot=100)
    assert tuned.num_particles == report.chosen == 16 and report.num_particles.tolist() == [8, 16, 32]
    assert 0.3 < float(report.at["q"]) < 2.0


@pytest.mark.slow
def test_pairs_without_correlation_vary_as_single_runs():
    """400 runs and 400 pairs: a ratio of variances of a standard error of about 15 %."""
    kernel = ParticleMetropolis(tiny, 16, correlation=1e-6, resample="always")
    z = {"q": jnp.log(0.8)}
    single, pairs = runs_at(random.key(0), kernel, 16, z, (DATA[:8],), {}, 400)
    assert 0.6 < pairs.var() / single.var() < 1.6 and abs(pairs.mean()) < 5 * pairs.std() / 20.0


def test_tuning_ends_where_more_particles_are_not_allowed():
    with pytest.raises(ValueError, match=r"above 1e-09 for every number of particles tried \(.* with 2\)"):
        ParticleMetropolis(tiny, 2).tune(
            random.key(1), DATA[:3], target_variance=1e-9, at={"q": 0.8}, num_runs=10, max_particles=3
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles must be a positive integer"),
        ({"correlation": 1.0}, r"correlation must be a number in \[0, 1\)"),
        ({"target_accept_prob": 1.5}, "target_accept_prob must be a number"),
        ({"step_size": 0.0}, "step_size must be positive, got 0.0"),
        ({"screen": 3.0}, "screen must be a function"),
        ({"resampler": "optimal_transport"}, "'optimal_transport' is not known to be unbiased"),
        ({"resampler": "nosuch"}, "Unknown resampler 'nosuch'"),
        ({"resample": "nosuch"}, "Unknown resample='nosuch'"),
        ({"correlation": 0.9, "resampler": "multinomial"}, "resampler='systematic', not 'multinomial'"),
        ({"sort": "state"}, "sort='state' is for correlated draws"),
        ({"correlation": 0.9, "sort": "size"}, "unknown sort='size'"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ParticleMetropolis(tiny, **{"num_particles": 4, **options})


def test_screens_must_be_scalars_and_models_must_have_parameters():
    with pytest.raises(ValueError, match=r"screen returned an array of shape \(3,\)"):
        ParticleMetropolis(tiny, 4, screen=lambda params, y: y).init(random.key(0), 0, None, (DATA[:3],), {})
    conditioned = ParticleMetropolis(tiny, 4, params={"q": 0.3})
    with pytest.raises(ValueError, match="ParticleMetropolis: the model has no global latent"):
        conditioned.init(random.key(0), 0, None, (DATA[:3],), {})


# ---- a block of NumPyro's Gibbs -------------------------------------------------------------------------------------


def regimes(y):
    fast = numpyro.sample("fast", dist.Bernoulli(0.9))
    q = numpyro.sample("q", dist.HalfNormal(1.0))
    a = jnp.where(fast, 0.3, 0.9)
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(a * x, q))
        numpyro.sample("y", dist.Normal(x, NOISE), obs=y_t)
        return x, None

    scan(step, x_0, y)


@pytest.mark.slow
def test_a_discrete_parameter_in_another_block_leaves_the_posterior_exact():
    """4 particles; 512 chains of 2000. An estimate made anew without the path is seen at nine standard errors."""
    q = np.linspace(0.0, 4.0, 801)[1:]
    weights = [p * np.exp(kalman(np.full_like(q, a), q, DATA[:8])[0] - q**2 / 2) for a, p in ((0.9, 0.1), (0.3, 0.9))]
    weights = np.array(weights) / np.sum(weights)
    blocks = [(ParticleMetropolis(regimes, 4, keep_paths=True), ["q", "x", "x_0"]), (DiscreteGibbs(regimes), ["fast"])]
    mcmc = mcmc_of(Gibbs(blocks), num_samples=2000, num_chains=512, chain_method=jax.vmap)
    mcmc.run(random.key(0), DATA[:8])
    samples = mcmc.get_samples(group_by_chain=True)
    assert_mean(samples["fast"].mean(1), weights[1].sum())
    assert_mean(samples["q"].mean(1), (weights.sum(0) * q).sum())


def test_a_block_must_hold_the_path_and_noise_of_its_own():
    nowhere = Place({"q": jnp.array(0.3)}, *[jnp.zeros(())] * 3, None)
    with pytest.raises(ValueError, match=r"must hold the path of the latents.*keep_paths=True"):
        TINY.target((DATA[:3],), {}).refreshed(random.key(0), nowhere)
    kernel = ParticleMetropolis(tiny, 4, keep_paths=True, correlation=0.5)
    with pytest.raises(ValueError, match="noise that is correlated between proposals cannot be drawn anew"):
        kernel.target((DATA[:3],), {}).refreshed(
            random.key(0), nowhere._replace(z={"q": jnp.array(0.3), "x": jnp.zeros(3)})
        )


def test_refreshing_keeps_parameters_and_path_and_estimates_given_the_path():
    r"""For paths of the posterior the mean of :math:`p(y \mid \theta) / \hat p` is one: 2000 estimates.

    That of independent estimates is above one, by Jensen's inequality.
    """
    kernel = ParticleMetropolis(tiny, 4, keep_paths=True, resample="always")
    y, value = DATA[:6], 0.7
    target = kernel.target((y,), {})
    z = target.latents.unconstrain({"q": jnp.array(value)})

    @jax.jit
    @jax.vmap
    def refreshed(rng_key):
        """From the path of a filter of 200 particles, which is one of the posterior."""
        many = kernel.with_particles(200)
        key, other = random.split(rng_key)
        place = many.target((y,), {}).at(key, z)
        return place, kernel.target((y,), {}).refreshed(other, place)

    before, after = refreshed(random.split(random.key(0), 2000))
    for name in ("q", "x"):
        np.testing.assert_array_equal(before.z[name], after.z[name])
    exact = kalman_from(np.array(0.8), np.array(value), y)
    ratios = np.exp(exact - np.asarray(after.log_evidence, np.float64))
    assert ratios.std() < 3.0
    assert_mean(ratios, 1.0)
    assert np.var(after.log_evidence) > 4 * np.var(before.log_evidence)


def kalman_from(a, q, y):
    """Log evidence of ``tiny``, whose first state is zero: :func:`kalman` after a known state."""
    mean, variance, total = np.zeros_like(q), np.zeros_like(q), 0.0
    for y_t in y.astype(np.float64):
        mean, variance = a * mean, a**2 * variance + q**2
        spread = variance + NOISE**2
        total = total - 0.5 * (np.log(2 * np.pi * spread) + (y_t - mean) ** 2 / spread)
        gain = variance / spread
        mean, variance = mean + gain * (y_t - mean), (1 - gain) * variance
    return total
