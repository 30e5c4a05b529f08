"""What every benchmark prints and writes: machine, versions and settings beside each figure,
a table, a CSV and a JSON.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from numpyro_smc.engines.checkpoint import replacing

PACKAGES = ("jax", "numpyro", "optax", "numpy", "numpyro_smc")


def environment() -> dict[str, str]:
    """The machine and the versions that produced a figure."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "device": str(jax.devices()[0].device_kind),
        "python": platform.python_version(),
        **versions,
    }


def processor() -> str:
    """The processor's name, as far as the operating system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_environment(settings: Mapping[str, Any]) -> None:
    print("  ".join(f"{name}={value}" for name, value in environment().items()))
    print("  ".join(f"{name}={value}" for name, value in settings.items()))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Rows as an aligned table; numbers with six significant digits."""
    if not rows:
        return
    columns = list(columns or rows[0])
    cells = [[column for column in columns]] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for number, row in enumerate(cells):
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
        if number == 0:
            print("  ".join("-" * width for width in widths))


def write(
    folder: str | os.PathLike[str], name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Path:
    """Write ``name.csv`` (the rows) and ``name.json`` (rows, settings, machine and versions), each whole or not."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with replacing(folder / f"{name}.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    document = {"environment": environment(), "settings": dict(settings), "rows": [dict(row) for row in rows]}
    with replacing(folder / f"{name}.json") as path:
        path.write_text(json.dumps(document, indent=2, default=str) + "\n")
    return folder / f"{name}.csv"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def load(
    folder: str | os.PathLike[str], name: str, settings: Mapping[str, Any], free: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows that an earlier run wrote, but for those with an error; none if it had other settings.

    :param free: settings that may differ, because they choose rows rather than change them.
    """
    try:
        document = json.loads((Path(folder) / f"{name}.json").read_text())
    except FileNotFoundError:
        return []
    now = json.loads(json.dumps(dict(settings), default=str))
    then = document["settings"]
    if any(now.get(key) != then.get(key) for key in (now.keys() | then.keys()) - set(free)):
        return []
    return [row for row in document["rows"] if not row.get("error")]


def digest(settings: Mapping[str, Any]) -> str:
    """Eight letters that differ between settings, for the names of checkpoints."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode()).hexdigest()[:8]
