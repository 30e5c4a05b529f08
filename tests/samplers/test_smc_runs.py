"""Runs as programs: compiled once, interrupted, resumed; results and errors."""

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

from numpyro_smc.programs.unconstrained import UnconstrainedModel
from numpyro_smc.samplers.checks import warn_of_stuck_particles
from numpyro_smc.samplers.genealogy import genealogical_variance
from numpyro_smc.samplers.moves import cloud_scale
from numpyro_smc.samplers.progress import Progress
from numpyro_smc.samplers.smc_sampler import SMCSampler
from numpyro_smc.samplers.tempering import StageReport
from tests.samplers import static_models as models
from tests.samplers.static_models import SCHEDULE, sampler
from tests.statistics_of_estimates import assert_unbiased_evidence


def run(chosen, seed=0, *args, **kwargs):
    return chosen.run(random.key(seed), *(args or models.CONJUGATE), progress_bar=False, **kwargs)


def everything(y):
    """Supports of all kinds, a support that depends on a latent, a scan, a scaled prior and a masked observation."""
    numpyro.sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    high = numpyro.sample("high", dist.Gamma(2.0, 1.0))
    numpyro.deterministic("twice", 2 * numpyro.sample("below", dist.Uniform(0.0, high)))
    numpyro.sample("point", dist.Delta(1.0))
    with numpyro.plate("n", 2), handlers.scale(scale=0.7):
        numpyro.sample("scaled", dist.Normal(0.0, 1.0))

    def step(x, y):
        x = numpyro.sample("x", dist.LogNormal(0.5 * jnp.log(x), 0.5))
        with handlers.mask(mask=y > 0.0):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x, None

    scan(step, 1.0, y)
    numpyro.factor("extra", -0.1 * high)


