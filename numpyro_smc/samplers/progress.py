"""A tempered run so far, and its file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from numpyro_smc.engines.checkpoint import AnyLength, load_run, save_run
from numpyro_smc.engines.identity import Identity
from numpyro_smc.samplers.tempering import StageReport

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
_WIDTH = len(StageReport._fields)


@dataclass(frozen=True)
class Progress:
    """Everything a restart needs. Immutable, so that Ctrl-C finds all or nothing of a stage.

    :ivar state: the cloud, or the pool of a persistent run.
    :ivar history: reports of the stages so far, ``[stages, fields of StageReport]``.
    """

    state: Any
    history: np.ndarray

    @property
    def num_stages(self) -> int:
        return len(self.history)

    @property
    def temperature(self) -> float:
        return float(self.history[-1, 0]) if len(self.history) else 0.0

    @property
    def log_evidence(self) -> float:
        return float(np.sum(self.history[:, 1], dtype=np.float64))

    def column(self, name: str) -> np.ndarray:
        return self.history[:, StageReport._fields.index(name)]

    def save(self, path: str | os.PathLike, settings: str, of: Identity) -> None:
        leaves = jax.tree.leaves(self.state)
        stored = [np.ravel(leaf) if _has_length(leaf) else leaf for leaf in leaves]
        save_run(path, settings, {"history": np.ravel(self.history), "state": stored}, of)

    def load(self, path: str | os.PathLike, settings: str, of: Identity) -> Progress:
        """The run saved in ``path``, by the same sampler as this one."""
        leaves, treedef = jax.tree.flatten(self.state)
        like = {
            "history": AnyLength(self.history.dtype),
            "state": [AnyLength(leaf.dtype) if _has_length(leaf) else leaf for leaf in leaves],
        }
        advice = "Pass the sampler and the data that wrote it, another file, or resume=False to overwrite it."
        contents = load_run(path, settings, like, of, "SMCSampler", advice)
        # The first axis of a pool grows with the run.
        restored = [
            jax.numpy.asarray(value.reshape(-1, *leaf.shape[1:])) if _has_length(leaf) else value
            for value, leaf in zip(contents["state"], leaves, strict=True)
        ]
        return Progress(jax.tree.unflatten(treedef, restored), contents["history"].reshape(-1, _WIDTH))


def _has_length(leaf: Any) -> bool:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return not is_key and np.ndim(leaf) > 0


def show(bar: tqdm, progress: Progress, num_particles: int) -> None:
    """Move a bar of total 1 to the run's temperature."""
    bar.n = min(progress.temperature, 1.0)
    bar.set_description(f"temperature {progress.temperature:.3g}", refresh=False)
    if progress.num_stages:
        shown = {
            "stage": progress.num_stages,
            "log evidence": f"{progress.log_evidence:.5g}",
            "ess": f"{progress.column('ess')[-1] / num_particles:.2f} N",
            "acceptance": f"{progress.column('acceptance')[-1]:.2f}",
        }
        bar.set_postfix(shown, refresh=False)
    bar.refresh()
