"""Binary black holes: limits of the waveform, its scaling, the prior's laws, and the exact likelihoods."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.stats import norm

from models import gravitational_waves as gw
from models.detector_noise import STRAIN, make_network
from models.detectors import DETECTORS, antenna_pattern, sidereal_time

#: A bowl like the detectors' own, at twelve frequencies.
FREQUENCY = 20.0 + 10.0 * np.arange(12)
DENSITY = 1e-46 * (1 + (60 / FREQUENCY) ** 4 + (FREQUENCY / 200) ** 2) * np.array([[1.0], [1.4]])
TIME = 1_126_259_462.391
NETWORK = make_network(FREQUENCY, DENSITY, TIME, 0.9)
LIGHT_MASSES = gw.INJECTION | {"m1": 12.0, "m2": 10.0, "a1": 0.0, "a2": 0.0, "distance": 500.0}

#: Any orthonormal directions will do to project on.
BASIS = np.linalg.qr(
    np.random.default_rng(0).normal(size=(12, 5)) + 1j * np.random.default_rng(1).normal(size=(12, 5))
)[0]


@jax.jit
def _observe(parameters, network, whole, projected):
    """All that is tested of a binary, compiled once, for any network."""
    plus, cross = gw.polarisations(parameters, jnp.asarray(network.frequency, float))
    signal = gw.signal(parameters, network)
    return {
        "plus": plus,
        "cross": cross,
        "signal": signal,
        "snr": gw.snr(parameters, network),
        "whittle": gw.log_likelihood(parameters, whole, network),
        "projected": gw.log_likelihood(parameters, projected, network, BASIS),
        "joint": log_density(gw.model, (network, BASIS, projected), {}, parameters)[0],
    }


def observe(parameters, whole=0.0, projected=0.0) -> dict[str, np.ndarray]:
    values = {name: jnp.asarray(value, float) for name, value in parameters.items()}
    data = np.broadcast_to(whole, (2, 12, 2)), np.broadcast_to(projected, (2, 5, 2))
    return jax.tree.map(np.asarray, _observe(values, NETWORK, *(jnp.asarray(array, float) for array in data)))


def test_face_on_waves_are_circular_and_edge_on_waves_linear():
    above, below, beside = (observe(LIGHT_MASSES | {"theta_jn": t}) for t in (1e-3, math.pi - 1e-3, math.pi / 2))
    turn = above["cross"] / above["plus"]
    np.testing.assert_allclose(turn, np.full(12, np.sign(turn[0].imag) * 1j), atol=1e-3)
    np.testing.assert_allclose(below["cross"] / below["plus"], -turn, atol=2e-3)
    assert np.all(np.abs(beside["cross"]) < 1e-3 * np.abs(beside["plus"]))
    np.testing.assert_allclose(np.abs(beside["plus"] / above["plus"]), 0.5, atol=1e-3)


def test_amplitude_is_the_newtonian_one_and_its_first_correction_far_from_the_merger():
    r"""At 20 Hz, |h| = sqrt(5 / 24) pi^(-2/3) Mc^(5/6) f^(-7/6) / d times 1 + (451 eta / 168 - 323 / 224) v^2 [3]; the
    next term is of order v^3 = 0.007."""
    plus = observe(LIGHT_MASSES | {"theta_jn": 1e-3})["plus"]
    second, megaparsec = 4.925490947641267e-6, 3.0856775814913673e22 / 299_792_458.0
    chirp_mass = second * (12 * 10) ** 0.6 / 22**0.2
    expected = math.sqrt(5 / 24) * math.pi ** (-2 / 3) * chirp_mass ** (5 / 6) * 20 ** (-7 / 6) / (500 * megaparsec)
    expected *= 1 + (451 * 120 / 22**2 / 168 - 323 / 224) * (math.pi * 22 * second * 20) ** (2 / 3)
    assert abs(plus[0]) == pytest.approx(expected / STRAIN, rel=0.02)


def test_ratio_of_signal_to_noise_falls_with_the_distance():
    near, far = (observe(gw.INJECTION | {"distance": d})["snr"] for d in (200.0, 600.0))
    assert float(near / far) == pytest.approx(3, rel=1e-5)


def test_signal_to_noise_is_that_of_the_spectra():
    """4 df sum |h|^2 / S, from the polarisations."""
    found = observe(gw.INJECTION)
    gmst = sidereal_time(TIME)
    power = 0.0
    for number, detector in enumerate(DETECTORS.values()):
        pattern = antenna_pattern(detector, *(gw.INJECTION[name] for name in ("ra", "dec", "psi")), gmst)
        strain = STRAIN * np.asarray(pattern[0] * found["plus"] + pattern[1] * found["cross"], np.complex128)
        power += 4 * 10.0 * np.sum(np.abs(strain) ** 2 / DENSITY[number])
    assert float(found["snr"]) == pytest.approx(math.sqrt(power), rel=1e-4)


def test_a_later_merger_turns_the_phases():
    first, later = (observe(gw.INJECTION | {"time": time})["signal"] for time in (0.0, 0.004))
    np.testing.assert_allclose(later, first * np.exp(-2j * np.pi * FREQUENCY * 0.004), atol=1e-4 * abs(first).max())


def test_waveforms_leave_the_precision_as_it_is():
    """Importing ripplegw turns double precision on everywhere."""
    assert observe(gw.INJECTION)["signal"].dtype == np.complex64
    assert not jax.config.jax_enable_x64


@pytest.mark.slow
def test_single_precision_suffices_and_has_gradients():
    network = make_network(np.arange(20, 1024.0, 0.5), 1e-46 * np.ones((2, 2008)), TIME)
    single = jax.jit(lambda p: gw.signal(p, network))(gw.INJECTION)
    with jax.enable_x64(True):
        double = jax.jit(lambda p: gw.signal(p, network))(gw.INJECTION)
    assert np.linalg.norm(single - double) < 1e-4 * np.linalg.norm(double)
    x = gw.project(double, None) + 1.0
    values = {name: jnp.asarray(value, float) for name, value in gw.INJECTION.items()}
    gradient = jax.jit(jax.grad(lambda p: gw.log_likelihood(p, x, network)))(values)
    assert all(np.isfinite(value) and value != 0 for value in gradient.values())


def test_prior_has_the_published_laws():
    """4,000 draws: five standard errors of each mean, false alarms 6e-7 each."""
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: handlers.seed(gw.prior, key)()))(keys)
    drawn = {name: np.asarray(values, np.float64) for name, values in drawn.items()}
    assert set(drawn) == set(gw.PARAMETERS) and np.all(drawn["m1"] >= drawn["m2"])
    third = 70 / 3
    means = {
        "m1": (10 + 2 * third, math.sqrt(70**2 / 18)),
        "m2": (10 + third, math.sqrt(70**2 / 18)),
        "distance": (550, 900 / math.sqrt(12)),
        "time": (0, 0.2 / math.sqrt(12)),
        "a1": (0.44, 0.88 / math.sqrt(12)),
        "psi": (math.pi / 2, math.pi / math.sqrt(12)),
        "ra": (math.pi, 2 * math.pi / math.sqrt(12)),
    }
    for name, (mean, deviation) in means.items():
        assert abs(drawn[name].mean() - mean) < 5 * deviation / math.sqrt(4000), name
    for name, function in (("tilt1", np.cos), ("tilt2", np.cos), ("theta_jn", np.cos), ("dec", np.sin)):
        values = function(drawn[name])  # uniform on (-1, 1)
        assert abs(values.mean()) < 5 / math.sqrt(3 * 4000), name
        assert abs((values**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / 4000), name


def test_supports_are_the_priors_intervals():
    """Samplers move on the real line by their bijections."""
    trace = handlers.trace(handlers.seed(gw.prior, 0)).get_trace()
    ends = {name: (site["fn"].support.lower_bound, site["fn"].support.upper_bound) for name, site in trace.items()}
    assert [float(end) for end in ends["m1"]] == [10, 80]
    assert [float(end) for end in ends["m2"]] == [10, float(trace["m1"]["value"])]
    assert [float(end) for end in ends["dec"]] == pytest.approx([-math.pi / 2, math.pi / 2])
    assert all(float(high) > float(low) for low, high in ends.values())


def test_prior_density_of_the_masses_is_uniform_over_sorted_pairs():
    trace = handlers.trace(handlers.seed(gw.prior, 0)).get_trace()
    values = {name: trace[name]["value"] for name in gw.PARAMETERS}
    densities = [
        log_density(gw.prior, (), {}, values | {"m1": jnp.asarray(m1), "m2": jnp.asarray(m2)})[0]
        for m1, m2 in ((70.0, 11.0), (20.0, 15.0))
    ]
    assert float(densities[0]) == pytest.approx(float(densities[1]), rel=1e-5)
    others = sum(float(trace[n]["fn"].log_prob(values[n])) for n in gw.PARAMETERS if n not in ("m1", "m2"))
    assert float(densities[0]) - others == pytest.approx(math.log(2 / 70**2), abs=1e-4)


def test_basis_is_that_of_the_singular_value_decomposition(monkeypatch):
    """Of cheap chirps that depend on the prior's draws: time, mass and distance."""

    def chirp(parameters, network):
        frequency = jnp.asarray(network.frequency)
        phase = 2j * np.pi * frequency * parameters["time"] / 10 + 1j * (frequency / parameters["m1"])
        return jnp.stack([jnp.exp(-phase), 2 * jnp.exp(phase)]) * jnp.exp(1j * (frequency / 40) ** 2)

    monkeypatch.setattr(gw, "signal", chirp)
    basis, outside = gw.fit_basis(jax.random.key(1), NETWORK, rank=4, num_waveforms=96, batch_size=32)
    np.testing.assert_allclose(basis.T.conj() @ basis, np.eye(4), atol=1e-5)
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(1), batch), 32) for batch in range(3)]
    draw = jax.vmap(lambda key: chirp(handlers.seed(gw.prior, key)(), NETWORK))
    waveforms = np.concatenate([np.asarray(draw(k)).reshape(64, 12) for k in keys])
    values = np.linalg.svd(waveforms, compute_uv=False)
    assert 0.001 < outside == pytest.approx(1 - (values[:4] ** 2).sum() / (values**2).sum(), abs=1e-4)
    kept = np.sum(np.abs(waveforms @ np.conj(basis)) ** 2) / np.sum(values**2)
    assert kept == pytest.approx(1 - outside, abs=1e-4)
    assert np.sum(np.abs(waveforms @ np.asarray(basis)) ** 2) / np.sum(values**2) < kept - 0.01  # the conjugate is not