def test_the_split_adds_up_to_the_density_of_numpyro():
    y = jnp.array([1.0, -1.0, 2.0])
    model = UnconstrainedModel(everything, (y,))

    def evaluate(position):
        expected = -potential_energy(everything, (y,), {}, model.unravel(position))
        return model.split(position), expected, model.values(position)

    split, expected, values = jax.jit(jax.vmap(evaluate))(random.normal(random.key(0), (3, model.dimension)))
    np.testing.assert_allclose(split.base + split.likelihood, expected, rtol=2e-5)
    prior = {name: values[name] for name in ("high", "below", "scaled")}
    scaled = dist.Normal(0.0, 1.0).log_prob(prior["scaled"]).sum(1)
    observed = dist.Normal(values["x"], 1.0).log_prob(y)[:, jnp.array([0, 2])].sum(1)
    np.testing.assert_allclose(split.likelihood, observed - 0.1 * prior["high"] - 0.3 * scaled, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(values["twice"], 2 * prior["below"])
    assert (prior["below"] < prior["high"]).all() and values["point"].shape == (3,)


def test_a_second_run_compiles_nothing():
    chosen = sampler(models.conjugate, 400, moves="rwmh", resampler="multinomial", dense_mass=True, batch_size=100)
    y, prior_scale, noise = models.CONJUGATE
    numbers = {len(run(chosen, seed, y, scale * prior_scale, noise).betas) for seed, scale in ((0, 1.0), (1, 20.0))}
    assert len(numbers) == 2
    assert [f.num_compiled() for f in (chosen._start, chosen._advance, chosen._finish)] == [1, 1, 1]


@pytest.mark.parametrize("persistent", [False, True])
def test_an_interrupted_run_resumes_to_the_bit(persistent, tmp_path, monkeypatch):
    """The persistent run has more temperatures than there is room for at first."""
    chosen = sampler(models.conjugate, 64, schedule=True, moves=models.random_walk, tune=(), step_size=0.4)
    if persistent:
        schedule = np.linspace(0.0, 1.0, 21)
        chosen = SMCSampler(models.conjugate, 64, moves="rwmh", num_moves=2, tempering=schedule, persistent=True)
    num_stages = len(chosen.schedule)
    whole = run(chosen)
    calls, advance = [], chosen._advance

    def interrupt(*args):
        calls.append(None)
        if len(calls) == num_stages - 2:
            raise KeyboardInterrupt
        return advance(*args)

    path = tmp_path / "run.npz"
    monkeypatch.setattr(chosen, "_advance", interrupt)
    stopped = run(chosen, checkpoint=path, checkpoint_every=5)
    assert stopped.interrupted and len(stopped.betas) == num_stages - 3 and np.isnan(stopped.log_evidence)
    assert f"interrupted at temperature {stopped.betas[-1]:.3g}" in repr(stopped)
    resumed = run(chosen, checkpoint=path)
    assert len(calls) == num_stages - 2 + 3
    assert resumed.log_evidence == whole.log_evidence and not resumed.interrupted
    jax.tree.map(np.testing.assert_array_equal, resumed.samples, whole.samples)
    assert run(chosen, checkpoint=path).log_evidence == whole.log_evidence and len(calls) == num_stages + 1
    other = chosen._description.replace(f"persistent={persistent}", f"persistent={not persistent}")
    monkeypatch.setattr(chosen, "_description", other)
    with pytest.raises(ValueError, match="is of another sampler"):
        run(chosen, checkpoint=path)


def test_a_result_answers_questions(capsys):
    chosen = sampler(models.conjugate, 400, moves="rwmh", persistent=True)
    result = run(chosen)
    samples, log_weights = result.get_weighted_samples()
    assert samples["x"].shape == (400 * (len(result.betas) + 1), 2)
    np.testing.assert_allclose(np.exp(log_weights).mean(), 1.0, rtol=1e-4)
    assert result.get_samples()["x"].shape == (400, 2)
    assert result.get_samples(10, random.key(1))["x"].shape == (10, 2)
    mean, scale = models.conjugate_posterior(*models.CONJUGATE)
    np.testing.assert_allclose(result.quantile("x", [0.5, 0.9]), [mean, mean + 1.2816 * scale], atol=0.15)
    np.testing.assert_allclose(result.log_evidence_increments.sum(), result.log_evidence, rtol=1e-5)
    result.print_summary()
    assert "x[1]" in capsys.readouterr().out and "log evidence" in repr(result)
    data = result.to_arviz()
    assert data["posterior"]["x"].shape == (1, 400, 2)
    assert data["posterior"].attrs["log_evidence_se"] == result.log_evidence_se
    assert data["sample_stats"]["beta"].values[..., -1].item() == 1.0
    assert len(result.plot().get_lines()) == 3
    with pytest.raises(KeyError, match="No site 'z'"):
        result.mean("z")
    with pytest.raises(ValueError, match=r"persistent sampling keeps mixtures\. Use log_evidence"):
        result.path_sampling()


def test_progress_is_shown_by_temperature(capsys):
    chosen = sampler(models.conjugate, 400, moves="rwmh", resampler="multinomial", dense_mass=True, batch_size=100)
    chosen.run(random.key(0), *models.CONJUGATE)
    assert "temperature 1" in capsys.readouterr().err


def test_the_scale_is_the_clouds_weighted_covariance():
    positions = random.normal(random.key(0), (5000, 3)) @ jnp.array([[2.0, 0, 0], [1.0, 0.5, 0], [0, 0.2, 0.1]])
    weights = jax.nn.softmax(random.normal(random.key(1), (5000,)))
    expected = np.cov(positions.T, aweights=weights, bias=True)
    np.testing.assert_allclose(cloud_scale(positions, weights, False), np.diag(expected) ** 0.5, rtol=1e-4)
    factor = cloud_scale(positions, weights, True)
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=2e-3, atol=2e-3)


def test_the_genealogical_variance_of_independent_draws_is_that_of_their_mean():
    weights = jax.nn.softmax(random.normal(random.key(0), (50,)))
    expected = np.var(50 * weights, ddof=1) / 50
    np.testing.assert_allclose(genealogical_variance(weights, jnp.arange(50), 50, 1), expected, rtol=1e-3)


def model_of(fn):
    def model():
        fn(numpyro.sample("x", dist.Normal(0.0, 1.0)))

    return model


def discrete():
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3))
    numpyro.sample("b", dist.Bernoulli(0.5))


def subsampled():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 10, subsample_size=3):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.zeros(3))


def improper():
    numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))


def masked():
    with handlers.mask(mask=False):
        numpyro.sample("x", dist.Normal(0.0, 1.0))


def at_edge():
    numpyro.sample("tiny", dist.Gamma(1e-4, 1.0))


