"""Simulations to learn from: parameters and outputs, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax import Array, random

from numpyro_smc.engines.checkpoint import identity_of

__all__ = ["NonfinitePolicy", "RatioData", "SimulationData"]

#: ``"raise"``, ``"drop"``, or a function from outputs ``[n, *event]`` to finite outputs.
NonfinitePolicy = str | Callable[[np.ndarray], Any]


@runtime_checkable
class SimulationData(Protocol):
    """What training asks of simulations, in memory or stored."""

    def __len__(self) -> int:
        """Number of simulations."""
        ...

    def chunks(self, rng_key: Array) -> Iterator[RatioData]:
        """All simulations in parts that fit in memory, in an order of the key's."""
        ...

    def num_batches(self, batch_size: int) -> int:
        """Full batches of one pass; no batch is of two chunks."""
        ...

    def first(self, num: int) -> RatioData:
        """Some simulations, at most ``num``."""
        ...

    def split(self, rng_key: Array, fraction: float) -> tuple[SimulationData, RatioData]:
        """Simulations for training, and about ``fraction`` of them all for validation."""
        ...

    def digest(self) -> str:
        """Text that differs between data sets."""
        ...


@dataclass(frozen=True, eq=False)
class RatioData:
    """Simulations in memory.

    Simulations that are not finite cannot be learnt from. Leaving them out means to infer under another prior, the
    prior given that the simulation is finite, so that this is never done unless asked for.

    :param theta: parameters ``[n, D]``.
    :param x: outputs ``[n, *event]``.
    :param context: ``[n, C]``: what else the ratio depends on, such as a noise level.
    :param nonfinite: what to do with simulations that are not finite: ``"raise"``, ``"drop"``, or a function that
        replaces the outputs ``[n, *event]`` by finite ones, such as a clip.
    :raises ValueError: for shapes that do not fit, and for non-finite numbers as ``nonfinite`` says.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_smc.ratio.datasets import RatioData
        >>> data = RatioData(np.ones((3, 2)), np.array([[0.5], [np.nan], [2.0]]), nonfinite="drop")
        >>> len(data), data.x.ravel().tolist()
        (2, [0.5, 2.0])
    """

    theta: np.ndarray
    x: np.ndarray
    context: np.ndarray | None = None
    nonfinite: NonfinitePolicy = "raise"

    def __post_init__(self) -> None:
        theta, x = np.asarray(self.theta), np.asarray(self.x)
        context = None if self.context is None else np.asarray(self.context)
        if theta.ndim != 2 or x.ndim < 1 or len(x) != len(theta):
            raise ValueError(
                f"RatioData: theta must be [n, D] and x [n, ...], one row per simulation, got shapes {theta.shape} and "
                f"{x.shape}."
            )
        if context is not None and (context.ndim != 2 or len(context) != len(theta)):
            raise ValueError(f"RatioData: context must be [{len(theta)}, C], got shape {context.shape}.")
        if not isinstance(self.nonfinite, str):
            x = np.asarray(self.nonfinite(x))
        elif self.nonfinite not in ("raise", "drop"):
            raise ValueError(f"RatioData: nonfinite must be 'raise', 'drop' or a function, got {self.nonfinite!r}.")
        theta, x, context = _finite(theta, x, context, drop=self.nonfinite == "drop")
        for name, value in (("theta", theta), ("x", x), ("context", context)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.theta)

    def __repr__(self) -> str:
        context = "" if self.context is None else f", {self.context.shape[1]} numbers of context"
        return f"RatioData({len(self)} simulations of {self.theta.shape[1]} parameters, x {self.x.shape[1:]}{context})"

    def rows(self, indices: Any) -> RatioData:
        """Some of the simulations.

        :param indices: integers, booleans ``[n]`` or a slice.
        """
        context = None if self.context is None else self.context[indices]
        return RatioData(self.theta[indices], self.x[indices], context)

    def chunks(self, rng_key: Array) -> Iterator[RatioData]:
        yield self

    def num_batches(self, batch_size: int) -> int:
        return len(self) // batch_size

    def first(self, num: int) -> RatioData:
        return self if num >= len(self) else self.rows(slice(num))

    def split(self, rng_key: Array, fraction: float) -> tuple[RatioData, RatioData]:
        """Simulations for training and for validation, chosen at random.

        :param fraction: of validation, rounded to at least one simulation.
        :raises ValueError: if nothing would be left to train on.
        """
        num = max(1, round(fraction * len(self)))
        if not 0 < fraction < 1 or num >= len(self):
            raise ValueError(
                f"RatioData: validation={fraction!r} of {len(self)} simulations leaves none to train on; pass a "
                f"fraction between 0 and 1, or more simulations."
            )
        order = np.asarray(random.permutation(rng_key, len(self)))
        return self.rows(np.sort(order[num:])), self.rows(np.sort(order[:num]))

    def digest(self) -> str:
        return identity_of("", self.theta, self.x, self.context).tobytes().hex()


def _finite(
    theta: np.ndarray, x: np.ndarray, context: np.ndarray | None, drop: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    good_theta, good_x = np.isfinite(theta).all(axis=1), np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    good = good_theta & good_x
    if context is not None:
        good &= np.isfinite(context).all(axis=1)
    if good.all():
        return theta, x, context
    if not drop:
        raise ValueError(
            f"RatioData: {(~good).sum()} of {len(good)} simulations are not finite ({(~good_x).sum()} outputs, "
            f"{(~good_theta).sum()} parameters). To leave them out, nonfinite='drop', changes the prior to that given "
            f"a finite simulation; a function nonfinite=f may replace such outputs by finite ones that tell."
        )
    if not good.any():
        raise ValueError(f"RatioData: none of {len(good)} simulations is finite.")
    return theta[good], x[good], None if context is None else context[good]
