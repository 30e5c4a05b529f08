"""How labels pass through operations that index: slices at a place that is computed, gathers and scatters."""

from typing import Any

import jax
import numpy as np

from numpyro_smc.programs.elements.labels import Labels, join, join_over, total


def _sliced(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    label, starts, sizes = labels[0], values[1:], eqn.params["slice_sizes"]
    if label is not None:
        for axis, (size, start) in enumerate(zip(sizes, starts, strict=True)):
            assert label is not None
            if size == label.shape[axis]:
                continue
            if start is None:
                label = join_over(label, (axis,), keepdims=True)
            else:
                first = int(np.clip(start, 0, label.shape[axis] - size))
                label = label[(slice(None),) * axis + (slice(first, first + size),)]
    return [join(label, total(labels[1:]))]


def _slice_updated(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    operand, update, starts = labels[0], labels[1], values[2:]
    shape, sizes = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    if any(start is None for start, size, whole in zip(starts, sizes, shape, strict=True) if size != whole):
        partial = tuple(axis for axis in range(len(shape)) if sizes[axis] != shape[axis])
        new = join(operand, join_over(update, partial, keepdims=True))
    else:
        new = np.zeros(shape, np.int32) if operand is None else np.array(operand)
        corner = [
            0 if size == whole else int(np.clip(start, 0, whole - size))
            for start, size, whole in zip(starts, sizes, shape, strict=True)
        ]
        where = tuple(slice(first, first + size) for first, size in zip(corner, sizes, strict=True))
        new[where] = 0 if update is None else update
    return [join(new, total(labels[2:]))]


def _gathered(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    operand, indices = labels
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, out_shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    batch_dims = [axis for axis in range(len(out_shape)) if axis not in numbers.offset_dims]
    result = None
    if indices is not None:
        per_index = join_over(indices, (indices.ndim - 1,))
        assert per_index is not None
        result = np.expand_dims(per_index, tuple(numbers.offset_dims))
    if operand is None:
        return [result]
    if values[1] is not None:
        return [join(result, _gathered_at(eqn, operand, values[1]))]
    kept = {}
    offset_axes = [
        axis
        for axis in range(len(shape))
        if axis not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    for axis, out_axis in zip(offset_axes, numbers.offset_dims, strict=True):
        if sizes[axis] == shape[axis]:
            kept[axis] = out_axis
    for axis, index_axis in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        kept[axis] = batch_dims[index_axis]
    rest = join_over(operand, tuple(axis for axis in range(len(shape)) if axis not in kept))
    assert rest is not None
    order = np.argsort([kept[axis] for axis in sorted(kept)])
    placed = rest.transpose(order)
    missing = tuple(axis for axis in range(len(out_shape)) if axis not in kept.values())
    return [join(result, np.expand_dims(placed, missing))]


def _gathered_at(eqn: Any, operand: np.ndarray, indices: np.ndarray) -> np.ndarray:
    # The gather itself on labels: what it fills in from outside depends on no element.
    params = eqn.params | {"fill_value": 0}
    with jax.ensure_compile_time_eval():
        return np.asarray(eqn.primitive.bind(np.array(operand), np.asarray(indices), **params))


def _scattered(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    operand, indices, updates = labels
    shape = eqn.invars[0].aval.shape
    if values[1] is None:
        return [join(operand, total([indices, updates]))]
    names = np.arange(1, int(np.prod(eqn.invars[2].aval.shape)) + 1, dtype=np.int32).reshape(eqn.invars[2].aval.shape)

    def scatter(how: Any, written: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            new = how(
                np.zeros(shape, np.int32),
                np.asarray(values[1]),
                written,
                eqn.params["dimension_numbers"],
                mode=eqn.params["mode"],
            )
        return np.asarray(new)

    if np.any(scatter(jax.lax.scatter_add, np.ones_like(names)) > 1):
        return [join(operand, total([updates]))]
    source = scatter(jax.lax.scatter, names)
    flat = np.zeros(names.size, np.int32) if updates is None else updates.ravel()
    written = np.where(source > 0, flat[np.maximum(source - 1, 0)], 0)
    if eqn.primitive.name == "scatter":
        before = np.zeros(shape, np.int32) if operand is None else operand
        return [np.where(source > 0, written, before)]
    return [join(operand, written)]


INDEXING = {
    "dynamic_slice": _sliced,
    "dynamic_update_slice": _slice_updated,
    "gather": _gathered,
    "scatter": _scattered,
    **{f"scatter{joint}{how}": _scattered for joint in "-_" for how in ("add", "mul", "min", "max")},
}
