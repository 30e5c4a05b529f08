"""Data tempering against conjugate linear regression: the evidence of every number of rows, and the posterior.

Mean tests are at five standard errors over replicates with fixed keys: false alarms 6e-7 per case.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from models import linear_regression
from models.linear_regression import Problem
from numpyro_smc.programs.unconstrained import UnconstrainedModel
from numpyro_smc.samplers.paths import Rows
from numpyro_smc.samplers.smc_sampler import SMCSampler
from tests.samplers.static_models import random_walk, replicates
from tests.statistics_of_estimates import assert_mean, assert_unbiased_evidence

X, Y, NOISE = linear_regression.random_problem(np.random.default_rng(3), 12, 2)
PROBLEM = Problem(X.astype(np.float32), Y.astype(np.float32), NOISE)
ROW_COUNTS = np.array([1, 2, 4, 8, 12])
SCHEDULED = SMCSampler(
    linear_regression.model,
    64,
    moves=random_walk,
    tune=(),
    step_size=0.5,
    tempering="data",
    row_counts=ROW_COUNTS,
)
ADAPTIVE = SMCSampler(linear_regression.model, 400, moves="rwmh", tempering="data")


def evidence_of(num_rows):
    return linear_regression.log_evidence(X[:num_rows], Y[:num_rows], NOISE)


def test_evidence_of_every_number_of_rows_is_unbiased_with_a_schedule_and_fixed_moves():
    """N = 64, 300 runs, 5 numbers of rows."""
    results = replicates(SCHEDULED, 300, *PROBLEM)
    assert 0.1 < np.mean([result.resampled.mean() for result in results]) < 0.9
    sequences = np.array([np.cumsum(result.log_evidence_increments) for result in results])
    for stage, num_rows in enumerate(ROW_COUNTS):
        assert_unbiased_evidence(sequences[:, stage], evidence_of(num_rows))
    for result in results:
        np.testing.assert_array_equal(result.row_counts, ROW_COUNTS)
        np.testing.assert_allclose(result.betas, ROW_COUNTS / 12)


@pytest.mark.parametrize("waste_free", [None, 20])
def test_adaptive_rows_have_the_evidence_of_each_and_the_posterior(waste_free):
    """N = 400, 40 runs."""
    chosen = ADAPTIVE
    if waste_free:
        chosen = SMCSampler(linear_regression.model, 400, moves="rwmh", tempering="data", waste_free=waste_free)
    results = replicates(chosen, 40, *PROBLEM)
    assert_unbiased_evidence([r.log_evidence for r in results], evidence_of(12))
    with pytest.raises(ValueError, match="data tempering has none"):
        results[0].path_sampling()
    first = [[r.log_evidence_increments[0], evidence_of(r.row_counts[0])] for r in results]
    assert_unbiased_evidence([log_z - exact for log_z, exact in first], 0.0)
    mean, covariance = linear_regression.posterior(X, Y, NOISE)
    for i in range(2):
        assert_mean([float(r.mean("w")[i]) for r in results], mean[i])
        squares = [float(np.exp(r.log_weights) @ (r.samples["w"][:, i] - mean[i]) ** 2) / 400 for r in results]
        assert_mean(squares, covariance[i, i])
    for r in results:
        counts = np.diff(r.row_counts, prepend=0)
        assert r.row_counts[-1] == 12 and (counts >= 1).all()
        assert ((r.ess >= 0.5 * 400) | (counts == 1)).all()


def test_the_next_number_of_rows_is_the_largest_that_keeps_the_effective_sample_size():
    path = Rows(UnconstrainedModel(linear_regression.model, PROBLEM), "data")
    rng = np.random.default_rng(0)
    next_rows, steps = jax.jit(path.next, static_argnums=3), set()
    for so_far in (0, 3, 11):
        kept, log_weights = rng.normal(size=(50, 12)) * 0.3, rng.normal(size=50) * 0.3
        kept[0, :4] = -np.inf  # dead from the first row on
        weights = np.exp(log_weights[:, None] + np.cumsum(kept[:, so_far:], axis=1))
        ess = weights.sum(0) ** 2 / (weights**2).sum(0)
        for target in (0.5, 0.8, 0.99):
            found = next_rows(jnp.asarray(kept), jnp.asarray(log_weights), jnp.asarray(so_far / 12), target)
            expected = max(np.flatnonzero(ess >= target * 50), default=0) + 1 + so_far
            assert round(float(found) * 12) == expected
            steps.add(expected - so_far)
    assert steps == {1, 7, 10}


def outside_and_inside(x, y, extra):
    """Rows in two sites, one of them masked; a factor and a site outside; a plate inside the plate."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.factor("outside", -0.3 * w[0])
    numpyro.sample("extra", dist.Normal(w[1], 1.0), obs=extra)
    with numpyro.plate("rows", len(y), dim=-2):
        numpyro.sample("first", dist.Normal((x @ w)[:, None], scale), obs=y[:, None])
        with numpyro.plate("repeats", 3, dim=-1), numpyro.handlers.mask(mask=(y > 0.0)[:, None]):
            numpyro.sample("second", dist.Normal((x @ w)[:, None], 2.0), obs=jnp.stack([y, 2 * y, 3 * y], 1))


