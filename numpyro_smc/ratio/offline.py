"""Are simulations such that a posterior follows from them: of the whole prior, with their failures, and varying?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from numpyro_smc.ratio.datasets import RatioData
from numpyro_smc.ratio.ratio_network import is_constant

_FALSE_ALARMS = 1e-9
_NUM_PROJECTIONS = 8
_FEWEST = 50


def check_varies(theta: np.ndarray, constant: np.ndarray, elements: Sequence[str]) -> None:
    """:param constant: elements that are constant by their nature, bool ``[D]``.
    :raises ValueError: naming another parameter that has one value only.
    """
    found = is_constant(theta) & ~constant
    if found.any():
        number = int(np.argmax(found))
        raise ValueError(
            f"NRE.train: parameter '{elements[number]}' is {theta[0, number]:g} in all simulations: there is nothing "
            f"to infer of it. Leave it out of params, or give it a prior that varies."
        )


def check_failures(some: RatioData, drops: bool, is_incomplete: bool) -> None:
    """:param drops: whether the posterior will be corrected for simulations that were left out.
    :param is_incomplete: whether some were left out without a record.
    :raises ValueError: for simulations that were left out otherwise.
    """
    if is_incomplete:
        raise ValueError(
            "NRE.train: simulations that failed were left out of the stored ones without a record of their "
            "parameters, so that only the law given a finite output is known, and no posterior under the prior. "
            "Simulate anew."
        )
    if some.failed is not None and len(some.failed) and not drops:
        raise ValueError(
            f"NRE.train: {len(some.failed)} simulations that failed were left out of the data, which changes the law "
            f"of the parameters. Build the NRE with nonfinite='drop'."
        )


def check_from_prior(
    theta: np.ndarray, draw: Callable[[int], np.ndarray], elements: Sequence[str], user: str = "NRE.train"
) -> None:
    """Compare parameters with draws from the prior, by two-sample Kolmogorov-Smirnov tests of every element and of a
    few random projections; false alarms: one in a billion.

    :param theta: ``[n, D]``; repeated rows count once.
    :param draw: as many draws from the prior as asked for, ``[num, D]``.
    :raises ValueError: naming the element that is distributed otherwise.
    """
    theta = np.unique(theta, axis=0)
    if len(theta) < _FEWEST:
        return
    prior = draw(20_000)
    scale = prior.std(0)
    varies = scale > 1e-6 * np.abs(prior).max(0)
    names = [f"parameter '{name}'" for name, kept in zip(elements, varies, strict=True) if kept]
    both = [(values / np.where(varies, scale, 1.0))[:, varies] for values in (theta, prior)]
    if len(names) > 1:
        directions = np.random.default_rng(0).normal(size=(len(names), _NUM_PROJECTIONS))
        both = [np.hstack([values, values @ directions]) for values in both]
        names += ["a combination of the parameters"] * _NUM_PROJECTIONS
    size = len(theta) * len(prior) / (len(theta) + len(prior))
    limit = np.sqrt(np.log(2 * len(names) / _FALSE_ALARMS) / (2 * size))
    for name, given, drawn in zip(names, *(values.T for values in both), strict=True):
        distance = _distance(given, drawn)
        if distance > limit:
            raise ValueError(
                f"{user}: {name} is not distributed in the data as in the simulator's prior (Kolmogorov-Smirnov "
                f"distance {distance:.2f}, by chance below {limit:.2f}). The ratio belongs to the law of the data, and "
                f"the posterior would be multiplied by the prior. Draw the parameters from the prior, state their law "
                f"in the simulator, pass box= if it was truncated; and keep simulations that failed, as rows that are "
                f"not finite, with nonfinite='drop'."
            )


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference of two empirical distribution functions."""
    first, second = np.sort(first), np.sort(second)
    at = np.concatenate([first, second])
    gaps = [np.searchsorted(values, at, side="right") / len(values) for values in (first, second)]
    return float(np.abs(gaps[0] - gaps[1]).max())
