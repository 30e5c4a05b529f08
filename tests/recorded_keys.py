"""Every random key that a call uses, and which of them are used twice.

The call runs without ``jit``. Of each key are noted the draws, the splits and the numbers folded in, with the place in
the package that asked for them.
"""

import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import random
from jax._src.random import prng

import numpyro_smc

_PACKAGE = str(Path(numpyro_smc.__file__).parent) + "/"


class Use(NamedTuple):
    """``"draw"`` of a shape, ``"split"`` to a shape, or ``"fold"`` of a number; places from within outwards."""

    how: str
    what: object
    places: tuple[str, ...]


def _places():
    frame, found = sys._getframe(2), []
    while frame is not None and len(found) < 60:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            place = f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_code.co_name}"
            if not found or found[-1] != place:
                found.append(place)
        frame = frame.f_back
    return tuple(found)


class _Recorder:
    """Keys that stem from those with which programs are read are left out: nothing but shapes is taken from them."""

    def __init__(self):
        self.uses = defaultdict(list)
        self.of_reading = {tuple(random.key_data(random.key(seed)).tolist()) for seed in (0, 1, 2)}

    def is_of_reading(self, keys):
        return all(tuple(row) in self.of_reading for row in np.asarray(keys._base_array).reshape(-1, 2).tolist())

    def note(self, keys, how, what, made=None):
        if self.is_of_reading(keys):
            if made is not None:
                self.of_reading |= {tuple(row) for row in np.asarray(made._base_array).reshape(-1, 2).tolist()}
            return
        data = np.asarray(keys._base_array)
        rows = data.reshape(-1, data.shape[-1])
        each = np.broadcast_to(np.asarray(what), data.shape[:-1]).reshape(-1) if how == "fold" else [what] * len(rows)
        places = _places()
        for row, one in zip(rows.tolist(), each, strict=True):
            self.uses[tuple(row)].append(Use(how, int(one) if how == "fold" else one, places))


def uses_of_keys(call):
    """All uses by key, ``{key: [Use]}``, of a call."""
    recorder = _Recorder()
    originals = {p: p.impl for p in (prng.random_bits_p, prng.random_split_p, prng.random_fold_in_p)}

    def draw(keys, *, bit_width, shape):
        recorder.note(keys, "draw", shape)
        return originals[prng.random_bits_p](keys, bit_width=bit_width, shape=shape)

    def split(keys, *, shape):
        made = originals[prng.random_split_p](keys, shape=shape)
        recorder.note(keys, "split", shape, made)
        return made

    def fold(keys, numbers):
        folded = originals[prng.random_fold_in_p](keys, numbers)
        shape = np.broadcast_shapes(keys.shape, np.shape(numbers))
        recorder.note(jax.numpy.broadcast_to(keys, shape), "fold", np.broadcast_to(np.asarray(numbers), shape), folded)
        return folded

    try:
        for primitive, impl in zip(originals, (draw, split, fold), strict=True):
            primitive.def_impl(impl)
        with jax.disable_jit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPyro's, of values outside of a support, which it sees without jit
            call()
    finally:
        for primitive, impl in originals.items():
            primitive.def_impl(impl)
    return dict(recorder.uses)


def repeats(uses):
    """Sets of uses of one key of which two are not independent.

    Draws among each other; draws beside splits or folds; and splits beside folds of numbers below their length, which
    make the same keys. Splits (or folds of one number) among each other count only by what is made of them.
    """
    found = set()
    for of_key in uses.values():
        draws = [use for use in of_key if use.how == "draw"]
        length = max((int(np.prod(use.what)) for use in of_key if use.how == "split"), default=0)
        meets = [use for use in of_key if use.how == "fold" and use.what < length]
        if len(draws) > 1 or (draws and len(draws) < len(of_key)):
            found.add(frozenset(of_key))
        elif meets:
            found.add(frozenset(use for use in of_key if use.how == "split" or use in meets))
    return found
