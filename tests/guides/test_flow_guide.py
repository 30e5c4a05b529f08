"""Flow guides: unbiased weights, gradients that reach the encoder, scores of given values, plates, and refusals."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions.transforms import ComposeTransform
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

from numpyro_smc import DAIS, IWELBO, RWS, STL, VIMCO, DReG
from numpyro_smc.guides.flow import FAMILIES, FlowGuide, flow
from numpyro_smc.guides.transforms import PlanarTransform
from numpyro_smc.programs.density import Pair, log_weights
from numpyro_smc.programs.guide_target import GuideTarget
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

# z ~ N(0, I) and x | z ~ N(z_1 - z_2 / 2 + z_3 / 4, 0.7) for each of three data.
X = jnp.array([[0.5], [-1.2], [2.0]])
LOADING, NOISE = jnp.array([1.0, -0.5, 0.25]), 0.7
LOG_EVIDENCE = dist.Normal(0.0, jnp.sqrt(LOADING @ LOADING + NOISE**2)).log_prob(X[:, 0])
FLOWS = [family for family in FAMILIES if family != "affine"]


def model(x, subsample_size=None):
    with numpyro.plate("data", len(x), subsample_size=subsample_size):
        rows = numpyro.subsample(x, event_dim=1)
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ LOADING[:, None], NOISE).to_event(1), obs=rows)


def encoder(rows):
    weight = numpyro.param("weight", 0.5 * LOADING[None])
    features = numpyro.param("features", jnp.array([[0.4, -0.8]]))
    return rows @ weight, jnp.ones((len(rows), 3)), jnp.tanh(rows @ features)


def initial_params(guide, model=model, x=X):
    """Parameters far from the identity."""
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    params = jax.jit(lambda: svi.get_params(svi.init(random.key(0), x)))()
    return {
        name: jax.tree.map(lambda leaf: leaf + 0.15 * jnp.sin(1.7 * jnp.arange(leaf.size)).reshape(leaf.shape), value)
        for name, value in params.items()
    }


@cache
def case(family):
    guide = FlowGuide(encoder, family, num_transforms=1, hidden=6)
    params = initial_params(guide)
    if family == "planar":
        params["z_planar_0$params"]["bias"] = jnp.array([1.2, -0.9, 0.2, 0.9, -0.5, 0.3, 0.4])  # u, w, b
    return guide, params


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_unbiased_and_their_gradient_reaches_the_encoder(family):
    """4,000 weights of each of three data, five standard errors: a false alarm in 6e-7 a datum."""
    guide, params = case(family)

    @jax.jit
    def weights_and_gradient(params):
        def bound(params):
            weights = log_weights(random.key(1), model, guide, params, (X,), {}, num_particles=4000).values
            return jnp.mean(weights), weights

        return jax.grad(bound, has_aux=True)(params)

    gradient, weights = weights_and_gradient(params)
    for row in range(3):
        assert_unbiased_evidence(weights[:, row], LOG_EVIDENCE[row])
        assert weights[:, row].mean() < LOG_EVIDENCE[row]
    sizes = {name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(g)) for name, g in gradient.items()}
    assert (sizes.pop("features") > 1e-3) == (family != "affine")  # which ignores the context
    assert min(sizes.values()) > 1e-3, sizes
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("loss", [Trace_ELBO(), IWELBO(1)], ids=["Trace_ELBO", "IWELBO"])
def test_warm_up_weighs_the_whole_of_log_q_and_nothing_else(loss):
    """Draws do not depend on the weight, so the loss is exactly weight * log q - log p of the same draw."""
    guide, params = case("planar")

    def silent(x, weight):
        with handlers.mask(mask=False):
            model(x)

    @jax.jit
    def terms(weight):
        def warmed_guide(x, weight):
            handlers.scale(guide, scale=weight)(x)

        both, log_q = (
            loss.loss(random.key(3), params, program, warmed_guide, X, weight)
            for program in (lambda x, weight: model(x), silent)
        )
        return log_q, both - log_q

    (log_q, minus_log_p), (tempered, same), (nothing, _) = map(terms, (1.0, 0.3, 0.0))
    assert float(tempered) == pytest.approx(0.3 * float(log_q), rel=1e-5) and abs(log_q) > 1.0 and nothing == 0.0
    assert float(same) == pytest.approx(float(minus_log_p), rel=1e-5)
    plain = loss.loss(random.key(3), params, model, guide, X)
    assert float(log_q + minus_log_p) == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize("family", FLOWS)
def test_a_given_value_has_the_density_and_gradient_with_which_it_was_drawn(family):
    """With y = T(z) and log q(y) = h(z), the gradient g of log q solves T'(z)^T g = h'(z)."""
    guide, params = case(family)

    @jax.jit
    def densities_and_gradients(params):
        with handlers.trace() as trace, handlers.seed(rng_seed=2):
            handlers.substitute(guide, data=params)(X)
        fn, y, z = trace["z"]["fn"], trace["z"]["value"], trace["z"]["intermediates"][0][0]
        transform = ComposeTransform(fn.transforms)

        def drawn(z):
            y, intermediates = transform.call_with_intermediates(z)
            return jnp.sum(fn.base_dist.log_prob(z) - transform.log_abs_det_jacobian(z, y, intermediates))

        def given(y):  # as reweighted wake-sleep, samplers and reverse annealing ask for it
            return log_density(guide, (X,), {}, {**params, "z": y})[0]

        _, pulled_back = jax.vjp(transform, z)
        found = jax.value_and_grad(given)(y)
        return jax.value_and_grad(drawn)(z), (found[0], pulled_back(found[1])[0])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), *densities_and_gradients(params))


def test_sticking_the_landing_at_one_particle_has_the_gradient_of_the_bound():
    """On average. 4,000 replicates, five standard errors."""
    guide, params = case("coupling")

    def gradients(loss, seed):
        one = jax.grad(lambda params, key: loss.loss(key, params, model, guide, X))
        return jax.jit(jax.vmap(lambda key: one(params, key)["weight"]))(random.split(random.key(seed), 4000))

    sticking, plain = gradients(STL(1), 3), gradients(IWELBO(1), 4)
    error = plain.std(0) / np.sqrt(4000)
    for i in range(3):
        assert_mean(sticking[:, 0, i], float(plain[:, 0, i].mean()), reference_error=float(error[0, i]))
    assert np.abs(plain.mean(0)).max() > 10 * error.max()  # so a lost term would show


@pytest.mark.parametrize(
    ("loss", "family"),
    [(DReG(3), "coupling"), (VIMCO(3), "coupling"), (RWS(3, sleep_phi=1.0), "iaf"), (DAIS(1, 1), "planar")],
)
def test_losses_take_flow_guides(loss, family):
    guide, params = case(family)
    if isinstance(loss, DAIS):
        params = params | initial_params(loss.wrap(guide))
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss.loss(random.key(0), p, model, guide, X)))(params)
    assert np.isfinite(value)
    for name, leaves in gradient.items():
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(leaves)), name
        assert "annealing" in name or max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(leaves)) > 0, name


def test_a_flow_guide_is_an_end_of_an_annealing_path():
    guide, params = case("planar")
    target = GuideTarget(Pair(model, guide, (X,), {}, random.key(0)), params, random.key(1))

    @jax.jit
    def ends(rng_key):
        state = target.draw(rng_key, jnp.asarray(0))
        gradient = jax.grad(lambda state: jnp.sum(target.ends(state).base))(state)["z"]
        trace = target.pair.draw(rng_key, jnp.asarray(0), params)
        return target.ends(state), gradient, trace.trace["z"]["value"], state["z"]

    (base, log_joint), gradient, value, state = ends(random.key(5))
    np.testing.assert_array_equal(state, value)
    expected = dist.Normal(0.0, 1.0).log_prob(value).sum(-1) + dist.Normal(value @ LOADING, NOISE).log_prob(X[:, 0])
    np.testing.assert_allclose(log_joint, expected, atol=1e-5)
    assert base.shape == (3,) and bool(jnp.isfinite(gradient).all()) and float(jnp.abs(gradient).min()) > 0


def test_model_and_guide_share_the_subsample():
    guide, params = case("coupling")
    trace = handlers.trace(handlers.substitute(handlers.seed(guide, 1), params)).get_trace(X, subsample_size=2)
    assert trace["z"]["value"].shape == (2, 3) and trace["z"]["scale"] == 1.5
    rows = trace["data"]["value"]
    assert list(rows) != [0, 1]
    replayed = handlers.trace(handlers.replay(handlers.seed(model, 0), trace)).get_trace(X, subsample_size=2)
    np.testing.assert_array_equal(replayed["x"]["value"], X[rows])
    np.testing.assert_allclose(trace["z"]["fn"].base_dist.base_dist.loc, X[rows] @ params["weight"], rtol=1e-6)


def test_a_flow_stands_in_any_plates_and_takes_any_transforms():
    def transforms(context):
        u = numpyro.param("u", jnp.array([[0.3, -0.2]]))
        return [PlanarTransform(context @ u, jnp.array([0.5, 1.0]), 0.1)]

    def program(context):
        with numpyro.plate("outer", 4, dim=-2), numpyro.plate("inner", 3, dim=-1):
            return flow("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1), transforms, context=context)

    context = random.normal(random.key(0), (4, 3, 1))
    trace = handlers.trace(handlers.seed(program, 1)).get_trace(context)
    assert trace["z"]["value"].shape == (4, 3, 2) and trace["z"]["fn"].batch_shape == (4, 3)
    assert trace["u"]["type"] == "param"
    z0 = trace["z"]["intermediates"][0][0]
    np.testing.assert_allclose(trace["z"]["value"], transforms_of(context)(z0), atol=1e-6)
    fixed = handlers.trace(
        handlers.seed(lambda: flow("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1), []), 1)
    ).get_trace()
    assert isinstance(fixed["z"]["fn"], dist.Independent)
    whole = handlers.seed(FlowGuide(lambda x: (x, jnp.ones(2)), "planar", plate=None), 0)(jnp.array([0.1, 0.2]))
    assert whole.shape == (2,)


def transforms_of(context):
    return PlanarTransform(context @ jnp.array([[0.3, -0.2]]), jnp.array([0.5, 1.0]), 0.1)


def test_a_flow_fits_a_curved_posterior_better_than_a_gaussian():
    def curved(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z[1] - z[0] ** 2, 0.1), obs=x)

    def trained_bound(family):
        def guide(x):
            loc = numpyro.param("loc", jnp.array([0.0, 0.5]))
            scale = numpyro.param("scale", 0.5 * jnp.ones(2), constraint=dist.constraints.positive)
            flow("z", dist.Normal(loc, scale).to_event(1), family, num_transforms=1, hidden=10)

        svi = SVI(curved, guide, optax.adam(0.02), Trace_ELBO(num_particles=20))
        params = svi.run(random.key(0), 500, 0.0, progress_bar=False).params
        return -Trace_ELBO(num_particles=4000).loss(random.key(1), params, curved, guide, 0.0)

    first = jnp.linspace(-6.0, 6.0, 2001)  # the other latent is integrated out
    log_evidence = jax.nn.logsumexp(
        dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(first**2, np.sqrt(1.01)).log_prob(0.0)
    ) + np.log(first[1] - first[0])
    assert trained_bound("affine") + 0.3 < trained_bound("coupling") < log_evidence


def test_what_does_not_fit_is_refused_by_name():
    def run(guide, x=X):
        return jax.eval_shape(handlers.seed(guide, 0), x)

    with pytest.raises(ValueError, match="unknown family 'rnvp' for site 'code'"):
        FlowGuide(encoder, "rnvp", site="code")
    with pytest.raises(ValueError, match="num_transforms must be a positive integer, got 0"):
        FlowGuide(encoder, num_transforms=0)
    with pytest.raises(
        ValueError, match=r"encoder must return \(loc, scale\) or \(loc, scale, context\), got .*Tracer"
    ):
        run(FlowGuide(lambda rows: rows))
    with pytest.raises(ValueError, match=r"returned scale of shape \(2,\) for data of shape \(3, 1\)"):
        run(FlowGuide(lambda rows: (jnp.ones((3, 2)), jnp.ones(2))))
    with pytest.raises(ValueError, match="make them equal"):
        run(FlowGuide(lambda rows: (jnp.ones((3, 2)), jnp.ones((3, 1)))))
    with pytest.raises(ValueError, match=r"the base of site 'z' has event shape \(\)"):
        run(lambda x: flow("z", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="site 'z' gave a int where a NumPyro Transform belongs"):
        run(lambda x: flow("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1), [1]))
    with pytest.raises(ValueError, match="u and w have 2 coordinates"):
        run(FlowGuide(encoder, [PlanarTransform(jnp.ones(2), jnp.ones(2), 0.0)]))
    with pytest.raises(ValueError, match="a coupling needs two coordinates"):
        run(FlowGuide(lambda rows: (rows, jnp.ones_like(rows))))
    with pytest.raises(ValueError, match="the guide never samples site 'z'"):
        IWELBO(2).loss(random.key(0), {}, model, lambda x: None, X)
    wrong = FlowGuide(encoder, "affine", site="code")
    with pytest.raises(ValueError, match="the guide never samples site 'z'"):
        IWELBO(2).loss(random.key(0), {}, model, handlers.seed(wrong, 0), X)


def test_a_transform_without_inverse_is_drawn_from_and_refuses_scores_by_name():
    class OneWay(PlanarTransform):
        def _inverse(self, y):
            raise NotImplementedError("OneWay has no inverse")

    guide = FlowGuide(encoder, [OneWay(jnp.ones(3), jnp.ones(3), 0.0)])
    params = initial_params(guide)
    assert np.isfinite(jax.jit(lambda p: IWELBO(2).loss(random.key(0), p, model, guide, X))(params))
    with pytest.raises(NotImplementedError, match=r"log density at a given value of site 'z'.*OneWay has no inverse"):
        jax.eval_shape(lambda p: STL(2).loss(random.key(0), p, model, guide, X), params)
