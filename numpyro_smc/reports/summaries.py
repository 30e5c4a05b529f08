"""Numbers of many elements in one line."""

from typing import Any

import numpy as np


def mean_and_error(values: Any) -> tuple[float, float]:
    """Mean of all elements, and its standard error from their spread (not a number for a single one)."""
    elements = np.asarray(values, np.float64).ravel()
    error = elements.std(ddof=1) / np.sqrt(elements.size) if elements.size > 1 else np.nan
    return float(elements.mean()), float(error)
