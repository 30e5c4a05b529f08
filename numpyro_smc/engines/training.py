"""Training with :class:`~numpyro.infer.svi.SVI` that survives non-finite steps, Ctrl-C and restarts."""

from __future__ import annotations

import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from tqdm import tqdm

from numpyro_smc.engines.checkpoint import Progress, check_folder, kept_or_warned
from numpyro_smc.engines.identity import identity
from numpyro_smc.programs import streams
from numpyro_smc.programs.arguments import check_callable, check_if_given, check_positive
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.fingerprint import fingerprint
from numpyro_smc.programs.inputs import as_data, as_params, check_names, check_program, one_key
from numpyro_smc.programs.options import keeps_options_apart
from numpyro_smc.programs.tracing import TRACING

__all__ = ["FitResult", "fit"]

_MAX_STEPS_PER_CALL = 1024
_COMPILED: weakref.WeakKeyDictionary[SVI, dict[bool, Compiled]] = weakref.WeakKeyDictionary()


@dataclass(repr=False)
class FitResult:
    """What :func:`fit` did.

    :ivar params: values of the ``param`` sites after the last step, constrained.
    :ivar state: the last :data:`~numpyro.infer.svi.SVIState`.
    :ivar losses: the loss of every step, ``[steps]``; non-finite where a step was skipped.
    :ivar evaluations: ``(step, values)`` of every call of ``evaluate``, ``step`` being the number of steps taken.
    :ivar num_skipped: steps that were skipped because something became non-finite.
    :ivar interrupted: whether Ctrl-C ended the training.
    """

    params: dict[str, Any]
    state: SVIState
    losses: np.ndarray
    evaluations: list[tuple[int, dict[str, float]]]
    num_skipped: int
    interrupted: bool

    @property
    def bound(self) -> np.ndarray:
        """The objective at every step: minus the losses."""
        return -self.losses

    def __repr__(self) -> str:
        parts = [f"{len(self.losses)} steps"]
        if len(self.losses):
            parts.append(f"bound {_finite_mean(self.bound[-max(1, len(self.losses) // 10) :]):.5g} over the last tenth")
        if self.evaluations:
            step, values = self.evaluations[-1]
            parts.append(", ".join(f"{name} {value:.5g}" for name, value in values.items()) + f" at step {step}")
        if self.num_skipped:
            parts.append(f"{self.num_skipped} skipped")
        if self.interrupted:
            parts.append("interrupted")
        return f"FitResult({'; '.join(parts)})"

    def plot(self, ax: Any = None) -> Any:
        """The bound over the steps, raw and as a moving average, with evaluations as markers.

        :param ax: Matplotlib axes; new ones by default.
        :return: the axes.
        """
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots()
        steps = np.arange(1, len(self.losses) + 1)
        finite = np.isfinite(self.bound)
        (raw,) = ax.plot(steps[finite], self.bound[finite], alpha=0.3, linewidth=0.8, label="bound")
        window = max(1, finite.sum() // 50)
        if window > 1:
            smooth = np.convolve(self.bound[finite], np.full(window, 1 / window), mode="valid")
            ax.plot(steps[finite][window - 1 :], smooth, color=raw.get_color(), label=f"mean of {window} steps")
        for name in dict.fromkeys(name for _, values in self.evaluations for name in values):
            points = [(step, values[name]) for step, values in self.evaluations if name in values]
            ax.plot(*zip(*points, strict=True), marker="o", linestyle="none", label=name)
        ax.set(xlabel="step", ylabel="bound")
        ax.legend()
        return ax


@keeps_options_apart("svi.model", "svi.guide")
def fit(
    svi: SVI,
    rng_key: Array,
    num_steps: int,
    *args: Any,
    init_params: dict[str, Any] | None = None,
    init_state: SVIState | None = None,
    chunk_size: int | None = None,
    progress_bar: bool = True,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    evaluate: Callable[[dict[str, Any], Array], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
    forward_mode_differentiation: bool = False,
    **kwargs: Any,
) -> FitResult:
    """Run ``svi.update`` for ``num_steps`` steps: the same steps as :meth:`~numpyro.infer.svi.SVI.run` takes.

    * **Compiled once.** Arrays and floats in ``args`` and ``kwargs`` are traced; anything else (integers, flags,
      strings, functions) is static. Another call with the same ``svi``, shapes and static values compiles nothing,
      whatever its ``num_steps`` and ``chunk_size``, unless something has changed that model, guide or loss close over.
    * **Non-finite steps are skipped.** A step whose loss is not finite, or that turns a finite number of the parameters
      or of the optimiser's or mutable state into a non-finite one, changes nothing but the random key. The first is
      warned of, all are counted.
    * **Ctrl-C** ends the training and returns what was done so far.
    * **Restarts are exact.** With ``checkpoint``, the same call continues where the last one ended, by Ctrl-C or by a
      crash, and ends with the numbers of an uninterrupted run (on the same machine) to the bit. A larger ``num_steps``
      continues a finished run; one already reached returns at once. A checkpoint of another model, guide, optimiser,
      loss or data is refused.

    :param svi: an :class:`~numpyro.infer.svi.SVI`.
    :param rng_key: random key; not used for training when ``init_state`` is given or a checkpoint is resumed.
    :param num_steps: steps in total, those of a resumed checkpoint included.
    :param args: arguments of model and guide.
    :param init_params: initial values of ``param`` sites, constrained.
    :param init_state: state to start from, such as :attr:`FitResult.state`, instead of ``svi.init``.
    :param chunk_size: steps between two calls of ``log`` and updates of the bound shown; by default a fiftieth of
        ``num_steps``.
    :param progress_bar: show progress, bound, evaluation and number of skipped steps.
    :param checkpoint: file to save to at the end, be that Ctrl-C or an error, and every ``checkpoint_every`` steps (by
        default a tenth of ``num_steps``).
    :param resume: whether to continue from ``checkpoint`` if that file exists; if not, it is overwritten.
    :param evaluate: called as ``evaluate(params, rng_key)`` every ``evaluate_every`` steps (by default a tenth of
        ``num_steps``); returns a dict of floats. Its key depends on the step only and does not disturb training.
    :param log: called as ``log(step, values)`` at the end of each chunk and after each evaluation, with the mean
        ``"bound"`` of the chunk, ``"num_skipped"`` so far, and the evaluation if there was one.
    :param forward_mode_differentiation: passed to ``svi.update``.
    :param kwargs: keyword arguments of model and guide.
    :return: a :class:`FitResult`.
    :raises ValueError: if an argument makes no sense, or ``checkpoint`` is of another training, naming what differs.

    **Example**

    .. doctest::

        >>> import jax, numpyro, numpyro.distributions as dist, optax
        >>> from jax import numpy as jnp
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_smc.engines.training import fit
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
        >>> result = fit(svi, jax.random.key(0), 500, jnp.array(2.0), progress_bar=False)
        >>> round(float(result.params["z_auto_loc"]))
        1
    """
    if not isinstance(svi, SVI):
        raise ValueError(f"fit: svi must be a numpyro.infer.SVI, got {type(svi).__name__}.")
    if init_state is not None and init_params is not None:
        raise ValueError("fit: init_params would be ignored, because init_state holds parameters; pass one of the two.")
    check_positive("fit", num_steps=num_steps)
    check_if_given("fit", chunk_size=chunk_size)
    for name, function in (("evaluate", evaluate), ("log", log)):
        if function is not None:
            check_callable("fit", **{name: function})
    rng_key = one_key("fit", rng_key)
    args, kwargs = as_data("fit", (args, kwargs))
    check_program(
        "fit",
        svi.model,
        svi.guide,
        as_params("fit", init_params),
        args,
        kwargs | svi.static_kwargs,
        options=(fit,),
        needs_data=False,
        may_lack="any",
        argument="init_params",
        may_reshape=True,
    )
    chunk_size = chunk_size or math.ceil(num_steps / 50)
    checkpoint_every = _period("checkpoint", checkpoint, checkpoint_every, num_steps)
    evaluate_every = _period("evaluate", evaluate, evaluate_every, num_steps)
    periods = [every for every in (chunk_size, evaluate_every, checkpoint_every) if every]
    check_folder("fit", checkpoint)

    untouched = fingerprint(svi.model, svi.guide)
    if init_state is None or svi.constrain_fn is None:
        with TRACING:
            fresh_state = svi.init(rng_key, *args, init_params=init_params, **kwargs)
        check_names("fit", "init_params", init_params or {}, svi.get_params(fresh_state))
        init_state = fresh_state if init_state is None else init_state
    parts = {"model": svi.model, "guide": svi.guide, "optimizer": svi.optim, "loss": svi.loss}
    parts["data"] = (args, {**svi.static_kwargs, **kwargs})
    of = {} if checkpoint is None else identity("fit", untouched.changed(), **parts)
    evaluation_key = jax.random.fold_in(rng_key, streams.EVALUATION)
    progress = saved = Progress(_without_weak_types(init_state), evaluation_key, np.zeros(0, jnp.result_type(float)))
    if checkpoint is not None and resume and os.path.exists(checkpoint):
        progress = saved = progress.load(checkpoint, of)
    program = _Program(svi, args, kwargs, forward_mode_differentiation)
    interrupted = False

    def save(progress: Progress) -> None:
        if checkpoint is not None:
            kept_or_warned(lambda: progress.save(checkpoint, of), "fit", checkpoint)

    def evaluated(progress: Progress) -> Progress:
        step, done = progress.step, dict(progress.evaluations)
        if evaluate is None or not evaluate_every or step in done:
            return progress
        if step == 0 or step > num_steps or step % evaluate_every:
            return progress
        values = evaluate(svi.get_params(progress.state), jax.random.fold_in(progress.evaluation_key, step))
        if not isinstance(values, Mapping):
            raise ValueError(f"fit: evaluate must return a dict of name to float, got {type(values).__name__}.")
        values = {name: float(value) for name, value in values.items()}
        return replace(progress, evaluations=(*progress.evaluations, (step, values)))

    def report(progress: Progress, bar: tqdm) -> None:
        step, evaluation = progress.step, dict(progress.evaluations).get(progress.step)
        bound = -_finite_mean(progress.losses[(step - 1) // chunk_size * chunk_size : step])
        _, latest = progress.evaluations[-1] if progress.evaluations else (None, {})
        shown = {"bound": f"{bound:.5g}", **{name: f"{value:.5g}" for name, value in latest.items()}}
        bar.set_postfix(shown | ({"skipped": progress.num_skipped} if progress.num_skipped else {}), refresh=False)
        if log is not None and (step % chunk_size == 0 or step == num_steps or evaluation):
            log(step, {"bound": bound, "num_skipped": progress.num_skipped, **(evaluation or {})})

    with tqdm(total=num_steps, initial=progress.step, unit="step", disable=not progress_bar) as bar:
        try:
            progress = evaluated(progress)
            while progress.step < num_steps:
                stop = min(num_steps, *(progress.step + every - progress.step % every for every in periods))
                while progress.step < stop:
                    progress = program.advance(progress, stop)
                    bar.update(progress.step - bar.n)
                progress = evaluated(progress)
                report(progress, bar)
                if checkpoint_every and progress.step % checkpoint_every == 0:
                    save(progress)
                    saved = progress
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if progress is not saved:
                save(progress)
    params, evaluations = svi.get_params(progress.state), list(progress.evaluations)
    return FitResult(params, progress.state, progress.losses, evaluations, progress.num_skipped, interrupted)


class _Program:
    """Steps of ``svi`` on one set of arguments, in calls short enough for Ctrl-C to be heard within about a second."""

    def __init__(self, svi: SVI, args: tuple, kwargs: dict[str, Any], forward_mode_differentiation: bool) -> None:
        self.arguments = args, kwargs
        arrays = [leaf for leaf in jax.tree.leaves(self.arguments) if isinstance(leaf, jax.Array)]
        meshes = [leaf.sharding.mesh for leaf in arrays if isinstance(leaf.sharding, NamedSharding)]
        self.replicated = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
        kept = _COMPILED.setdefault(svi, {})
        self.run = kept.setdefault(forward_mode_differentiation, Compiled(_Steps(svi, forward_mode_differentiation)))
        self.steps_per_call = 1
        self.has_warned = False

    def advance(self, progress: Progress, stop: int) -> Progress:
        """Take some steps, at most to step ``stop``."""
        num_steps, started = min(self.steps_per_call, stop - progress.step), time.perf_counter()
        state = progress.state
        if self.replicated is not None:  # as later calls find it: another placement would be another program
            state = jax.tree.map(lambda x: x if len(x.devices()) > 1 else jax.device_put(x, self.replicated), state)
        state, losses, kept = self.run(state, np.int32(num_steps), *self.arguments)
        losses, kept = np.asarray(losses)[:num_steps], np.asarray(kept)[:num_steps]
        elapsed = time.perf_counter() - started
        if elapsed < 0.25:
            self.steps_per_call = min(2 * self.steps_per_call, _MAX_STEPS_PER_CALL)
        elif elapsed > 1.0:
            self.steps_per_call = max(num_steps // 2, 1)
        if not kept.all() and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"fit: step {progress.step + kept.argmin()} gave a non-finite loss, parameter or optimiser state, and "
                f"was skipped; such steps are counted in FitResult.num_skipped.",
                stacklevel=4,
            )
        num_skipped = progress.num_skipped + int((~kept).sum())
        return replace(progress, state=state, losses=np.append(progress.losses, losses), num_skipped=num_skipped)


class _Steps:
    """``(state, num_steps, args, kwargs) -> (state, losses, kept)``.

    The number of steps is traced, so one program serves chunks of all lengths, and a restart repeats the very same
    arithmetic wherever it cuts the chunks.
    """

    def __init__(self, svi: SVI, forward_mode_differentiation: bool) -> None:
        self.svi = weakref.ref(svi)
        self.forward_mode_differentiation = forward_mode_differentiation

    def __fingerprint__(self) -> tuple[Any, ...]:
        svi: Any = self.svi()
        constraints = getattr(svi.constrain_fn, "args", svi.constrain_fn)
        return svi.model, svi.guide, svi.loss, svi.optim, svi.static_kwargs, constraints

    def __call__(
        self, state: SVIState, num_steps: Array, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[SVIState, Array, Array]:
        svi: Any = self.svi()
        forward = self.forward_mode_differentiation

        def step(index: Array, carry: tuple) -> tuple:
            state, losses, kept = carry
            new, loss = svi.update(state, *args, forward_mode_differentiation=forward, **kwargs)
            before, after = ((*s[:2], svi.get_params(s)) for s in (state, new))
            keep = jnp.isfinite(loss) & _stays_finite(before, after)
            chosen = jax.tree.map(lambda a, b: jnp.where(keep, a, b), tuple(new[:2]), tuple(state[:2]))
            return SVIState(*chosen, new.rng_key), losses.at[index].set(loss), kept.at[index].set(keep)

        losses, kept = jnp.zeros(_MAX_STEPS_PER_CALL), jnp.ones(_MAX_STEPS_PER_CALL, bool)
        return lax.fori_loop(0, num_steps, step, (state, losses, kept))


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _stays_finite(before: Any, after: Any) -> Array:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    broken = [jnp.any(jnp.isfinite(b) & ~jnp.isfinite(a)) for b, a in pairs if _is_inexact(a)]
    return ~jnp.any(jnp.stack(broken)) if broken else jnp.array(True)


def _without_weak_types(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), tree)


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _period(name: str, value: Any, every: int | None, num_steps: int) -> int | None:
    if value is None and every is not None:
        raise ValueError(f"fit: {name}_every={every} has no effect without {name}; pass {name} too.")
    check_if_given("fit", **{f"{name}_every": every})
    return None if value is None else every or math.ceil(num_steps / 10)