def test_projection_keeps_what_lies_in_the_basis():
    whole = jnp.asarray(np.array([[1.0, 2j, 0, -1, 0.5], [0, 1, 1j, 0, 3]]) @ BASIS.T)
    kept = np.asarray(gw.project(whole, BASIS))
    np.testing.assert_allclose(kept[..., 0] + 1j * kept[..., 1], [[1, 2j, 0, -1, 0.5], [0, 1, 1j, 0, 3]], atol=1e-5)


def test_likelihoods_are_gaussian_around_the_signal():
    rng = np.random.default_rng(2)
    whole, projected = rng.normal(size=(2, 12, 2)), rng.normal(size=(2, 5, 2))
    found = observe(gw.INJECTION, whole, projected)
    mean, coefficients = found["signal"], found["signal"] @ BASIS.conj()
    expected = norm.logpdf(whole, np.stack([mean.real, mean.imag], -1)).sum()
    assert float(found["whittle"]) == pytest.approx(expected, rel=1e-5)
    expected = norm.logpdf(projected, np.stack([coefficients.real, coefficients.imag], -1)).sum()
    assert float(found["projected"]) == pytest.approx(expected, rel=1e-5)
    values = {name: jnp.asarray(value, float) for name, value in gw.INJECTION.items()}
    prior = float(log_density(gw.prior, (), {}, values)[0])
    assert float(found["joint"]) - prior == pytest.approx(expected, rel=1e-5)


