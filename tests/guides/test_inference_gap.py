"""Inference gaps of the linear-Gaussian VAE, all of whose parts are known exactly."""

import csv

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from models import linear_gaussian_vae
from numpyro_smc.guides import inference_gap as module
from numpyro_smc.guides import local
from numpyro_smc.guides.gap_result import InferenceGap
from numpyro_smc.guides.inference_gap import inference_gap
from numpyro_smc.guides.local import LocalOptimizer

NUM = 14
PARAMS = linear_gaussian_vae.make_params(random.key(3), 4, 2)
X = linear_gaussian_vae.simulate(random.key(4), PARAMS, NUM)
PROGRAMS = linear_gaussian_vae.model, linear_gaussian_vae.guide
OPTIMIZER = LocalOptimizer("ffg", num_mc=8, patience=3, max_steps=3000, num_eval=8000)
CHAINS = {"num_chains": 64, "num_temperatures": 60, "num_leapfrog": 3}
SETTINGS = {"families": [OPTIMIZER], "evidence_options": CHAINS, "num_samples": 20_000, "batch_size": 5}

LOG_P = linear_gaussian_vae.log_evidence(PARAMS, X)
ELBO = linear_gaussian_vae.elbo(PARAMS, X)
STAR = linear_gaussian_vae.optimal_factorised_elbo(PARAMS, X)


def run(x=X, key=0, **options):
    return inference_gap(random.key(key), *PROGRAMS, PARAMS, x, **{**SETTINGS, **options})


@pytest.fixture(scope="module")
def gap():
    return run(num_simulated=2)


def test_mean_gaps_are_the_exact_ones_to_two_hundredths_of_a_nat(gap):
    assert abs(np.mean(gap.approximation["ffg"]) - np.mean(LOG_P - STAR)) < 0.02
    assert abs(np.mean(gap.amortisation["ffg"]) - np.mean(STAR - ELBO)) < 0.02
    assert abs(np.mean(gap.inference) - np.mean(LOG_P - ELBO)) < 0.02
    assert np.mean(LOG_P - STAR) > 0.1 and np.mean(STAR - ELBO) > 0.5


def test_every_part_of_every_datum_is_exact_within_its_monte_carlo_error(gap):
    """Five standard errors for each of 3 x 14 numbers: a false alarm in 2e-5; the local optimum may be 0.01 short."""
    assert np.all(np.abs(gap.log_p - LOG_P) < 5 * gap.log_p_error + 1e-4)
    assert np.all(np.abs(gap.elbo - ELBO) < 5 * gap.elbo_error + 1e-4)
    assert np.all(np.abs(gap.elbo_star["ffg"] - STAR) < 5 * gap.elbo_star_error["ffg"] + 0.01)


def test_the_parts_sum_exactly(gap):
    assert np.array_equal(gap.approximation["ffg"] + gap.amortisation["ffg"], gap.inference)


def test_the_best_estimate_is_the_larger_of_annealing_and_importance_sampling(gap):
    assert set(gap.estimates) == {"ais", "iwae"}
    assert np.array_equal(gap.log_p, np.maximum(gap.estimates["ais"], gap.estimates["iwae"]))
    assert np.any(gap.log_p == gap.estimates["ais"]) and np.any(gap.log_p == gap.estimates["iwae"])


@pytest.mark.parametrize(
    ("evidence", "options"),
    [("ais", {}), ("iwae", {}), ("smc", {"evidence_options": {"num_particles": 500}})],
    ids=["ais", "iwae", "smc"],
)
def test_every_estimate_of_the_evidence_is_right(evidence, options):
    """Mean over data within three standard errors (false alarm: 0.3% a case), and below also the log's shortfall."""
    found = run(evidence=evidence, **options)
    assert np.array_equal(found.log_p, found.estimates[evidence])
    error = np.sqrt(np.sum(found.log_p_error**2)) / NUM
    shortfall = np.mean(found.log_p_error**2) / 2
    assert -3 * error - shortfall < np.mean(found.log_p - LOG_P) < 3 * error
    assert error < 0.02


