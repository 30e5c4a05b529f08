"""Tempered sequential Monte Carlo on unmodified NumPyro models."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from numpyro_smc.engines.checkpoint import check_folder
from numpyro_smc.programs.arguments import check_if_given, check_positive
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.resampling import Scheme
from numpyro_smc.programs.unconstrained import Program, Split, UnconstrainedModel
from numpyro_smc.samplers import persistent as pooling
from numpyro_smc.samplers import tempering as cloudwise
from numpyro_smc.samplers.batch import Batch
from numpyro_smc.samplers.checks import (
    broken_particle,
    check_advance,
    not_startable,
    too_many_stages,
    warn_of_stuck_particles,
)
from numpyro_smc.samplers.options import check_options, chosen_move, chosen_path, chosen_scheme, description
from numpyro_smc.samplers.paths import Temperatures
from numpyro_smc.samplers.progress import BAR_FORMAT, Progress, show
from numpyro_smc.samplers.result import SMCResult
from numpyro_smc.samplers.stages import advance_stages, next_limit
from numpyro_smc.samplers.tempering import Settings


class SMCSampler:
    r"""Tempered sequential Monte Carlo [1, 2]: posterior draws and the evidence of an unmodified NumPyro model.

    Particles are drawn from the prior :math:`\pi_0` (or from a fitted guide) and carried through
    :math:`\pi_0(z)\,L(z)^\beta` from :math:`\beta = 0` to 1: weighed, resampled, and moved by a Markov kernel that
    leaves the new density invariant. :math:`L` is the likelihood: observed sites and ``numpyro.factor`` terms. Latents
    are moved on the real line, by the bijections of their supports.

    The next temperature is where the effective sample size of the reweighed cloud falls to ``target_ess * N``. With a
    schedule in its place and ``tune=()`` the estimate of the evidence is unbiased; adaptation costs a relative bias of
    O(1/N). The standard error comes from the run's genealogy [3] and covers only what the run has seen: a mode that no
    particle found is in no standard error. Run again with another key, and with twice the moves, to trust a hard
    posterior.

    Modes keep their shares, which no chain does, with an error that falls as :math:`N^{-1/2}`: two modes of 90 % and
    10 % in ten dimensions have it at 2 points with 1,000 particles and at 1 point with 4,000, from the prior and from a
    wide guide alike. :meth:`SMCResult.standard_error` tells it after one run. At equal cost more particles help most, a
    larger ``target_ess`` and more moves less, and ``waste_free`` hurts: its few ancestors decide the shares.

    Cost of a stage: N times ``num_moves`` times the gradients of one move; memory O(N D).

    :param model: a NumPyro model whose latent sites are continuous.
    :param num_particles: N.
    :param moves: ``"hmc"``, ``"nuts"``, ``"mala"`` or ``"rwmh"``, by BlackJAX, or a function ``(rng_key, position,
        log_density, step_size) -> (position, acceptance probability)`` of one particle, a vector of reals in units of
        the cloud's spread.
    :param num_moves: how often each particle is moved at a temperature. By default 5 for ``"hmc"``, 2 for ``"nuts"``,
        10 for ``"mala"`` and functions, 20 for ``"rwmh"``.
    :param moves_kwargs: ``num_integration_steps`` of ``"hmc"`` (8), ``max_num_doublings`` of ``"nuts"`` (8).
    :param tempering: ``"adaptive"``; an increasing array of temperatures that ends at 1; or ``"data"``: the particles
        go through :math:`p(z \mid y_{1:n})` with :math:`n` growing [6], as far as ``target_ess`` allows, by one row at
        least. What is observed outside ``data_plate`` enters first. Every evaluation still runs over all rows, and the
        log likelihoods of all rows are kept: memory O(N (D + rows)).
    :param data_plate: the plate whose elements are the rows. No latent site may stand in it.
    :param row_counts: a schedule for ``"data"``: increasing numbers of rows, the last being all.
    :param target_ess: fraction of N, between 0 and 1; larger means more temperatures.
    :param ess_threshold: a schedule's stage, and the last one, resample where the effective sample size is at most this
        fraction of N; all other adaptive stages do.
    :param waste_free: P, the number of states kept of each chain [4]: N / P ancestors are resampled and moved P - 1
        times, and all states are the new cloud. In place of ``num_moves``.
    :param persistent: reweigh the particles of all past stages [5]; see :mod:`numpyro_smc.samplers.persistent`. Its
        evidence is consistent but not unbiased.
    :param tune: what is learned from the cloud: ``"step_size"``, after each sweep, and ``"inverse_mass_matrix"``, the
        cloud's covariance, at each temperature.
    :param dense_mass: whether that is the whole covariance or its diagonal.
    :param step_size: initial step size in units of the cloud's spread; by default by the moves and the dimension.
    :param init_guide: ``(guide, params)``: start from a fitted guide instead of the prior, and temper its importance
        weights. The guide should be wider than the posterior.
    :param resampler: name of an unbiased resampling scheme, or a :class:`~numpyro_smc.resampling.Scheme`.
    :param batch_size: particles moved at a time, to bound the memory of a stage.
    :param max_stages: after how many temperatures to give up.
    :raises ValueError: for bad options at once; when run, naming the sites, for discrete latents, subsampled plates,
        improper priors without ``init_guide``, a guide that does not cover the latents, and latents in ``data_plate``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.samplers.smc_sampler import SMCSampler
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mean, scale), obs=y)
        >>> sampler = SMCSampler(model, num_particles=500)
        >>> result = sampler.run(random.key(0), jnp.array([1.1, 0.3, 2.2, 1.4]), progress_bar=False)
        >>> bool(abs(result.log_evidence + 7.40) < 0.4)
        True
        >>> result.get_samples()["mean"].shape
        (500,)

    **References**

    1. *Sequential Monte Carlo samplers*, P. Del Moral, A. Doucet, A. Jasra (2006)
    2. *An Introduction to Sequential Monte Carlo*, N. Chopin, O. Papaspiliopoulos (2020), chapter 17
    3. *Variance estimation in the particle filter*, A. Lee, N. Whiteley (2018)
    4. *Waste-free sequential Monte Carlo*, H.-D. Dau, N. Chopin (2022)
    5. *Persistent Sampling: Enhancing the Efficiency of Sequential Monte Carlo*, M. Karamanis, U. Seljak (2024)
    6. *A sequential particle filter method for static models*, N. Chopin (2002)
    """

    def __init__(
        self,
        model: Program,
        num_particles: int = 1000,
        *,
        moves: str | Callable[..., Any] = "hmc",
        num_moves: int | None = None,
        moves_kwargs: dict[str, Any] | None = None,
        tempering: str | Any = "adaptive",
        data_plate: str = "data",
        row_counts: Any = None,
        target_ess: float = 0.5,
        ess_threshold: float = 0.5,
        waste_free: int | None = None,
        persistent: bool = False,
        tune: Collection[str] = ("step_size", "inverse_mass_matrix"),
        dense_mass: bool = False,
        step_size: float | None = None,
        init_guide: tuple[Program, dict[str, Any]] | None = None,
        resampler: str | Scheme = "systematic",
        batch_size: int | None = None,
        max_stages: int = 1000,
    ) -> None:
        check_options(num_particles, num_moves, target_ess, ess_threshold, waste_free, persistent, tune, init_guide)
        check_positive("SMCSampler", max_stages=max_stages)
        check_if_given("SMCSampler", batch_size=batch_size)
        self.model = model
        self.num_particles = int(num_particles)
        self.guide: Program | None
        self.guide, self.guide_params = (None, {}) if init_guide is None else init_guide
        self._path, self.schedule = chosen_path(tempering, data_plate, row_counts, persistent, init_guide)
        self._by_rows = self._path is not Temperatures
        self.persistent = persistent
        self.max_stages = max_stages
        move = chosen_move(moves, moves_kwargs)
        self.settings = Settings(
            self.num_particles,
            move,
            waste_free - 1 if waste_free else num_moves or move.num_moves,
            chosen_scheme(resampler, needs_fewer=bool(waste_free) or persistent),
            target_ess if self.schedule is None else None,
            ess_threshold,
            waste_free,
            step_size,
            "step_size" in tune,
            "inverse_mass_matrix" in tune,
            dense_mass,
            batch_size,
        )
        self._moves = moves if isinstance(moves, str) else getattr(moves, "__name__", "function")
        rows_of = data_plate if self._by_rows else None
        self._description = description(self.settings, self._moves, self.schedule, persistent, rows_of)
        self._engine = pooling if persistent else cloudwise
        self._start = Compiled(self._start_run)
        self._advance = Compiled(self._advance_run)
        self._finish = Compiled(self._finish_run)
        self._diagnose = Compiled(self._log_densities)
        self._batch = Batch(self)

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", self.model)
        return f"SMCSampler({name}, num_particles={self.num_particles}, moves={self._moves!r})"

    def __fingerprint__(self) -> tuple[Any, ...]:
        return (self.model, self.guide, self._path, self.schedule, self.persistent, self.settings)

    def run(
        self,
        rng_key: Array,
        *args: Any,
        params: dict[str, Any] | None = None,
        progress_bar: bool = True,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 1,
        resume: bool = True,
        **kwargs: Any,
    ) -> SMCResult:
        """Sample the posterior.

        Arrays in ``args`` and ``kwargs`` are traced, anything else is static, as in ``jax.jit``: a second run with the
        same shapes compiles nothing, whatever its temperatures. **Ctrl-C** ends the run and returns the tempered
        posterior reached; with ``checkpoint``, the same call continues there and ends with the numbers of an
        uninterrupted run.

        :param rng_key: random key; not used if a checkpoint is resumed.
        :param args: arguments of the model (and of the guide).
        :param params: values of ``param`` sites; those of ``init_guide`` need not be repeated.
        :param progress_bar: show the temperature, and each stage's evidence, effective sample size and acceptance.
        :param checkpoint: file to save to every ``checkpoint_every`` stages, at the end, and on Ctrl-C or an error.
        :param resume: whether to continue from ``checkpoint`` if that file exists; if not, it is overwritten.
        :return: an :class:`SMCResult`.
        :raises FloatingPointError: naming the sites, if initial log densities are not finite; if no particle has any
            likelihood; if tempering comes to a halt.
        """
        check_folder("SMCSampler", checkpoint)
        check_positive("SMCSampler", checkpoint_every=checkpoint_every)
        program = (jax.tree.map(jnp.asarray, {**self.guide_params, **(params or {})}), args, kwargs)
        progress, interrupted = self._carry(rng_key, program, progress_bar, checkpoint, checkpoint_every, resume=resume)
        return self._result(progress, program, interrupted)

    def run_many(
        self,
        rng_key: Array,
        *args: Any,
        params: dict[str, Any] | None = None,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> list[SMCResult]:
        """Sample the posteriors of many data sets at once, in one compiled program.

        Every array in ``args`` and ``kwargs`` has the problems as its leading axis, of size B, and each problem has its
        own key, temperatures, tuning and particles. The stages go on until the last problem is at its posterior, at the
        cost of B times the stages of the slowest; memory is B times that of :meth:`run`.

        :param rng_key: random key, split over the problems.
        :param params: values of ``param`` sites, shared by all.
        :param progress_bar: show how many problems are done.
        :return: a result a problem.
        :raises ValueError: if the arrays do not share a leading axis, or for ``persistent=True``.
        :raises FloatingPointError: as :meth:`run` does, naming the problem.
        """
        if self.persistent:
            raise ValueError("SMCSampler.run_many: persistent=True keeps pools that grow; use run for each problem.")
        params = jax.tree.map(jnp.asarray, {**self.guide_params, **(params or {})})
        return self._batch.run(rng_key, params, (args, kwargs), progress_bar)

    def _carry(
        self,
        rng_key: Array,
        program: tuple,
        progress_bar: bool,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 1,
        *,
        resume: bool = True,
    ) -> tuple[Progress, bool]:
        """Carry the particles from the start to the posterior; also whether Ctrl-C ended that."""
        state, split = self._start(rng_key, *program)
        progress = Progress(state, np.zeros((0, len(cloudwise.StageReport._fields)), split.base.dtype))
        saved = None
        if checkpoint is not None and resume and os.path.exists(checkpoint):
            progress = saved = progress.load(checkpoint, self._description)
        else:
            self._check_start(split, state, program)
        interrupted, limit = False, 1
        with tqdm(total=1.0, bar_format=BAR_FORMAT, disable=not progress_bar) as bar:
            try:
                show(bar, progress, self.num_particles)
                while progress.temperature < 1.0:
                    start = time.perf_counter()
                    progress = self._next(progress, program, limit)
                    if checkpoint is None:
                        limit = next_limit(limit, time.perf_counter() - start)
                    show(bar, progress, self.num_particles)
                    if checkpoint is not None and progress.num_stages % checkpoint_every == 0:
                        progress.save(checkpoint, self._description)
                        saved = progress
            except KeyboardInterrupt:
                interrupted = True
            finally:
                if checkpoint is not None and progress is not saved:
                    progress.save(checkpoint, self._description)
        warn_of_stuck_particles(progress)
        return progress, interrupted

    def _next(self, progress: Progress, program: tuple, limit: int) -> Progress:
        """One more stage, or up to ``limit``."""
        limit = min(limit, self.max_stages - progress.num_stages)
        if limit < 1:
            raise too_many_stages(progress, self.max_stages)
        state: Any = progress.state
        if self.persistent:
            if progress.num_stages + 1 >= len(state.temperatures):
                state = pooling.grown(state)
            limit = min(limit, len(state.temperatures) - 1 - progress.num_stages)
        state, reports, number = self._advance(state, np.asarray(limit, np.int32), *program)
        for report in np.asarray(reports)[: int(number)]:
            new = Progress(state, np.concatenate([progress.history, report[None]]))
            check_advance(progress, new, self.settings.target_ess)
            progress = new
        return progress

    def _result(self, progress: Progress, program: tuple, interrupted: bool = False) -> SMCResult:
        values, log_weights = self._finish(progress.state, *program)
        return self._result_of(progress, values, log_weights, interrupted)

    def _result_of(
        self, progress: Progress, values: dict[str, Array], log_weights: Array, interrupted: bool = False
    ) -> SMCResult:
        alive = np.flatnonzero(np.asarray(log_weights) > -np.inf) if self.persistent else slice(None)
        return SMCResult.of(
            progress,
            {name: value[alive] for name, value in values.items()},
            log_weights[alive],
            np.ravel(progress.state.families)[alive],
            self.num_particles,
            interrupted=interrupted,
            num_rows=progress.state.log_likelihood.shape[1] if self._by_rows else None,
            integrable=not (self._by_rows or self.persistent),
        )

    # ---- compiled ------------------------------------------------------------------------------------------------

    def _read(self, params: Any, args: Any, kwargs: Any) -> UnconstrainedModel:
        return UnconstrainedModel(self.model, args, kwargs, params, guide=self.guide, user="SMCSampler")

    def _start_run(self, rng_key: Array, *program: Any) -> tuple[Any, Split]:
        return self._engine.start(rng_key, self._path(self._read(*program)), self.settings)

    def _advance_run(self, state: Any, limit: Array, *program: Any) -> tuple[Any, Array, Array]:
        path = self._path(self._read(*program))
        schedule = jnp.asarray([1.0] if self.schedule is None else self.schedule, state.temperature.dtype)

        def advance(state: Any) -> tuple[Any, Array]:
            return self._engine.advance(state, schedule[state.num_stages], path, self.settings)

        return advance_stages(advance, state, limit)

    def _finish_run(self, state: Any, *program: Any) -> tuple[dict[str, Array], Array]:
        position, log_weights = state.positions_and_weights
        return jax.vmap(self._read(*program).values)(position), log_weights

    def _log_densities(self, position: Array, *program: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        model = self._read(*program)
        return model.site_log_densities(position), model.unravel(position)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _check_start(self, split: Split, state: Any, program: tuple) -> None:
        """:raises FloatingPointError: naming the sites, where a run cannot start."""
        first, number = broken_particle(split)
        if not number:
            return
        position = state.position.reshape(-1, state.position.shape[-1])[first]
        densities, latents = jax.tree.map(np.asarray, self._diagnose(position, *program))
        raise not_startable(number, self.num_particles, densities, latents)
