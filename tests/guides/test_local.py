"""Local optimisation against optima that are known: of the linear-Gaussian VAE, and by quadrature in one dimension."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal
from scipy import stats

from models import linear_gaussian_vae
from numpyro_smc.guides import local
from numpyro_smc.guides.local import LocalOptimizer

PARAMS = linear_gaussian_vae.make_params(random.key(3), 4, 2)
X = linear_gaussian_vae.simulate(random.key(4), PARAMS, 12)
PROGRAMS = linear_gaussian_vae.model, linear_gaussian_vae.guide
SMALL = {"num_mc": 8, "patience": 3, "max_steps": 3000, "batch_size": 5}
FACTORISED = LocalOptimizer("ffg", num_eval=2000, **SMALL)


def run(optimizer, x=X, key=0, **options):
    return optimizer.run(random.key(key), PROGRAMS[0], x, guide=PROGRAMS[1], params=PARAMS, **options)


@pytest.fixture(scope="module")
def optimum():
    return run(FACTORISED)


def exact_elbos(loc, tril, x=X):
    """Of Gaussians: the log evidence less KL(q, posterior)."""
    loc, tril = np.asarray(loc, np.float64), np.asarray(tril, np.float64)
    means, covariance = linear_gaussian_vae.posterior(PARAMS, x)
    precision, size = np.linalg.inv(covariance), loc.shape[1]
    traces = np.einsum("ij,nik,njk->n", precision, tril, tril)
    log_ratio = -np.linalg.slogdet(precision)[1] - 2 * np.linalg.slogdet(tril)[1]
    shifts = np.einsum("ni,ij,nj->n", loc - means, precision, loc - means)
    return linear_gaussian_vae.log_evidence(PARAMS, x) - 0.5 * (traces - size + log_ratio + shifts)


def factorised_elbos(found, x=X):
    scales = np.asarray(found.params["auto_scale"])
    return exact_elbos(found.params["auto_loc"], scales[:, :, None] * np.eye(scales.shape[1]), x)


def test_the_best_factorised_gaussian_is_found(optimum):
    """By closed forms within a hundredth of a nat; the bounds stated, of 2,000 draws, within five standard errors."""
    shortfall = linear_gaussian_vae.optimal_factorised_elbo(PARAMS, X) - factorised_elbos(optimum)
    assert np.all(shortfall > -1e-6) and np.all(shortfall < 0.01)
    assert np.all(np.abs(optimum.elbo - factorised_elbos(optimum)) < 5 * optimum.elbo_error)
    assert np.all(optimum.elbo_error > 0) and np.all(optimum.elbo_error < 0.05)
    error = np.abs(optimum.iwae - linear_gaussian_vae.log_evidence(PARAMS, X))
    assert np.all(error < 5 * optimum.iwae_error) and np.all(optimum.iwae > optimum.elbo)
    assert np.all(optimum.converged) and np.all(optimum.start == 0)
    assert "ffg, 12 data" in repr(optimum) and optimum.table()[0]["quantity"] == "elbo"


def test_the_encoder_is_never_better_than_the_optimum_that_starts_from_it(optimum):
    assert np.all(factorised_elbos(optimum) > linear_gaussian_vae.elbo(PARAMS, X) - 1e-6)
    assert np.mean(factorised_elbos(optimum) - linear_gaussian_vae.elbo(PARAMS, X)) > 0.5


def test_the_full_rank_gaussian_is_the_posterior():
    found = run(LocalOptimizer("full_rank", init="zeros", num_eval=500, **SMALL))
    elbos = exact_elbos(found.params["auto_loc"], found.params["auto_scale_tril"])
    shortfall = linear_gaussian_vae.log_evidence(PARAMS, X) - elbos
    assert np.all(shortfall > -1e-6) and np.all(shortfall < 0.02)
    assert np.all(np.abs(found.elbo - elbos) < 5 * found.elbo_error + 1e-5)


def test_a_datum_is_frozen_when_its_loss_stops_to_fall_whatever_the_others_do(optimum):
    assert len(set(optimum.num_steps)) > 1 and np.all(optimum.num_steps % 100 == 0)
    assert np.all(optimum.num_steps >= 2 * 4 * 100 - 100) and np.all(optimum.num_steps <= 3000)
    alone = run(FACTORISED, X[:5])
    np.testing.assert_allclose(alone.params["auto_loc"], optimum.params["auto_loc"][:5], rtol=1e-4, atol=1e-5)
    assert np.array_equal(alone.num_steps, optimum.num_steps[:5])
    # The same datum in the same place, in other company that takes longer.
    mixed = run(FACTORISED, jnp.concatenate([X[:1], 3.0 * X[1:5]]))
    np.testing.assert_allclose(mixed.params["auto_loc"][0], optimum.params["auto_loc"][0], rtol=1e-4, atol=1e-5)
    assert mixed.num_steps[0] == optimum.num_steps[0] and np.any(mixed.num_steps != optimum.num_steps[:5])


def test_every_datum_has_draws_of_its_own():
    same = run(FACTORISED, jnp.broadcast_to(X[0], (10, 4)))
    assert len(set(same.elbo.tolist())) == 10 and np.ptp(same.elbo) < 10 * np.max(same.elbo_error)


def test_batches_share_one_program_and_a_second_call_compiles_nothing(optimum):
    compiled = local._compiled(FACTORISED, *PROGRAMS)
    assert compiled.num_compiled() == 1
    many = linear_gaussian_vae.simulate(random.key(5), PARAMS, 23)
    found = run(LocalOptimizer("ffg", num_eval=2000, **SMALL), many)  # equal settings, more data
    assert compiled.num_compiled() == 1 and found.elbo.shape == (23,)
    assert np.all(linear_gaussian_vae.optimal_factorised_elbo(PARAMS, many) - factorised_elbos(found, many) < 0.01)


def test_finished_batches_survive_ctrl_c_and_a_restart_ends_with_the_same_numbers(tmp_path, monkeypatch, optimum):
    path, batch, firsts = tmp_path / "local.npz", LocalOptimizer.batch, []

    def interrupted(self, *args):
        if args[-1] == 7:  # the last batch, of rows 7 to 11
            raise KeyboardInterrupt
        firsts.append(args[-1])
        return batch(self, *args)

    monkeypatch.setattr(LocalOptimizer, "batch", interrupted)
    part = run(FACTORISED, checkpoint=path)
    assert part.interrupted and part.elbo.shape == (10,) and "(interrupted)" in repr(part)
    np.testing.assert_array_equal(part.elbo, optimum.elbo[:10])
    monkeypatch.setattr(LocalOptimizer, "batch", lambda self, *args: firsts.append(args[-1]) or batch(self, *args))
    whole = run(FACTORISED, checkpoint=path)
    assert firsts == [0, 5, 7] and not whole.interrupted
    for name in ("elbo", "iwae_error", "num_steps", "converged"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(optimum, name))
    np.testing.assert_array_equal(whole.params["auto_scale"], optimum.params["auto_scale"])
    for other in ({"key": 1}, {"x": X + 1.0}):
        with pytest.raises(ValueError, match="is of another configuration"):
            run(FACTORISED, checkpoint=path, **other)
    with pytest.raises(ValueError, match="is of another configuration"):
        run(LocalOptimizer("ffg", num_eval=1000, **SMALL), checkpoint=path)
    with pytest.raises(ValueError, match="does not exist; create it"):
        run(FACTORISED, checkpoint=tmp_path / "nowhere" / "local.npz")
    monkeypatch.setattr(LocalOptimizer, "batch", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(FACTORISED)


# A posterior with a mode on either side of zero, the right one higher: x | z ~ N(z^2, 1), z ~ N(0.3, 1.5).
SQUARES = jnp.array([3.0, 4.0, 5.5])


def square_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.3, 1.5))
        numpyro.sample("x", dist.Normal(z**2, 1.0), obs=x)


def square_guide(x):
    """An encoder at the lower mode."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(-jnp.sqrt(x), 0.3))


