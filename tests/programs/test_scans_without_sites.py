"""Scans without sites are ordinary computation: before the scan with sites, inside it and after it.

The log weights of every program here are NumPyro's own densities; evidences are Kalman filters'.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import MCMC, NUTS, SVI, Predictive
from numpyro.optim import Adam

from numpyro_smc import (
    FIVO,
    ParticleFilter,
    ParticleMetropolis,
    bootstrap,
    log_evidence,
)
from tests.programs.numpyros_densities import assert_numpyros_densities
from tests.programs.user_programs import kalman

Y = 0.5 * np.random.default_rng(3).normal(size=8).astype(np.float32)
U = np.random.default_rng(4).normal(size=8).astype(np.float32)


def moving_average(u):
    def step(c, v):
        c = 0.5 * c + v
        return c, c

    return scan(step, 0.0, u)[1]


def exact_average(u):
    found, c = [], 0.0
    for v in np.asarray(u, float):
        c = 0.5 * c + v
        found.append(c)
    return np.array(found)


def before(u, y, slope=None):
    slope = numpyro.param("slope", 0.1) if slope is None else slope

    def step(x, inputs):
        m, y_t = inputs
        x = numpyro.sample("x", dist.Normal(0.8 * x + slope * m, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, 0.0, (moving_average(u), y))


def before_with_deterministic_site(u, y):
    def feature(c, v):
        c = numpyro.deterministic("feature", 0.5 * c + v)
        return c, c

    _, ma = scan(feature, 0.0, u)
    x_0 = numpyro.sample("x_0", dist.Normal(ma[0], 1.0))

    def step(x, inputs):
        m, y_t = inputs
        x = numpyro.sample("x", dist.Normal(0.8 * x + 0.1 * m, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, x_0, (ma, y))


def inside(u, y):
    """A response with several Euler steps between observations, whose noise stands outside of them."""

    def step(x, inputs):
        u_t, y_t = inputs

        def euler(z, _):
            z = numpyro.deterministic("between", z + 0.1 * (u_t - z))
            return z, None

        x, _ = scan(euler, x, None, length=5)
        x = numpyro.sample("x", dist.Normal(x, 0.4))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, x

    scan(step, 0.0, (u, y))


def inside_twice_and_backwards(u, y):
    def inner(c, v):
        return 0.5 * c + v, c

    def step(x, y_t):
        def outer(c, v):
            last, path = scan(inner, c, v * jnp.arange(3.0), reverse=True)
            return last, path.sum()

        _, sums = scan(outer, x[0], jnp.array([0.1, 0.2]))
        x = numpyro.sample("x", dist.Normal(0.7 * x + 0.1 * sums, 0.5).to_event(1))
        numpyro.sample("y", dist.Normal(x.sum(), 0.5), obs=y_t)
        return x, None

    scan(step, jnp.zeros(2), y)


def after(u, y):
    """The likelihood is written in a scan of its own, without sites, and stated as a factor."""

    def step(x, _):
        x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
        return x, x

    _, x = scan(step, 0.0, None, length=8)
    _, log_probs = scan(lambda n, xy: (n + 1, dist.Normal(xy[0], 0.5).log_prob(xy[1])), 0, (x, y))
    numpyro.factor("seen", log_probs)


def after_for_reports(u, y):
    """What comes after the scan is a report: cumulated states, by a scan with a deterministic site."""

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, x

    _, x = scan(step, 0.0, y)
    _, total = scan(lambda c, v: (numpyro.deterministic("total", c + v), c + v), 0.0, x)
    numpyro.deterministic("largest", total.max())


def everywhere(u, y):
    """Before, inside and after; two at the front, one of them backwards."""
    ma = moving_average(u)
    _, ahead = scan(lambda c, v: (0.9 * c + v, c), 0.0, u, reverse=True)

    def step(x, inputs):
        m, a = inputs
        drift, _ = scan(lambda c, k: (c + 0.1 * k, None), 0.0, jnp.arange(3.0))
        x = numpyro.sample("x", dist.Normal(0.8 * x + 0.1 * m + 0.05 * a + 0.1 * drift, 0.5))
        return x, x

    _, x = scan(step, 0.0, (ma, ahead))
    scan(lambda c, v: (c + v, None), 0.0, x)
    numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def under_conditions(u, y):
    """Control flow of both libraries around and in the step, none of it with sites."""
    start = cond(u[0] > 0, lambda v: 0.1 * v, lambda v: -0.2 * v, u[1])
    start = lax.fori_loop(0, 3, lambda i, v: 0.5 * v + 0.1 * i, start)

    def step(x, y_t):
        x = cond(x > 0, lambda v: 0.9 * v, lambda v: 0.5 * v, x)
        x = lax.cond(x > 0.3, lambda v: v - 0.1, lambda v: v, x)
        x = lax.while_loop(lambda v: v > 1.0, lambda v: 0.7 * v, x)
        x = numpyro.sample("x", dist.Normal(x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, start, y)


def before_under_a_plate(u, y):
    """Features of two series; the scan with sites has a plate."""
    _, ma = scan(lambda c, v: (0.5 * c + v, 0.5 * c + v), jnp.zeros(2), u)

    def step(x, inputs):
        m, y_t = inputs
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Normal(0.8 * x + 0.1 * m, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, jnp.zeros(2), (ma, y))


def of_a_latent(u, y):
    """The features depend on a latent, which is global therefore."""
    decay = numpyro.sample("decay", dist.Beta(2.0, 2.0))
    _, ma = scan(lambda c, v: (decay * c + v, decay * c + v), 0.0, u)

    def step(x, inputs):
        m, y_t = inputs
        x = numpyro.sample("x", dist.Normal(0.8 * x + 0.1 * m, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, 0.0, (ma, y))


@pytest.mark.parametrize(
    "program",
    [
        before_with_deterministic_site,
        inside,
        inside_twice_and_backwards,
        after,
        after_for_reports,
        everywhere,
        under_conditions,
    ],
)
def test_weights_are_numpyros_own_densities(program):
    assert_numpyros_densities(program, U, Y)


def test_weights_under_a_plate_are_numpyros_own_densities():
    y = np.stack([Y, -0.5 * Y], 1)
    result = assert_numpyros_densities(before_under_a_plate, np.stack([U, 0.5 * U], 1), y)
    assert result.log_evidence.shape == (2,)


def test_a_latent_that_a_scan_without_sites_uses_is_global():
    assert_numpyros_densities(of_a_latent, U, Y, params={"decay": 0.4})
    with pytest.raises(ValueError, match="'decay' is a global latent"):
        ParticleFilter(of_a_latent, 2).run(random.key(0), U, Y)


def test_deterministic_sites_of_such_scans_are_kept():
    result = ParticleFilter(before_with_deterministic_site, 3).run(random.key(0), U, Y)
    np.testing.assert_allclose(result.particles["feature"], np.tile(exact_average(U), (3, 1)), rtol=1e-5)
    assert ParticleFilter(inside, 3).run(random.key(0), U, Y).particles["between"].shape == (8, 3, 5)


@pytest.mark.parametrize("entry", ["run", "function", "stream", "FIVO"])
def test_evidence_is_the_kalman_filters(entry):
    """20,000 particles; the standard error of the logarithm is below 0.02."""
    drift = 0.1 * exact_average(U)
    exact, _ = kalman(Y, 0.0, 0.0, 0.8, 0.25, 1.0, 0.25, b=lambda t: drift[t])
    key = random.key(1)
    if entry == "run":
        found = ParticleFilter(before, 20_000, history=False).run(key, U, Y).log_evidence
    elif entry == "function":
        found = log_evidence(key, before, {"slope": 0.1}, U, Y, num_particles=20_000)
    elif entry == "FIVO":
        found = -FIVO(20_000, resampler="systematic").loss(key, {"slope": 0.1}, before, bootstrap(before), U, Y)
    else:
        stream = ParticleFilter(before, 20_000)
        state = stream.init(key, U, Y)
        for m, y_t in zip(exact_average(U), Y, strict=True):
            state = stream.update(state, (m, y_t))
        found = state.log_evidence
    assert float(found) == pytest.approx(exact, abs=0.1)


def test_guides_may_hold_them():
    """An encoder backwards in time, as a scan; in front of a scan that proposes, and of a path as one site."""

    def encoded(y):
        return scan(lambda c, v: (0.5 * c + v, 0.5 * c + v), 0.0, y, reverse=True)[1]

    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    def stepwise(y):
        gain = numpyro.param("gain", 0.3)

        def step(x, h):
            return numpyro.sample("x", dist.Normal(0.5 * x + gain * h, 0.6)), None

        scan(step, 0.0, encoded(y))

    def path(y):
        gain = numpyro.param("gain", 0.3)
        numpyro.sample("x", dist.Normal(gain * encoded(y), 0.6).to_event(1))

    for guide in (stepwise, path):
        assert_numpyros_densities(model, Y, guide=guide)
    svi = SVI(model, stepwise, Adam(0.01), FIVO(3))
    assert np.isfinite(svi.run(random.key(0), 2, jnp.asarray(Y), progress_bar=False).losses).all()


def test_joint_densities_and_kernels_agree():
    """Entries that evaluate the whole joint density, and kernels, with a parameter: log p(y) by quadrature."""

    def model(u, y):
        before(u, y, numpyro.sample("slope", dist.Normal(0.0, 1.0)))

    grid = np.linspace(-4, 4, 401)
    ma = exact_average(U)
    logs = [kalman(Y, 0.0, 0.0, 0.8, 0.25, 1.0, 0.25, b=lambda t, s=s: s * ma[t])[0] - s * s / 2 for s in grid]
    weights = np.exp(logs - np.max(logs))
    mean = float(weights @ grid / weights.sum())
    sd = float(np.sqrt(weights @ (grid - mean) ** 2 / weights.sum()))
    args = (jnp.asarray(U), jnp.asarray(Y))
    for kernel in (NUTS(model), ParticleMetropolis(model, num_particles=64)):
        mcmc = MCMC(kernel, num_warmup=200, num_samples=600, progress_bar=False)
        mcmc.run(random.key(0), *args)
        # 5 standard errors at an effective size of 60
        assert float(mcmc.get_samples()["slope"].mean()) == pytest.approx(mean, abs=5 * sd / np.sqrt(60))


def test_two_scans_with_sites_are_refused_by_the_names_of_both():
    def model(y):
        moving_average(y)

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            return x, x

        _, x = scan(step, 0.0, None, length=8)
        moving_average(x)
        scan(lambda c, xy: (c, numpyro.sample("y", dist.Normal(xy[0], 0.5), obs=xy[1])), None, (x, y))

    message = r"two scans with sites: in the first 'x', in the second 'y'\. Merge them into one"
    with pytest.raises(ValueError, match=message):
        ParticleFilter(model, 4).run(random.key(0), Y)


def test_keys_drawn_in_a_scan_are_no_ordinary_computation():
    def model(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, x

        _, x = scan(step, 0.0, y)
        scan(lambda c, v: (c, random.normal(numpyro.prng_key())), None, x)

    with pytest.raises(ValueError, match="two scans with sites: in the first 'x', 'y', in the second keys drawn"):
        ParticleFilter(model, 4).run(random.key(0), Y)


def test_a_program_whose_only_scan_has_no_sites_is_evaluated_as_before():
    """An ordinary differential equation with its data after it: the evidence is the likelihood."""

    def model(y, rate):
        _, x = scan(lambda c, _: (c - rate * c, c), 1.0, None, length=8)
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    x = (1 - 0.3) ** np.arange(8)
    exact = float(dist.Normal(x, 0.5).log_prob(Y).sum())
    assert float(ParticleFilter(model, 2).run(random.key(0), Y, 0.3).log_evidence) == pytest.approx(exact, rel=1e-5)


def test_predictive_runs_every_program_unchanged():
    for program in (before, before_with_deterministic_site, inside, after, everywhere, under_conditions):
        assert Predictive(program, num_samples=2)(random.key(0), U, Y) is not None
