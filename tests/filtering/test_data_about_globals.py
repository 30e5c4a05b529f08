"""Data about global latents, under a plate of series, are part of every evidence: of their element's where they
stand in the plate, and of the total always.

Two particles that are never resampled: the weights are NumPyro's own densities. Evidences are Kalman filters'.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_smc import FIVO, ParticleFilter, bootstrap, log_evidence
from tests.programs.numpyros_densities import assert_numpyros_densities
from tests.programs.user_programs import kalman

Y = 0.5 * np.random.default_rng(2).normal(size=(5, 2)).astype(np.float32)
S = np.array([0.3, 1.2], np.float32)


def series(a, y, size=2):
    def step(x, y_t):
        with numpyro.plate("series", size):
            x = numpyro.sample("x", dist.Normal(a * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, jnp.zeros(size), y)


def inside(y, s):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("series", 2):
        numpyro.sample("s", dist.Normal(a, 1.0), obs=s)
    series(a, y)


def outside(y, s):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("s", dist.Normal(a, 1.0).expand([2]).to_event(1), obs=s)
    numpyro.factor("more", -0.5 * a**2)
    series(a, y)


def box_cox(z):
    """Positive data, transformed with an exponent for each series: the Jacobian is a factor in the plate."""
    with numpyro.plate("series", 2):
        exponent = numpyro.sample("exponent", dist.Uniform(0.2, 1.0))
        numpyro.factor("jacobian", (exponent - 1.0) * jnp.log(z).sum(0))
    series(0.8, (z**exponent - 1.0) / exponent)


def both(y, s):
    """One site in the plate, one in a plate of its own, one observed through a latent of the particles."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("series", 2):
        numpyro.sample("s", dist.Normal(a, 1.0), obs=s)
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("first", dist.Normal(x_0, 1.0), obs=0.5 * s)
    with numpyro.plate("others", 3):
        numpyro.sample("other", dist.Normal(a, 2.0), obs=jnp.arange(3.0))

    def step(x, y_t):
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Normal(a * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, x_0, y)


