"""Gradient statistics are those of the draws: exact on known gradients, in one pass or two, for any ELBO."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.elbo import ELBO

from models import gaussian_toy
from numpyro_smc import FIVO, OVIS, VIMCO, DecayingAverage, Reinforce
from numpyro_smc.reports import gradient_statistics as module
from numpyro_smc.reports.gradient_statistics import gradient_statistics

X = jnp.array([0.7, -1.1, 2.0])


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("guide_scale", 0.5, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc, scale))


PARAMS = {"loc": jnp.array(0.3), "guide_scale": jnp.array(0.5)}


class Linear(ELBO):
    """A loss whose ascent gradient by ``"w"`` is ``scale * noise + mean``, and zero by ``"unused"``."""

    mean = jnp.array([[1.0, -2.0], [0.0, 4.0]])
    scale = jnp.array([[0.5, 1.0], [2.0, 0.0]])

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        gradient = self.scale * random.normal(rng_key, (2, 2)) + self.mean
        return {"loss": -jnp.sum(gradient * param_map["w"]) + 0.0 * param_map["unused"][0], "mutable_state": None}


LINEAR = {"w": jnp.ones((2, 2)), "unused": jnp.ones(3)}


def draws_of(loss: ELBO, rng_key, num_samples: int) -> np.ndarray:
    keys = random.split(random.split(rng_key)[0], num_samples)
    gradient = jax.grad(lambda w, key: -loss.loss(key, {**LINEAR, "w": w}, model, guide))
    return np.asarray(jax.vmap(lambda key: gradient(LINEAR["w"], key))(keys), np.float64).reshape(num_samples, 4)


def test_the_statistics_are_those_of_the_draws():
    loss, key, num = Linear(), random.key(3), 50
    found = gradient_statistics(key, loss, model, guide, LINEAR, num_samples=num)
    draws = draws_of(loss, key, num)
    mean, variance = draws.mean(0), draws.var(0, ddof=1)
    np.testing.assert_allclose(found.mean["w"].ravel(), mean, rtol=1e-6)
    np.testing.assert_allclose(found.variance["w"].ravel(), variance, rtol=1e-6, atol=1e-15)
    np.testing.assert_array_equal(found.variance["unused"], 0.0)
    snr = abs(mean[:3]) / np.sqrt(variance[:3])  # the last entry does not vary
    assert found.keep_ratio == 3 / 7
    assert found.average_magnitude == pytest.approx(abs(mean[:3]).mean())
    assert found.average_variance == pytest.approx(variance[:3].mean())
    assert found.average_snr == pytest.approx(snr.mean())
    unit = mean / np.linalg.norm(mean)
    along = draws @ unit
    across = np.linalg.norm(draws - along[:, None] * unit, axis=1)
    assert found.dsnr == pytest.approx((abs(along) / across).mean())
    # Percentiles are of all entries: the fixed one is infinite but for the smallest divisor, the unused ones zero.
    assert found.snr_min == found.snr_percentiles[25] == 0.0
    assert found.snr_percentiles[50] == pytest.approx(snr.min()) and found.snr_max > 1e14


def test_the_moments_of_a_reparameterised_gradient_are_the_known_ones():
    # d/dloc of the ELBO is sum_n x_n - 2 z_n with z_n = loc + scale e_n: mean sum x - 2 N loc, variance 4 N scale^2.
    # 4000 draws; mean within 5 standard errors, variance within 5 of its relative error sqrt(2/M): false alarms 1e-6.
    num = 4000
    found = gradient_statistics(
        random.key(0), Trace_ELBO(), model, guide, PARAMS, X, num_samples=num, names="loc", batch_size=100
    )
    variance = 4 * 3 * 0.25
    assert abs(found.mean["loc"] - (X.sum() - 6 * 0.3)) < 5 * np.sqrt(variance / num)
    assert abs(found.variance["loc"] / variance - 1) < 5 * np.sqrt(2 / num)
    assert found.ess == 1.0


def test_two_passes_and_chunks_change_nothing(monkeypatch):
    def run(batch_size):
        return gradient_statistics(
            random.key(1), VIMCO(4), model, guide, PARAMS, X, num_samples=11, batch_size=batch_size
        )

    once = run(None)
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", 32)  # four draws of two numbers
    monkeypatch.setattr(module, "_BYTES_KEPT", 0)
    for other in (run(None), run(3)):
        for name in PARAMS:
            np.testing.assert_allclose(other.mean[name], once.mean[name], rtol=1e-5)
            np.testing.assert_allclose(other.variance[name], once.variance[name], rtol=1e-4)
        assert other.dsnr == pytest.approx(once.dsnr, rel=1e-4)


def test_the_same_key_gives_the_same_numbers_and_another_key_others():
    results = [
        gradient_statistics(random.key(seed), OVIS(5), model, guide, PARAMS, X, num_samples=5).average_snr
        for seed in (0, 0, 1)
    ]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("names", ["guide", ["guide_scale"], {"guide_scale"}, lambda name: "scale" in name])
def test_parameters_are_selected_by_prefix_names_or_predicate(names):
    found = gradient_statistics(random.key(0), VIMCO(3), model, guide, PARAMS, X, num_samples=4, names=names)
    assert list(found.mean) == ["guide_scale"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "encoder"}, "selects none of the parameters"),
        ({"names": ["loc", "location"]}, "no parameter .'location'."),
        ({"num_samples": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_computed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_statistics(random.key(0), VIMCO(3), model, guide, PARAMS, X, **options)


def test_the_direction_is_the_cosine_with_the_oracle():
    def cosine(oracle):
        return gradient_statistics(
            random.key(0), Linear(), model, guide, LINEAR, num_samples=20, names="w", oracle={"w": oracle}
        ).direction

    mean = draws_of(Linear(), random.key(0), 20).mean(0)
    assert cosine(3.0 * mean.reshape(2, 2)) == pytest.approx(1.0, abs=1e-6)
    assert cosine(jnp.array([[0.0, 0.0], [0.0, -1.0]])) == pytest.approx(-mean[3] / np.linalg.norm(mean))


def test_effective_sample_size_is_that_of_the_weights():
    # With q = N(0, 1/2): log w is a quadratic in z of one sign, and the exact mean ESS of 2 particles is by quadrature.
    x = jnp.array([1.0])
    params = {"loc": jnp.array(0.0), "guide_scale": jnp.array(0.5)}
    found = gradient_statistics(random.key(0), OVIS(2), model, guide, params, x, num_samples=2000, batch_size=500)
    nodes, masses = np.polynomial.hermite_e.hermegauss(100)
    z, masses = 0.5 * nodes, masses / masses.sum()
    log_w = -(z**2) / 2 - (1 - z) ** 2 / 2 + nodes**2 / 2
    w = np.exp(log_w - log_w.max())
    ess = (w[:, None] + w) ** 2 / (w[:, None] ** 2 + w**2)
    assert found.ess == pytest.approx(masses @ ess @ masses, abs=0.03)  # ESS in [1, 2]: sd below 0.3, 4.5 s.e.


def test_a_gradient_that_is_not_a_number_shows():
    params = PARAMS | {"guide_scale": jnp.array(jnp.nan)}
    found = gradient_statistics(random.key(0), VIMCO(3), model, guide, params, X, num_samples=4)
    assert np.isnan(found.average_variance)


def test_a_sequential_bound_has_statistics():
    def sequence(y):
        a = numpyro.param("a", 1.0)

        def step(z, y_t):
            z = numpyro.sample("z", dist.Normal(0.9 * z, 1.0))
            numpyro.sample("y", dist.Normal(a * z, 1.0), obs=y_t)
            return z, None

        scan(step, 0.0, y)

    def proposal(y):
        b = numpyro.param("b", 0.1)

        def step(z, y_t):
            return numpyro.sample("z", dist.Normal(0.9 * z + b * y_t, 1.0)), None

        scan(step, 0.0, y)

    params = {"a": jnp.array(1.0), "b": jnp.array(0.1)}
    y = jnp.array([0.1, 1.0, -0.4])
    found = gradient_statistics(random.key(0), FIVO(8), sequence, proposal, params, y, num_samples=10)
    assert np.isfinite(found.average_snr) and 1.0 <= found.ess <= 8.0


def test_the_table_and_the_plot_have_a_line_per_parameter():
    x = gaussian_toy.simulate(random.key(0), 5, 3)
    params = gaussian_toy.perturbed_optimum(random.key(1), x)
    found = gradient_statistics(
        random.key(2), OVIS(4), gaussian_toy.model, gaussian_toy.guide, params, x, num_samples=6
    )
    rows = found.table()
    assert [row["parameter"] for row in rows] == ["mu", "A", "b", "(all)"]
    assert [row["entries"] for row in rows] == [3, 9, 3, 15]
    assert rows[-1]["snr"] == pytest.approx(found.average_snr)
    assert "ESS" in repr(found) and len({len(line) for line in repr(found).splitlines()[1:]}) == 1
    axes = found.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mu", "A", "b"]


def test_a_loss_with_state_is_given_its_state_among_the_parameters():
    loss = Reinforce(4, baseline=DecayingAverage(0.9))
    with_baseline = loss.with_baseline(guide)
    svi = SVI(model, with_baseline, numpyro.optim.Adam(0.01), loss)
    state, _ = svi.update(svi.init(random.key(0), X), X)
    params = {**svi.get_params(state), **state.mutable_state}
    found = gradient_statistics(random.key(1), loss, model, with_baseline, params, X, num_samples=5, names=PARAMS)
    assert set(found.mean) == set(PARAMS) and np.isfinite(found.average_snr)


def test_programs_without_importance_weights_have_no_effective_sample_size():
    def other(x):
        numpyro.sample("other", dist.Normal())

    params = LINEAR | PARAMS
    found = gradient_statistics(random.key(0), Linear(2), model, other, params, X, num_samples=3, names="w")
    assert found.ess is None and "ESS" not in repr(found)
