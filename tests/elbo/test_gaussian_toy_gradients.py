"""Gradients of the multi-sample estimators on the Gaussian toy, against the original's means, variances and SNR.

The golden moments come from 20,000 draws of the original at fixed data and parameters (D = 5, N = 8). The
signal-to-noise ratios come from its published figure and its script (D = 20, N = 1024); their data and parameters are
regenerated here from PyTorch's seeds, because the signal depends on them (by 10 % from one seed to another). The Monte
Carlo draws are our own.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

import numpyro_smc
from models import gaussian_toy
from numpyro_smc import IWELBO, OVIS, STL, DReG

REFERENCE = json.loads((Path(__file__).parent / "ovis_reference.json").read_text())
TOY = REFERENCE["gaussian_toy"]
X = jnp.array(TOY["x"])
PARAMS = {name: jnp.array(TOY[name]) for name in ("b", "A", "mu")}
NUM_REPLICATES = 20_000


def has_the_wrong_scale(row):
    """The original evaluates log q of STL and DReG with standard deviation 1 here; '-scalefixed' rows have it right."""
    return row["estimator"] in ("stl", "dreg")


ROWS = {
    f"{row['estimator']}-K{row['K']}-alpha{row['alpha']}": row for row in TOY["rows"] if not has_the_wrong_scale(row)
}


def estimator(name, num_particles, alpha=0.0, **changes):
    """The loss that an estimator id of the original stands for."""
    if name == "pathwise-vae":
        return IWELBO(1, num_mc=num_particles)
    kind, options = REFERENCE["estimators"][name]
    orders = {} if kind == "TVO" else {"alpha": alpha}
    return getattr(numpyro_smc, kind)(num_particles, **options | orders | changes)


def draw_gradients(loss, params, x, num_replicates, seed, names=("b", "A", "mu"), batch_size=500):
    """Replicates of the ascent gradient of the bound, averaged over the data: ``{name: [replicates, entries]}``."""

    def bound(chosen, key):
        return -loss.loss(key, params | chosen, gaussian_toy.model, gaussian_toy.guide, x) / len(x)

    def replicates(chosen, keys):
        return lax.map(lambda key: jax.grad(bound)(chosen, key), keys, batch_size=batch_size)

    keys = random.split(random.key(seed), num_replicates)
    gradients = jax.jit(replicates)({name: params[name] for name in names}, keys)
    return {name: np.asarray(value, np.float64).reshape(num_replicates, -1) for name, value in gradients.items()}


@functools.cache
def golden_draws(name):
    row = ROWS[name]
    loss = estimator(row["estimator"], row["K"], row["alpha"], **row.get("options", {}))
    return draw_gradients(loss, PARAMS, X, NUM_REPLICATES, seed=30)


def largest_z(ours, mean, variance, num_reference):
    """Largest difference of the means, in combined standard errors."""
    error = np.sqrt(ours.var(0, ddof=1) / len(ours) + np.array(variance) / num_reference)
    return np.abs((ours.mean(0) - np.array(mean)) / error).max()


QUICK = {
    "pathwise-iwae-K3-alpha0.0",
    "pathwise-vae-K3-alpha0.0",
    "stl-scalefixed-K3-alpha0.0",
    "dreg-scalefixed-K3-alpha0.0",
    "ovis-gamma1-K3-alpha0.0",
    "ovis-gamma0-K10-alpha0.0",
}


def test_every_golden_row_is_checked_or_left_out_for_a_stated_reason():
    assert len(TOY["rows"]) == 46 and len(ROWS) == 42 and ROWS.keys() >= QUICK


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ROWS])
def test_gradients_have_the_mean_and_variance_of_the_original(name):
    """20,000 replicates of 35 entries: means within 4 combined standard errors, variances (averaged by parameter) 10 %.

    False alarms: at most 2e-3 a case for the means. The variances' own errors are below 2 % for all but the heaviest
    tails.
    """
    row = ROWS[name]
    for parameter, draws in golden_draws(name).items():
        variance = np.array(row[f"{parameter}_var"])
        z = largest_z(draws, row[f"{parameter}_mean"], variance, row["n_mc"])
        assert z < 4, f"mean of {parameter}: {z:.1f} standard errors"
        ratio = draws.var(0, ddof=1).mean() / variance.mean()
        assert 0.9 < ratio < 1.1, f"variance of {parameter}: {ratio:.3f} times the original's"


def assert_same_mean(draws, name):
    """Four combined standard errors for 35 entries: false alarm 2e-3."""
    row = ROWS[name]
    for parameter, ours in draws.items():
        z = largest_z(ours, row[f"{parameter}_mean"], row[f"{parameter}_var"], row["n_mc"])
        assert z < 4, f"{parameter}: {z:.1f} standard errors"


def test_sticking_the_landing_has_the_mean_of_gamma_one():
    draws, other = golden_draws("stl-scalefixed-K3-alpha0.0"), golden_draws("ovis-gamma1-K3-alpha0.0")
    assert_same_mean(draws, "ovis-gamma1-K3-alpha0.0")
    assert np.abs(draws["b"].mean(0)).mean() > 2 * np.abs(golden_draws("pathwise-iwae-K3-alpha0.0")["b"].mean(0)).mean()
    assert other["b"].var(0).mean() > 50 * draws["b"].var(0).mean()  # the same mean, but not the same estimator


def test_doubly_reparameterised_gradients_are_unbiased_for_the_bound():
    assert_same_mean(golden_draws("dreg-scalefixed-K3-alpha0.0"), "pathwise-iwae-K3-alpha0.0")


def test_doubly_reparameterised_gradients_are_unbiased_for_the_renyi_bound():
    draws = draw_gradients(DReG(3, alpha=0.5), PARAMS, X, NUM_REPLICATES, seed=31)
    assert_same_mean(draws, "pathwise-iwae-K3-alpha0.5")


@pytest.mark.parametrize("alpha", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_tradeoff_of_dreg_leads_to_the_wake_direction(alpha):
    draws = draw_gradients(DReG(3, alpha=alpha, tradeoff=1.0), PARAMS, X, NUM_REPLICATES, seed=32)
    assert_same_mean(draws, f"wake-wake-K3-alpha{alpha}")


@pytest.mark.slow
def test_sticking_the_landing_has_the_mean_of_the_exact_gamma_one_at_positive_alpha():
    stl = draw_gradients(STL(3, alpha=0.5), PARAMS, X, NUM_REPLICATES, seed=33)
    ovis = draw_gradients(OVIS(3, alpha=0.5, gamma=1.0, clip_log_odds=None), PARAMS, X, NUM_REPLICATES, seed=34)
    for parameter, draws in stl.items():
        z = largest_z(draws, ovis[parameter].mean(0), ovis[parameter].var(0, ddof=1), NUM_REPLICATES)
        assert z < 4, f"{parameter}: {z:.1f} standard errors"


# ---------------------------------------------------------------------------------------------------------------------
# Signal-to-noise ratios


class TorchGenerator:
    """PyTorch's CPU generator: Mersenne twister, 24-bit uniforms, Box-Muller on blocks of 16 (from size 16 on)."""

    def __init__(self, seed):
        self.twister = np.random.RandomState(seed % 2**32)

    def uniform(self, size):
        return (np.frombuffer(self.twister.bytes(4 * size), "<u4") % 2**24) / 2**24

    def normal(self, *shape):
        size = int(np.prod(shape))
        values = self.uniform(size)
        for start in range(0, size - 15, 16):
            values[start : start + 16] = self._box_muller(values[start : start + 16])
        if size % 16:
            values[-16:] = self._box_muller(self.uniform(16))
        return values.reshape(shape)

    def seed(self):
        """``torch.randint(1, sys.maxsize, (1,))``."""
        high, low = (int(bits) for bits in np.frombuffer(self.twister.bytes(8), "<u4"))
        return (high * 2**32 + low) % (2**63 - 2) + 1

    @staticmethod
    def _box_muller(uniforms):
        radius, angle = np.sqrt(-2 * np.log(1 - uniforms[:8])), 2 * np.pi * uniforms[8:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


@functools.cache
def published_problem():
    """Data, and parameters 0.01 off their optimum, of the original's script at its published seeds 42 and 10."""
    dim, num_data = 20, 1024
    location = TorchGenerator(42).normal(dim)
    of_data = TorchGenerator(42)
    x = location + of_data.normal(num_data, dim) + of_data.normal(num_data, dim)
    generator = TorchGenerator(10)
    generator.uniform(dim * dim + 2 * dim)  # initial A, b and mu
    for _ in range(4):  # two draws of the data and two evaluations, each of which ends by reseeding
        generator = TorchGenerator(generator.seed())
    x = jnp.asarray(x, jnp.float32)
    noise = {"mu": generator.normal(dim), "A": generator.normal(dim, dim), "b": generator.normal(dim)}
    params = {name: value + 0.01 * noise[name] for name, value in gaussian_toy.optimum(x).items()}
    return x, {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def test_the_generator_is_that_of_pytorch():
    """The first numbers of torch.manual_seed(42); torch.randn(16), as printed by PyTorch."""
    known = [1.9269, 1.4873, 0.9007, -2.1055, 0.6784, -1.2345, -0.0431, -1.6047]
    np.testing.assert_allclose(TorchGenerator(42).normal(16)[:8], known, atol=6e-5)


@functools.cache
def signal_to_noise(name, num_particles, num_replicates):
    """Mean over b's entries of |mean| / standard deviation, and of the variance."""
    x, params = published_problem()
    loss = estimator(name, num_particles)
    b = draw_gradients(loss, params, x, num_replicates, seed=40, names=("b",), batch_size=1)["b"]
    variance = b.var(0, ddof=1)
    return (np.abs(b.mean(0)) / np.sqrt(variance)).mean(), variance.mean()


# Signal-to-noise ratio and variance by number of particles, 10,000 replicates, read off the plot. Its variances span
# seven decades and are left out where they are hidden or misread: that of gamma = 1 at K = 54 (2.5e-5) contradicts the
# plot's own ratio and magnitude, (0.0854 / 13.6)^2 = 3.9e-5; that of gamma = 0 (2.7e-7) is 1.3 % of the axis above
# 2.2e-7, which both this package and a simulation without it give.
FIGURE = {
    "ovis-gamma0": {3: (2.19, 2.26e-4), 54: (5.62, None)},
    "ovis-gamma1": {3: (3.16, None), 54: (13.6, None)},
    "pathwise-iwae": {3: (1.25, 7.79e-4), 54: (0.367, 6.57e-5)},
}
SCRIPT = {
    (row["estimator"], row["K"]): (row["snr"], row["variance"])
    for row in REFERENCE["asymptotic"]["rows"]
    if row["estimator"] not in ("stl", "dreg")  # the wrong scale, as above
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURE)
def test_signal_to_noise_is_that_of_the_published_figure(name):
    """400 replicates, 20 entries: errors of about 3 %, tolerance 15 %."""
    for num_particles, (snr, variance) in FIGURE[name].items():
        ours = signal_to_noise(name, num_particles, 400)
        assert abs(ours[0] / snr - 1) < 0.15, f"K = {num_particles}: {ours[0]:.3f}, published {snr}"
        assert variance is None or abs(ours[1] / variance - 1) < 0.15, f"K = {num_particles}: {ours[1]:.3g}, {variance}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ovis-gamma0", "ovis-gamma1", "vimco-arithmetic", "pathwise-iwae"])
