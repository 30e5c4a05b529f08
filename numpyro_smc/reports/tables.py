"""Tables as CSV."""

from __future__ import annotations

import csv
import os
from typing import Any


def write_csv(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """One line a row, under the names of the first row's entries."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