def test_the_certificate_brackets_the_evidence_of_simulated_data(gap):
    bounds = gap.certificate
    for (args, _), lower, upper, low_error, high_error in zip(
        bounds.problems, bounds.lower, bounds.upper, bounds.lower_error, bounds.upper_error, strict=True
    ):
        exact = linear_gaussian_vae.log_evidence(PARAMS, args[0])
        assert np.mean(lower) - 3 * np.sqrt(np.sum(low_error**2)) / len(exact) < np.mean(exact)
        assert np.mean(exact) < np.mean(upper) + 3 * np.sqrt(np.sum(high_error**2)) / len(exact)
    assert bounds.mean_gap < 0.1 and "10 simulated problems" in repr(gap)


def test_a_second_call_compiles_nothing(gap):
    compiled = [
        module._weigher(*PROGRAMS, SETTINGS["num_samples"], 100, "data"),
        local._compiled(
            LocalOptimizer("ffg", num_mc=8, patience=3, max_steps=3000, num_eval=8000, batch_size=5), *PROGRAMS
        ),
        module._annealer(*PROGRAMS, module._frozen({"plates": ("data",), **CHAINS}))._forward,
    ]
    run(X[::-1], key=1)
    assert [program.num_compiled() for program in compiled] == [1, 1, 1]


def test_tables_files_and_figures_hold_the_gaps(gap, tmp_path):
    rows = {(row["quantity"], row["family"]): row for row in gap.table()}
    assert list(rows) == [
        ("log p(x)", ""),
        ("L[q*]", "ffg"),
        ("L[q]", ""),
        ("approximation gap", "ffg"),
        ("amortisation gap", "ffg"),
        ("inference gap", ""),
    ]
    paired = rows["approximation gap", "ffg"]
    assert paired["mean"] == pytest.approx(np.mean(gap.approximation["ffg"]))
    assert paired["s.e."] == pytest.approx(np.std(gap.approximation["ffg"], ddof=1) / np.sqrt(NUM))
    assert paired["s.e."] < rows["log p(x)", ""]["s.e."] / 5  # the same data, so their spread cancels
    gap.to_csv(tmp_path / "gap.csv")
    lines = list(csv.DictReader((tmp_path / "gap.csv").read_text().splitlines()))
    assert len(lines) == NUM and [float(line["inference"]) for line in lines] == list(gap.inference)
    assert float(lines[3]["approximation_ffg"]) + float(lines[3]["amortisation_ffg"]) == float(lines[3]["inference"])
    heights = [bar.get_height() for bar in gap.plot().patches]
    assert heights == pytest.approx([np.mean(gap.approximation["ffg"]), np.mean(gap.amortisation["ffg"])])
    points = gap.plot_data().lines[0].get_xydata()
    assert np.array_equal(points[:, 1], gap.amortisation["ffg"])
    assert "InferenceGap of 14 data" in repr(gap) and not gap.concerns


def test_finished_batches_survive_ctrl_c_and_a_restart_ends_with_the_same_numbers(tmp_path, monkeypatch, gap):
    path, by_ais, calls = tmp_path / "gap.npz", module._by_ais, []

    def counted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return by_ais(*args)

    monkeypatch.setattr(module, "_by_ais", counted)
    part = run(checkpoint=path)
    assert part.interrupted and part.certificate is None and "of 5 data (interrupted)" in repr(part)
    assert np.array_equal(part.inference, gap.inference[:5])
    whole = run(checkpoint=path)
    assert len(calls) == 4 and not whole.interrupted
    assert np.array_equal(whole.log_p, gap.log_p)
    assert np.array_equal(whole.amortisation["ffg"], gap.amortisation["ffg"])
    for other in ({"key": 1}, {"num_samples": 10_000}, {"x": X[:10]}, {"families": ["full_rank"]}):
        with pytest.raises(ValueError, match="is of another configuration"):
            run(checkpoint=path, **other)


