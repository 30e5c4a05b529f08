"""Work done on some rows of the data at a time, which keeps what is done through Ctrl-C and restarts."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from numpyro_smc.engines.checkpoint import check_folder, kept_or_warned, load_run, save_run
from numpyro_smc.engines.identity import Identity
from numpyro_smc.evidence.rows import batches


def over_rows(
    work: Callable[[int], Any],
    num_rows: int,
    size: int,
    *,
    like: Callable[[], Any],
    checkpoint: str | os.PathLike[str] | None,
    of: Identity,
    user: str,
    progress_bar: bool,
) -> tuple[Any, bool]:
    """Results of all rows, and whether Ctrl-C came first: then they are those of the rows done.

    :param work: from the first of ``size`` rows to a pytree of arrays ``[size, ...]``.
    :param like: shapes and dtypes of what ``work`` returns; called to read a checkpoint only.
    :param checkpoint: file written after every ``size`` rows, from which the same work continues.
    :param of: what the work is of; see :func:`~numpyro_smc.engines.identity.identity`.
    :raises ValueError: if the checkpoint is of other work.
    """
    done, results = 0, None
    check_folder(user, checkpoint)
    if checkpoint is not None and os.path.exists(checkpoint):
        done, results = _load(checkpoint, _empty(like(), num_rows), of, user)
    with tqdm(total=num_rows, initial=done, unit="datum", desc=user, disable=not progress_bar) as bar:
        try:
            for first, repeated in batches(num_rows, size):
                if first + size <= done:
                    continue
                found = jax.tree.map(np.asarray, work(first))
                results = _empty(found, num_rows) if results is None else results
                jax.tree.map(lambda to, new, f=first, r=repeated: _put(to, new[r:], f + r), results, found)
                done = first + size
                bar.update(done - bar.n)
                if checkpoint is not None:
                    contents = {"done": done, "results": results}
                    kept_or_warned(partial(save_run, checkpoint, user, contents, of), user, checkpoint)
        except KeyboardInterrupt:
            if not done:
                raise
    return jax.tree.map(lambda leaf: leaf[:done], results), done < num_rows


def _load(path: str | os.PathLike[str], results: Any, of: Identity, user: str) -> tuple[int, Any]:
    advice = "Pass what wrote it, name another file, or delete this one."
    try:
        saved = load_run(path, user, {"done": 0, "results": results}, of, user, advice)
    except ValueError as error:
        raise ValueError(
            f"{user}: checkpoint '{os.fspath(path)}' is of another configuration, or damaged: {error}"
        ) from error
    return saved["done"], saved["results"]


def _empty(like: Any, num_rows: int) -> Any:
    return jax.tree.map(lambda leaf: np.zeros((num_rows, *leaf.shape[1:]), leaf.dtype), like)


def _put(to: np.ndarray, values: np.ndarray, first: int) -> None:
    to[first : first + len(values)] = values