def test_signal_to_noise_at_three_particles_is_that_of_the_original_script(name):
    """400 replicates against the script's 100: combined errors of 3 to 4 %, tolerance 15 %."""
    ours, script = signal_to_noise(name, 3, 400), SCRIPT[name, 3]
    assert abs(ours[0] / script[0] - 1) < 0.15, f"{ours[0]:.3f}, original {script[0]:.3f}"
    assert abs(ours[1] / script[1] - 1) < 0.15, f"{ours[1]:.3g}, original {script[1]:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ovis-gamma1", "vimco-arithmetic", "pathwise-iwae"])
def test_variances_at_many_particles_are_those_of_the_original_script(name):
    """100 replicates each: combined errors of 4.5 %, tolerance 15 %, false alarm 1e-3 per number.

    Not for gamma = 0, whose heavy tails (kurtosis 8 at K = 100) leave the script's variance an error of 10 %.
    """
    for num_particles in (17, 100):
        ours, script = signal_to_noise(name, num_particles, 100)[1], SCRIPT[name, num_particles][1]
        assert abs(ours / script - 1) < 0.15, f"K = {num_particles}: {ours:.3g}, original {script:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slopes"),
    [
        ("ovis-gamma0", (0.2, 1.0)),
        ("ovis-gamma1", (0.4, 1.0)),
        ("vimco-arithmetic", (-1.0, -0.3)),
        ("pathwise-iwae", (-1.0, -0.3)),
    ],
)
def test_signal_to_noise_rises_for_ovis_and_falls_for_vimco_and_pathwise_gradients(name, slopes):
    """Least squares of log SNR on log K at K = 3, 17, 100; 100 replicates. The original: +.29, +.51, -.41, -.45."""
    num_particles = (3, 17, 100)
    ratios = [signal_to_noise(name, k, 100)[0] for k in num_particles]
    slope = np.polyfit(np.log(num_particles), np.log(ratios), 1)[0]
    assert slopes[0] < slope < slopes[1], f"slope {slope:+.2f} of {np.round(ratios, 3)}"