def not_a_number(x):
    numpyro.factor("bad", jnp.log(x - 100.0))


def impossible(x):
    numpyro.factor("never", -jnp.inf)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (discrete, ValueError, r"sites 'k', 'b' are discrete.*MixtureSameFamily"),
        (subsampled, ValueError, "plate 'rows' is subsampled"),
        (improper, ValueError, "prior of site 'x' is improper.*init_guide"),
        (masked, ValueError, "prior of site 'x' is improper"),
        (lambda: None, ValueError, "no continuous latent site"),
        (at_edge, FloatingPointError, "draws of site 'tiny' lie on the edge"),
        (model_of(not_a_number), FloatingPointError, r"4 of 4 .* the first at site 'bad' \(nan\)"),
        (model_of(impossible), FloatingPointError, r"4 of 4 .* the first at site 'never' \(-inf\)"),
    ],
)
def test_models_that_cannot_be_sampled_are_refused_by_name(model, error, message):
    with pytest.raises(error, match=message):
        SMCSampler(model, 4).run(random.key(0), progress_bar=False)


def test_a_guide_must_cover_the_latents_and_may_start_an_improper_prior():
    with pytest.raises(ValueError, match="the guide never samples site 'x'"):
        SMCSampler(model_of(lambda x: None), 4, init_guide=(lambda: None, {})).run(random.key(0), progress_bar=False)

    def model(y):
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    def guide(y):
        numpyro.sample("x", dist.Normal(0.0, 2.0))

    chosen = SMCSampler(model, 400, init_guide=(guide, {}), moves="rwmh")
    estimates = [chosen.run(random.key(i), jnp.array(1.0), progress_bar=False).log_evidence for i in range(20)]
    assert_unbiased_evidence(estimates, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_ess": 1.0}, r"target_ess must lie in \(0, 1\), got 1.0"),
        ({"target_ess": 0.0}, "target_ess"),
        ({"ess_threshold": 1.5}, "ess_threshold must lie in"),
        ({"num_particles": 1}, "num_particles must be at least 2"),
        ({"num_moves": 0}, "num_moves must be a positive integer"),
        ({"moves": "gibbs"}, "unknown moves='gibbs'.*'hmc'"),
        ({"moves": "rwmh", "moves_kwargs": {"num_integration_steps": 3}}, "does not take moves_kwargs"),
        ({"tempering": "linear"}, "tempering must be 'adaptive', 'data' or an array"),
        ({"tempering": [0.5, 0.3, 1.0]}, "strictly increasing"),
        ({"tempering": SCHEDULE[:-1]}, "ends at 1"),
        ({"waste_free": 3}, "proper divisor of num_particles=100"),
        ({"waste_free": 10, "num_moves": 3}, "leave out num_moves"),
        ({"waste_free": 10, "persistent": True}, "choose one"),
        ({"waste_free": 10, "resampler": "killing"}, "as many offspring as particles"),
        ({"resampler": lambda key, w, n: jnp.arange(n)}, "does not copy particles in proportion"),
        ({"tune": ("mass",)}, "tune must be a tuple of names out of step_size, inverse_mass_matrix"),
        ({"init_guide": lambda: None}, "must be \\(guide, params\\)"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        SMCSampler(models.conjugate, **{"num_particles": 100, **options})


def test_particles_that_do_not_move_are_warned_of():
    history = np.ones((3, len(StageReport._fields)), np.float32)
    history[1, StageReport._fields.index("acceptance")] = 0.001
    with pytest.warns(UserWarning, match="at 1 of 3 temperatures fewer than one move in a hundred"):
        warn_of_stuck_particles(Progress(None, history))


def test_tempering_that_does_not_end_is_an_error(monkeypatch):
    chosen = sampler(models.conjugate, 400, moves="rwmh", resampler="multinomial", dense_mass=True, batch_size=100)
    monkeypatch.setattr(chosen, "max_stages", 2)
    with pytest.raises(FloatingPointError, match="after max_stages=2 stages"):
        run(chosen)
    advance = chosen._advance
    monkeypatch.setattr(chosen, "_advance", lambda *args: (args[0], 0.0 * advance(*args)[1], 1))
    with pytest.raises(FloatingPointError, match="came to a halt at temperature 0 "):
        run(chosen)