def test_the_bound_of_an_auxiliary_guide_is_that_of_the_extended_space():
    """z = encoder's + c v with r(v) = N(0, 1) whatever z: L[q] is less than the Gaussian's by c' Lambda c / 2."""
    spread = jnp.array([0.4, -0.3])

    def guide(x):
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            loc = x @ PARAMS["A"].T + PARAMS["a"] + spread * v[:, None]
            base = numpyro.sample("base", dist.Normal(loc, PARAMS["s"]).to_event(1), infer={"is_auxiliary": True})
            log_r = dist.Normal(0.0, 1.0).log_prob(v)
            numpyro.sample("z", dist.Delta(base, log_density=-log_r, event_dim=1))

    of_model = {name: PARAMS[name] for name in ("W", "b", "sigma")}
    found = inference_gap(random.key(0), PROGRAMS[0], guide, of_model, X, **{**SETTINGS, "evidence": "ais"})
    precision = np.linalg.inv(linear_gaussian_vae.posterior(PARAMS, X).covariance)
    loss = 0.5 * np.asarray(spread) @ precision @ np.asarray(spread)
    assert loss > 0.3
    assert np.all(np.abs(found.elbo - (ELBO - loss)) < 5 * found.elbo_error)
    assert np.all(np.abs(found.log_p - LOG_P) < 5 * found.log_p_error + 1e-4)
    assert np.all(np.abs(found.elbo_star["ffg"] - STAR) < 5 * found.elbo_star_error["ffg"] + 0.01)


def test_what_speaks_against_the_numbers_is_said(gap):
    found = {**vars(gap), "converged": {"ffg": np.arange(NUM) > 2}, "log_p": gap.log_p - 3.0, "evidence": "iwae"}
    found |= {"pareto_k": np.full(NUM, 0.9), "log_p_error": np.where(np.arange(NUM) < 4, 0.7, 0.01)}
    concerns = " ".join(InferenceGap(**found).concerns)
    assert "3 (ffg) of 14 data had not converged" in concerns and "above their evidence" in concerns
    assert "evidence of 4 of 14 data" in concerns and "14 data have weights with Pareto k" in concerns


def test_what_it_cannot_do_is_refused_by_name():
    model, guide = PROGRAMS

    of_model = {name: PARAMS[name] for name in ("W", "b", "sigma")}

    def refused(match, *programs, x=X, **options):
        params = PARAMS if programs[1] is guide else of_model
        with pytest.raises(ValueError, match=match):
            inference_gap(random.key(0), *programs, params, x, **options)

    def misnamed(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("w", dist.Normal(jnp.zeros((len(x), 2)), 1.0).to_event(1))

    def without_plate(x):
        numpyro.sample("z", dist.Normal(jnp.zeros((len(x), 2)), 1.0).to_event(2))

    refused("the guide never samples site 'z'", model, misnamed)
    refused("site 'z' has shape .* in the model|outside plate 'data': site 'z' of the guide", model, without_plate)
    refused("plate 'data' is subsampled", model, guide, subsample_size=3)
    refused("1 of 14 data are outside the support of site 'x'", model, guide, x=X.at[3, 1].set(jnp.nan))
    with pytest.raises(ValueError, match="no value for parameter 'W' of the model"):
        inference_gap(random.key(0), model, guide, {n: v for n, v in PARAMS.items() if n != "W"}, X)
    refused("evidence must be one of", model, guide, evidence="nested")
    refused("families must be a sequence", model, guide, families="ffg")
    refused("families have names of their own", model, guide, families=["ffg", LocalOptimizer("ffg")])
    refused("num_simulated certifies", model, guide, evidence="iwae", num_simulated=1)
    refused("num_samples must be a positive integer", model, guide, num_samples=0)
