"""Monte Carlo diffusion: Langevin transitions whose reversal has a network, and the samplers known by name."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from jax import random
from numpyro.infer import SVI

from numpyro_smc import DAIS, DSMCS, resampling
from numpyro_smc.engines.learned_schedule import PREFIX
from tests.elbo.test_dsmcs import DATA, guide, log_evidence, model
from tests.statistics_of_estimates import assert_unbiased_evidence

SCORE = PREFIX + "score"


def initial_params(loss, program=model, proposal=guide):
    svi = SVI(program, loss.wrap(proposal), optax.sgd(0.1), loss)
    return svi.get_params(svi.init(random.key(0), DATA))


def value_and_gradient(loss, params):
    return jax.jit(jax.value_and_grad(lambda p: loss.loss(random.key(1), p, model, guide, DATA)))(params)


def test_an_untrained_score_is_langevin_and_has_a_gradient():
    mcd, ula = (DAIS(4, 3, kernel=kernel, step_size_max=0.2) for kernel in ("mcd", "ula"))
    params = initial_params(mcd)
    assert params[SCORE]["out"].shape[0] == 1  # one latent number for each element of the plate
    value, gradient = value_and_gradient(mcd, params)
    expected, expected_gradient = value_and_gradient(ula, {k: v for k, v in params.items() if k != SCORE})
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert abs(float(gradient.pop(SCORE)["scale"])) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected_gradient)


def test_any_score_gives_an_unbiased_evidence():
    """400 runs, five standard errors: a false alarm in 6e-7."""
    loss = DSMCS(4, 3, kernel="mcd", step_size_max=0.2, ess_threshold=0.9)
    params = initial_params(loss)
    params[SCORE]["scale"] = jnp.asarray(0.4)
    keys = random.split(random.key(0), 400)
    run = jax.jit(lambda p: jax.lax.map(lambda k: -loss.loss(k, p, model, guide, DATA), keys, batch_size=50))
    values = run(params)
    assert_unbiased_evidence(values, float(log_evidence(DATA).sum()))
    params[SCORE]["scale"] = jnp.asarray(0.0)
    assert float(jnp.abs(run(params) - values).max()) > 0.05


@pytest.mark.slow
def test_a_trained_score_tightens_the_bound_of_langevin():
    def trained_bound(kernel):
        loss = DAIS(1, 4, kernel=kernel, step_size=0.05, step_size_max=0.2, learn=(), num_mc=16)
        svi = SVI(model, loss.wrap(guide), optax.adam(1e-2), loss)
        params = svi.run(random.key(0), 400, DATA, progress_bar=False).params
        fixed = params | {"shift": jnp.asarray(0.3)}
        evaluate = jax.jit(jax.vmap(lambda k: -loss.loss(k, fixed, model, guide, DATA)))
        return evaluate(random.split(random.key(1), 300))

    gains = trained_bound("mcd") - trained_bound("ula")
    assert gains.mean() > 5 * gains.std() / np.sqrt(len(gains))


def test_a_score_declared_for_other_plates_is_refused():
    def model_with_more(x):
        model(x)
        numpyro.factor("extra", 0.0)

    loss = DAIS(1, 2, kernel="mcd")
    params = initial_params(DAIS(1, 2, kernel="mcd"))
    with pytest.raises(ValueError, match="score network was declared for 1 latent numbers"):
        loss.loss(random.key(0), params, model_with_more, guide, DATA)
    everything = DAIS(1, 2, kernel="mcd", plates=None)
    params = initial_params(everything, model_with_more)
    assert params[SCORE]["out"].shape[0] == 2
    assert np.isfinite(everything.loss(random.key(0), params, model_with_more, guide, DATA))
    with pytest.raises(ValueError, match="Wrap the guide"):
        loss.loss(random.key(0), {k: v for k, v in params.items() if k != SCORE}, model, guide, DATA)


@pytest.mark.parametrize(
    "name, resampler",
    [("cat", "multinomial"), ("bern-gst", resampling.bernoulli(resampling.gapped_straight_through(0.1, 1.0)))],
)
def test_published_samplers_are_known_by_name(name, resampler):
    by_name = DSMCS.published(name, 4, 3)
    written = DSMCS(4, 3, resampler=resampler, resample="always", resampling_gradient="none")
    params = initial_params(by_name)
    for ours, theirs in zip(*(jax.tree.leaves(value_and_gradient(s, params)) for s in (by_name, written)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if name == "cat":
        with pytest.raises(ValueError, match="unknown name 'dog'"):
            DSMCS.published("dog", 4, 3)


def test_step_sizes_driven_to_zero_are_counted_in_a_warning():
    loss = DSMCS(4, 3)
    params = initial_params(loss)
    params[PREFIX + "step_size"] = jnp.array([0.1, 1e-5, 2e-5])
    with pytest.warns(UserWarning, match="2 of 3 step sizes were driven to zero"):
        loss.diagnostics(random.key(0), params, model, guide, DATA)
