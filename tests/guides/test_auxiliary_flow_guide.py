"""Auxiliary-flow guides: exact where they can be, unbiased always, a known wrong formula caught, extended models."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from numpyro.infer.util import log_density

from numpyro_smc import AIS, DAIS, IWELBO, RWS, STL, VIMCO, DReG
from numpyro_smc.guides.auxiliary import AuxiliaryFlowGuide, extend_guide, extend_model
from numpyro_smc.guides.transforms.amortised import Network
from numpyro_smc.programs.density import log_weights
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

# z ~ N(0, I) and x | z ~ N(z, 1/2) for each of three data: the posterior is N(4 x / 5, 1 / 5).
X = jnp.array([[0.5, 0.1], [-1.2, 0.4], [2.0, -0.7]])
LOG_EVIDENCE = np.asarray(dist.Normal(0.0, np.sqrt(1.25)).log_prob(X).sum(-1))


def model(x, subsample_size=None):
    with numpyro.plate("data", len(x), subsample_size=subsample_size):
        rows = numpyro.subsample(x, event_dim=1)
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
        numpyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=rows)


def encoder(rows):
    slope = numpyro.param("slope", 0.8)
    scale = numpyro.param("scale", np.sqrt(0.2))
    features = numpyro.param("features", jnp.array([[0.4, -0.8, 0.3], [1.0, 0.2, -0.5]]))
    return slope * rows, scale * jnp.ones_like(rows), jnp.tanh(rows @ features)


GUIDE = AuxiliaryFlowGuide(encoder, aux_dim=3, num_transforms=1, hidden=4)


def initial_params(guide, model=model):
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    return jax.jit(lambda: svi.get_params(svi.init(random.key(0), X)))()


def stir(params):
    """Parameters far from where they start."""
    return {
        name: jax.tree.map(lambda leaf: leaf + 0.1 * jnp.sin(1.7 * jnp.arange(leaf.size)).reshape(leaf.shape), value)
        for name, value in params.items()
    }


PARAMS = stir(initial_params(GUIDE)) | {"scale": jnp.asarray(0.6)}
PARAMS["z_forward$params"][-1]["bias"] += jnp.repeat(jnp.array([0.0, 0.4]), 3)  # wider than the reverse model


def weights_of(model, guide, params, num, seed=1):
    def weigh(params):
        return log_weights(random.key(seed), model, guide, params, (X,), {}, num_particles=num).values

    return jax.jit(weigh)(params)


def assert_no_better_than_exact(log_weights):
    """Neither the evidence lower bound nor the importance-weighted one is above the log evidence by five errors."""
    ratios = np.exp(np.asarray(log_weights, np.float64) - LOG_EVIDENCE)
    error = ratios.std(0, ddof=1) / np.sqrt(len(ratios))
    assert (ratios.mean(0) < 1 + 5 * error + 1e-5).all(), f"evidence too large by {np.log(ratios.mean(0))} nats"


def test_every_weight_is_the_evidence_where_the_guide_is_exact():
    """The flow moves v alone, by a network of z and x, and the reverse model is told how."""
    layers = PARAMS["z_coupling_0_second$params"]

    def forward(z, context):
        return jnp.tanh(z.sum(-1, keepdims=True) + context), jnp.exp(0.3 * context)

    def reverse(z, context):
        shift, raw = jnp.split(Network(layers, jax.nn.elu)(z, context), 2, axis=-1)
        loc, scale = forward(z, context)
        return loc * jax.nn.sigmoid(raw) + shift, scale * jax.nn.sigmoid(raw)

    guide = AuxiliaryFlowGuide(encoder, 3, reverse_net=reverse, forward_net=forward, num_transforms=1, hidden=4)
    still = jax.tree.map(jnp.zeros_like, PARAMS["z_coupling_0_first$params"])
    still[-1]["bias"] = jnp.repeat(jnp.array([0.0, 15.0]), 2)  # gates wide open
    params = initial_params(guide) | {"z_coupling_0_second$params": layers, "z_coupling_0_first$params": still}
    weights = weights_of(model, guide, params, 50)
    np.testing.assert_allclose(weights, np.broadcast_to(LOG_EVIDENCE, (50, 3)), atol=1e-5)
    assert_no_better_than_exact(weights)
    # The same on the extended space, where z and v are scored by the inverse flow.
    weights = weights_of(extend_model(model, guide), extend_guide(guide), params, 50)
    np.testing.assert_allclose(weights, np.broadcast_to(LOG_EVIDENCE, (50, 3)), atol=1e-5)


@pytest.mark.parametrize("is_extended", [False, True], ids=["guide", "extended"])
def test_weights_are_unbiased_and_a_bound_for_any_parameters(is_extended):
    """20,000 weights of each of three data, five standard errors: a false alarm in 6e-7 a datum."""
    pair = (extend_model(model, GUIDE), extend_guide(GUIDE)) if is_extended else (model, GUIDE)
    weights = weights_of(*pair, PARAMS, 20_000)
    for row in range(3):
        assert_unbiased_evidence(weights[:, row], LOG_EVIDENCE[row])
    assert (weights.mean(0) < LOG_EVIDENCE - 0.1).all()
    assert_no_better_than_exact(weights)


def test_the_reverse_model_at_a_sample_of_its_own_is_caught():
    """25 reverse numbers of log variance -1: their densities (without constants) add log E[r(v)] = 3.84 nats."""
    num, log_variance = 25, -1.0

    def wrong(x):
        with numpyro.plate("data", len(x)):
            loc, scale, _ = encoder(x)
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))
            with handlers.mask(mask=False):  # drawn, but its density is not in the weight
                reverse = dist.Normal(jnp.zeros(num), np.exp(log_variance / 2)).to_event(1)
                v = numpyro.sample("own", reverse, infer={"is_auxiliary": True})
            log_r = reverse.log_prob(v) + num / 2 * np.log(2 * np.pi)
            numpyro.factor("log_r", -log_r)

    weights = weights_of(model, wrong, initial_params(wrong), 20_000)
    excess = np.exp(np.asarray(weights, np.float64) - LOG_EVIDENCE)
    for row in range(3):  # the relative variance of e^log_r is (4 / 3)^(25 / 2) - 1
        assert_mean(excess[:, row], np.exp(num / 2 * (1 - np.log(2))))
    assert num / 2 * (1 - np.log(2)) == pytest.approx(3.84, abs=0.005)
    with pytest.raises(AssertionError, match="evidence too large"):
        assert_no_better_than_exact(weights)


def test_warm_up_weighs_the_whole_of_the_guide_auxiliary_terms_included():
    """Draws do not depend on the weight, so what it multiplies is exact; without the model nothing else is left."""

    @jax.jit
    def terms(weight):
        warmed, silent = handlers.scale(GUIDE, scale=weight), handlers.mask(model, mask=False)
        of_guide, both = (
            log_weights(random.key(2), program, warmed, PARAMS, (X,), {}, num_particles=2).values
            for program in (silent, model)
        )
        return of_guide, both - of_guide

    (whole, log_p), (tempered, same), (nothing, _) = map(terms, (1.0, 0.3, 0.0))
    np.testing.assert_allclose(tempered, 0.3 * whole, atol=1e-5)  # a float32 sum of terms of the order of one
    np.testing.assert_allclose(same, log_p, atol=1e-5)
    assert not nothing.any() and np.abs(whole).max() > 1.0


def test_the_weight_is_the_written_one():
    with handlers.trace() as trace, handlers.seed(rng_seed=3), handlers.substitute(data=PARAMS):
        GUIDE(X)
    z0, v0, z = (trace[name]["value"] for name in ("z_base", "z_auxiliary_base", "z"))
    assert all(trace[name]["infer"] == {"is_auxiliary": True} for name in ("z_base", "z_auxiliary_base"))
    rows = np.asarray(X, np.float64)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)
    context = np.tanh(rows @ params["features"])

    def network(name, *inputs):
        hidden = np.concatenate(inputs, -1)
        layers = params[f"z_{name}$params"]
        for layer in layers[:-1]:
            hidden = hidden @ layer["weight"] + layer["bias"]
            hidden = np.where(hidden > 0, hidden, np.expm1(hidden))
        return np.split(hidden @ layers[-1]["weight"] + layers[-1]["bias"], 2, -1)

    def gaussian(value, loc, log_scale):
        return np.sum(-0.5 * ((value - loc) / np.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi), -1)

    log_q = gaussian(np.asarray(z0), params["slope"] * rows, np.log(params["scale"]) * np.ones_like(rows))
    log_q = log_q + gaussian(np.asarray(v0), *network("forward", z0, context))
    shift, raw = network("coupling_0_second", z0, context)
    v = v0 / (1 + np.exp(-raw)) + shift
    log_q = log_q + np.log1p(np.exp(-raw)).sum(-1)
    shift, raw = network("coupling_0_first", v, context)
    np.testing.assert_allclose(z, z0 / (1 + np.exp(-raw)) + shift, atol=1e-5)
    log_q = log_q + np.log1p(np.exp(-raw)).sum(-1)
    log_r = gaussian(v, *network("reverse", z, context))
    np.testing.assert_allclose(trace["z"]["fn"].log_density, log_q_of_point(trace, log_q) - log_r, atol=2e-5)
    values = {name: trace[name]["value"] for name in ("z_base", "z_auxiliary_base")}
    found, _ = log_density(GUIDE, (X,), {}, PARAMS | values)
    np.testing.assert_allclose(found, (log_q - log_r).sum(), rtol=1e-5)
    # On the extended space: the model has r, the guide the rest.
    extended, _ = log_density(extend_model(model, GUIDE), (X,), {}, PARAMS | {"z": z, "z_auxiliary": jnp.asarray(v)})
    plain, _ = log_density(model, (X,), {}, PARAMS | {"z": z})
    np.testing.assert_allclose(extended - plain, log_r.sum(), rtol=1e-4)
    joint = jnp.concatenate([z, v.astype(np.float32)], -1)
    found, _ = log_density(extend_guide(GUIDE), (X,), {}, PARAMS | {"z_joint": joint})
    np.testing.assert_allclose(found, log_q.sum(), rtol=1e-5)


def log_q_of_point(trace, log_q):
    """What is left to the point mass: minus the log-determinant."""
    sites = [trace[name] for name in ("z_base", "z_auxiliary_base")]
    return log_q - sum(np.asarray(site["fn"].log_prob(site["value"])) for site in sites)


def gradient_of(loss, model=model, guide=GUIDE, params=PARAMS, seed=0):
    return jax.jit(jax.value_and_grad(lambda p: loss.loss(random.key(seed), p, model, guide, X)))(params)


def assert_finite_and_somewhere_nonzero(gradient, but=()):
    for name, leaves in gradient.items():
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(leaves)), name
        assert name in but or max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(leaves)) > 1e-6, name


def test_flow_and_reverse_model_get_the_same_gradient_from_every_pathwise_loss():
    """They have no score of their own: at K = 1, draw by draw, the gradient of the evidence lower bound."""
    _, expected = gradient_of(IWELBO(1))
    assert_finite_and_somewhere_nonzero(expected)
    for loss in (STL(1), DReG(1)):
        _, found = gradient_of(loss)
        for name in ("z_coupling_0_first$params", "z_coupling_0_second$params", "z_reverse$params"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[name], expected[name]
            )
        assert_finite_and_somewhere_nonzero(found)


@pytest.mark.parametrize(
    "loss",
    [VIMCO(3), RWS(3), pytest.param(DAIS(1, 1), marks=pytest.mark.slow)],
    ids=lambda loss: type(loss).__name__,
)
def test_other_losses_take_auxiliary_guides(loss):
    params = PARAMS
    if isinstance(loss, DAIS):
        params = PARAMS | initial_params(loss.wrap(GUIDE))
    value, gradient = gradient_of(loss, params=params)
    assert np.isfinite(value)
    assert_finite_and_somewhere_nonzero(gradient, but={name for name in params if "annealing" in name})


def test_numpyros_own_losses_take_auxiliary_guides():
    """The mean of 5,000 draws, five standard errors."""
    weights = weights_of(model, GUIDE, PARAMS, 5000)
    total = np.asarray(weights).sum(-1)
    loss, _ = gradient_of(Trace_ELBO(num_particles=5000), seed=7)
    assert abs(float(loss) + total.mean()) < 5 * np.sqrt(2) * total.std() / np.sqrt(5000)
    bound = -gradient_of(RenyiELBO(num_particles=5000), seed=8)[0]
    ratios = np.exp(np.asarray(weights, np.float64) - LOG_EVIDENCE)
    error = np.sqrt(np.sum(ratios.var(0) / 5000))
    assert abs(float(bound) - LOG_EVIDENCE.sum()) < 5 * error


def test_annealing_moves_the_extended_space():
    """400 chains, five standard errors."""
    target, guide = extend_model(model, GUIDE), extend_guide(GUIDE)
    result = AIS(target, guide=guide, num_temperatures=8, num_chains=400).run(random.key(0), X, params=PARAMS)
    assert result.standard_error < 0.1
    assert abs(result.value - LOG_EVIDENCE.sum()) < 5 * result.standard_error


def test_the_extended_model_shares_the_plate_and_leaves_the_model_alone():
    extended = extend_model(model, GUIDE)
    with handlers.trace() as trace, handlers.seed(rng_seed=0), handlers.substitute(data=PARAMS):
        extended(X, subsample_size=2)
    assert trace["z_auxiliary"]["value"].shape == (2, 3) and trace["z_auxiliary"]["scale"] == 1.5
    assert trace["z_auxiliary"]["cond_indep_stack"] == trace["z"]["cond_indep_stack"]
    rows = trace["data"]["value"]
    np.testing.assert_array_equal(trace["x"]["value"], X[rows])
    with handlers.seed(rng_seed=0), handlers.substitute(data=PARAMS):
        context = encoder(X[rows])[2]
        expected = GUIDE._gaussian("reverse", trace["z"]["value"], context)
    np.testing.assert_allclose(trace["z_auxiliary"]["fn"].base_dist.loc, expected.base_dist.loc, rtol=1e-6)
    with handlers.trace() as trace, handlers.seed(rng_seed=0), handlers.substitute(data=PARAMS):
        GUIDE(X, subsample_size=2)
    assert trace["z"]["value"].shape == (2, 2) and trace["z"]["scale"] == trace["z_base"]["scale"] == 1.5


def test_its_statements_stand_in_any_plates():
    def program(x):
        with numpyro.plate("outer", 4, dim=-2), numpyro.plate("inner", 3, dim=-1):
            return GUIDE.sample(x)

    x = random.normal(random.key(0), (4, 3, 2))
    trace = handlers.trace(handlers.seed(handlers.substitute(program, data=PARAMS), 1)).get_trace(x)
    assert all(trace[name]["fn"].batch_shape == (4, 3) for name in ("z_base", "z_auxiliary_base", "z"))


def test_what_does_not_fit_is_refused_by_name():
    def run(guide, x=X):
        return jax.eval_shape(handlers.seed(guide, 0), x)

    with pytest.raises(ValueError, match="aux_dim must be a positive integer, got 0"):
        AuxiliaryFlowGuide(encoder, 0)
    with pytest.raises(ValueError, match=r"reverse_net returned loc and scale of shapes \(3, 2\) and \(3, 2\)"):
        run(AuxiliaryFlowGuide(encoder, 3, hidden=4, reverse_net=lambda z, context: (z, jnp.ones_like(z))))
    with pytest.raises(ValueError, match="AuxiliaryFlowGuide: the encoder must return"):
        run(AuxiliaryFlowGuide(lambda rows: rows, 3))
    with pytest.raises(ValueError, match="extend_model: the model never samples site 'code'"):
        run(extend_model(model, AuxiliaryFlowGuide(encoder, 3, site="code")))
    with pytest.raises(ValueError, match=r"RWS: sleep needs the guide's density.*'z_base'"):
        run(lambda x: RWS(2, sleep_phi=1.0).loss(random.key(0), PARAMS, model, GUIDE, x))
    single = AuxiliaryFlowGuide(lambda x: (x, jnp.ones(2)), 3, hidden=4, plate=None)
    assert run(single, X[0]).shape == (2,) and run(extend_guide(single), X[0]).shape == (2,)
