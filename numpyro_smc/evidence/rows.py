"""A program on a few rows of its data at a time."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from numpyro_smc.programs.compiled import is_array
from numpyro_smc.programs.sites import BatchPlates


def has_rows(leaf: Any, num_rows: int) -> bool:
    """Whether a leaf is an array whose leading axis has ``num_rows`` elements."""
    return is_array(leaf) and np.ndim(leaf) > 0 and np.shape(leaf)[0] == num_rows


def cut(tree: Any, num_rows: int, first: int, size: int) -> Any:
    """Rows ``first`` to ``first + size`` of every array whose leading axis has ``num_rows`` elements."""

    def rows(leaf: Any) -> Any:
        return leaf[first : first + size] if has_rows(leaf, num_rows) else leaf

    return jax.tree.map(rows, tree)


def batches(num_rows: int, size: int) -> Iterator[tuple[int, int]]:
    """First row of each batch, and how many of its rows were in the batch before: all batches have ``size`` rows."""
    for first in range(0, num_rows, size):
        start = min(first, num_rows - size)
        yield start, first - start


def check_plates(whole: BatchPlates, part: BatchPlates, size: int, user: str) -> None:
    """:raises ValueError: unless the program on a batch is the same with ``size`` elements in its first plate."""
    if part.names != whole.names or part.shape != (size, *whole.shape[1:]):
        raise ValueError(
            f"{user}: batch_size={size} runs the programs on rows of their array arguments, but on such rows plates "
            f"{list(whole.names)} have sizes {part.shape} instead of {(size, *whole.shape[1:])}. Let the plate's size "
            f"follow from the data (numpyro.plate('data', len(x))) in model and guide, or pass batch_size=None."
        )


def are_same(whole: Any, part: Any) -> bool:
    """Whether log densities agree, up to what another order of the same sums may change."""
    whole, part = np.asarray(whole, np.float64), np.asarray(part, np.float64)
    finite = np.isfinite(whole)
    return np.array_equal(finite, np.isfinite(part)) and np.allclose(whole[finite], part[finite], rtol=1e-3, atol=1e-3)


def check_densities(whole: Any, part: Any, user: str) -> None:
    """:raises ValueError: unless the densities of a batch are those of the same rows of the whole."""
    if not are_same(whole, part):
        raise ValueError(
            f"{user}: batch_size runs the programs on rows of those array arguments whose leading axis has as many "
            f"elements as the data's plate, and the densities of the first batch differ from those of the same rows of "
            f"the whole. Give arguments that are not data another shape (such as a leading axis of one), or pass "
            f"batch_size=None."
        )
