"""Train several seeds of one estimator at once: every step of every seed in one compiled program, with checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.infer import SVI
from tqdm import tqdm

from numpyro_smc.engines.checkpoint import load_pytree, save_pytree

Batch = Callable[[Array], tuple[Any, ...]]
Evaluate = Callable[[dict[str, Any], Array], dict[str, Array]]


class Replicates(NamedTuple):
    """What :func:`train` did.

    - **params** - constrained parameters after the last step, each with a leading axis of seeds.
    - **curves** - by quantity, ``[evaluations, seeds]``; ``"step"`` is ``[evaluations]``, and ``"loss"`` the mean since
      the last evaluation.
    - **seconds** - time spent training (evaluations excluded) in this call; **resumed** - steps that were loaded.
    """

    params: dict[str, Any]
    curves: dict[str, np.ndarray]
    seconds: float
    resumed: int


def train(
    svi: SVI,
    seeds: list[int],
    num_steps: int,
    batch: Batch,
    *,
    evaluate: Evaluate,
    num_evaluations: int = 10,
    init_params: Callable[[Array], dict[str, Any]] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress_bar: bool = True,
    description: str = "",
) -> Replicates:
    """Train ``svi`` from several seeds side by side.

    :param batch: ``batch(rng_key)`` gives the arguments of model and guide for one step, on the device: drawn data, or
        rows of a data set that it closes over.
    :param evaluate: ``evaluate(params, rng_key)`` of one seed, at evenly spaced steps; values are scalars.
    :param init_params: ``init_params(rng_key)`` gives initial parameters of one seed, in place of those that the
        programs carry (a network's are fixed when it is built, and would be the same for every seed).
    :param checkpoint: file written at each evaluation. A call with the same arguments continues from it, to the bit;
        one with more steps (and evaluations in proportion) goes on from a finished run.
    """
    keys = jax.vmap(random.key)(jnp.asarray(seeds))
    every = max(num_steps // num_evaluations, 1)
    data_keys = jax.vmap(lambda key: random.fold_in(key, 1))(keys)

    def start_one(rng_key: Array, data_key: Array) -> Any:
        given = None if init_params is None else init_params(random.fold_in(rng_key, 3))
        return svi.init(rng_key, *batch(data_key), init_params=given)

    states = jax.vmap(start_one)(keys, data_keys)

    @jax.jit
    def advance(states: Any, start: Array, stop: Array) -> tuple[Any, Array]:
        def step(index: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            states, total = carry

            def update(state: Any, key: Array) -> tuple[Any, Array]:
                return svi.update(state, *batch(random.fold_in(key, index)))

            states, losses = jax.vmap(update)(states, data_keys)
            return states, total + losses

        return lax.fori_loop(start, stop, step, (states, jnp.zeros(len(seeds))))

    # One seed at a time: evaluations are large, training steps are small.
    measure = jax.jit(lambda params, keys: lax.map(lambda pair: evaluate(*pair), (params, keys)))
    steps: list[int] = []
    records: list[dict[str, np.ndarray]] = []
    if checkpoint is not None and os.path.exists(checkpoint):
        names = list(jax.eval_shape(measure, jax.vmap(svi.get_params)(states), keys))
        for done in range(num_steps // every, 0, -1):
            like_records = {name: np.zeros((done, len(seeds)), np.float32) for name in [*names, "loss"]}
            like = {"states": states, "steps": np.zeros(done, np.int32), "records": like_records}
            try:
                saved = load_pytree(checkpoint, like)
            except ValueError:
                continue
            states, steps = saved["states"], [int(step) for step in saved["steps"]]
            records = [{name: saved["records"][name][i] for name in like_records} for i in range(done)]
            break
        else:
            raise ValueError(f"'{checkpoint}' is of another configuration; use another --output, or delete it.")
    resumed, seconds = (steps[-1] if steps else 0), 0.0
    with tqdm(total=num_steps, initial=resumed, desc=description, unit="step", disable=not progress_bar) as bar:
        for start in range(resumed, num_steps, every):
            stop = min(start + every, num_steps)
            began = time.perf_counter()
            states, total = jax.block_until_ready(advance(states, jnp.asarray(start), jnp.asarray(stop)))
            seconds += time.perf_counter() - began
            evaluation_keys = jax.vmap(lambda key, stop=stop: random.fold_in(random.fold_in(key, 2), stop))(keys)
            values = measure(jax.vmap(svi.get_params)(states), evaluation_keys)
            record = {name: np.asarray(value, np.float32) for name, value in values.items()}
            records.append({**record, "loss": np.asarray(total / (stop - start), np.float32)})
            steps.append(stop)
            bar.update(stop - start)
            bar.set_postfix({name: f"{value.mean():.4g}" for name, value in records[-1].items()}, refresh=False)
            if checkpoint is not None:
                stacked = {name: np.stack([r[name] for r in records]) for name in records[0]}
                save_pytree(checkpoint, {"states": states, "steps": np.asarray(steps, np.int32), "records": stacked})
    curves = {name: np.stack([r[name] for r in records]) for name in records[0]}
    params = jax.vmap(svi.get_params)(states)
    return Replicates(params, {"step": np.asarray(steps), **curves}, seconds, resumed)
