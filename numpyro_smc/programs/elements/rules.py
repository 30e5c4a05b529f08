"""How labels pass through single operations of a jaxpr.

Elementwise operations join the labels of their operands, reshapes and slices move them, sums and contractions join them
over what they sum; what is not known here joins all labels of all its operands.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np

from numpyro_smc.programs.elements.indexing import INDEXING
from numpyro_smc.programs.elements.labels import MOST_KNOWN, Labels, along, join, join_over, total

Rule = Callable[[Any, list[Labels], list[Any]], list[Labels]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ELEMENTWISE = _words(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil "
    "clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 "
    "expm1 floor ge ge_to gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p "
    "logistic lt lt_to max min mul ne neg nextafter not or polygamma population_count pow random_gamma_grad real "
    "reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta"
)
_MOVES = _words("reshape squeeze expand_dims transpose broadcast_in_dim slice rev concatenate stack split pad")
_REDUCTIONS = _words("reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor argmax argmin")
_CUMULATIVE = _words("cumsum cumprod cummax cummin cumlogsumexp")
# Operations on two trailing axes, alike for all that stands before them.
_MATRIX = _words("cholesky lu qr eigh eig svd householder_product")


def anything(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    return [total(labels)] * len(eqn.outvars)


def _elementwise(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    shape = eqn.outvars[0].aval.shape
    for label in labels:
        if label is not None and label.ndim and any(a not in (1, b) for a, b in zip_longest(label.shape, shape)):
            return anything(eqn, labels, values)
    return [join(*labels)]


def _unchanged(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    return labels


def _moved(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    shapes = [atom.aval.shape for atom in eqn.invars]
    filled = [
        np.zeros(shape, np.int32) if label is None else label for label, shape in zip(labels, shapes, strict=True)
    ]
    return _move(eqn, filled)


def _move(eqn: Any, arrays: list[np.ndarray]) -> list[Any]:
    """What an operation that only moves numbers about does to arrays."""
    name, params = eqn.primitive.name, eqn.params
    first = arrays[0]
    if name == "reshape" or name == "squeeze" or name == "expand_dims":
        return [first.reshape(eqn.outvars[0].aval.shape)]
    if name == "transpose":
        return [first.transpose(params["permutation"])]
    if name == "broadcast_in_dim":
        shape = [1] * len(params["shape"])
        for size, dim in zip(first.shape, params["broadcast_dimensions"], strict=True):
            shape[dim] = size
        return [np.broadcast_to(first.reshape(shape), params["shape"])]
    if name == "slice":
        strides = params["strides"] or (1,) * first.ndim
        bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        return [first[tuple(slice(*bound) for bound in bounds)]]
    if name == "rev":
        return [np.flip(first, params["dimensions"])]
    if name == "concatenate":
        return [np.concatenate(arrays, params["dimension"])]
    if name == "stack":
        return [np.stack(arrays, params["axis"])]
    if name == "split":
        return np.split(first, np.cumsum(params["sizes"])[:-1], params["axis"])
    assert name == "pad"
    return [_padded(first, arrays[1], params["padding_config"])]


def _padded(array: np.ndarray, fill: np.ndarray, config: Any) -> np.ndarray:
    for axis, (low, high, interior) in enumerate(config):
        size = array.shape[axis]
        spread = size + max(size - 1, 0) * interior
        shape = list(array.shape)
        shape[axis] = max(low, 0) + spread + max(high, 0)
        wide = np.full(shape, fill, array.dtype)
        wide[(slice(None),) * axis + (slice(max(low, 0), max(low, 0) + spread, interior + 1),)] = array
        cut = slice(max(-low, 0), shape[axis] - max(-high, 0))
        array = wide[(slice(None),) * axis + (cut,)]
    return array


def _reduced(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    return [join_over(label, tuple(eqn.params["axes"])) for label in labels]


def _cumulated(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    return [join_over(label, (eqn.params["axis"],), keepdims=True) for label in labels]


def _sorted(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    together = join_over(join(*labels), (eqn.params["dimension"],), keepdims=True)
    return [together] * len(eqn.outvars)


def _contracted(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    (left_over, right_over), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    ranks = [len(atom.aval.shape) for atom in eqn.invars[:2]]
    free = [
        [axis for axis in range(rank) if axis not in over and axis not in batch]
        for rank, over, batch in zip(ranks, (left_over, right_over), (left_batch, right_batch), strict=True)
    ]

    def placed(label: Labels, over: Any, batch: Any, own: list[int], before: int, after: int) -> Labels:
        """``[*batch, *free of the left, *free of the right]``, whatever the other side is."""
        if label is None:
            return None
        kept = join_over(label.transpose([*batch, *own, *over]), tuple(range(len(batch) + len(own), label.ndim)))
        assert kept is not None
        sizes = kept.shape
        return kept.reshape(sizes[: len(batch)] + (1,) * before + sizes[len(batch) :] + (1,) * after)

    left = placed(labels[0], left_over, left_batch, free[0], 0, len(free[1]))
    right = placed(labels[1], right_over, right_batch, free[1], len(free[0]), 0)
    return [join(left, right)]


def _convolved(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    numbers, rank = eqn.params["dimension_numbers"], len(eqn.outvars[0].aval.shape)
    image, kernel = labels
    if eqn.params["batch_group_count"] != 1:
        return anything(eqn, labels, values)
    if image is not None:
        per_example = join_over(image.swapaxes(0, numbers.lhs_spec[0]), tuple(range(1, rank)))
        assert per_example is not None
        image = np.expand_dims(per_example, tuple(axis for axis in range(rank) if axis != numbers.out_spec[0]))
    return [join(image, total([kernel]))]


def _on_matrices(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    kept = [None if label is None else join_over(label, (label.ndim - 2, label.ndim - 1)) for label in labels]
    together = join(*kept)
    assert together is not None
    ranks = [len(out.aval.shape) for out in eqn.outvars]
    return [together.reshape(together.shape + (1,) * (rank - together.ndim)) for rank in ranks]


def _solved(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    matrix, right = labels
    # The columns of the right-hand side are solved for one by one; its rows, where the matrix stands on the right.
    along_the_other = join_over(right, (-2 if eqn.params["left_side"] else -1,), keepdims=True)
    of_matrix = join_over(matrix, (-2, -1), keepdims=True)
    return [join(of_matrix, along_the_other)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(_CUMULATIVE, _cumulated),
    **dict.fromkeys(_MATRIX, _on_matrices),
    **INDEXING,
    "triangular_solve": _solved,
    "optimization_barrier": _unchanged,
    "sort": _sorted,
    "dot_general": _contracted,
    "conv_general_dilated": _convolved,
}

_INTEGER_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "select_n": lambda which, *cases: np.where(which, *reversed(cases)) if len(cases) == 2 else None,
}


def evaluated(eqn: Any, values: list[Any]) -> list[np.ndarray | None]:
    """Values of the outputs, for the arithmetic that indices are made with."""
    unknown: list[np.ndarray | None] = [None] * len(eqn.outvars)
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    if any(value is None for value in values) or np.prod(getattr(aval, "shape", ())) > MOST_KNOWN:
        return unknown
    if name == "iota":
        return [np.asarray(along(aval.shape, eqn.params["dimension"]) - 1, aval.dtype)]
    if name == "convert_element_type":
        is_whole = np.issubdtype(aval.dtype, np.integer) or aval.dtype == bool
        return [np.asarray(values[0], aval.dtype)] if is_whole else unknown
    if name in _MOVES:
        return _move(eqn, values)
    if name in _INTEGER_ARITHMETIC:
        value = _INTEGER_ARITHMETIC[name](*values)
        return unknown if value is None else [np.asarray(value, aval.dtype)]
    return unknown
