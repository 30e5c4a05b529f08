"""Which arguments of a likelihood after the scan run over time is proved: matrices and vectors of another meaning with
as many rows as there are steps are left whole.

The log weights of every program here are NumPyro's own densities.
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
from numpyro.primitives import CondIndepStackFrame

from numpyro_smc import ParticleFilter
from numpyro_smc.programs.series import read_series
from tests.programs.numpyros_densities import assert_numpyros_densities
from tests.programs.user_programs import kalman

T = 5
RNG = np.random.default_rng(0)
SQUARE = RNG.normal(size=(T, T)).astype(np.float32)
LOADINGS = (0.5 * RNG.normal(size=(T, T))).astype(np.float32)
VECTOR = RNG.uniform(0.4, 1.2, T).astype(np.float32)
SERIES = RNG.normal(size=T).astype(np.float32)
REGIONS = np.array([4, 0, 2, 2, 1])
MASK = np.array([True, False, True, True, False])


def states(size=None):
    """A path of states: one number a step, or a vector."""

    def step(x, _):
        fn = dist.Normal(0.8 * x, 0.5)
        x = numpyro.sample("x", fn if size is None else fn.to_event(1))
        return x, x

    return scan(step, 0.0 if size is None else jnp.zeros(size), None, length=T)[1]


def regimes():
    def step(z, _):
        z = numpyro.sample("z", dist.Categorical(jnp.full(T, 0.4 / (T - 1)).at[z].set(0.6)))
        return z, z

    return scan(step, 0, None, length=T)[1]


def loadings(y, matrix):
    numpyro.sample("y", dist.Normal(states(T) @ matrix, 0.5).to_event(1), obs=y)


def loadings_in_a_dict(data):
    noise = data["noise"]
    numpyro.sample("y", dist.Normal(jnp.einsum("tk,jk->tj", states(T), data["matrix"]), noise), obs=data["y"])


def loadings_by_keyword(y, *, matrix):
    covariance = matrix @ matrix.T + jnp.eye(T)
    numpyro.sample("y", dist.MultivariateNormal(states(T) @ matrix, covariance), obs=y)


def scales_of_the_series(y, scales):
    numpyro.sample("y", dist.Normal(states(T), scales), obs=y)


def two_vectors(y, by_time, by_series):
    numpyro.sample("y", dist.Normal(states(T) * by_time[:, None], by_series), obs=y)


def means_of_the_regimes(y, means):
    numpyro.sample("y", dist.Normal(means[regimes()], 0.5), obs=y)


def emissions_of_the_regimes(y, probs):
    numpyro.sample("y", dist.Categorical(probs[regimes()]), obs=y)


def panel(y, offsets):
    """As many regions as steps, in a plate whose index is used."""
    x = states()
    with numpyro.plate("time", T, dim=-2), numpyro.plate("regions", T, dim=-1) as region:
        numpyro.sample("y", dist.Normal(x[:, None] + offsets[region], 0.5), obs=y)


def panel_transposed(y, offsets):
    """Regions in rows, so that time is the last axis of the data."""
    x = states()
    with numpyro.plate("regions", T, dim=-2), numpyro.plate("time", T, dim=-1):
        numpyro.sample("y", dist.Normal(x[None] + offsets[:, None], 0.5), obs=y.T)


def regression_with_regions(y, region, effects):
    x = states()
    with numpyro.plate("time", T):
        numpyro.sample("y", dist.Normal(x + effects[region], 0.5), obs=y)


def centred(y):
    """The mean of the data needs all of them, and the data run over time."""
    numpyro.sample("y", dist.Normal(states(), 0.5), obs=(y - y.mean()) / y.std())


def backwards(y):
    numpyro.sample("y", dist.Normal(states(), 0.5), obs=y[::-1])


def masked_and_weighted(y, mask, weights):
    x = states()
    with handlers.mask(mask=mask):
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
    numpyro.factor("more", (weights * dist.Normal(x, 1.0).log_prob(y)).sum() / 2)


def one_event_for_all(y, matrix):
    numpyro.sample("y", dist.Normal(states(T) @ matrix, 0.5).to_event(2), obs=y)


def summed_factor(y, matrix):
    log_prob = dist.Normal(states(T) @ matrix, 0.5).log_prob(y)
    numpyro.factor("seen", jnp.where(jnp.sum(matrix) > 100.0, 0.0, -(-log_prob.sum(-1)).sum()) + 0.0)


def data_that_is_closed_over(matrix):
    numpyro.sample("y", dist.Normal(states(T) @ matrix, VECTOR), obs=SQUARE)


def lags(y, matrix):
    """The first rows of the matrix are used for something else before the scan."""
    start = matrix[0].sum() + matrix[1, 1]

    def step(x, _):
        x = numpyro.sample("x", dist.Normal(0.8 * x + start, 0.5).to_event(1))
        return x, x

    _, x = scan(step, jnp.zeros(T), None, length=T)
    numpyro.sample("y", dist.Normal(x @ matrix, 0.5).to_event(1), obs=y)


def flattened(y, by_time, by_series):
    mean = states(2) * by_time[:, None] + by_series
    numpyro.sample("y", dist.Normal(mean.reshape(-1), 0.5), obs=y.reshape(-1))


PROGRAMS = [
    (loadings, (SQUARE, LOADINGS), {}),
    (loadings_in_a_dict, ({"y": SQUARE, "matrix": LOADINGS, "noise": VECTOR},), {}),
    (loadings_by_keyword, (SQUARE,), {"matrix": LOADINGS}),
    (scales_of_the_series, (SQUARE, VECTOR), {}),
    (two_vectors, (SQUARE, VECTOR, VECTOR[::-1].copy()), {}),
    (means_of_the_regimes, (SERIES, 3 * np.arange(T, dtype=np.float32)), {}),
    (emissions_of_the_regimes, (REGIONS, np.exp(SQUARE) / np.exp(SQUARE).sum(1, keepdims=True)), {}),
    (panel, (SQUARE, VECTOR), {}),
    (panel_transposed, (SQUARE, VECTOR), {}),
    (regression_with_regions, (SERIES, REGIONS, 3 * VECTOR), {}),
    (centred, (SERIES,), {}),
    (backwards, (SERIES,), {}),
    (masked_and_weighted, (SERIES, MASK, VECTOR), {}),
    (one_event_for_all, (SQUARE, LOADINGS), {}),
    (summed_factor, (SQUARE, LOADINGS), {}),
    (data_that_is_closed_over, (LOADINGS,), {}),
    (flattened, (SQUARE[:, :2], VECTOR, VECTOR[:2]), {}),
    (lags, (SQUARE, LOADINGS), {}),
]


@pytest.mark.parametrize("model, args, kwargs", PROGRAMS, ids=lambda value: getattr(value, "__name__", ""))
def test_weights_are_numpyros_own_densities(model, args, kwargs):
    assert_numpyros_densities(model, *args, **kwargs)


def test_evidence_with_a_square_matrix_of_loadings_is_the_kalman_filters():
    """20,000 particles; the standard error of the logarithm is below 0.02. Compiled with everything traced, too."""
    y, matrix = SQUARE[:3, :3], LOADINGS[:3, :3]

    def model(y, matrix):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5).to_event(1))
            return x, x

        _, x = scan(step, jnp.zeros(3), None, length=3)
        numpyro.sample("y", dist.Normal(x @ matrix, 1.0).to_event(1), obs=y)

    exact, means = kalman(y, np.zeros(3), np.zeros((3, 3)), 0.8 * np.eye(3), 0.25 * np.eye(3), matrix.T, np.eye(3))
    particle_filter = ParticleFilter(model, 20_000)
    result = particle_filter.run(random.key(0), y, matrix)
    assert float(result.log_evidence) == pytest.approx(exact, abs=0.1)
    np.testing.assert_allclose(result.mean("x"), means, atol=0.05)
    compiled = jax.jit(particle_filter.log_evidence)(random.key(0), y, matrix)
    assert float(compiled) == pytest.approx(float(result.log_evidence), abs=1e-4)


def test_gradient_reaches_a_square_matrix_as_numpyros_does():
    """One particle: the log evidence is the log likelihood of its path."""
    particle_filter = ParticleFilter(loadings, 1)
    path = particle_filter.run(random.key(0), SQUARE, LOADINGS).particles["x"][:, 0]

    def log_likelihood(matrix):
        return dist.Normal(path @ matrix, 0.5).log_prob(SQUARE).sum()

    found = jax.jit(jax.grad(lambda matrix: particle_filter.log_evidence(random.key(0), SQUARE, matrix)))(LOADINGS)
    np.testing.assert_allclose(found, jax.grad(log_likelihood)(jnp.asarray(LOADINGS)), rtol=1e-3, atol=1e-3)


def sticky_regimes(y, means):
    """The data depend on the regime of the step before: on most paths that is the regime of the step itself."""

    def step(z, _):
        z = numpyro.sample("z", dist.Categorical(jnp.where(jnp.arange(2) == z, 0.999, 0.001)))
        return z, z

    _, z = scan(step, 0, None, length=T)
    numpyro.sample("y", dist.Normal(means[jnp.roll(z, 1)], 0.5), obs=y)


def trend(y):
    """A trend whose coefficient is zero at first: at that value the factors do add up."""
    slope = numpyro.param("slope", 0.0)
    numpyro.sample("y", dist.Normal(states() + slope * jnp.arange(len(y)), 0.5), obs=y)


def differences_of_states(y):
    x = states()
    numpyro.sample("y", dist.Normal(jnp.diff(x, prepend=0.0), 0.5), obs=y)


@pytest.mark.parametrize(
    "model, args, params, message",
    [
        (sticky_regimes, (SERIES, np.array([0.0, 3.0], np.float32)), {}, "a term of it depends on several steps"),
        (differences_of_states, (SERIES,), {}, "a term of it depends on several steps"),
        (trend, (SERIES,), {"slope": 0.0}, "its factors at the single steps do not add up to the whole"),
    ],
)
def test_what_is_not_proved_is_refused_by_the_name_of_the_site(model, args, params, message):
    with pytest.raises(ValueError, match=rf"site 'y'\) does not split over time: {message}.*Move the statement into"):
        ParticleFilter(model, 4).run(random.key(0), *args, params=params)


RATE = jnp.exp(SQUARE[:, 0])
DISTRIBUTIONS = {
    "Poisson": lambda x, a: (dist.Poisson(jnp.exp(x) * a), jnp.arange(T)),
    "NegativeBinomial2": lambda x, a: (dist.NegativeBinomial2(jnp.exp(x), 2.0), jnp.arange(T)),
    "Binomial": lambda x, a: (dist.Binomial(10, logits=x * a), jnp.arange(T)),
    "BetaBinomial": lambda x, a: (dist.BetaBinomial(jnp.exp(x), a, 10), jnp.arange(T)),
    "Categorical": lambda x, a: (dist.Categorical(logits=x[:, None] * LOADINGS), jnp.arange(T)),
    "OrderedLogistic": lambda x, a: (dist.OrderedLogistic(x, jnp.array([-1.0, 0.0, 1.0])), jnp.arange(T) % 4),
    "StudentT": lambda x, a: (dist.StudentT(4.0, x, a), SERIES),
    "Gamma": lambda x, a: (dist.Gamma(2.0, jnp.exp(x)), RATE),
    "LogNormal": lambda x, a: (dist.LogNormal(x, a), RATE),
    "TruncatedNormal": lambda x, a: (dist.TruncatedNormal(x, a, low=-5.0, high=5.0), SERIES),
    "VonMises": lambda x, a: (dist.VonMises(x, jnp.exp(x)), SERIES / 3),
    "ZeroInflatedPoisson": lambda x, a: (dist.ZeroInflatedPoisson(0.3, jnp.exp(x)), jnp.arange(T)),
    "MixtureSameFamily": lambda x, a: (
        dist.MixtureSameFamily(
            dist.Categorical(probs=jnp.array([0.3, 0.7])), dist.Normal(x[:, None] * jnp.array([1.0, -1.0]), 0.5)
        ),
        SERIES,
    ),
    "MultivariateNormal": lambda x, a: (
        dist.MultivariateNormal(x[:, None] * LOADINGS[0], jnp.eye(T) * jnp.exp(x)[:, None, None]),
        SQUARE,
    ),
    "Multinomial": lambda x, a: (dist.Multinomial(logits=x[:, None] * LOADINGS, total_count=5), jnp.eye(T) * 5),
    "Independent": lambda x, a: (dist.Normal(x[:, None] * LOADINGS, a[:, None]).to_event(2), SQUARE),
    "GaussianRandomWalk": None,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_is_read_through(name):
    """The density at one step is seen to depend on its own state and on its own entry of an argument."""

    def sites(outputs, arguments):
        if name == "GaussianRandomWalk":
            fn, value = dist.GaussianRandomWalk(0.5, T).to_event(0), outputs * arguments
        else:
            fn, value = DISTRIBUTIONS[name](outputs, arguments)
        return {"y": {"fn": fn, "value": value, "scale": None, "cond_indep_stack": []}}

    found = read_series(sites, jnp.zeros(T), jnp.asarray(VECTOR), T)
    if name == "GaussianRandomWalk":
        assert found.mixed == ("y",)
    else:
        assert found.mixed == ()


def test_plates_over_time_are_told_from_plates_of_the_same_size():
    def sites(outputs, arguments):
        frames = [CondIndepStackFrame("regions", -1, T), CondIndepStackFrame("time", -2, T)]
        fn = dist.Normal(outputs[:, None] + arguments[0], 0.5)
        return {"y": {"fn": fn, "value": arguments[1], "scale": None, "cond_indep_stack": frames}}

    found = read_series(sites, jnp.zeros(T), (jnp.asarray(VECTOR), jnp.asarray(SQUARE), jnp.asarray(VECTOR)), T)
    assert found.plates == {"time"}
    assert found.arguments == (False, True, False)
