"""The gap to the posterior and the active units, against closed forms and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan

from numpyro_smc.programs.density import log_weights
from numpyro_smc.reports.posterior_gap import _compiled_gap, _compiled_variances, active_units, kl_q_p

X = jnp.array([1.7, -0.4, 0.3, 2.9])


def gaussian_model(x, subsample_size=None):
    with numpyro.plate("data", len(x), subsample_size=subsample_size):
        z = numpyro.sample("z", dist.Normal(0.5, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.8), obs=numpyro.subsample(x, event_dim=0))


def gaussian_guide(x, subsample_size=None):
    loc, scale = numpyro.param("loc", 0.0), numpyro.param("scale", 1.0)
    with numpyro.plate("data", len(x), subsample_size=subsample_size):
        slope = 1 / (1 + 0.8**2)
        mean = 0.5 + slope * (numpyro.subsample(x, event_dim=0) - 0.5)
        numpyro.sample("z", dist.Normal(mean + loc, scale))


POSTERIOR_SCALE = float(np.sqrt(0.8**2 / (1 + 0.8**2)))
LOG_EVIDENCE = dist.Normal(0.5, np.sqrt(1 + 0.8**2)).log_prob(X)


def test_at_the_posterior_every_particle_has_the_log_evidence():
    found = kl_q_p(
        random.key(0),
        gaussian_model,
        gaussian_guide,
        {"loc": 0.0, "scale": POSTERIOR_SCALE},
        X,
        num_particles=7,
    )
    assert np.allclose(found.bound, LOG_EVIDENCE, atol=2e-6)
    assert np.allclose(found.elbo, LOG_EVIDENCE, atol=2e-6)
    assert np.allclose(found.ess, 7, rtol=1e-5)


def test_a_gaussian_guide_has_its_known_divergence_and_the_bound_converges():
    """False alarms: below 1e-5. An ELBO without log q would be off by 1.3 nats, one without the prior by more."""
    loc, scale = 0.3, 0.75
    divergence = dist.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, POSTERIOR_SCALE))
    found = kl_q_p(
        random.key(1),
        gaussian_model,
        gaussian_guide,
        {"loc": loc, "scale": scale},
        X,
        num_particles=40_000,
        batch_size=7000,
    )
    draws = log_weights(
        random.key(2),
        gaussian_model,
        gaussian_guide,
        {"loc": loc, "scale": scale},
        (X,),
        {},
        num_particles=2000,
    ).values
    error = jnp.std(draws, axis=0) / np.sqrt(40_000)
    assert np.all(np.abs(found.elbo - (LOG_EVIDENCE - divergence)) < 5 * error)
    assert np.allclose(found.bound, LOG_EVIDENCE, atol=0.03)
    assert np.allclose(found.gap, divergence, atol=0.04) and 0.1 < divergence < 0.3
    # Effective share of the draws: the inverse of the weights' second moment, for these scales and this offset.
    z = np.linspace(-5, 5, 20_001)
    p, q = (np.exp(np.asarray(d.log_prob(z))) for d in (dist.Normal(0.0, POSTERIOR_SCALE), dist.Normal(loc, scale)))
    expected = 1 / np.trapezoid(p * p / q, z)
    assert np.allclose(found.ess / 40_000, expected, rtol=0.03)


WEIGHTS = np.array([[1.5, -0.7, 0.4], [-0.3, 0.9, 2.0]])


def binary_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(jnp.array([0.2, 0.6, 0.45])).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=z @ WEIGHTS.T - 0.5).to_event(1), obs=x)


def binary_guide(x):
    with numpyro.plate("data", len(x)):
        logits = numpyro.param("offset", jnp.zeros(3)) + x @ WEIGHTS / 2
        numpyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def test_a_binary_guide_agrees_with_enumeration():
    """Five standard errors; false alarms below 1e-5."""
    x, offset = jnp.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), jnp.array([-1.0, 0.2, 0.4])
    states = jnp.array(list(itertools.product((0.0, 1.0), repeat=3)))[:, None]
    log_p = dist.Bernoulli(jnp.array([0.2, 0.6, 0.45])).log_prob(states).sum(-1)
    log_p = log_p + dist.Bernoulli(logits=states @ WEIGHTS.T - 0.5).log_prob(x).sum(-1)
    log_q = dist.Bernoulli(logits=offset + x @ WEIGHTS / 2).log_prob(states).sum(-1)
    log_evidence = jax.nn.logsumexp(log_p, 0)
    elbo = jnp.sum(jnp.exp(log_q) * (log_p - log_q), 0)
    error = jnp.sqrt(jnp.sum(jnp.exp(log_q) * (log_p - log_q - elbo) ** 2, 0) / 20_000)
    found = kl_q_p(random.key(3), binary_model, binary_guide, {"offset": offset}, x, num_particles=20_000)
    assert np.all(np.abs(found.elbo - elbo) < 5 * error)
    assert np.allclose(found.bound, log_evidence, atol=0.02)
    second_moment = jnp.sum(jnp.exp(2 * log_p - log_q), 0) / jnp.exp(2 * log_evidence)
    assert np.allclose(found.ess / 20_000, 1 / second_moment, rtol=0.03)


def test_totals_are_scaled_to_the_full_plate_and_errors_are_over_elements():
    params = {"loc": 0.3, "scale": 0.75}
    found = kl_q_p(random.key(4), gaussian_model, gaussian_guide, params, X, num_particles=50, subsample_size=3)
    assert found.bound.shape == (3,) and found.plates.scale == pytest.approx(4 / 3)
    rows = {row["quantity"]: row for row in found.table()}
    values = np.asarray(found.bound, np.float64)
    assert rows["bound"]["mean"] == pytest.approx(values.mean())
    assert rows["bound"]["s.e."] == pytest.approx(values.std(ddof=1) / np.sqrt(3))
    assert rows["bound"]["total"] == pytest.approx(values.mean() * 4)
    assert rows["bound"]["total s.e."] == pytest.approx(values.std(ddof=1) / np.sqrt(3) * 4)
    assert rows["gap"]["mean"] == pytest.approx(rows["bound"]["mean"] - rows["elbo"]["mean"], rel=1e-5)
    assert "total" not in rows["ess"] and "data 3" in repr(found)


def test_without_a_common_plate_there_is_one_weight_for_the_whole_model():
    def model():
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal()), 1.0), obs=0.7)

    def guide():
        numpyro.sample("z", dist.Normal(0.35, np.sqrt(0.5)))

    found = kl_q_p(random.key(5), model, guide, {}, num_particles=5)
    assert float(found.gap) == pytest.approx(0.0, abs=1e-6)
    assert float(found.bound) == pytest.approx(float(dist.Normal(0.0, np.sqrt(2.0)).log_prob(0.7)), abs=1e-6)
    assert np.isnan(found.table()[0]["s.e."]) and "whole model" in repr(found)


def test_a_second_call_does_not_compile_again_and_traced_calls_agree():
    params = {"loc": 0.1, "scale": 0.75}
    first = kl_q_p(random.key(6), gaussian_model, gaussian_guide, params, X, num_particles=11)
    compiled = _compiled_gap(gaussian_model, gaussian_guide, 11, None).num_compiled()
    kl_q_p(random.key(7), gaussian_model, gaussian_guide, {"loc": 0.2, "scale": 0.5}, X + 1, num_particles=11)
    assert _compiled_gap(gaussian_model, gaussian_guide, 11, None).num_compiled() == compiled == 1
    traced = jax.jit(lambda p, x: kl_q_p(random.key(6), gaussian_model, gaussian_guide, p, x, num_particles=11))
    assert np.allclose(traced(params, X).bound, first.bound, atol=1e-6)


UNIT_LOC = np.array([[2.0, 0.0, 0.05], [0.5, -1.0, 0.0]])


def unit_model(x):
    with numpyro.plate("data", len(x), dim=-2):
        with numpyro.plate("parts", 2):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        b = numpyro.sample("b", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(z[..., 0].sum(-1, keepdims=True) + b, 1.0), obs=x[:, None])


def unit_guide(x):
    with numpyro.plate("data", len(x), dim=-2):
        with numpyro.plate("parts", 2):
            numpyro.sample("z", dist.Normal(x[:, None, None] * UNIT_LOC + 3.0, 1e-3).to_event(1))
        numpyro.sample("b", dist.Bernoulli(jnp.where(x > 0, 1.0, 0.0)[:, None]))


@pytest.mark.parametrize("batch_size", [None, 4, 7])
def test_active_units_have_the_variance_of_their_known_means(batch_size):
    x = jnp.array([-1.0, 0.3, 0.9, 1.1, -0.2])
    found = active_units(random.key(0), unit_model, unit_guide, {}, x, num_samples=10, batch_size=batch_size)
    variance = np.var(np.asarray(x), ddof=1)
    assert np.allclose(found.variances["z"], UNIT_LOC**2 * variance, atol=1e-3)
    assert found.variances["b"].shape == (1,)  # not in the plate "parts", which leaves it an axis of one
    assert np.allclose(found.variances["b"], np.var(np.asarray(x) > 0, ddof=1))
    assert {name: int(count) for name, count in found.counts.items()} == {"z": 4, "b": 1}
    assert int(found.num_active) == 5 and found.num_units == 7
    assert found.table()[-1] == {"site": "(all)", "active": 5, "units": 7}
    assert "b 1 of 1, z 4 of 6" in repr(found)


def test_the_threshold_and_the_number_of_draws_decide_what_is_active():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(400), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(jnp.zeros(400), 1.0).expand([len(x), 400]).to_event(1))

    few, many = (
        active_units(random.key(1), model, guide, {}, jnp.zeros(30), num_samples=n, batch_size=min(n, 500))
        for n in (10, 4000)  # in eight batches, which must not be of the same draws
    )
    assert int(few.num_active) == 400 and int(many.num_active) == 0
    assert float(few.variances["z"].mean()) == pytest.approx(1 / 10, rel=0.1)  # Var_q / S, as documented


def test_units_of_a_scan_are_its_steps_and_auxiliary_sites_are_not_units():
    def model(x):
        def step(c, t):
            with numpyro.plate("data", len(x)):
                return numpyro.sample("z", dist.Normal(c, 1.0)), None

        scan(step, jnp.zeros(len(x)), jnp.arange(3.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        def step(c, t):
            with numpyro.plate("data", len(x)):
                return c, numpyro.sample("z", dist.Normal(t * x, 1e-3))

        with numpyro.plate("data", len(x)):
            numpyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
        scan(step, 0.0, jnp.arange(3.0))

    x = jnp.array([-1.0, 0.3, 0.9, 1.1])
    found = active_units(random.key(2), model, guide, {}, x, num_samples=3)
    assert list(found.variances) == ["z"]
    assert np.allclose(found.variances["z"], np.arange(3.0) ** 2 * np.var(np.asarray(x), ddof=1), atol=5e-3)


def test_active_units_does_not_compile_again():
    for seed in (0, 1):
        active_units(random.key(seed), unit_model, unit_guide, {}, jnp.arange(3.0) + seed, num_samples=2)
    assert _compiled_variances(unit_model, unit_guide, 2, None).num_compiled() == 1


def test_units_need_a_plate_around_both_programs():
    def model():
        numpyro.sample("z", dist.Normal())

    with pytest.raises(ValueError, match="no plate of two or more elements encloses"):
        active_units(random.key(0), model, model, {})
    with pytest.raises(ValueError, match="num_samples must be a positive integer"):
        active_units(random.key(0), model, model, {}, num_samples=0)
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        kl_q_p(random.key(0), model, model, {}, batch_size=0)


def test_plots_show_every_element_and_every_site():
    found = kl_q_p(random.key(8), gaussian_model, gaussian_guide, {"loc": 0.3, "scale": 0.75}, X, num_particles=20)
    assert sum(bar.get_height() for bar in found.plot().patches) == 4
    units = active_units(random.key(0), unit_model, unit_guide, {}, jnp.arange(4.0), num_samples=3)
    assert [len(line.get_xdata()) for line in units.plot().lines[:2]] == [1, 6]
