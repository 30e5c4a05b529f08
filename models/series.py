"""The real series that the sequential benchmarks run on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

#: Rows of the currency series that are training data; the rest is the test set.
NUM_FOREX_TRAIN = 119


def load_forex(data_dir: str | os.PathLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Monthly log returns of 22 currencies against the US dollar, ``forex_data.tsv``, as VSMC and SIXO use them.

    No scaling and no centring. The file has no dates.

    :param data_dir: where the file is; without it, the environment variable ``NUMPYRO_SMC_DATA``.
    :return: training series, the first 119 returns, and test series, the rest: ``[119, 22]`` and ``[54, 22]``.
    :raises FileNotFoundError: if there is no such file. :func:`load_sp500` needs none.
    """
    prices = np.loadtxt(_find("forex_data.tsv", data_dir), skiprows=1, ndmin=2)
    returns = np.diff(np.log(prices), axis=0)
    return returns[:NUM_FOREX_TRAIN], returns[NUM_FOREX_TRAIN:]


def load_sp500(start: str = "2016-01-01", end: str = "2018-12-31") -> tuple[np.ndarray, np.ndarray]:
    """Daily log returns of the S&P 500 in percent, from the data set that the ``arch`` package ships (1999 to 2018).

    The default window is the last three years of it: the calm of 2017 between two turbulent stretches.

    :param start, end: first and last day, inclusive.
    :return: returns ``[T]`` and their dates ``[T]``, ``datetime64[D]``.
    :raises ModuleNotFoundError: if ``arch`` is not installed.
    """
    try:
        from arch.data import sp500
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "load_sp500: the S&P 500 series comes with the package 'arch'; pip install arch.", name=error.name
        ) from error
    table = sp500.load()
    dates = table.index.to_numpy().astype("datetime64[D]")[1:]
    returns = 100 * np.diff(np.log(table["Adj Close"].to_numpy(dtype=np.float64)))
    window = (dates >= np.datetime64(start)) & (dates <= np.datetime64(end))
    if not window.any():
        raise ValueError(f"load_sp500: no trading day from {start} to {end}; the data cover {dates[0]} to {dates[-1]}.")
    return returns[window], dates[window]


def _find(name: str, data_dir: str | os.PathLike | None) -> Path:
    directory = data_dir if data_dir is not None else os.environ.get("NUMPYRO_SMC_DATA")
    path = None if directory is None else Path(directory) / name
    if path is None or not path.is_file():
        looked = "no directory was given" if path is None else f"there is no file {path}"
        raise FileNotFoundError(
            f"{name} is missing: {looked}. It is the monthly currency series (174 prices of 22 currencies) published "
            "with the code of VSMC (github.com/blei-lab/variational-smc) and SIXO. Pass its directory as data_dir, or "
            "set the environment variable NUMPYRO_SMC_DATA. Without it, fall back to load_sp500(): the S&P 500 series "
            "that the package 'arch' ships."
        )
    return path
