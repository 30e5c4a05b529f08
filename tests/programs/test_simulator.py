"""Simulators read from NumPyro programs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import potential_energy

from numpyro_smc.programs.simulator import Simulator


def walk():
    """Hidden draws of every kind: a site, a scan, a plate and a key."""
    slope = numpyro.sample("slope", dist.Normal(0.5, 0.2))
    scales = numpyro.sample("scales", dist.LogNormal(jnp.array([0.0, 1.0, -1.0]), 0.5).to_event(1))
    offset = numpyro.sample("offset", dist.MultivariateNormal(jnp.zeros(2), jnp.array([[2.0, 0.5], [0.5, 1.0]])))
    numpyro.deterministic("total", scales.sum() + slope)
    start = numpyro.sample("start", dist.Normal(0.0, 1.0))
    numpyro.deterministic("hidden_start", start * slope)

    def step(level, _):
        level = numpyro.sample("level", dist.Normal(slope * level, scales[0]))
        return level, level

    _, levels = scan(step, start, None, length=6)
    noise = scales[1] * random.normal(numpyro.prng_key(), (6,))
    with numpyro.plate("time", 6):
        numpyro.sample("x", dist.Normal(levels + noise + offset[0], scales[2] + offset[1] ** 2))


WALK = Simulator(walk, ["slope", "scales", "offset"])


def test_parameters_and_output_are_those_of_the_program():
    assert WALK.elements == ("slope", "scales[0]", "scales[1]", "scales[2]", "offset[0]", "offset[1]")
    assert (WALK.size, WALK.event_shape, WALK.visible) == (6, (6,), {"slope", "scales", "offset", "total"})
    found = jax.jit(WALK.simulate)(random.key(3))
    trace = handlers.trace(handlers.seed(walk, random.key(3))).get_trace()
    np.testing.assert_allclose(found.x, trace["x"]["value"], rtol=1e-5)
    np.testing.assert_allclose(WALK.unravel(found.theta)["scales"], trace["scales"]["value"], rtol=1e-5)
    given = WALK.simulate(random.key(4), found.theta)
    np.testing.assert_array_equal(given.theta, found.theta)
    assert not np.allclose(given.x, found.x)


def test_posterior_is_prior_jacobian_and_ratio_and_nothing_else():
    target = jnp.arange(6.0) / 3
    program = WALK.posterior(lambda theta: -jnp.sum((theta - target) ** 2))
    reals = {"slope": jnp.asarray(0.3), "scales": jnp.array([0.1, -0.4, 0.8]), "offset": jnp.array([1.0, -0.5])}
    values = reals | {"scales": jnp.exp(reals["scales"])}
    priors = dist.Normal(0.5, 0.2).log_prob(values["slope"])
    priors += dist.LogNormal(jnp.array([0.0, 1.0, -1.0]), 0.5).log_prob(values["scales"]).sum()
    covariance = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    priors += dist.MultivariateNormal(jnp.zeros(2), covariance).log_prob(values["offset"])
    expected = priors + reals["scales"].sum() - jnp.sum((WALK.ravel(values) - target) ** 2)
    assert -potential_energy(program, (), {}, reals) == pytest.approx(float(expected), rel=1e-5)


def test_posterior_compiles_to_a_program_without_the_simulator():
    program = WALK.posterior(lambda theta: -jnp.sum(theta**2))
    reals = {"slope": jnp.asarray(0.3), "scales": jnp.zeros(3), "offset": jnp.zeros(2)}
    gradient = jax.jit(jax.grad(lambda reals: potential_energy(program, (), {}, reals)))
    compiled = gradient.lower(reals).compile().as_text()
    assert "while" not in compiled and "threefry" not in compiled and "rng" not in compiled


def test_handlers_outside_see_parameters_only():
    program = WALK.posterior(lambda theta: jnp.zeros(()))
    seeded = handlers.seed(handlers.reparam(program, {"slope": LocScaleReparam(0.0)}), random.key(0))
    trace = handlers.trace(seeded).get_trace()
    assert set(trace) == {"slope", "slope_decentered", "scales", "offset", "total", "log_ratio"}
    first, second = (handlers.trace(handlers.seed(program, random.key(i))).get_trace() for i in (1, 2))
    assert float(first["slope"]["value"]) != float(second["slope"]["value"])


def test_priors_of_some_elements_are_marginals_of_the_prior():
    chosen = WALK.mask(["offset[1]", "scales[2]", "slope"])
    found = WALK.prior_of_elements(chosen)(jnp.array([0.4, 0.7, 0.2]))
    expected = dist.Normal(0.5, 0.2).log_prob(0.4) + dist.LogNormal(-1.0, 0.5).log_prob(0.7)
    assert float(found) == pytest.approx(float(expected + dist.Normal(0.0, 1.0).log_prob(0.2)), rel=1e-5)
    whole = WALK.prior_of_elements(WALK.mask(None))(jnp.array([0.4, 1.0, 2.0, 0.7, 0.1, 0.2]))
    trace = handlers.trace(handlers.seed(walk, random.key(0))).get_trace()
    values = {"slope": 0.4, "scales": jnp.array([1.0, 2.0, 0.7]), "offset": jnp.array([0.1, 0.2])}
    assert float(whole) == pytest.approx(
        sum(float(trace[n]["fn"].log_prob(v).sum()) for n, v in values.items()), rel=1e-5
    )


def test_supports_bound_the_elements():
    def bounded():
        numpyro.sample("u", dist.Uniform(jnp.array([-1.0, 0.0]), 2.0).to_event(1))
        scale = numpyro.sample("s", dist.HalfNormal(1.0))
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, scale)), 1.0))

    bounds = Simulator(bounded, ["u", "s"]).support()
    np.testing.assert_array_equal(bounds, [[-1.0, 2.0], [0.0, 2.0], [0.0, np.inf]])


def hierarchical():
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
    theta = numpyro.sample("theta", dist.Normal(centre, 1.0))
    numpyro.deterministic("x", theta + random.normal(numpyro.prng_key()))


def test_a_prior_that_depends_on_a_hidden_site_is_refused_by_name():
    with pytest.raises(ValueError, match="prior of parameter 'theta' depends on the hidden site 'centre'"):
        Simulator(hierarchical, ["theta"])
    with pytest.raises(ValueError, match="'theta' depends on other parameters"):
        reading = Simulator(hierarchical, ["centre", "theta"])
        reading.prior_of_elements(reading.mask(["theta"]))


def dirichlet():
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    numpyro.deterministic("x", shares + random.normal(numpyro.prng_key(), (3,)))


def test_some_elements_of_a_joint_prior_have_no_density():
    reading = Simulator(dirichlet, ["shares"])
    with pytest.raises(ValueError, match=r"'shares' \(Dirichlet\) is not factorised"):
        reading.prior_of_elements(reading.mask(["shares[0]"]))


def counts():
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    number = numpyro.sample("number", dist.Poisson(rate))
    with numpyro.plate("rows", 10, subsample_size=5):
        numpyro.sample("x", dist.Normal(number, 1.0))


@pytest.mark.parametrize(
    ("model", "params", "options", "message"),
    [
        (walk, ["slop"], {}, "no site 'slop'"),
        (walk, ["level"], {}, "'level' stands inside a scan"),
        (walk, ["total"], {}, "'total' is deterministic"),
        (walk, [], {}, "params must name at least one site"),
        (walk, ["slope", "slope"], {}, "each once"),
        (walk, ["slope"], {"observed": "slope"}, "named as parameter and as something else"),
        (walk, ["slope", "scales", "offset"], {"observed": "y"}, "no site 'y'"),
        (counts, ["number"], {}, "'number' is discrete"),
        (counts, ["rate"], {}, "plate 'rows' is subsampled"),
        (handlers.condition(walk, {"x": jnp.zeros(6)}), ["slope"], {}, r"site 'x' has obs=\.\.\."),
    ],
)
def test_what_is_no_simulator_is_refused(model, params, options, message):
    with pytest.raises(ValueError, match=message):
        Simulator(model, params, **options)


@pytest.mark.parametrize(
    ("names", "message"), [([], "of no parameter"), (["scales[3]"], "no parameter 'scales\\[3\\]'"), (["s"], "'s'")]
)
def test_unknown_elements_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        WALK.mask(names)


def test_contexts_are_drawn_and_known():
    def model():
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        noise = numpyro.sample("noise", dist.Gamma(2.0, 4.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(mean, noise).to_event(1))

    reading = Simulator(model, ["mean"], context=["noise"])
    found = reading.simulate(random.key(0))
    assert found.context.shape == (2,) and reading.has_tractable_likelihood
    np.testing.assert_array_equal(reading.ravel_context({"noise": found.context}), found.context)
    with pytest.raises(ValueError, match="context site 'noise' has no value"):
        reading.ravel_context({})
    with pytest.raises(ValueError, match=r"has shape \(3,\), but \(2,\)"):
        reading.ravel_context({"noise": jnp.ones(3)})
