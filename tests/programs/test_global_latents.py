"""Global latents of scan programs: which they are, and their prior in unconstrained space, against one by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import potential_energy

from numpyro_smc.programs.global_latents import GlobalLatents

DATA = jnp.array([0.4, -0.2, 0.7])
Z = {"a": jnp.array(0.3), "loc": jnp.array([0.1, -0.4]), "q": jnp.array(-0.7), "top": jnp.array(0.2)}


def steps(a, q, x0, y):
    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(a * x, q))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, x0, y)


def hierarchy(y):
    """``a`` has a support and ``q`` a prior that depend on ``top``; ``x_0`` belongs to the particles."""
    top = numpyro.sample("top", dist.HalfNormal(2.0))
    a = numpyro.sample("a", dist.Uniform(-top, 1.0))
    q = numpyro.sample("q", dist.Gamma(2.0, top))
    with numpyro.plate("dimensions", 2):
        loc = numpyro.sample("loc", dist.Normal(1.0, 3.0))
    numpyro.sample("about q", dist.Normal(q, 1.0), obs=0.3)
    numpyro.deterministic("ratio", a / q)
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    numpyro.deterministic("start", loc[0] * x_0)
    steps(a, q, x_0 + loc[0], y)


def by_hand(z):
    """The prior density of unconstrained values, and these in their supports."""
    top, q = jnp.exp(z["top"]), jnp.exp(z["q"])
    unit = jax.nn.sigmoid(z["a"])
    a = -top + (1.0 + top) * unit
    log_prior = dist.HalfNormal(2.0).log_prob(top) + z["top"]
    log_prior += dist.Gamma(2.0, top).log_prob(q) + z["q"]
    log_prior += -jnp.log(1.0 + top) + jnp.log(1.0 + top) + jnp.log(unit) + jnp.log1p(-unit)
    log_prior += dist.Normal(1.0, 3.0).log_prob(z["loc"]).sum()
    return log_prior, {"a": a, "loc": z["loc"], "q": q, "top": top}


@pytest.fixture(scope="module")
def latents():
    return GlobalLatents(hierarchy, (DATA,), user="Test")


def test_global_are_what_steps_use_and_what_their_priors_depend_on(latents):
    # "loc" reaches the steps in the carry only, so it belongs to the particles as "x_0" does.
    assert latents.names == ("a", "q", "top")


def test_prior_has_the_jacobians_of_supports_that_depend_on_other_sites(latents):
    z = {name: Z[name] for name in latents.names}
    expected, values = by_hand(Z)
    expected -= dist.Normal(1.0, 3.0).log_prob(Z["loc"]).sum()
    np.testing.assert_allclose(latents.log_prior(z), expected, rtol=1e-5)
    for name, value in latents.constrain(z).items():
        np.testing.assert_allclose(value, values[name], rtol=1e-5)
    for name, value in latents.unconstrain(latents.constrain(z)).items():
        np.testing.assert_allclose(value, z[name], rtol=1e-4, atol=1e-5)


def test_a_carried_parameter_is_global_when_it_says_so():
    program = handlers.infer_config(
        hierarchy, config_fn=lambda site: {"particle": False} if site["name"] == "loc" else {}
    )
    latents = GlobalLatents(program, (DATA,))
    assert latents.names == ("a", "loc", "q", "top")
    np.testing.assert_allclose(latents.log_prior(Z), by_hand(Z)[0], rtol=1e-5)


def test_values_have_the_deterministic_sites_of_global_latents_alone(latents):
    values = latents.values({name: Z[name] for name in latents.names})
    assert sorted(values) == ["a", "q", "ratio", "top"]
    np.testing.assert_allclose(values["ratio"], values["a"] / values["q"], rtol=1e-6)


def test_methods_run_under_jit_vmap_and_grad(latents):
    """And the gradient is NumPyro's own, of the model without what follows the parameters."""

    def prior_only():
        top = numpyro.sample("top", dist.HalfNormal(2.0))
        numpyro.sample("a", dist.Uniform(-top, 1.0))
        numpyro.sample("q", dist.Gamma(2.0, top))

    def log_prior(z):
        return GlobalLatents(hierarchy, (DATA,)).log_prior(z)

    z = jax.jit(jax.vmap(latents.draw))(random.split(random.key(0), 5))
    gradients = jax.jit(jax.vmap(jax.grad(log_prior)))(z)
    expected = jax.vmap(jax.grad(lambda z: -potential_energy(prior_only, (), {}, z)))(z)
    for name in latents.names:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-4, atol=1e-5)


