"""A guide's support against the model's: masses are not weighed against densities, and less than all is said so."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan

from numpyro_smc import AIS, FIVO, IWELBO, OVIS, ParticleFilter, importance, kl_q_p

X = jnp.array([0.3, -1.2, 2.0])
EXACT = float(dist.Normal(0.0, 2.0**0.5).log_prob(X).sum())


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(fn):
    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", fn)

    return guide


def series(y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        return x, None

    scan(step, 0.0, y)


def series_guide_of(fn):
    def guide(y):
        scan(lambda x, _: (numpyro.sample("x", fn) * 1.0, None), 0.0, y)

    return guide


MIXED = r"site '{}' is continuous in the model \(Normal\) and discrete in the guide \({}\).*Use a continuous"
CATEGORICAL = guide_of(dist.Categorical(logits=jnp.zeros(5)))
KEY = random.key(0)


@pytest.mark.parametrize(
    "run",
    [
        lambda: importance(KEY, model, X, guide=CATEGORICAL, num_samples=100),
        lambda: kl_q_p(KEY, model, CATEGORICAL, {}, X, num_particles=10),
        lambda: OVIS(5).loss(KEY, {}, model, CATEGORICAL, X),
    ],
    ids=["importance", "kl_q_p", "OVIS"],
)
def test_a_mass_is_not_weighed_against_a_density(run):
    with pytest.raises(ValueError, match=MIXED.format("z", "CategoricalLogits")):
        run()


def test_nor_in_a_filter_nor_the_other_way_round():
    counts = series_guide_of(dist.Poisson(2.0))
    for run in (
        lambda: ParticleFilter(series, 10, guide=counts).run(KEY, X),
        lambda: FIVO(10, resampling_gradient="stop_gradient").loss(KEY, {}, series, counts, X),
    ):
        with pytest.raises(ValueError, match=MIXED.format("x", "Poisson")):
            run()

    def discrete(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Bernoulli(0.3)), 1.0), obs=x)

    with pytest.raises(
        ValueError, match=r"'z' is discrete in the model \(BernoulliProbs\) and continuous in the guide"
    ):
        IWELBO(5).loss(KEY, {}, discrete, guide_of(dist.Normal(0.0, 1.0)), X)


def test_a_smaller_support_is_warned_of_and_never_trustworthy():
    for fn, expected in ((dist.Exponential(1.0), r"GreaterThan|Positive"), (dist.Uniform(-1.5, 2.5), "Interval")):
        with pytest.warns(UserWarning, match=f"guide's support of site 'z', ({expected}).* is smaller than"):
            found = importance(KEY, model, X, guide=guide_of(fn), num_samples=2000)
        assert found.verdict.startswith("Not to be trusted: the guide's support of site 'z'")
        assert found.value < EXACT - 0.1
    with pytest.warns(UserWarning, match="AIS: the guide's support of site 'z'"):
        found = AIS(model, guide_of(dist.Exponential(1.0)), num_temperatures=10, num_chains=4).run(KEY, X)
    assert "Not to be trusted: the guide's support" in found.verdict
    with pytest.warns(UserWarning, match="ParticleFilter: the guide's support of site 'x'"):
        ParticleFilter(series, 10, guide=series_guide_of(dist.HalfNormal(2.0))).run(KEY, jnp.abs(X))


def test_the_same_or_a_larger_support_passes_without_a_word():
    found = importance(KEY, model, X, guide=guide_of(dist.Normal(0.5 * X, 0.8)), num_samples=2000)
    assert found.verdict.startswith("Trustworthy") and abs(found.value - EXACT) < 5 * found.standard_error

    def bounded(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Uniform(-4.0, 4.0)), 1.0), obs=x)

    exact = np.log((dist.Normal().cdf(4.0 - X) - dist.Normal().cdf(-4.0 - X)) / 8.0).sum()
    for fn in (dist.Normal(X, 1.2), dist.Uniform(-4.0, 5.0)):
        found = importance(KEY, bounded, X, guide=guide_of(fn), num_samples=20_000)
        assert abs(found.value - exact) < 5 * found.standard_error
