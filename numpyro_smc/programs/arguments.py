"""Checks of arguments that several entry points share."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def check_positive(user: str, **numbers: Any) -> None:
    """:raises ValueError: unless each number is a positive integer; the message names user and argument."""
    for name, number in numbers.items():
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{user}: {name} must be a positive integer, got {number!r}.")


def check_if_given(user: str, **numbers: Any) -> None:
    """:func:`check_positive` for the numbers that are not ``None``."""
    check_positive(user, **{name: number for name, number in numbers.items() if number is not None})


def check_not_negative(user: str, **numbers: Any) -> None:
    """:raises ValueError: unless each number is a whole number from zero on; the message names user and argument."""
    for name, number in numbers.items():
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 0:
            raise ValueError(f"{user}: {name} must be a whole number from 0 on, got {number!r}.")


def check_number(user: str, interval: str, remedy: str = "", **numbers: Any) -> None:
    """:raises ValueError: unless each number is in an interval; the message names user and argument.

    :param interval: as it is written, such as ``"(0, 1]"`` or ``"(0, inf)"``.
    :param remedy: what to do, for the message.
    """
    low, high = map(float, interval[1:-1].split(","))
    for name, number in numbers.items():
        is_real = np.ndim(number) == 0 and np.asarray(number).dtype.kind in "iuf"
        above = is_real and (number > low or (interval[0] == "[" and number == low))
        below = is_real and (number < high or (interval[-1] == "]" and number == high))
        if not (above and below):
            where = "be positive" if interval.startswith("(0, inf") else f"lie in {interval}"
            raise ValueError(f"{user}: {name} must {where}, got {number!r}. {remedy}".strip())


def checked_levels(user: str, q: Any) -> np.ndarray:
    """Levels of quantiles as an array.

    :raises ValueError: unless all are numbers in [0, 1].
    """
    levels = np.asarray(q)
    if levels.dtype.kind not in "iuf" or not np.all((levels >= 0) & (levels <= 1)):
        raise ValueError(f"{user}: q must be levels in [0, 1], got {q!r}. The median is q=0.5.")
    return levels.astype(np.float64)


def check_callable(user: str, **functions: Any) -> None:
    """:raises TypeError: unless each is a function or a program; the message names user and argument."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{user}: {name} must be a function, got {function!r}.")


def check_plate_names(user: str, plates: str | Collection[str] | None) -> None:
    """:raises ValueError: unless it is ``"auto"``, ``None`` or several names."""
    if plates is not None and (isinstance(plates, str) or not isinstance(plates, Collection)) and plates != "auto":
        raise ValueError(f"{user}: plates must be 'auto', None or a collection of names, got {plates!r}.")


@contextmanager
def named(user: str) -> Iterator[None]:
    """Errors about options say whose these are."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{user}: {error}") from error


def check_between(user: str, low: float, high: float, remedy: str = "", **numbers: Any) -> None:
    """:raises ValueError: unless each number is in [low, high); the message names user and argument.

    :param remedy: what to do, for the message.
    """
    for name, number in numbers.items():
        is_real = np.ndim(number) == 0 and np.issubdtype(np.asarray(number).dtype, np.number)
        if not is_real or not low <= number < high:
            raise ValueError(
                f"{user}: {name} must be a number in [{low:g}, {high:g}), got {number!r}. {remedy}".strip()
            )
