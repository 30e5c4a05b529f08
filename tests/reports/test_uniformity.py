"""Distances from the uniform law."""

import csv

import numpy as np
import pytest
from scipy import stats

from numpyro_smc.reports.uniformity import Uniformity


def test_p_values_are_those_of_kolmogorov_and_smirnov():
    values = np.random.default_rng(0).beta([1.0, 1.3, 1.0], [1.0, 1.0, 1.2], (300, 3))
    found = Uniformity("ranks", values, ("a", "b", "c"))
    for column, deviation, p_value in zip(values.T, found.deviations, found.p_values, strict=True):
        exact = stats.kstest(column, "uniform")
        assert abs(deviation) == pytest.approx(exact.statistic)
        assert p_value == pytest.approx(exact.pvalue, abs=0.01)
        assert np.sign(deviation) == exact.statistic_sign


def test_rejections_are_shared_among_columns():
    values = np.random.default_rng(1).uniform(size=(200, 2))
    assert Uniformity("ranks", values, ("a", "b")).is_uniform()
    assert not Uniformity("ranks", values**1.5, ("a", "b")).is_uniform()
    assert not Uniformity("ranks", np.c_[values[:, 0], values[:, 1] ** 2], ("a", "b")).is_uniform()


def test_has_a_verdict_at_its_own_level():
    values = np.random.default_rng(1).uniform(size=(200, 2)) ** 1.2
    p_value = Uniformity("ranks", values, ("a", "b")).p_values.min()
    strict, lenient = (Uniformity("ranks", values, ("a", "b"), level=2 * p_value * by) for by in (1.01, 0.99))
    assert not strict.passed and "not uniform" in repr(strict)
    assert lenient.passed and "not uniform" not in repr(lenient)


def test_of_many_columns_the_worst_are_shown():
    values = np.random.default_rng(2).uniform(size=(100, 12))
    values[:, 10] **= 3
    found = Uniformity("ranks", values, tuple("abcdefghijkl"))
    assert "\n  k: " in repr(found) and "and 4 more" in repr(found) and len(found.table()) == 12
    labels = [line.get_label() for line in found.plot().lines]
    assert "k" in labels and len(labels) == 9


def test_says_which_way_it_deviates(tmp_path):
    levels = np.linspace(0, 1, 100)[:, None] ** 2
    found = Uniformity("Coverage", levels, ("all",), ("conservative", "overconfident"))
    assert "conservative" in repr(found) and found.deviations[0] == pytest.approx(0.25, abs=0.02)
    found.to_csv(tmp_path / "table.csv")
    (line,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert line["reading"] == "conservative"
    axes = found.plot()
    assert axes.get_title() == "Coverage" and len(axes.lines) == 2
    np.testing.assert_allclose(found.distribution([0.25])[0], 0.5, atol=0.01)


@pytest.mark.parametrize("values", [np.zeros((5, 2)), np.zeros((0, 1)), np.full((5, 1), 1.5), np.full((5, 1), np.nan)])
def test_what_is_no_sample_of_the_unit_interval_is_refused(values):
    with pytest.raises(ValueError, match="Uniformity: values must"):
        Uniformity("ranks", values, ("a",))
