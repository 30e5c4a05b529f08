r"""Labels of numbers: which element of an axis a number depends on.

A label is nothing (0), one element :math:`j` (``j + 1``), or several (``MIXED``). Labels join as in a lattice,
:math:`0 \sqcup a = a`, :math:`a \sqcup a = a`, else ``MIXED``.
"""

from functools import reduce
from typing import Any

import jax
import numpy as np

MIXED = -1
_LARGEST = np.iinfo(np.int32).max
MOST_KNOWN = 10_000

# Labels of an array, of its shape; None where nothing in it depends on any element.
Labels = np.ndarray | None


def join(*labels: Labels) -> Labels:
    """The labels of what depends on all of these, by broadcasting."""

    def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(a == 0, b, np.where((b == 0) | (a == b), a, MIXED))

    known = [label for label in labels if label is not None]
    return reduce(both, known) if known else None


def join_over(labels: Labels, axes: tuple[int, ...], keepdims: bool = False) -> Labels:
    """The labels of what depends on everything along some axes."""
    if labels is None or not axes:
        return labels
    highest = labels.max(axis=axes, keepdims=keepdims, initial=0)
    lowest = np.where(labels == 0, _LARGEST, labels).min(axis=axes, keepdims=keepdims, initial=_LARGEST)
    return np.where(lowest == _LARGEST, 0, np.where(lowest == highest, highest, MIXED))


def total(labels: list[Labels]) -> Labels:
    """The label of what depends on everything in some arrays, a scalar."""
    return join(*[join_over(label, tuple(range(label.ndim))) for label in labels if label is not None])


def along(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Labels of an array whose entries along ``axis`` are the elements."""
    size = shape[axis]
    numbers = np.arange(1, size + 1, dtype=np.int32).reshape(
        [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
    )
    return np.broadcast_to(numbers, shape)


def concrete(value: Any) -> np.ndarray | None:
    """A small array of integers (an index, most often) whose values are known while tracing."""
    if isinstance(value, jax.core.Tracer) or np.size(value) > MOST_KNOWN:
        return None
    dtype = value.dtype if hasattr(value, "dtype") else np.result_type(value)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) or dtype.kind not in "biu":
        return None
    return np.asarray(value)
