"""The benchmark of particle MCMC at tiny sizes: every sampler has its row, and a second run takes them up again."""

import csv

import pytest

from benchmarks import particle_mcmc


@pytest.mark.slow
def test_every_sampler_is_measured_beside_nuts_and_sweeps_beside_the_filter(tmp_path):
    sizes = ["--num_steps", "20", "10", "--num_warmup", "10", "--num_samples", "10", "--num_chains", "2"]
    arguments = [*sizes, "--num_particles", "10", "--sweep_particles", "10", "--output", str(tmp_path)]
    rows = particle_mcmc.main(arguments)
    assert [(row["model"], row["sampler"]) for row in rows] == [
        (model, sampler) for model in particle_mcmc.MODELS for sampler in particle_mcmc.SAMPLERS
    ]
    assert all(row["parameter ESS / s"] > 0 for row in rows)
    with open(tmp_path / "particle_mcmc_sweeps.csv") as file:
        sweeps = list(csv.DictReader(file))
    assert len(sweeps) == 4 and float(sweeps[0]["over the filter"]) == 1.0
    assert particle_mcmc.main(arguments) == rows
