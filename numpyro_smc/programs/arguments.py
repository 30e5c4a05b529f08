"""Checks of arguments that several entry points share."""

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
