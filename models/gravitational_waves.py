r"""Two black holes merging, as the LIGO detectors H1 and L1 would record it: precessing waveforms in real noise.

Fifteen parameters with the prior of [1, 2]; waveforms by IMRPhenomPv2 of ``ripplegw`` (extra ``gw``), from 20 Hz on.
Detector :math:`d` sees

.. math:: h_d(f) = \big(F^+_d h_+(f) + F^\times_d h_\times(f)\big)\, e^{-2\pi i f (t_c + \Delta t_d)},

with the antenna pattern :math:`F_d` and the delay :math:`\Delta t_d` of a wave front after the centre of the Earth.
Divided by the root of the noise's spectral density and by the standard deviation :math:`\sqrt{w / (4\,df)}` of its real
and imaginary parts (:math:`w` is the mean square of the analysis window), the noise is standard normal: what
:func:`model` adds. The likelihood of all frequencies is Whittle's, exactly; :func:`fit_basis` finds the few directions
that waveforms span, and the model projected on them has an exact likelihood as well.

Spectra are those of the detectors around GW150914. The strain of that event is not here: data of this module are
simulated, :data:`INJECTION` among them, and nothing found with them is an analysis of GW150914.

Checked against published numbers or limits: sidereal time, detector positions and tensors, the light's travel time
between the sites, averages of the antenna pattern, the Newtonian amplitude, polarisation face on and edge on, spin
angles against the waveform's own. Not verified against LALSuite: waveforms and angles digit by digit; the convention of
``phase``. Single precision suffices: it moves a signal of ratio 27 to the noise by 0.001 of the noise's deviation.

**References**

1. *Complete parameter inference for GW150914 using deep learning*, S. Green, J. Gair (2021)
2. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
3. *Frequency-domain gravitational waves from nonprecessing black-hole binaries. II*, S. Khan et al. (2016)
4. *An excess power statistic for detection of burst sources of gravitational radiation*, W. Anderson, P. Brady,
   J. Creighton, E. Flanagan (2001): antenna patterns
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax, random
from jax.typing import ArrayLike
from numpyro.distributions import constraints, transforms

from models.detector_noise import LOWEST_FREQUENCY, STRAIN, Network, load_network
from models.detectors import DETECTORS, antenna_pattern, delay
from models.spins import spins_in_source_frame

REFERENCE_FREQUENCY = LOWEST_FREQUENCY  # Hz
LIGHTEST, HEAVIEST = 10.0, 80.0  # solar masses
BASIS_DISTANCE = 1000.0  # Mpc

__all__ = [
    "INJECTION",
    "PARAMETERS",
    "Network",
    "fit_basis",
    "load_network",
    "log_likelihood",
    "model",
    "polarisations",
    "prior",
    "project",
    "signal",
    "simulate_injection",
    "snr",
]

#: The parameters, in the published order; four of them are nuisances there.
PARAMETERS = (
    *("m1", "m2", "phase", "time", "distance", "a1", "a2", "tilt1", "tilt2"),
    *("phi_12", "phi_jl", "theta_jn", "psi", "ra", "dec"),
)
PUBLISHED_NUISANCES = ("phase", "phi_12", "phi_jl", "psi")

#: An injection with masses, distance and sky position like those found for GW150914. It is simulated: not that event.
INJECTION = {
    "m1": 36.0,
    "m2": 30.0,
    "phase": 1.3,
    "time": 0.0,
    "distance": 420.0,
    "a1": 0.3,
    "a2": 0.2,
    "tilt1": 1.0,
    "tilt2": 1.8,
    "phi_12": 0.7,
    "phi_jl": 2.1,
    "theta_jn": 2.7,
    "psi": 0.8,
    "ra": 1.95,
    "dec": -1.22,
}


class Polar(dist.Distribution):
    r"""The polar angle of a direction uniform on the sphere: density :math:`\tfrac12 \sin\theta` on (0, pi)."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.interval(0.0, math.pi)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return jnp.arccos(random.uniform(key, self.shape(sample_shape), minval=-1.0, maxval=1.0))

    def log_prob(self, value: ArrayLike) -> Array:
        return jnp.log(jnp.sin(value) / 2)


