"""Conditional SMC and particle Gibbs against exact posteriors, and every convenience of NumPyro's MCMC.

Means are compared within five Monte Carlo standard errors (from the effective sample size), so each comparison would
fail by chance with probability 6e-7; seeds are fixed.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, SVI, DiscreteGibbs, Gibbs
from scipy.stats import multivariate_normal

from models import drift_diffusion
from numpyro_smc import SIXO, ConditionalSMC, ParticleGibbs, ParticleMetropolis, twist

Y = jnp.array([0.5, 0.1, -0.3, 2.0, 1.0])
PHI = 0.9


def autoregression(y, phi=PHI):
    """States with one initial latent; ``phi=None`` gives the coefficient a prior."""
    if phi is None:
        phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(phi * x, 1.0))
        numpyro.deterministic("twice", 2 * x)
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_init", dist.Normal(0.0, 2.0)), y)


def guide(y, phi=PHI):
    """A proposal that looks at the observation."""

    def step(x, y_t):
        return numpyro.sample("x", dist.Normal(0.5 * phi * x + 0.4 * y_t, 0.7)), None

    scan(step, numpyro.sample("x_init", dist.Normal(0.2, 1.5)), y)


def exact_path(y, phi):
    """Mean and covariance of (x_init, x_0, ..., x_{T-1}) given the data, and the log evidence up to a constant."""
    size = len(y) + 1
    transition = np.eye(size) - phi * np.eye(size, k=-1)
    prior = transition.T @ np.diag([1 / 4.0] + [1.0] * (size - 1)) @ transition
    covariance = np.linalg.inv(prior + np.diag([0.0] + [4.0] * (size - 1)))
    shift = np.concatenate([[0.0], 4.0 * np.asarray(y)])
    mean = covariance @ shift
    log_evidence = 0.5 * (np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(prior)[1] + shift @ mean)
    return mean, covariance, log_evidence


def assert_means(draws, mean, variance=None):
    """Means over chains and draws, ``[C, S, ...]``, within five standard errors; variances too, by their squares."""
    draws = np.asarray(draws, float)
    for value, expected in [(draws, mean)] + ([] if variance is None else [((draws - mean) ** 2, variance)]):
        error = value.std((0, 1)) / np.sqrt(effective_sample_size(value))
        assert (np.abs(value.mean((0, 1)) - expected) < 5 * error).all(), (value.mean((0, 1)), expected, error)


def sampled(kernel, *args, num_samples=3000, num_chains=4, num_warmup=50, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), *args, **kwargs)
    return mcmc


OPTIONS = {
    "ancestor sampling": {},
    "lineages alone": {"ancestor_sampling": False, "num_particles": 8},
    "lineages alone, adaptive": {"ancestor_sampling": False, "num_particles": 8, "resample": "ess"},
    "backward sampling, adaptive": {"backward_sampling": True, "resample": "ess", "resampler": "multinomial"},
    "ancestor sampling, adaptive killing": {"resample": "ess", "resampler": "killing"},
    "guide": {"guide": guide, "resampler": "residual"},
    "fixed schedule": {"resample": lambda log_weights, t: t % 2 == 0, "resampler": "stratified"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_paths_have_their_posterior_means_and_variances(options):
    kernel = ConditionalSMC(autoregression, **{"num_particles": 4, **options})
    draws = sampled(kernel, Y).get_samples(group_by_chain=True)
    mean, covariance, _ = exact_path(Y, PHI)
    path = np.concatenate([draws["x_init"][..., None], draws["x"]], axis=-1)
    assert_means(path, mean, np.diag(covariance))
    np.testing.assert_array_equal(draws["twice"], 2 * draws["x"])


def test_a_right_twist_leaves_the_posterior_of_the_path(exact_drift_posterior):
    args, mean, variance, twisted = exact_drift_posterior
    draws = sampled(ConditionalSMC(drift_diffusion.model, 4, guide=twisted), *args).get_samples(group_by_chain=True)
    assert_means(draws["x"], mean, variance)


@pytest.fixture
def exact_drift_posterior():
    """A random walk of four steps seen at its end: a Brownian bridge; and a guide with a wrong proposal and twist."""
    num_steps, drift, y = 4, 0.5, jnp.asarray(3.0)

    def twisted(y, num_steps, num_series, drift):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(x + drift + 0.2, 1.1))
            twist("r", -0.1 * (x - 2.0) ** 2)
            return x, None

        scan(step, 0.0, jnp.arange(num_steps))

    times = np.arange(1, num_steps + 1)
    mean = y * times / (num_steps + 1)
    variance = times * (num_steps + 1 - times) / (num_steps + 1)
    return (y, num_steps, None, drift), mean, variance, twisted


def test_guides_and_twists_trained_by_sixo_drive_the_kernels():
    def learned(y, phi=PHI):
        gain, slope = numpyro.param("gain", jnp.asarray(0.1)), numpyro.param("slope", jnp.asarray(0.0))

        def step(x, inputs):
            y_t, later = inputs
            x = numpyro.sample("x", dist.Normal(phi * x + gain * (y_t - phi * x), 0.8))
            twist("r", slope * x * later)
            return x, None

        start = numpyro.sample("x_init", dist.Normal(0.0, 2.0))
        scan(step, start, (y, jnp.concatenate([y[1:], jnp.zeros(1)])))

    loss = SIXO(num_particles=8)
    params = (
        SVI(autoregression, learned, numpyro.optim.Adam(0.03), loss)
        .run(random.key(0), 100, Y, progress_bar=False)
        .params
    )
    assert abs(params["slope"]) > 0.01
    draws = sampled(ConditionalSMC(autoregression, 4, guide=learned, params=params), Y).get_samples(group_by_chain=True)
    mean, covariance, _ = exact_path(Y, PHI)
    assert_means(draws["x"], mean[1:], np.diag(covariance)[1:])

    def guide_of_parameters(y, phi=None):
        return learned(y, 0.5)

    kernel = ParticleMetropolis(autoregression, 20, guide=guide_of_parameters, params=params)
    mcmc = sampled(kernel, Y, None, num_samples=1000, num_warmup=300)
    assert_means(mcmc.get_samples(group_by_chain=True)["phi"], exact_coefficient()[0])


def test_series_in_a_plate_are_independent_problems():
    both = jnp.stack([Y, -2.0 * Y])

    def series(y):
        with numpyro.plate("series", 2):
            x_init = numpyro.sample("x_init", dist.Normal(0.0, 2.0))

        def step(x, y_t):
            with numpyro.plate("series", 2):
                x = numpyro.sample("x", dist.Normal(PHI * x, 1.0))
                numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, x_init, y.T)

    draws = sampled(ConditionalSMC(series, 4), both).get_samples(group_by_chain=True)
    for number in range(2):
        mean, covariance, _ = exact_path(both[number], PHI)
        assert_means(draws["x"][..., number], mean[1:], np.diag(covariance)[1:])


def switching(y):
    """A hidden Markov chain with a marked discrete state, an initial state and a parameter."""
    stay = numpyro.sample("stay", dist.Beta(2.0, 1.0))
    marked = {"enumerate": "parallel"}

    def step(z, y_t):
        z = numpyro.sample("z", dist.Bernoulli(jnp.where(z == 1, stay, 1 - stay)), infer=marked)
        numpyro.sample("y", dist.Normal(1.0 * z, 0.7), obs=y_t)
        return z, None

    scan(step, numpyro.sample("z_init", dist.Bernoulli(0.3), infer=marked), y)


def exact_switching(y):
    """Posterior mean of the parameter and of the states, summing over all paths on a grid of the parameter."""
    grid = (np.arange(1000) + 0.5) / 1000
    paths = np.array(np.meshgrid(*[[0, 1]] * (len(y) + 1), indexing="ij")).reshape(len(y) + 1, -1).T
    stays = (paths[:, 1:] == paths[:, :-1]).sum(1)
    log_likelihood = -0.5 * ((np.asarray(y) - paths[:, 1:]) ** 2).sum(1) / 0.49
    log_prior = np.log(np.where(paths[:, 0] == 1, 0.3, 0.7))
    moves = stays * np.log(grid[:, None]) + (len(y) - stays) * np.log1p(-grid[:, None])
    weights = np.exp(log_likelihood + log_prior + moves) * 2 * grid[:, None]
    weights /= weights.sum()
    return (weights.sum(1) * grid).sum(), weights.sum(0) @ paths


def test_discrete_states_and_their_parameter_match_the_sum_over_all_paths():
    draws = sampled(ParticleGibbs(switching, 6), Y, num_samples=2500, num_warmup=200).get_samples(group_by_chain=True)
    stay, states = exact_switching(Y)
    assert_means(draws["stay"], stay)
    assert_means(draws["z_init"], states[0])
    assert_means(draws["z"], states[1:])


@cache
def exact_coefficient():
    """Posterior mean and variance of ``phi`` and mean of the path, by quadrature."""
    grid = np.linspace(-1, 1, 2001)[1:-1]
    answers = [exact_path(Y, phi) for phi in grid]
    weights = np.exp([log_evidence - max(a[2] for a in answers) for _, _, log_evidence in answers])
    weights /= weights.sum()
    mean = weights @ grid
    return mean, weights @ (grid - mean) ** 2, weights @ np.array([a[0] for a in answers])


@cache
def gibbs_run():
    kernel = ParticleGibbs(autoregression, 6)
    fields = ("block_states.0.renewed", "block_states.1.accept_prob")
    mcmc = sampled(kernel, Y, None, num_samples=3000, num_warmup=300, extra_fields=fields)
    return kernel, mcmc


def test_parameters_and_paths_of_particle_gibbs_match_quadrature():
    _, mcmc = gibbs_run()
    draws = mcmc.get_samples(group_by_chain=True)
    mean, variance, path = exact_coefficient()
    assert_means(draws["phi"], mean, variance)
    assert_means(draws["x"], path[1:])


def test_chains_summaries_and_extra_fields_behave_as_with_nuts():
    import arviz as az

    _, mcmc = gibbs_run()
    assert {name: value.shape for name, value in mcmc.get_samples().items()} == {
        "phi": (12000,),
        "x": (12000, 5),
        "x_init": (12000,),
        "twice": (12000, 5),
    }
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert fields["block_states.0.renewed"].shape == (4, 3000, 5)
    assert 0.5 < float(fields["block_states.1.accept_prob"].mean()) <= 1.0
    mcmc.print_summary()
    assert az.from_numpyro(mcmc)["posterior"]["x"].shape == (4, 3000, 5)
    # Warm-up tuned the step size of each chain, and then left it alone.
    sizes = mcmc.last_state.block_states[1].adapt_state.step_size
    assert len(np.unique(np.asarray(sizes))) == 4


def test_a_run_goes_on_from_its_last_state():
    kernel = ParticleGibbs(autoregression, 6)
    mcmc = MCMC(kernel, num_warmup=30, num_samples=20, progress_bar=False)
    mcmc.run(random.key(1), Y, None)
    last = mcmc.last_state
    mcmc.post_warmup_state = last
    mcmc.run(random.key(2), Y, None)
    expected = jax.jit(kernel.sample)(last._replace(rng_key=random.key(2)), (Y, None), {})
    np.testing.assert_allclose(mcmc.get_samples()["phi"][0], np.tanh(expected.z["phi"] / 2), rtol=1e-5)


@pytest.mark.slow
def test_parallel_and_sequential_chains_agree():
    def draws(chain_method):
        kernel = ParticleGibbs(autoregression, 6)
        mcmc = MCMC(kernel, num_warmup=20, num_samples=10, num_chains=2, chain_method=chain_method, progress_bar=False)
        mcmc.run(random.key(3), Y, None)
        return mcmc.get_samples(group_by_chain=True)["phi"]

    np.testing.assert_allclose(draws("parallel"), draws("sequential"), rtol=1e-4)


@pytest.mark.slow
def test_it_is_a_block_of_numpyros_gibbs_beside_other_kernels():
    blocks = [(NUTS(autoregression), ["phi"]), (ConditionalSMC(autoregression, 6), ["x_init", "x"])]
    mcmc = MCMC(Gibbs(blocks), num_warmup=100, num_samples=500, progress_bar=False)
    mcmc.run(random.key(4), Y, None)
    assert_means(mcmc.get_samples()["phi"][None], exact_coefficient()[0])


@pytest.mark.slow
def test_data_may_be_given_by_condition():
    def unobserved(y=None):
        phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))

        def step(x, _):
            x = numpyro.sample("x", dist.Normal(phi * x, 1.0))
            numpyro.sample("y", dist.Normal(x, 0.5))
            return x, None

        scan(step, numpyro.sample("x_init", dist.Normal(0.0, 2.0)), jnp.arange(5))

    mcmc = MCMC(
        ParticleGibbs(handlers.condition(unobserved, data={"y": Y}), 6),
        num_warmup=100,
        num_samples=500,
        progress_bar=False,
    )
    mcmc.run(random.key(5))
    assert_means(mcmc.get_samples()["phi"][None], exact_coefficient()[0])


def test_a_path_to_start_from_may_be_given():
    kernel = ParticleGibbs(autoregression, 2)
    path = {"x_init": jnp.asarray(0.3), "x": Y}
    state = kernel.init(random.key(6), 1, path, (Y, None), {})
    np.testing.assert_array_equal(state.z["x"], Y)


def no_parameters(y):
    autoregression(y, 0.5)


def autoregression_of_order_two(y):
    phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))

    def step(lags, y_t):
        x = numpyro.sample("x", dist.Normal(phi * lags[0] - 0.2 * lags[1], 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return (x, lags[0]), None

    scan(step, (0.0, 0.0), y)


def discrete_parameter(y):
    order = numpyro.sample("order", dist.Bernoulli(0.5))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * order * x, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def positive(y):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Gamma(2.0, 1.0))
        numpyro.sample("y", dist.Normal(x, scale), obs=y_t)
        return x, None

    scan(step, 1.0, y)


def auxiliary_guide(y):
    def step(x, y_t):
        u = numpyro.sample("u", dist.Normal(), infer={"is_auxiliary": True})
        return numpyro.sample("x", dist.Normal(u, 1.0)), None

    scan(step, numpyro.sample("x_init", dist.Normal()), y)


def no_states(y):
    def step(last, y_t):
        numpyro.sample("y", dist.Normal(0.5 * last, 1.0), obs=y_t)
        return y_t, None

    scan(step, 0.0, y)


def start(kernel, *args, init_params=None):
    return lambda: kernel.init(random.key(0), 1, init_params, args, {})


REFUSALS = {
    "one particle": (lambda: ParticleGibbs(autoregression, 1), "num_particles is 1"),
    "scheme": (lambda: ParticleGibbs(autoregression, 4, resampler="ssp"), "'ssp' has no conditional version"),
    "no parameters": (start(ParticleGibbs(no_parameters, 4), Y), "no global latents"),
    "lags": (start(ParticleGibbs(autoregression_of_order_two, 4), Y), "ancestor_sampling=False"),
    "discrete": (start(ParticleGibbs(discrete_parameter, 4), Y), "order"),
    "other model": (
        lambda: ParticleGibbs(autoregression, 4, parameter_kernel=NUTS(positive)),
        "built on another model",
    ),
    "shape": (
        start(ParticleGibbs(positive, 4), Y, init_params={"x": jnp.ones(4)}),
        r"path of 'x' with shape \(4,\); it must have shape \(5,\)",
    ),
    "support": (start(ParticleGibbs(positive, 4), Y, init_params={"x": -jnp.ones(5)}), "site 'x'.*outside"),
    "part of a path": (
        start(ParticleGibbs(autoregression, 4), Y, None, init_params={"x": Y}),
        r"without \['x_init'\]",
    ),
    "guide": (start(ConditionalSMC(autoregression, 4, guide=auxiliary_guide), Y), "'u' is auxiliary"),
    "no states": (start(ConditionalSMC(no_states, 4), Y), "no latent sites"),
}


@pytest.mark.parametrize("call, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_be_sampled_is_refused_by_name(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        call()


def test_carries_with_lags_work_without_ancestor_sampling():
    kernel = ParticleGibbs(autoregression_of_order_two, 6, ancestor_sampling=False)
    mcmc = MCMC(kernel, num_warmup=10, num_samples=10, progress_bar=False)
    mcmc.run(random.key(7), Y)
    assert np.isfinite(mcmc.get_samples()["phi"]).all()


def test_a_kernel_for_discrete_parameters_takes_them():
    kernel = ParticleGibbs(discrete_parameter, 6, parameter_kernel=DiscreteGibbs)
    draws = sampled(kernel, Y, num_samples=2000).get_samples(group_by_chain=True)["order"]
    evidences = [multivariate_normal(np.zeros(5), covariance_of_data(phi)).pdf(Y) for phi in (0.0, 0.5)]
    assert_means(draws, evidences[1] / sum(evidences))


def covariance_of_data(phi):
    """Of observations of an autoregression that starts at zero."""
    transition = np.linalg.inv(np.eye(5) - phi * np.eye(5, k=-1))
    return transition @ transition.T + 0.25 * np.eye(5)


def test_parameters_that_explain_nothing_are_reported():
    def bounded(y):
        width = numpyro.sample("width", dist.Uniform(0.0, 1.0))

        def step(x, y_t):
            x = numpyro.sample("x", dist.Uniform(x, x + width))
            numpyro.factor("near", jnp.where(jnp.abs(x - y_t) < 0.1, 0.0, -jnp.inf))
            return x, None

        scan(step, 0.0, y)

    with pytest.raises(FloatingPointError, match="no particle explains the data"):
        start(ParticleGibbs(bounded, 4), Y)()
