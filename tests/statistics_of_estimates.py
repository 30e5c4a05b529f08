"""Assertions about Monte Carlo estimates.

A false alarm at five standard errors has probability 6e-7 under normality.
"""

import numpy as np


def assert_mean(values, expected, num_standard_errors=5.0, reference_error=0.0):
    """The mean of independent ``values`` is ``expected``, up to ``num_standard_errors`` standard errors."""
    values = np.asarray(values, np.float64)
    error = np.sqrt(values.var(ddof=1) / len(values) + reference_error**2)
    difference = values.mean() - expected
    assert np.isfinite(values).all(), "some values are not finite"
    assert abs(difference) <= num_standard_errors * error, (
        f"mean {values.mean():.5f}, expected {expected:.5f}: {difference / error:.1f} standard errors of {error:.2g}"
    )


def assert_unbiased_evidence(log_estimates, log_evidence, num_standard_errors=5.0):
    """The mean of exp(log estimate - log evidence) is one. Refuses tests without power (relative sd above 3)."""
    ratios = np.exp(np.asarray(log_estimates, np.float64) - float(log_evidence))
    assert ratios.std() < 3.0, f"the estimates are too noisy to test: relative sd {ratios.std():.2f}"
    assert_mean(ratios, 1.0, num_standard_errors)
