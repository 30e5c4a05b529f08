"""Where the published epidemics' files are."""

from __future__ import annotations

import os
from pathlib import Path


def find(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """A file in ``data_dir`` or its folder ``pomp``; without ``data_dir``, in the one that ``NUMPYRO_SMC_DATA`` names.

    :raises FileNotFoundError: if there is none.
    """
    directory = data_dir if data_dir is not None else os.environ.get("NUMPYRO_SMC_DATA")
    tried = [] if directory is None else [Path(directory) / name, Path(directory) / "pomp" / name]
    for path in tried:
        if path.is_file():
            return path
    looked = f"there is no file {' or '.join(map(str, tried))}" if tried else "no directory was given"
    raise FileNotFoundError(
        f"{name} is missing: {looked}. It holds series that come with the R package pomp and with pypomp. Pass its "
        "directory as data_dir, or set the environment variable NUMPYRO_SMC_DATA."
    )