def two_plates(y, s):
    """Groups of series; data about each group, in its plate but in no plate of series."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 3, dim=-2):
        numpyro.sample("group", dist.Normal(a, 1.0), obs=jnp.arange(3.0)[:, None])
        with numpyro.plate("series", 2, dim=-1):
            numpyro.sample("s", dist.Normal(a, 1.0), obs=s)

    def step(x, y_t):
        with numpyro.plate("groups", 3, dim=-2), numpyro.plate("series", 2, dim=-1):
            x = numpyro.sample("x", dist.Normal(a * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, jnp.zeros((3, 2)), jnp.broadcast_to(y[:, None], (len(y), 3, 2)))


def exact_series(a, y=Y):
    return np.array([kalman(y[:, j], 0.0, 0.0, a, 0.25, 1.0, 0.25)[0] for j in range(y.shape[1])])


def exact_inside(a):
    return exact_series(a) + np.asarray(dist.Normal(a, 1.0).log_prob(S))


Z = np.exp(Y)
EXPONENTS = np.array([0.4, 0.7], np.float32)


@pytest.mark.parametrize(
    "model, args, params",
    [(inside, (Y, S), {"a": 0.7}), (box_cox, (Z,), {"exponent": EXPONENTS})],
)
def test_in_the_plate_they_belong_to_their_elements(model, args, params):
    result = assert_numpyros_densities(model, *args, params=params)
    assert float(result.total_log_evidence) == pytest.approx(float(result.log_evidence.sum()), rel=1e-5)


@pytest.mark.parametrize(
    "model, names", [(outside, "'more', 's'"), (both, "'other'"), (two_plates, "'group'")], ids=["outside", "both", "2"]
)
def test_outside_of_the_plate_they_are_in_the_total_and_a_warning_says_so(model, names):
    with pytest.warns(UserWarning, match=f"the data {names} stand outside of it.*total_log_evidence"):
        result = assert_numpyros_densities(model, Y, S, params={"a": 0.7})
    assert "total" in repr(result)


@pytest.mark.parametrize("entry", ["run", "pure", "function", "stream"])
def test_every_evidence_is_of_all_data(entry):
    """20,000 particles; standard errors of the logarithms are below 0.03."""
    key, params = random.key(1), {"a": 0.7}
    particle_filter = ParticleFilter(inside, 20_000, history=False)
    if entry == "run":
        found = particle_filter.run(key, Y, S, params=params).log_evidence
    elif entry == "pure":
        found = jax.jit(lambda a: particle_filter.log_evidence(key, Y, S, params={"a": a}))(0.7)
    elif entry == "function":
        found = log_evidence(key, inside, params, Y, S, num_particles=20_000)
    else:
        state = particle_filter.init(key, Y, S, params=params)
        for y_t in Y:
            state = particle_filter.update(state, y_t)
        found = state.log_evidence
    np.testing.assert_allclose(found, exact_inside(0.7), atol=0.15)


def test_exponents_of_box_cox_are_weighed_by_their_jacobians():
    transformed = (Z**EXPONENTS - 1.0) / EXPONENTS
    exact = exact_series(0.8, transformed) + (EXPONENTS - 1.0) * np.log(Z).sum(0)
    result = ParticleFilter(box_cox, 20_000, history=False).run(random.key(0), Z, params={"exponent": EXPONENTS})
    np.testing.assert_allclose(result.log_evidence, exact, atol=0.15)


def test_the_objective_counts_them_once():
    """FIVO's bound is the total of the same weights; with a scale of everything, too."""
    for model in (inside, outside):
        params = {"a": jnp.asarray(0.7)}
        bound = -FIVO(64, resampler="systematic").loss(random.key(3), params, model, bootstrap(model), Y, S)
        particle_filter = ParticleFilter(model, 64)
        if model is inside:
            total = particle_filter.run(random.key(3), Y, S, params=params).total_log_evidence
            scaled = ParticleFilter(handlers.scale(model, scale=3.0), 64).run(random.key(3), Y, S, params=params)
            assert float(scaled.total_log_evidence) == pytest.approx(3 * float(total), rel=1e-5)
        else:
            with pytest.warns(UserWarning, match="stand outside"):
                total = particle_filter.run(random.key(3), Y, S, params=params).total_log_evidence
        assert float(bound) == pytest.approx(float(total), rel=1e-5)


def test_rows_of_a_subsample_bring_their_own_data():
    def model(y, s):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        plate = numpyro.plate("series", 4, subsample_size=2)
        with plate as rows:
            numpyro.sample("s", dist.Normal(a, 1.0), obs=s[rows])

        def step(x, y_t):
            with plate:
                x = numpyro.sample("x", dist.Normal(a * x, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t[rows])
            return x, None

        scan(step, jnp.zeros(2), y)

    y, s = np.concatenate([Y, -Y], 1), np.concatenate([S, -S])
    result = ParticleFilter(model, 20_000).run(random.key(0), y, s, params={"a": 0.7})
    with handlers.seed(rng_seed=0):
        own = exact_series(0.7, y) + np.asarray(dist.Normal(0.7, 1.0).log_prob(s))
    found = np.asarray(result.log_evidence)
    rows = [int(np.argmin(np.abs(own - value))) for value in found]
    np.testing.assert_allclose(found, own[rows], atol=0.15)
    assert float(result.total_log_evidence) == pytest.approx(2 * found.sum(), rel=1e-5)


@pytest.mark.parametrize("model", [inside, outside])
def test_the_score_counts_them(model):
    """4,000 particles; the standard error is below 0.05."""

    def exact(a):
        more = -0.5 * a**2 if model is outside else 0.0
        return exact_inside(a).sum() + more

    slope = (exact(0.7 + 1e-3) - exact(0.7 - 1e-3)) / 2e-3
    particle_filter = ParticleFilter(model, 4000)
    if model is outside:
        with pytest.warns(UserWarning, match="stand outside"):
            result = particle_filter.run(random.key(0), Y, S, params={"a": 0.7})
            found = result.score("a")
    else:
        found = particle_filter.run(random.key(0), Y, S, params={"a": 0.7}).score("a")
    assert float(found.value["a"]) == pytest.approx(slope, abs=0.25)
