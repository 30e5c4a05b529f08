"""Draws and statistics as ArviZ data, on ArviZ 0.x and 1.x alike."""

from typing import Any

import numpy as np


def inference_data(
    draws: dict[str, Any], stats: dict[str, Any] | None = None, attributes: dict[str, Any] | None = None
) -> Any:
    """One chain of draws with per-step statistics.

    :param draws: by site, ``[num_samples, ...]``.
    :param stats: by name, arrays without a draw axis; they become ``sample_stats`` of a single draw.
    :param attributes: numbers and strings attached to the posterior group.
    :return: ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x) with groups ``posterior`` and ``sample_stats``.
    """
    import arviz as az

    groups = {"posterior": {name: np.asarray(value)[None] for name, value in draws.items()}}
    if stats:
        groups["sample_stats"] = {name: np.asarray(value)[None, None] for name, value in stats.items()}
    from_dict: Any = az.from_dict
    data = from_dict(groups) if int(az.__version__.split(".")[0]) >= 1 else from_dict(**groups)
    data["posterior"].attrs.update(attributes or {})
    return data