def prior() -> dict[str, Array]:
    """The sites of :data:`PARAMETERS`.

    Two masses uniform in 10 to 80 suns, sorted: the larger has density 2 (m - 10) / 70^2, and the smaller is uniform
    below it. Directions are uniform on the sphere; distance (100 to 1000 Mpc), spins (up to 0.88), angles and time
    (0.1 s either side) are uniform.
    """
    circle = dist.Uniform(0.0, 2 * math.pi)
    to_masses = transforms.AffineTransform(LIGHTEST, HEAVIEST - LIGHTEST, domain=constraints.unit_interval)
    m1 = numpyro.sample("m1", dist.TransformedDistribution(dist.Beta(2.0, 1.0), to_masses))
    to_declination = transforms.AffineTransform(-math.pi / 2, 1.0, domain=Polar.support)
    laws = {
        "m2": dist.Uniform(LIGHTEST, m1),
        "phase": circle,
        "time": dist.Uniform(-0.1, 0.1),
        "distance": dist.Uniform(100.0, 1000.0),
        "a1": dist.Uniform(0.0, 0.88),
        "a2": dist.Uniform(0.0, 0.88),
        "tilt1": Polar(),
        "tilt2": Polar(),
        "phi_12": circle,
        "phi_jl": circle,
        "theta_jn": Polar(),
        "psi": dist.Uniform(0.0, math.pi),
        "ra": circle,
        "dec": dist.TransformedDistribution(Polar(), to_declination),
    }
    return {"m1": m1} | {name: numpyro.sample(name, law) for name, law in laws.items()}


def model(network: Network, basis: ArrayLike | None = None, x: ArrayLike | None = None) -> Array:
    """The simulator, with the sites of :data:`PARAMETERS` and ``"x"`` ``[2, F, 2]``: detector, frequency, real and
    imaginary part, in units of the noise.

    :param basis: orthonormal directions ``[F, R]`` to project on (:func:`fit_basis`); ``"x"`` is then ``[2, R, 2]``.
    :param x: condition on this; simulated if ``None``.
    """
    mean = project(signal(prior(), network), basis)
    return numpyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=x)


def log_likelihood(
    parameters: Mapping[str, ArrayLike], x: ArrayLike, network: Network, basis: ArrayLike | None = None
) -> Array:
    r""":math:`\log p(x \mid \theta)` of one observation, exactly: Whittle's likelihood, or that of the projection."""
    mean = project(signal(parameters, network), basis)
    return dist.Normal(mean, 1.0).to_event(3).log_prob(jnp.asarray(x))


def simulate_injection(rng_key: Array, network: Network, basis: ArrayLike | None = None) -> Array:
    """Data of :data:`INJECTION`, in the shape of ``"x"``."""
    mean = project(signal(INJECTION, network), basis)
    return mean + random.normal(rng_key, mean.shape)


def project(signal: Array, basis: ArrayLike | None) -> Array:
    """Real and imaginary parts of whitened signals ``[2, F]``, in the frequencies or in a basis: ``[2, R, 2]``."""
    real, imaginary = signal.real, signal.imag
    if basis is not None:
        # Products of real matrices: XLA's complex ones are much slower on CPUs.
        along, across = jnp.real(basis), jnp.imag(basis)
        real, imaginary = real @ along + imaginary @ across, imaginary @ along - real @ across
    return jnp.stack([real, imaginary], -1)


def signal(parameters: Mapping[str, ArrayLike], network: Network) -> Array:
    """Whitened signals in units of the noise, complex ``[2, F]``."""
    frequency, gmst, p = jnp.asarray(network.frequency, float), network.sidereal_time, parameters
    plus, cross = polarisations(parameters, frequency)
    # Without the barrier XLA computes the waveform anew for each detector, in loops a hundred times slower.
    plus, cross = lax.optimization_barrier((plus, cross))
    patterns = [antenna_pattern(detector, p["ra"], p["dec"], p["psi"], gmst) for detector in DETECTORS.values()]
    f_plus, f_cross = (jnp.stack(pattern)[:, None] for pattern in zip(*patterns, strict=True))
    delays = jnp.stack([delay(detector, p["ra"], p["dec"], gmst) for detector in DETECTORS.values()])
    turns = frequency * (p["time"] + delays[:, None])
    strain = (f_plus * plus + f_cross * cross) * jnp.exp(-2j * math.pi * turns)
    return strain / jnp.asarray(network.noise, float)


