"""The loaders: the currency file's format on a tiny file, its known facts on the real one, and the packaged index."""

import os

import numpy as np
import pytest

from models import series
from models.stochastic_volatility import iid_log_evidence, reference_params

REAL_DIRECTORIES = [os.environ["NUMPYRO_SMC_DATA"]] if "NUMPYRO_SMC_DATA" in os.environ else []


def write_forex(directory, prices: np.ndarray):
    header = "\t".join(f"EX{i}" for i in range(prices.shape[1]))
    np.savetxt(directory / "forex_data.tsv", prices, delimiter="\t", header=header, comments="")
    return directory


def check_published_facts(train: np.ndarray, test: np.ndarray) -> None:
    """What is known of the 22 currencies, the iid limit of the model on them included."""
    both = np.concatenate([train, test])
    assert train.shape == (119, 22)
    assert test.shape == (54, 22)
    assert both.std() == pytest.approx(0.0230, abs=5e-5)
    assert np.abs(both).max() == pytest.approx(0.1915, abs=5e-5)
    assert np.sum(both == 0) == 4
    params = reference_params(train)
    assert float(iid_log_evidence(train, params)) == pytest.approx(6685.410, abs=0.02)
    assert float(iid_log_evidence(test, params)) == pytest.approx(3164.016, abs=0.02)


def check_tiny(train: np.ndarray, test: np.ndarray) -> None:
    """Steps of exp(0.1), exp(-0.2): the returns written by :func:`tiny_directory`."""
    np.testing.assert_allclose(train, np.tile([0.1, -0.2], (119, 1)), rtol=1e-6)
    np.testing.assert_allclose(test, np.tile([0.1, -0.2], (3, 1)), rtol=1e-6)


def tiny_directory(tmp_path):
    return write_forex(tmp_path, np.exp(np.outer(np.arange(123), [0.1, -0.2])))


CASES = [(tiny_directory, check_tiny)]
CASES += [(lambda tmp_path, directory=directory: directory, check_published_facts) for directory in REAL_DIRECTORIES]


@pytest.mark.parametrize(("find", "check"), CASES, ids=["tiny", *["real"] * len(REAL_DIRECTORIES)])
def test_forex_is_the_differenced_log_prices_split_at_119(tmp_path, find, check):
    check(*series.load_forex(find(tmp_path)))


def test_forex_directory_defaults_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMPYRO_SMC_DATA", str(tiny_directory(tmp_path)))
    check_tiny(*series.load_forex())


@pytest.mark.parametrize("named", [True, False])
def test_missing_file_is_named_with_its_source_and_the_fallback(tmp_path, monkeypatch, named):
    monkeypatch.delenv("NUMPYRO_SMC_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"forex_data\.tsv .*monthly currency series.*VSMC.*SIXO.*load_sp500"):
        series.load_forex(tmp_path if named else None)


def test_sp500_returns_are_daily_percent_within_the_window():
    returns, dates = series.load_sp500()
    assert returns.shape == dates.shape == (754,)
    assert (dates[0], dates[-1]) == (np.datetime64("2016-01-04"), np.datetime64("2018-12-31"))
    assert np.all(np.diff(dates) > np.timedelta64(0, "D"))
    assert returns[-1] == pytest.approx(100 * np.log(2506.850098 / 2485.739990), rel=1e-6)
    assert 0.5 < returns.std() < 1.5


def test_sp500_window_without_trading_days_is_refused():
    with pytest.raises(ValueError, match="no trading day from 2030-01-01"):
        series.load_sp500("2030-01-01", "2031-01-01")
