"""Many problems of one shape at once: a stage of all of them is part of one call of one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from tqdm import tqdm

from numpyro_smc.programs.compiled import Compiled, is_array
from numpyro_smc.samplers.checks import broken_particle, check_advance, too_many_stages, warn_of_stuck_particles
from numpyro_smc.samplers.progress import BAR_FORMAT, Progress
from numpyro_smc.samplers.result import SMCResult
from numpyro_smc.samplers.stages import MOST
from numpyro_smc.samplers.tempering import StageReport

if TYPE_CHECKING:
    from numpyro_smc.samplers.smc_sampler import SMCSampler


class Batch:
    """The programs of a sampler, mapped over problems. What they do is said at :meth:`SMCSampler.run_many`."""

    def __init__(self, sampler: SMCSampler) -> None:
        self.sampler = sampler
        self._start = Compiled(_over_problems(sampler._start_run))
        self._advance = Compiled(_over_problems(self._stages))
        self._finish = Compiled(_over_problems(sampler._finish_run))

    def run(self, rng_key: Array, params: Any, data: tuple[Any, Any], progress_bar: bool) -> list[SMCResult]:
        """:param data: the model's arguments and keyword arguments."""
        number = _number_of_problems(data)
        state, split = self._start(random.split(rng_key, number), params, data)
        for i in range(number):
            broken = broken_particle(_row(split, i))[1]
            if broken:
                raise FloatingPointError(
                    f"SMCSampler: problem {i} of {number}: {broken} of {self.sampler.num_particles} initial particles "
                    f"have non-finite log densities, or none has any likelihood. Use run on this problem alone, which "
                    f"names the sites."
                )
        empty = np.zeros((0, len(StageReport._fields)), split.base.dtype)
        runs = [Progress(None, empty)] * number
        with tqdm(total=number, bar_format=BAR_FORMAT, disable=not progress_bar) as bar:
            while any(run.temperature < 1.0 for run in runs):
                state, *reported = self._advance(state, params, data)
                reports, counts = map(np.asarray, reported)
                runs = [self._advanced(run, i, reports[i][: counts[i]]) for i, run in enumerate(runs)]
                bar.update(sum(run.temperature >= 1.0 for run in runs) - bar.n)
        for run in runs:
            warn_of_stuck_particles(run)
        # On the host first: slices of device arrays cost more than all the arithmetic of a problem.
        values, log_weights, clouds = jax.tree.map(
            np.asarray, (*self._finish(state, params, data), state._replace(rng_key=None))
        )
        return [
            self.sampler._result_of(Progress(_row(clouds, i), run.history), _on_device(_row(values, i)), log_weights[i])
            for i, run in enumerate(runs)
        ]

    def _stages(self, state: Any, *program: Any) -> tuple[Any, Array, Array]:
        return self.sampler._advance_run(state, jnp.asarray(MOST, jnp.int32), *program)

    def _advanced(self, run: Progress, problem: int, reports: np.ndarray) -> Progress:
        for report in reports:
            if run.num_stages == self.sampler.max_stages:
                raise too_many_stages(run, self.sampler.max_stages)
            before, run = run, Progress(None, np.concatenate([run.history, report[None]]))
            try:
                check_advance(before, run, self.sampler.settings.target_ess)
            except FloatingPointError as error:
                raise FloatingPointError(f"Problem {problem}: {error}") from error
        return run


def _row(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def _over_problems(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(first, params, args, kwargs)`` over the leading axis of all arrays but those of ``params``."""

    def mapped(first: Any, params: Any, data: tuple[Any, Any]) -> Any:
        leaves, treedef = jax.tree.flatten((first, data))
        arrays = [leaf for leaf in leaves if is_array(leaf)]

        def one(*arrays: Any) -> Any:
            rest = iter(arrays)
            first, data = jax.tree.unflatten(treedef, [next(rest) if is_array(leaf) else leaf for leaf in leaves])
            return fn(first, params, *data)

        return jax.vmap(one)(*arrays)

    return mapped


def _number_of_problems(data: tuple[Any, Any]) -> int:
    """:raises ValueError: if the arrays do not share a leading axis."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(data) if is_array(leaf)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"SMCSampler.run_many: every array among the arguments needs the problems as its leading axis; got shapes "
            f"{', '.join(map(str, shapes)) or 'of no array at all'}. Close over what all problems share."
        )
    return int(sizes.pop())  # type: ignore[arg-type]