def write_spectra(folder) -> np.ndarray:
    frequency = np.arange(0, 200.1, 0.5, dtype=np.float32)
    spectra = {
        f"log10_psd_{name}": np.full(len(frequency), level, np.float32) for name, level in (("H1", -46), ("L1", -45))
    }
    arrays = {"frequency": frequency, **spectra, "t_event": 1_126_259_462.391, "window_factor": 0.9}
    folder.mkdir(exist_ok=True)
    np.savez(folder / "gw150914_psd.npz", **arrays)
    return frequency


@pytest.mark.parametrize("folder", [".", "gw"])
def test_spectra_are_read_from_twenty_hertz_on(tmp_path, monkeypatch, folder):
    write_spectra(tmp_path / folder)
    monkeypatch.setenv("NUMPYRO_SMC_DATA", str(tmp_path))
    network = gw.load_network(highest=100.0, stride=4)
    np.testing.assert_array_equal(network.frequency, np.arange(20, 100.1, 2.0))
    expected = math.sqrt(0.9 / 8) * np.repeat([[1.0], [10**0.5]], len(network.frequency), 1)
    np.testing.assert_allclose(network.noise, expected, rtol=1e-5)
    assert network.sidereal_time == sidereal_time(TIME) and network.window_factor == 0.9


def test_missing_spectra_are_named_with_their_source(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"gw150914_psd\.npz is missing: no directory .*lfi-gw.*data_dir"):
        gw.load_network()
    with pytest.raises(FileNotFoundError, match="nor in its folder 'gw'"):
        gw.load_network(tmp_path)