def test_draws_are_those_of_the_prior(latents):
    """4000 draws; five standard errors."""
    values = jax.vmap(lambda key: latents.constrain(latents.draw(key)))(random.split(random.key(1), 4000))
    expected = 2.0 * np.sqrt(2.0 / np.pi)
    assert abs(values["top"].mean() - expected) < 5 * values["top"].std() / np.sqrt(4000)
    middle = (values["a"] - (1.0 - values["top"]) / 2) / (1.0 + values["top"])  # uniform on (-1/2, 1/2)
    assert abs(middle.mean()) < 5 * np.sqrt(1 / 12 / 4000) and abs(middle.var() - 1 / 12) < 0.006


def test_scaled_and_masked_priors_count_as_in_numpyro_but_jacobians_are_not_scaled():
    def program(y):
        with handlers.scale(scale=3.0):
            q = numpyro.sample("q", dist.LogNormal(0.5, 2.0))
        steps(0.5, q, 0.0, y)

    z = {"q": jnp.array(0.3)}
    expected = 3.0 * dist.LogNormal(0.5, 2.0).log_prob(jnp.exp(0.3)) + 0.3
    np.testing.assert_allclose(GlobalLatents(program, (DATA,)).log_prior(z), expected, rtol=1e-5)


def test_latents_to_condition_on_are_not_among_the_global_ones(latents):
    given = GlobalLatents(hierarchy, (DATA,), params={"top": 0.7})
    assert given.names == ("a", "q")
    z = {"a": Z["a"], "q": Z["q"]}
    q = jnp.exp(z["q"])
    unit = jax.nn.sigmoid(z["a"])
    expected = dist.Gamma(2.0, 0.7).log_prob(q) + z["q"] + jnp.log(unit) + jnp.log1p(-unit)
    np.testing.assert_allclose(given.log_prior(z), expected, rtol=1e-5)
    conditioned = GlobalLatents(handlers.condition(hierarchy, {"top": jnp.array(0.7)}), (DATA,))
    assert conditioned.names == ("a", "q")
    np.testing.assert_allclose(conditioned.log_prior(z), expected, rtol=1e-5)


def no_globals(y):
    steps(0.5, 1.0, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def discrete(y):
    regime = numpyro.sample("regime", dist.Bernoulli(0.3))
    steps(0.5 + 0.4 * regime, numpyro.sample("q", dist.HalfNormal(1.0)), 0.0, y)


def subsampled(y):
    q = numpyro.sample("q", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 6, subsample_size=3):
        numpyro.sample("other", dist.Normal(q, 1.0), obs=jnp.ones(3))
    steps(0.5, q, 0.0, y)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (no_globals, r"Test: the model has no global latent.*ConditionalSMC\(model\).*infer=\{'particle': False\}"),
        (discrete, "Test: the global latent site 'regime' is discrete.*DiscreteGibbs"),
        (subsampled, "late 'rows' is subsampled"),
    ],
)
def test_programs_without_a_density_of_parameters_are_refused(program, message):
    with pytest.raises(ValueError, match=message):
        GlobalLatents(program, (DATA,), user="Test")


def test_improper_priors_have_a_density_but_no_draws():
    def program(y):
        q = numpyro.sample("q", dist.ImproperUniform(dist.constraints.positive, (), ()))
        steps(0.5, q, 0.0, y)

    latents = GlobalLatents(program, (DATA,), user="Test")
    np.testing.assert_allclose(latents.log_prior({"q": jnp.array(0.4)}), 0.4, rtol=1e-6)
    with pytest.raises(ValueError, match=r"Test: the prior of site 'q' is improper.*init_params"):
        latents.draw(random.key(0))


def test_starts_of_other_sites_or_shapes_are_refused(latents):
    z = {name: Z[name] for name in latents.names}
    latents.check(z)
    with pytest.raises(ValueError, match=r"'a', 'q', 'top': 'q' missing; 'other' unknown"):
        latents.check({"a": Z["a"], "top": Z["top"], "other": jnp.array(0.0)})
    with pytest.raises(ValueError, match=r"site 'a' has shape \(4,\); unconstrained values of it have shape \(\)"):
        latents.check(z | {"a": jnp.zeros(4)})
