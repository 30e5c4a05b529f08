"""The classifier two-sample test: a Gaussian's known Bayes accuracy, the published definition, and its errors."""

import sys

import numpy as np
import pytest
from scipy.stats import norm

from numpyro_smc.reports import c2st as module
from numpyro_smc.reports.c2st import c2st

RNG = np.random.default_rng(0)
REFERENCE, SAME = RNG.normal(size=(2, 1000, 2)) * [1.0, 20.0] + [0.0, 300.0]


def test_accuracy_is_the_bayes_classifiers_for_a_shift():
    """Between N(0, 1) and N(d, 1) it is Phi(d / 2); of 2,000 rows the standard error is 0.011."""
    shift = 1.2
    found = c2st(REFERENCE, SAME + np.array([0.0, 20.0 * shift]))
    assert norm.cdf(shift / 2) - 0.05 < float(found) < norm.cdf(shift / 2) + 0.03


def test_samples_of_the_same_law_are_not_told_apart():
    """Standard error 0.011, of which five."""
    assert abs(float(c2st(REFERENCE, SAME)) - 0.5) < 0.055


def test_definition_is_the_published_one():
    """Standardised by the reference with N - 1, scikit-learn's classifier and folds with their published arguments."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    reference, samples = REFERENCE[:200].astype(np.float32), 1.3 * SAME[:150].astype(np.float32)
    rows = np.concatenate([(z - reference.mean(0)) / reference.std(0, ddof=1) for z in (reference, samples)])
    labels = np.repeat([0, 1], [200, 150])
    network = MLPClassifier(
        activation="relu", hidden_layer_sizes=(20, 20), max_iter=10000, solver="adam", random_state=1
    )
    folds = KFold(n_splits=5, shuffle=True, random_state=1)
    expected = cross_val_score(network, rows, labels, cv=folds, scoring="accuracy")
    found = c2st(reference, samples)
    np.testing.assert_allclose(found.folds, expected)
    assert float(found) == found.accuracy == pytest.approx(expected.mean())
    assert repr(found).startswith(f"TwoSampleTest of 150 draws against 200: accuracy {expected.mean():.3f} (folds ")


def test_both_are_standardised_by_the_reference_with_one_degree_of_freedom_less(monkeypatch):
    seen = []

    def keep(network, rows, labels, **kwargs):
        seen.append((rows, labels))
        return np.full(5, 0.5)

    monkeypatch.setattr(module, "_classifier", lambda *arguments: (None, None, keep))
    c2st(REFERENCE[:6], SAME[:9])
    ((rows, labels),) = seen
    np.testing.assert_array_equal(labels, np.repeat([0, 1], [6, 9]))
    np.testing.assert_allclose(rows[:6].std(0, ddof=1), 1)
    np.testing.assert_allclose(rows[6:], (SAME[:9] - REFERENCE[:6].mean(0)) / REFERENCE[:6].std(0, ddof=1))


def test_vectors_are_one_parameter_and_folds_can_be_chosen():
    found = c2st(REFERENCE[:100, 0], REFERENCE[100:200, 0] + 5, num_folds=2, seed=3)
    assert len(found.folds) == 2 and float(found) > 0.9


@pytest.mark.parametrize(
    ("reference", "samples", "options", "match"),
    [
        (REFERENCE, SAME[:, :1], {}, "reference has 2 columns and samples has 1"),
        (REFERENCE[None], SAME, {}, r"reference has shape \(1, 1000, 2\); expected \[draws, parameters\]"),
        (
            REFERENCE,
            np.where(np.arange(1000)[:, None] == 7, np.nan, SAME),
            {},
            "samples has .* not finite, first in row 7",
        ),
        (REFERENCE * [1.0, 0.0], SAME, {}, "reference is constant in column 1; leave that column out"),
        (REFERENCE, SAME[:4], {}, "num_folds=5 with 1000 draws in reference and 4 in samples"),
        (REFERENCE, SAME, {"num_folds": 1}, "num_folds=1 with .* at least two folds"),
        (REFERENCE, SAME, {"max_iterations": 0}, "max_iterations must be a positive integer"),
    ],
)
def test_what_cannot_be_compared_is_refused(reference, samples, options, match):
    with pytest.raises(ValueError, match=match):
        c2st(reference, samples, **options)


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(ModuleNotFoundError, match="c2st: the classifier is scikit-learn's; pip install scikit-learn"):
        c2st(REFERENCE, SAME)
