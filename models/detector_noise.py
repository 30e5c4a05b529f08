r"""The noise of H1 and L1 around GW150914, as far as a signal is concerned: what it is divided by.

Noise of spectral density :math:`S(f)`, recorded for a time :math:`1 / df` and seen through a window of mean square
:math:`w`, has real and imaginary parts of standard deviation :math:`\sqrt{w\,S / (4\,df)}` at each frequency. Strains
are in units of :data:`STRAIN`: a signal of 1e-22, and a density of 1e-46, have numbers that single precision holds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from models.detectors import DETECTORS, sidereal_time

STRAIN = 1e-23
LOWEST_FREQUENCY = 20.0  # Hz; waveforms start there
PSD_FILE = "gw150914_psd.npz"
PSD_SOURCE = (
    "It holds the detectors' spectra that are published with github.com/stephengreen/lfi-gw, as the arrays frequency, "
    "log10_psd_H1, log10_psd_L1, t_event and window_factor."
)


class Network(NamedTuple):
    """What the detectors are like around an event; its arrays may be traced."""

    frequency: ArrayLike  # [F], Hz, evenly spaced
    noise: ArrayLike  # standard deviation of its real part in each detector, in units of STRAIN, [2, F]
    sidereal_time: ArrayLike  # of Greenwich, radians
    window_factor: ArrayLike  # mean square of the window


def make_network(frequency: ArrayLike, density: ArrayLike, time: float, window_factor: float = 1.0) -> Network:
    """From spectra.

    :param frequency: in Hz, evenly spaced, ``[F]``.
    :param density: of the noise's power, 1 / Hz, ``[2, F]``: H1, then L1.
    :param time: of the event, GPS seconds.
    """
    frequency = np.asarray(frequency, np.float64)
    scale = np.sqrt(window_factor / (4 * (frequency[1] - frequency[0])))
    noise = scale * np.sqrt(np.asarray(density, np.float64)) / STRAIN
    return Network(frequency, noise, sidereal_time(time), window_factor)


def load_network(data_dir: str | os.PathLike | None = None, highest: float = 1024.0, stride: int = 1) -> Network:
    """H1 and L1 around GW150914, from 20 Hz on.

    :param data_dir: where ``gw150914_psd.npz`` is, here or in a folder ``gw``; without it, the environment variable
        ``NUMPYRO_SMC_DATA``.
    :param highest: frequency, in Hz.
    :param stride: keep every ``stride``-th frequency, which shortens the recorded time, and the signals that fit.
    :raises FileNotFoundError: if there is no such file.
    """
    directory = data_dir if data_dir is not None else os.environ.get("NUMPYRO_SMC_DATA")
    folders = [] if directory is None else [Path(directory), Path(directory) / "gw"]
    path = next((folder / PSD_FILE for folder in folders if (folder / PSD_FILE).is_file()), None)
    if path is None:
        looked = (
            "no directory was given" if directory is None else f"it is neither in {directory} nor in its folder 'gw'"
        )
        raise FileNotFoundError(
            f"load_network: {PSD_FILE} is missing: {looked}. {PSD_SOURCE} Pass its directory as data_dir, or set the "
            "environment variable NUMPYRO_SMC_DATA; or make a network from spectra of your own by make_network."
        )
    with np.load(path) as arrays:
        frequency = arrays["frequency"].astype(np.float64)
        density = 10.0 ** np.stack([arrays[f"log10_psd_{name}"].astype(np.float64) for name in DETECTORS])
        time, window_factor = float(arrays["t_event"]), float(arrays["window_factor"])
    kept = np.flatnonzero((frequency >= LOWEST_FREQUENCY) & (frequency <= highest))[::stride]
    return make_network(frequency[kept], density[:, kept], time, window_factor)
