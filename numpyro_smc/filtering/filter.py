"""Particle filters for sequence models written as NumPyro programs, in one go or one observation at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.engines.checkpoint import load_run, save_run
from numpyro_smc.engines.chunks import in_chunks
from numpyro_smc.engines.identity import identity
from numpyro_smc.engines.particles import Move, ParticleState, run
from numpyro_smc.filtering import streaming
from numpyro_smc.filtering.result import FilterResult, History
from numpyro_smc.filtering.streaming import FilterState, warn_of_data_outside
from numpyro_smc.programs.arguments import check_callable, check_positive, named
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.inputs import Call, as_data, checked_call
from numpyro_smc.programs.options import keeps_options_apart
from numpyro_smc.programs.reading import read_sequence
from numpyro_smc.programs.resample import Decision, build
from numpyro_smc.programs.resampling import Scheme, resolve
from numpyro_smc.programs.sequence import Program, Sequence
from numpyro_smc.programs.weights import normalise


class ParticleFilter:
    r"""Particle filter of an unmodified NumPyro model with one ``scan`` [1, 2].

    Particles move by the model's own transition (the bootstrap filter), or by a guide's scan body, and are weighed by
    :math:`p(x_t \mid x_{t-1})\,p(y_t \mid x_t) / q(x_t \mid x_{t-1}, y)`; ``twist`` statements of the guide are
    honoured and taken out of the reported filtering weights. The estimate of the evidence :math:`\hat Z` is unbiased,
    :math:`\mathbb E \hat Z = p(y \mid \theta)`, for every resampling scheme marked so and any schedule; its logarithm
    is biased low. Cost: O(NT) time; O(NT) memory with history, O(N) without.

    A plate around all sites makes independent problems, with weights and ancestors of their own, where the program
    proves that no density and no carry of one element depends on another's latents. Otherwise (a vector autoregression
    over a plate of dimensions) its elements are one problem, which a warning says, naming the site.

    Latents before the scan that the steps use directly are global: they must be given in ``params`` (the evidence is
    then conditional on them) or proposed by the guide.

    :param model: a NumPyro model.
    :param num_particles: number of particles N.
    :param guide: proposal; ``None`` for the model's own transition.
    :param resampler, resample, ess_threshold: see :class:`~numpyro_smc.FIVO`.
    :param allow_biased: let :meth:`log_evidence` answer also under a scheme that is not known to be unbiased.
    :param history: whether to keep the particles of all steps (needed for filtered means, smoothing, plots).
    :param batch_size: move particles in chunks of this size, to bound the memory of a step; must divide
        ``num_particles``.
    :raises ValueError: for bad options at once; naming the site for programs that cannot be filtered, when run.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_smc import ParticleFilter
        >>> def local_level(y=None, T=3):
        ...     level = numpyro.sample("level_0", dist.Normal(0.0, 1.0))
        ...     def step(level, y_t):
        ...         level = numpyro.sample("level", dist.Normal(level, 0.1))
        ...         numpyro.sample("y", dist.Normal(level, 0.5), obs=y_t)
        ...         return level, level
        ...     scan(step, level, y, length=T)
        >>> result = ParticleFilter(local_level, num_particles=1000).run(random.key(0), jnp.array([0.1, 0.3, 0.2]))
        >>> result.mean("level").shape
        (3,)
        >>> result.sample_posterior(random.key(1), num_samples=100)["level"].shape
        (100, 3)

    **References**

    1. *Novel approach to nonlinear/non-Gaussian Bayesian state estimation*, N. Gordon, D. Salmond, A. Smith (1993)
    2. *An Introduction to Sequential Monte Carlo*, N. Chopin, O. Papaspiliopoulos (2020)
    """

    def __init__(
        self,
        model: Program,
        num_particles: int = 1000,
        *,
        guide: Program | None = None,
        resampler: str | Scheme = "systematic",
        resample: str | Decision = "ess",
        ess_threshold: float = 0.5,
        allow_biased: bool = False,
        history: bool = True,
        batch_size: int | None = None,
    ) -> None:
        check_positive("ParticleFilter", num_particles=num_particles)
        check_callable("ParticleFilter", model=model, **({} if guide is None else {"guide": guide}))
        self.model = model
        self.num_particles = int(num_particles)
        self.guide = guide
        with named("ParticleFilter"):
            self.resampling = build(resampler, resample, ess_threshold)
            in_chunks(None, self.num_particles, batch_size)
        self.scheme = resolve(resampler) if self.resampling is not None else None
        self.allow_biased = allow_biased
        self.history = history
        self.batch_size = batch_size
        self._compiled_run = Compiled(self._run)
        self._compiled_answer = Compiled(partial(_answer, self))
        self._compiled_init = Compiled(partial(streaming.start, self))
        self._compiled_update = Compiled(partial(streaming.take_in, self))

    def __repr__(self) -> str:
        guide = "" if self.guide is None else f", guide={getattr(self.guide, '__name__', self.guide)}"
        return (
            f"ParticleFilter({getattr(self.model, '__name__', self.model)}, num_particles={self.num_particles}{guide})"
        )

    @property
    def is_biased(self) -> bool:
        """Whether the evidence estimate is biased, or not known to be unbiased, because of the resampling scheme."""
        return self.scheme is not None and not self.scheme.unbiased

    def check_unbiased(self, caller: str) -> None:
        """:raises ValueError: if the evidence estimate is biased and the filter was not told to allow that."""
        if self.is_biased and not self.allow_biased:
            assert self.scheme is not None
            raise ValueError(
                f"{caller}: resampler '{self.scheme.name}' is not known to be unbiased, and neither is an evidence "
                f"estimated with it. Use an unbiased scheme such as 'systematic', or pass allow_biased=True to have "
                f"the biased value, as an objective for instance."
            )

    # ---- whole series -------------------------------------------------------------------------------------------

    @keeps_options_apart("self.model", "self.guide")
    def run(self, rng_key: Array, *args: Any, params: dict[str, Any] | None = None, **kwargs: Any) -> FilterResult:
        """Filter a whole series.

        :param rng_key: random key.
        :param args: arguments of the model (and of the guide).
        :param params: values of ``param`` sites, and of latents to condition on (they add nothing to the weights).
        :return: the evidence, weights, particles and ancestors, with methods for smoothing and forecasts.
        :raises FloatingPointError: if all weights are zero or not a number at some step, naming the step and the sites.
        """
        return self.filtered(self._checked(rng_key, params, args, kwargs, ParticleFilter.run))

    def filtered(self, call: Call) -> FilterResult:
        """:meth:`run` of a call that has been checked."""
        rng_key, params, args, kwargs = call
        log_evidence, history = self._compiled_run(rng_key, params, args, kwargs)
        result = FilterResult(self, rng_key, (params, args, kwargs), log_evidence, history)
        result.check_finite()
        return result

    @keeps_options_apart("self.model", "self.guide")
    def log_evidence(self, rng_key: Array, *args: Any, params: dict[str, Any] | None = None, **kwargs: Any) -> Array:
        """The log evidence alone, ``[*batch]``: pure and differentiable,
        for use under ``jit``, ``grad`` and ``vmap``.

        Data about global latents outside of the plates belong to no element of the batch: a warning names them.

        :raises ValueError: if the resampling scheme is biased, unless the filter was made with ``allow_biased=True``.
        """
        self.check_unbiased("ParticleFilter.log_evidence")
        call = self._checked(rng_key, params, args, kwargs, ParticleFilter.log_evidence)
        return self._run(*call, history=False)[0]

    def _checked(
        self, rng_key: Any, params: Any, args: Any, kwargs: Any, method: Callable[..., Any], needs_data: bool = True
    ) -> Call:
        options = (ParticleFilter, method)
        return checked_call(
            "ParticleFilter",
            rng_key,
            self.model,
            self.guide,
            params,
            args,
            kwargs,
            options=options,
            needs_data=needs_data,
        )

    def read(
        self, rng_key: Array, params: dict[str, Any], args: Any, kwargs: Any, model: Program | None = None
    ) -> Sequence:
        """The program as the particle recursion sees it."""
        return read_sequence(rng_key, model or self.model, self.guide, params, args, kwargs, user="ParticleFilter")

    def _run(
        self, rng_key: Array, params: Any, args: Any, kwargs: Any, history: bool | None = None
    ) -> tuple[Array, History]:
        history = self.history if history is None else history
        read_key, run_key = random.split(rng_key)
        sequence = self.read(read_key, params, args, kwargs)
        warn_of_data_outside(sequence)

        def keep(state: ParticleState, move: Move) -> Any:
            return {
                "cloud": state.cloud,
                "values": move.values,
                "log_weights": normalise(state.log_weights - move.log_twist)[0],
            }

        model = in_chunks(sequence, self.num_particles, self.batch_size)
        recursion = run(run_key, model, self.num_particles, self.resampling, keep=keep if history else None)
        log_evidence = recursion.log_evidence
        return log_evidence, History(
            increments=recursion.steps.increment,
            initial_increment=recursion.initial.increment,
            ess=recursion.steps.ess,
            resampled=recursion.steps.resampled,
            ancestors=recursion.steps.ancestors if history else None,
            initial=recursion.kept,
            steps=recursion.steps.history,
            log_weights=recursion.state.log_weights,
            cloud=recursion.state.cloud,
            global_values=sequence.global_values,
            bound=sequence.bound(log_evidence),
            combined=dict.fromkeys(sequence.combined) if history else {},
        )

    # ---- one observation at a time ------------------------------------------------------------------------------

    @keeps_options_apart("self.model", "self.guide")
    def init(self, rng_key: Array, *args: Any, params: dict[str, Any] | None = None, **kwargs: Any) -> FilterState:
        """Draw the initial particles of a stream.

        :param args: arguments of the model, with any series of length one or more; only what stands before the scan is
            run with them.
        :return: the running state; advance it with :meth:`update`.
        :raises FloatingPointError: if what is observed before the scan leaves no particle alive.
        """
        rng_key, *program = self._checked(rng_key, params, args, kwargs, ParticleFilter.init, needs_data=False)
        if not jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key):
            rng_key = random.wrap_key_data(rng_key)
        state = self._compiled_init(rng_key, *program)._replace(program=tuple(program))
        streaming.check_step(self, "ParticleFilter.init", None, state, None, {})
        return state

    def update(
        self, state: FilterState, x: Any = None, *, guide_x: Any = None, data: dict[str, Any] | None = None
    ) -> FilterState:
        """Take in one observation. Memory does not grow with the number of observations.

        With the same key, a stream's particles equal those of :meth:`run` on the whole series, and so does its log
        evidence up to rounding of the last digit: the sum is compensated, however long the stream.

        :param x: what the scan's body receives at this step, one slice of its ``xs`` (for many models the observation).
        :param guide_x: the same for the guide's body; ``x`` if not given.
        :param data: observations by site name, for models that are conditioned from outside.
        :return: the new state.
        :raises FloatingPointError: naming the site and step, if no particle explains the observation or it is not
            finite. Under ``jit`` nothing can be raised: the log evidence is ``-inf`` or not a number from then on.
        """
        if not isinstance(state, FilterState):
            raise TypeError(f"ParticleFilter.update: state must be that of init, load or update, got {state!r}.")
        x, guide_x, data = as_data("ParticleFilter", (x, guide_x, data))
        arrays = state._replace(program=None)
        new = self._compiled_update(arrays, state.program, x, x if guide_x is None else guide_x, data or {})
        streaming.check_step(self, "ParticleFilter.update", state, new, x, data or {})
        return new._replace(program=state.program)

    def save(self, path: Any, state: FilterState) -> None:
        """Write a running state to a file (``.npz``); :meth:`load` reads it back."""
        save_run(path, "stream", {"state": state._replace(program=None)}, self._identity(state.program))

    @keeps_options_apart("self.model", "self.guide")
    def load(self, path: Any, *args: Any, params: dict[str, Any] | None = None, **kwargs: Any) -> FilterState:
        """Read a running state, given the arguments that :meth:`init` was given.

        :raises ValueError: if the file is damaged, or of another model, guide, resampling, ``params`` or arguments.
        """
        fresh = self.init(random.key(0), *args, params=params, **kwargs)
        like, of = {"state": fresh._replace(program=None)}, self._identity(fresh.program)
        advice = "Pass the filter and the arguments that the stream was started with, or another file."
        contents = load_run(path, "stream", like, of, "ParticleFilter.load", advice)
        return contents["state"]._replace(program=fresh.program)

    def _identity(self, program: Any) -> dict[str, str]:
        params, args, kwargs = program
        parts = {"model": self.model, "guide": self.guide, "resampling": self.resampling}
        return identity("ParticleFilter", self._compiled_init.ignored, **parts, params=params, arguments=(args, kwargs))


def _answer(particle_filter: ParticleFilter, question: Any, *args: Any) -> Any:
    """A question about a filter's result, put to the filter: a result would stay with the compiled program."""
    return question(particle_filter, *args)
