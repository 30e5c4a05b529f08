"""Checks of arguments that several entry points share."""

from typing import Any

import numpy as np


def check_positive(user: str, **numbers: Any) -> None:
    """:raises ValueError: unless each number is a positive integer; the message names user and argument."""
    for name, number in numbers.items():
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{user}: {name} must be a positive integer, got {number!r}.")