def square_elbos(loc, scale):
    """By quadrature that is exact for polynomials of degree four, per datum."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    z = np.asarray(loc, np.float64)[..., None] + np.asarray(scale, np.float64)[..., None] * nodes
    x = np.asarray(SQUARES, np.float64).reshape(-1, *[1] * (z.ndim - 1))
    values = stats.norm(0.3, 1.5).logpdf(z) + stats.norm(z**2, 1.0).logpdf(x)
    return values @ (weights / weights.sum()) + 0.5 * np.log(2 * np.pi * np.e) + np.log(scale)


def test_the_best_of_several_starts_is_returned():
    optimizer = LocalOptimizer("ffg", init=("encoder", 6), num_mc=16, patience=3, num_eval=4000)
    found = optimizer.run(random.key(0), square_model, SQUARES, guide=square_guide)
    locs, scales = np.meshgrid(np.linspace(-3, 3, 301), np.linspace(0.02, 1.5, 149), indexing="ij")
    everywhere = square_elbos(np.broadcast_to(locs, (3, *locs.shape)), np.broadcast_to(scales, (3, *scales.shape)))
    best, left = everywhere.max((1, 2)), everywhere[:, :130].max((1, 2))
    elbos = square_elbos(found.params["auto_loc"][:, 0], found.params["auto_scale"][:, 0])
    assert np.all(left < best - 0.1), "the modes are too alike for a test"
    assert np.all(found.start > 0) and np.all(found.params["auto_loc"] > 0.5)
    assert np.all(np.abs(elbos - best) < 0.01)
    assert np.all(np.abs(found.elbo - elbos) < 5 * found.elbo_error)


def test_a_start_that_no_step_betters_is_kept():
    optimizer = LocalOptimizer("ffg", learning_rate=300.0, num_mc=4, check_every=5, patience=1, num_eval=200)
    found = optimizer.run(random.key(0), square_model, SQUARES, guide=square_guide)
    assert np.all(found.num_steps == 0)
    np.testing.assert_allclose(found.params["auto_loc"][:, 0], -np.sqrt(SQUARES), rtol=1e-5)
    np.testing.assert_allclose(found.params["auto_scale"][:, 0], 0.3, rtol=1e-5)


# A rate with a gamma prior: its log evidence is that of a negative binomial variable.
COUNTS = jnp.array([0, 2, 7])


def rate_model(counts):
    with numpyro.plate("data", len(counts)):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
        numpyro.sample("count", dist.Poisson(rate), obs=counts)


def rate_guide(counts):
    with numpyro.plate("data", len(counts)):
        numpyro.sample("rate", dist.Gamma(3.0 + counts, 3.0))


def rate_elbos(loc, scale):
    """Of log-normal distributions; all expectations are known."""
    x, mean = np.asarray(COUNTS, np.float64), np.exp(loc + scale**2 / 2)
    prior = 3 * np.log(2.0) - np.log(2.0) + 2 * loc - 2 * mean
    likelihood = x * loc - mean - np.log([1.0, 2.0, 5040.0])
    return prior + likelihood + 0.5 * np.log(2 * np.pi * np.e) + np.log(scale) + loc


def test_latents_on_the_half_line_are_optimised_in_unconstrained_space():
    """The optimum has scale (3 + x)^(-1/2) and mean e^(m + s^2/2) = (3 + x) / 3, by the derivatives."""
    found = LocalOptimizer("ffg", num_mc=16, patience=3, num_eval=2000).run(
        random.key(0), rate_model, COUNTS, guide=rate_guide
    )
    shape = 3.0 + np.asarray(COUNTS, np.float64)
    best = rate_elbos(np.log(shape / 3) - 0.5 / shape, shape**-0.5)
    elbos = rate_elbos(found.params["auto_loc"][:, 0].astype(float), found.params["auto_scale"][:, 0].astype(float))
    assert np.all(elbos < best + 1e-6) and np.all(elbos > best - 0.005)
    exact = stats.nbinom(3, 2 / 3).logpmf(COUNTS)
    assert np.all(best < exact) and np.all(np.abs(found.elbo - elbos) < 5 * found.elbo_error)


def test_families_are_classes_of_automatic_guides_or_functions_that_are_told_the_start():
    seen = []

    def laplace(model, start):
        seen.append(start)

        def guide(x):
            loc = numpyro.param("loc", start.values["z"])
            scale = numpyro.param("scale", start.scales["z"], constraint=constraints.positive)
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Laplace(loc, scale))

        return guide

    settings = {"num_mc": 8, "patience": 2, "max_steps": 1000, "num_eval": 1000}
    by_function = LocalOptimizer(laplace, **settings).run(random.key(0), square_model, SQUARES, guide=square_guide)
    assert by_function.family == "laplace" and set(by_function.params) == {"loc", "scale"} and len(seen) > 0
    assert np.all(by_function.params["loc"] < -1.0) and np.all(by_function.params["scale"] > 0.05)
    by_class = LocalOptimizer(AutoNormal, **settings).run(random.key(0), square_model, SQUARES, guide=square_guide)
    assert by_class.family == "AutoNormal" and np.all(by_class.params["z_auto_loc"] < -1.0)
    assert np.all(by_class.elbo > by_function.elbo)  # these posteriors are nearly normal


def test_what_it_cannot_do_is_refused_by_name():
    quick = LocalOptimizer("ffg", init="zeros", num_mc=2, check_every=2, patience=1, num_eval=10)
    ones = jnp.ones(3)

    def refused(match, model, *args, guide=None, optimizer=quick):
        with pytest.raises(ValueError, match=match):
            optimizer.run(random.key(0), model, *args, guide=guide)

    def without_plate(x):
        numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def with_global(x):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), scale), obs=x)

    def subsampled(x):
        with numpyro.plate("data", len(x), subsample_size=2):
            rows = numpyro.subsample(x, event_dim=0)
            numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=rows)

    def discrete(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(numpyro.sample("k", dist.Bernoulli(0.5)), 1.0), obs=x)

    def binary(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Bernoulli(logits=numpyro.sample("z", dist.Normal(0.0, 1.0))), obs=x)

    def closed_over(n):
        with numpyro.plate("data", n):
            numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=ones)

    def tied(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)) + x.mean(), 1.0), obs=x)

    def other(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("w", dist.Normal(0.0, 1.0))

    refused("the model has no plate", without_plate, ones)
    refused("outside plate 'data': site 'scale' of the model", with_global, ones)
    refused("plate 'data' is subsampled", subsampled, ones)
    refused("site 'k' is discrete", discrete, ones)
    refused("2 of 4 data are outside the support of site 'x'", binary, jnp.array([0.0, 0.4, 1.0, jnp.nan]))
    refused("no array argument has as many rows as plate 'data'", closed_over, 3)
    refused("Let each datum depend on its own row only", tied, jnp.array([0.0, 1.0, 5.0]))
    encoder = LocalOptimizer("ffg", num_mc=2)
    refused("the guide never samples site 'z'", square_model, ones, guide=other, optimizer=encoder)
    refused("pass guide=, or init='zeros'", square_model, ones, optimizer=encoder)
    plain = LocalOptimizer(lambda model: square_guide, num_mc=2)
    refused("neither start nor init_loc_fn", square_model, ones, guide=square_guide, optimizer=plain)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"family": "laplace"}, "unknown family 'laplace'"),
        ({"family": 3}, "must be a name, a class or a function"),
        ({"init": "prior"}, "init must be 'encoder', 'zeros'"),
        ({"init": 0}, "init must be a positive integer"),
        ({"init": ()}, "must not be empty"),
        ({"learning_rate": (1e-2, -1.0)}, r"learning_rate must lie in \(0, 1e3\), got -1.0"),
        ({"num_mc": 0}, "num_mc must be a positive integer"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        LocalOptimizer(**settings)
