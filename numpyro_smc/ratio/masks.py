"""Which parameters a ratio is of: laws of random masks, and the language in which masks are written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.programs.arguments import check_positive

__all__ = [
    "MaskLaw",
    "PoissonMask",
    "RestrictedMask",
    "SelectionMask",
    "SizesMask",
    "UniformMask",
    "default_mask_law",
    "parse_masks",
]

_LARGEST_WITH_UNIFORM_MASKS = 8


@runtime_checkable
class MaskLaw(Protocol):
    """A law of non-empty subsets of the parameters."""

    def sample(self, rng_key: Array, num: int, size: int) -> Array:
        """Independent masks, one a row.

        :param rng_key: random key.
        :param num: number of masks.
        :param size: number of parameters :math:`D`.
        :return: bool ``[num, size]``; true where the parameter is kept.
        """
        ...


@dataclass(frozen=True)
class UniformMask:
    r"""All non-empty subsets alike: :math:`P(b) = 1 / (2^D - 1)` [1].

    The number kept is near :math:`D / 2` when :math:`D` is large: then the small marginals that are looked at are
    hardly ever trained, and :class:`SizesMask` is better.

    **Example**

    .. doctest::

        >>> from jax import random
        >>> from numpyro_smc.ratio.masks import UniformMask
        >>> masks = UniformMask().sample(random.key(0), 1000, 5)
        >>> masks.shape, bool(masks.any(axis=1).all())
        ((1000, 5), True)

    **References**

    1. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
    """

    def sample(self, rng_key: Array, num: int, size: int) -> Array:
        check_positive("UniformMask", size=size)
        first_key, rest_key = random.split(rng_key)
        # The first kept parameter is number j with probability proportional to 2^-j; those after it are fair coins.
        first = random.categorical(first_key, -jnp.log(2.0) * jnp.arange(size), shape=(num,))[:, None]
        positions = jnp.arange(size)
        return (positions == first) | ((positions > first) & random.bernoulli(rest_key, shape=(num, size)))


@dataclass(frozen=True)
class PoissonMask:
    r"""Few parameters: :math:`k = \min(1 + \mathrm{Poisson}(\lambda), D)` of them, all subsets of a size alike.

    Every row draws its own :math:`k`; the original code draws one per batch.

    :param lam: mean :math:`\lambda > 0`.
    :raises ValueError: if ``lam`` is not positive.
    """

    lam: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.lam, float | int) or not 0 < self.lam < np.inf:
            raise ValueError(f"PoissonMask: lam must be a positive number, got {self.lam!r}.")

    def sample(self, rng_key: Array, num: int, size: int) -> Array:
        check_positive("PoissonMask", size=size)
        size_key, subset_key = random.split(rng_key)
        return _subsets(subset_key, 1 + random.poisson(size_key, self.lam, (num,)), size)


@dataclass(frozen=True)
class SizesMask:
    """Subsets of a few sizes: a size from the list, then any subset of that size alike.

    The default trains what is looked at, all parameters and the marginals of one and two, whatever :math:`D` is.

    :param sizes: numbers of parameters kept, each from 1 to :math:`D`, or ``"all"``.
    :param probabilities: of the sizes; equal by default.
    :raises ValueError: for an empty list, probabilities that do not fit, or, when used, a size above :math:`D`.
    """

    sizes: tuple[int | str, ...] = (1, 2, "all")
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.sizes:
            raise ValueError(
                "SizesMask: sizes is empty, so that no parameter would be kept. Pass some, such as (1, 2)."
            )
        for size in self.sizes:
            if size != "all":
                check_positive("SizesMask", **{"every size other than 'all'": size})
        if self.probabilities is not None:
            weights = np.asarray(self.probabilities, np.float64)
            if weights.shape != (len(self.sizes),) or not np.isclose(weights.sum(), 1) or np.any(weights < 0):
                raise ValueError(
                    f"SizesMask: probabilities must be {len(self.sizes)} non-negative numbers that sum to one, one per "
                    f"size, got {self.probabilities!r}."
                )
            object.__setattr__(self, "probabilities", tuple(map(float, weights)))

    def sample(self, rng_key: Array, num: int, size: int) -> Array:
        numbers = [size if number == "all" else int(number) for number in self.sizes]
        if max(numbers) > size:
            raise ValueError(f"SizesMask: masks of {max(numbers)} parameters were asked for, but there are {size}.")
        size_key, subset_key = random.split(rng_key)
        probabilities = None if self.probabilities is None else jnp.array(self.probabilities)
        kept = random.choice(size_key, jnp.array(numbers), (num,), p=probabilities)
        return _subsets(subset_key, kept, size)


@dataclass(frozen=True)
class SelectionMask:
    """One mask of a list, all alike.

    :param masks: what :func:`parse_masks` understands, such as ``["=1", "11100"]`` or bool ``[M, D]``.
    """

    masks: Any

    def __post_init__(self) -> None:
        if not isinstance(self.masks, str):  # what a list holds is made hashable
            frozen = [m if isinstance(m, str) else tuple(map(bool, np.asarray(m).tolist())) for m in self.masks]
            object.__setattr__(self, "masks", tuple(frozen))

    def sample(self, rng_key: Array, num: int, size: int) -> Array:
        return random.choice(rng_key, jnp.asarray(parse_masks(self.masks, size)), (num,))


@dataclass(frozen=True)
class RestrictedMask:
    """A law over some of the parameters: the others are never kept.

    :param law: law of the masks of the allowed parameters alone.
    :param allowed: which parameters may be kept, such as ``"11011"`` or bool ``[D]``.
    :raises ValueError: when used, if ``allowed`` allows nothing or has not one entry per parameter.
    """

    law: MaskLaw
    allowed: Any

    def __post_init__(self) -> None:
        if not isinstance(self.allowed, str):
            object.__setattr__(self, "allowed", tuple(map(bool, np.asarray(self.allowed).tolist())))

    def sample(self, rng_key: Array, num: int, size: int) -> Array:
        (positions,) = np.nonzero(np.array(_one_mask(self.allowed, size)))
        masks = self.law.sample(rng_key, num, len(positions))
        return jnp.zeros((num, size), bool).at[:, positions].set(masks)


def default_mask_law(size: int) -> MaskLaw:
    """:class:`UniformMask` of up to eight parameters, :class:`SizesMask` of more.

    :param size: number of parameters.
    """
    return UniformMask() if size <= _LARGEST_WITH_UNIFORM_MASKS else SizesMask()


def parse_masks(spec: str | Sequence[Any] | np.ndarray, size: int) -> np.ndarray:
    """Masks from text: ``"=2"`` is all subsets of two parameters, ``"01100"`` the second and the third.

    :param spec: words separated by spaces, or a sequence of words and of booleans ``[size]``.
    :param size: number of parameters.
    :return: bool ``[M, size]``, without repetition, in the order given.
    :raises ValueError: for a word that is neither, a mask of another length, or a mask that keeps nothing.

    **Example**

    .. doctest::

        >>> from numpyro_smc.ratio.masks import parse_masks
        >>> parse_masks("=1 110", 3).astype(int).tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    """
    entries = spec.split() if isinstance(spec, str) else list(spec)
    if not entries:
        raise ValueError(f"parse_masks: no masks in {spec!r}. Pass words such as '=1' or '{'1' * size}'.")
    masks: list[tuple[bool, ...]] = []
    for entry in entries:
        if isinstance(entry, str) and " " in entry.strip():
            masks += map(tuple, parse_masks(entry, size).tolist())
        elif isinstance(entry, str) and entry.startswith("="):
            masks += _all_of_size(entry, size)
        else:
            masks.append(_one_mask(entry, size))
    return np.array(list(dict.fromkeys(masks)), bool)


def _all_of_size(word: str, size: int) -> list[tuple[bool, ...]]:
    if not word[1:].isdecimal() or not 1 <= int(word[1:]) <= size:
        raise ValueError(
            f"parse_masks: {word!r} asks for masks of '{word[1:]}' parameters; pass '=k' with k from 1 to {size}."
        )
    subsets = itertools.combinations(range(size), int(word[1:]))
    return [tuple(position in subset for position in range(size)) for subset in subsets]


def _one_mask(entry: Any, size: int) -> tuple[bool, ...]:
    if isinstance(entry, str) and set(entry) - {"0", "1"}:
        raise ValueError(
            f"parse_masks: {entry!r} is no mask. Write '=k' for all masks of k parameters, or one digit per "
            f"parameter, such as '{('01' * size)[:size]}'."
        )
    mask = np.array([digit == "1" for digit in entry] if isinstance(entry, str) else entry, bool)
    if mask.shape != (size,):
        raise ValueError(f"parse_masks: a mask has one entry per parameter, {size}, but {entry!r} has not.")
    if not mask.any():
        raise ValueError(f"parse_masks: a mask keeps no parameter ({entry!r}); every mask must keep at least one.")
    return tuple(map(bool, mask))


def _subsets(rng_key: Array, kept: Array, size: int) -> Array:
    """For each row, a uniform subset of ``kept[row]`` elements (all, if that is more than there are)."""
    noise = random.uniform(rng_key, (*kept.shape, size))
    ranks = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    return ranks < kept[..., None]