def polarisations(parameters: Mapping[str, ArrayLike], frequency: Array) -> tuple[Array, Array]:
    """Plus and cross polarisation at the centre of the Earth, complex ``[F]``, in units of 1e-23 s."""
    p = parameters
    inclination, first, second = spins_in_source_frame(
        *(jnp.asarray(p[name], float) for name in ("m1", "m2", "a1", "a2", "tilt1", "tilt2")),
        *(jnp.asarray(p[name], float) for name in ("phi_12", "phi_jl", "theta_jn", "phase")),
        reference_frequency=REFERENCE_FREQUENCY,
    )
    total = p["m1"] + p["m2"]
    ratio = p["m1"] * p["m2"] / total**2
    arguments = {"M_c": total * ratio**0.6, "eta": ratio, "phase_c": p["phase"], "iota": inclination}
    arguments |= {f"s1_{axis}": first[i] for i, axis in enumerate("xyz")}
    arguments |= {f"s2_{axis}": second[i] for i, axis in enumerate("xyz")}
    # The amplitude is inversely proportional to the distance: one tiny enough makes its unit 1e-23.
    found = _waveform()(frequency, arguments | {"d_L": jnp.asarray(p["distance"], float) * STRAIN})
    return found["p"], found["c"]


def snr(parameters: Mapping[str, ArrayLike], network: Network) -> Array:
    r"""Optimal signal-to-noise ratio of the network, :math:`\sqrt{4\,df \sum_d \sum_f |h_d|^2 / S_d}`."""
    return jnp.sqrt(network.window_factor * (jnp.abs(signal(parameters, network)) ** 2).sum())


def fit_basis(
    rng_key: Array, network: Network, rank: int = 128, num_waveforms: int = 4096, batch_size: int = 64
) -> tuple[Array, Array]:
    r"""Directions that waveforms span: leading right singular vectors of whitened prior draws at 1000 Mpc.

    A randomised singular value decomposition: a sketch of ``rank + 16`` random combinations of waveforms spans them
    nearly, and within its span the decomposition is exact. Waveforms are drawn twice rather than kept. Published:
    32,768 waveforms in each detector, 128 directions.

    :param num_waveforms: each counts in both detectors.
    :return: the basis ``[F, rank]``, orthonormal columns, and the share of the mean power outside it.
    """

    @jax.jit
    def waveforms(number: Array) -> Array:
        keys = random.split(random.fold_in(rng_key, number), batch_size)
        return jax.vmap(lambda key: signal(draw(key), network))(keys).reshape(2 * batch_size, -1)

    def draw(rng_key: Array) -> dict[str, Array]:
        with numpyro.handlers.seed(rng_seed=rng_key):
            return prior() | {"distance": jnp.asarray(BASIS_DISTANCE)}

    num_batches = -(-num_waveforms // batch_size)
    sketch, rng = 0.0, np.random.default_rng(0)
    for number in range(num_batches):
        combinations = rng.standard_normal((rank + 16, 2 * batch_size))
        sketch += combinations @ np.asarray(waveforms(number))
    span, _ = np.linalg.qr(np.asarray(sketch).conj().T)
    second, power = 0.0, 0.0
    for number in range(num_batches):
        batch = np.asarray(waveforms(number))
        within = batch @ span
        second += within.conj().T @ within
        power += float((np.abs(batch) ** 2).sum())
    values, rotation = np.linalg.eigh(second)
    # Rows of the matrix are waveforms h, so that its right singular vectors v have large |h v|: conjugates of ours.
    basis = np.conj(span @ rotation[:, ::-1][:, :rank])
    return jnp.asarray(basis), 1 - float(values[::-1][:rank].sum()) / power


@cache
def _waveform() -> Callable[..., dict[str, Array]]:
    """IMRPhenomPv2, imported in a thread of its own, where nothing is being traced."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_import_waveform).result()


def _import_waveform() -> Callable[..., dict[str, Array]]:
    is_double = jax.config.jax_enable_x64
    try:
        with jax.enable_x64(False):  # so that its tables fit both precisions
            import ripplegw
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gravitational_waves: waveforms come from ripplegw; pip install ripplegw, or the extra 'gw'.",
            name=error.name,
        ) from error
    finally:
        jax.config.update("jax_enable_x64", is_double)  # importing it turns double precision on for the whole process
    return ripplegw.waveform("IMRPhenomPv2", f_ref=REFERENCE_FREQUENCY)