def test_rows_add_up_and_what_stands_outside_the_plate_belongs_to_the_first():
    x, y = PROBLEM.x, PROBLEM.y
    model = UnconstrainedModel(outside_and_inside, (x, y, 0.4))
    plate = model.plate("rows")

    def evaluate(position):
        return model.split(position), model.split(position, plate), model.values(position)

    whole, by_row, values = jax.jit(evaluate)(jnp.array([0.3, -0.2, 0.7]))
    assert by_row.likelihood.shape == (12,)
    np.testing.assert_allclose(by_row.base, whole.base)
    np.testing.assert_allclose(by_row.likelihood.sum(), whole.likelihood, rtol=1e-5)
    w, scale = values["w"], values["scale"]
    rows = dist.Normal(x @ w, scale).log_prob(y)
    repeats = dist.Normal((x @ w)[:, None], 2.0).log_prob(jnp.stack([y, 2 * y, 3 * y], 1)).sum(1)
    expected = rows + jnp.where(y > 0.0, repeats, 0.0)
    expected = expected.at[0].add(-0.3 * w[0] + dist.Normal(w[1], 1.0).log_prob(0.4))
    np.testing.assert_allclose(by_row.likelihood, expected, rtol=1e-4)


def test_a_second_run_with_other_rows_compiles_nothing():
    numbers = set()
    for scale in (1.0, 3.0):
        result = ADAPTIVE.run(random.key(0), PROBLEM.x, scale * PROBLEM.y, NOISE, progress_bar=False)
        numbers.add(len(result.betas))
    assert len(numbers) == 2
    assert [f.num_compiled() for f in (ADAPTIVE._start, ADAPTIVE._advance, ADAPTIVE._finish)] == [1, 1, 1]


def test_an_interrupted_run_resumes_to_the_bit(tmp_path, monkeypatch):
    whole = SCHEDULED.run(random.key(0), *PROBLEM, progress_bar=False)
    calls, advance = [], SCHEDULED._advance

    def interrupt(*args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return advance(*args)

    path = tmp_path / "run.npz"
    monkeypatch.setattr(SCHEDULED, "_advance", interrupt)
    stopped = SCHEDULED.run(random.key(0), *PROBLEM, progress_bar=False, checkpoint=path)
    assert stopped.interrupted and list(stopped.row_counts) == [1, 2, 4]
    resumed = SCHEDULED.run(random.key(1), *PROBLEM, progress_bar=False, checkpoint=path)
    assert len(calls) == 6 and resumed.log_evidence == whole.log_evidence
    np.testing.assert_array_equal(resumed.samples["w"], whole.samples["w"])
    monkeypatch.setattr(SCHEDULED, "_description", SCHEDULED._description.replace("rows_of=data", "rows_of=other"))
    with pytest.raises(ValueError, match="is of another sampler"):
        SCHEDULED.run(random.key(0), *PROBLEM, progress_bar=False, checkpoint=path)


def latents_in_the_plate(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(y)):
        z = numpyro.sample("z", dist.Normal(0.0, scale))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_models_whose_rows_bring_latents_and_plates_without_data_are_refused_by_name():
    def run(model, *args, **options):
        SMCSampler(model, 4, tempering="data", **options).run(random.key(0), *args, progress_bar=False)

    with pytest.raises(ValueError, match=r"latent site 'z' stands in plate 'data'.*tempering='adaptive'"):
        run(latents_in_the_plate, PROBLEM.y)
    with pytest.raises(ValueError, match=r"nothing is observed in a plate 'cities'.*plates of the model: 'data'"):
        run(linear_regression.model, *PROBLEM, data_plate="cities")
    with pytest.raises(ValueError, match="row_counts ends at 10, but plate 'data' has 12 rows"):
        run(linear_regression.model, *PROBLEM, row_counts=[5, 10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"persistent": True}, "persistent=True reweighs past particles by their temperatures"),
        ({"init_guide": (lambda: None, {})}, "tempering='data' starts from the prior"),
        ({"row_counts": [3, 3, 12]}, "row_counts=.* strictly increasing array of whole numbers"),
        ({"row_counts": [0, 12]}, "from at least 1"),
        ({"row_counts": [0.5, 1.0]}, "whole numbers"),
        ({"row_counts": [12], "tempering": "adaptive"}, "row_counts are the schedule of tempering='data'"),
    ],
)
def test_options_that_do_not_compose_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        SMCSampler(linear_regression.model, 100, **{"tempering": "data", **options})
