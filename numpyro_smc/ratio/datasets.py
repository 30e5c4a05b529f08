"""Simulations to learn from: parameters and outputs, in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax import Array, random

from numpyro_smc.engines.checkpoint import identity_of

__all__ = ["NonfinitePolicy", "RatioData", "SimulationData", "are_finite", "check_policy"]

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

    Simulations that are not finite cannot be learnt from. Leaving them out trains on another law of the parameters, the
    prior given that the simulation is finite, so that this is never done unless asked for; the parameters that failed
    are kept, for a posterior to be corrected by the probability of a finite output.

    :param theta: parameters ``[n, D]``.
    :param x: outputs ``[n, *event]``.
    :param context: ``[n, C]``: what else the ratio depends on, such as a noise level.
    :param nonfinite: what to do with simulations that are not finite: ``"raise"``, ``"drop"``, or a function that
        replaces the outputs ``[n, *event]`` by finite ones, such as a clip.
    :ivar failed: parameters ``[m, D]`` of the simulations that were left out.
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
    failed: np.ndarray | None = None

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
        check_policy("RatioData", self.nonfinite)
        if callable(self.nonfinite):
            x = _replaced(x, self.nonfinite)
        good = are_finite(theta, x, context, drop=self.nonfinite == "drop")
        failed = theta[:0] if self.failed is None else np.asarray(self.failed)
        if not good.all():
            lost = theta[~good]
            failed = np.concatenate([failed, lost[np.isfinite(lost).all(axis=1)]])
            theta, x, context = theta[good], x[good], None if context is None else context[good]
        for name, value in (("theta", theta), ("x", x), ("context", context), ("failed", failed)):
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
        if num >= len(self):
            return self
        assert self.failed is not None
        share = math.ceil(len(self.failed) * num / len(self))
        return replace(self.rows(slice(num)), failed=self.failed[:share])

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


def check_policy(user: str, nonfinite: Any) -> None:
    """:raises ValueError: unless it says what to do with simulations that are not finite."""
    if nonfinite not in ("raise", "drop") if isinstance(nonfinite, str) else not callable(nonfinite):
        raise ValueError(f"{user}: nonfinite must be 'raise', 'drop' or a function, got {nonfinite!r}.")


def _replaced(x: np.ndarray, policy: Callable[[np.ndarray], Any]) -> np.ndarray:
    found = np.asarray(policy(x))
    if found.shape != x.shape:
        raise ValueError(
            f"RatioData: nonfinite=f must return outputs of the shape that it is given, {x.shape}, not {found.shape}."
        )
    return found


def are_finite(theta: np.ndarray, x: np.ndarray, context: np.ndarray | None, drop: bool) -> np.ndarray:
    """Which simulations are finite, ``[n]``.

    :raises ValueError: if some are not, unless they are to be dropped; if none is.
    """
    good_theta, good_x = np.isfinite(theta).all(axis=1), np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    good = good_theta & good_x
    if context is not None:
        good &= np.isfinite(context).all(axis=1)
    if good.all():
        return good
    if not drop:
        raise ValueError(
            f"RatioData: {(~good).sum()} of {len(good)} simulations are not finite ({(~good_x).sum()} outputs, "
            f"{(~good_theta).sum()} parameters). To leave them out, nonfinite='drop', changes the prior to that given "
            f"a finite simulation; a function nonfinite=f may replace such outputs by finite ones that tell."
        )
    if not good.any():
        raise ValueError(f"RatioData: none of {len(good)} simulations is finite.")
    return good
