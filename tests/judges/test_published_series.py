"""Series whose log likelihood is published: filters agree within four combined standard errors, of ten keys."""

import argparse

import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy.optimize import minimize
from scipy.stats import poisson

from benchmarks import judges
from models import published_series as series
from numpyro_smc import SMC2, ParticleFilter

OPTIONS = argparse.Namespace(seed=0, num_particles=None, keys=None, data_dir=None)
SERIES = ["nile", "nile, first left out", "ricker", "earthquakes", "brownian, scales known", "clark_1987"]


@pytest.mark.parametrize("name", SERIES)
def test_filters_find_the_published_likelihood(name):
    row = judges.compare(name, OPTIONS)
    assert abs(row["z"]) < 4 and row["s.e."] < 0.15, row


def test_the_published_likelihoods_of_linear_series_are_exact():
    """By the Kalman filter, in double precision."""
    one = np.ones(1)
    levels = series.kalman(series.NILE, np.eye(1), one, 1469.1 * np.eye(1), 15099.0, 1e7 * np.eye(1))[0]
    assert levels.sum() == pytest.approx(judges.JUDGES["nile"].value, abs=1e-4)
    walk = series.kalman(series.BROWNIAN, np.eye(1), one, 0.01 * np.eye(1), 0.15**2, 0.01 * np.eye(1))[0]
    assert walk.sum() == pytest.approx(judges.JUDGES["brownian, scales known"].value, abs=1e-5)
    assert series.load_output_gap()[1] == pytest.approx(judges.JUDGES["clark_1987"].value, abs=1e-5)


def test_brownian_motion_of_unknown_scales_has_the_published_evidence_and_posterior():
    """By SMC2, four runs; means of the posterior within four standard errors of 400 independent draws."""
    sampler = SMC2(series.brownian, 200, 100)
    runs = [sampler.run(random.key(k), series.BROWNIAN, progress_bar=False) for k in range(4)]
    evidences = np.exp([float(run.log_evidence) - judges.JUDGES["brownian"].value for run in runs])
    error = evidences.std(ddof=1) / 2
    assert abs(evidences.mean() - 1) < 4 * error < 1.0
    for name, mean, sd in (("scale", 0.115534, 0.040306), ("noise", 0.112656, 0.037538)):
        assert abs(np.mean([run.mean(name)[-1] for run in runs]) - mean) < 4 * sd / 20
        assert 0.8 < np.mean([run.standard_deviation(name)[-1] for run in runs]) / sd < 1.2


# Earthquakes


def forward(rates, transitions):
    """The likelihood of the hidden chain, summed over its states."""
    rates, transitions = np.asarray(rates, np.float64), np.asarray(transitions, np.float64)
    law = np.linalg.solve(np.eye(len(rates)) - transitions.T + 1.0, np.ones(len(rates)))
    total = 0.0
    for y in series.EARTHQUAKES:
        joint = law * poisson.pmf(y, rates)
        total += np.log(joint.sum())
        law = transitions.T @ (joint / joint.sum())
    return total


def test_one_state_has_the_published_maximum():
    mean = series.EARTHQUAKES.mean()
    assert forward([mean], [[1.0]]) == pytest.approx(-391.9189, abs=1e-4)
    run = ParticleFilter(series.earthquakes, 2).run(random.key(0), series.EARTHQUAKES, [mean], [[1.0]])
    assert float(run.log_evidence) == pytest.approx(-391.9189, abs=1e-3)


def free_chain(y):
    """Two states whose rates and transitions are to be learned."""
    rates = numpyro.param("rates", jnp.array([12.0, 30.0]), constraint=constraints.positive)
    stay = numpyro.param("stay", jnp.array([0.8, 0.8]), constraint=constraints.unit_interval)
    series.earthquakes(y, rates, jnp.stack([jnp.stack([stay[0], 1 - stay[0]]), jnp.stack([1 - stay[1], stay[1]])]))


def test_the_score_vanishes_at_the_published_maximum_of_two_states_and_nowhere_else():
    """By Fisher's identity, ten keys: beside differences of the exact likelihood, within five standard errors."""

    def exact(z):
        return forward(z[:2], [[z[2], 1 - z[2]], [1 - z[3], z[3]]])

    start = np.array([12.0, 30.0, 0.8, 0.8])
    found = minimize(lambda z: -exact(z), [15.0, 26.0, 0.93, 0.87], method="Nelder-Mead", options={"fatol": 1e-10})
    assert -found.fun == pytest.approx(-342.3183, abs=1e-4)
    assert exact(start) < -347
    particle_filter = ParticleFilter(free_chain, 300)
    for at in (found.x, start):
        steps = 1e-5 * np.eye(4)
        gradient = np.array([(exact(at + h) - exact(at - h)) / 2e-5 for h in steps])
        params = {"rates": jnp.asarray(at[:2], jnp.float32), "stay": jnp.asarray(at[2:], jnp.float32)}
        runs = [particle_filter.run(random.key(k), series.EARTHQUAKES, params=params).score() for k in range(10)]
        scores = np.array([np.concatenate([run.value["rates"], run.value["stay"]]) for run in runs])
        errors = scores.std(axis=0, ddof=1) / np.sqrt(10)
        assert (np.abs(scores.mean(axis=0) - gradient) < 5 * errors).all()
        assert (np.abs(scores.mean(axis=0)) < 5 * errors).all() == (at is found.x)
