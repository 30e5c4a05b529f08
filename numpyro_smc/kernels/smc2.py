r"""SMC2: parameters and states of a sequence model, jointly and sequentially."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from tqdm import tqdm

from numpyro_smc.kernels.estimated_likelihood import EstimatedLikelihood
from numpyro_smc.kernels.smc2_checks import (
    check_file,
    check_options,
    check_settings,
    check_start,
    checked_increment,
    checked_until,
)
from numpyro_smc.kernels.smc2_progress import Progress, StepReport, load_progress, show
from numpyro_smc.kernels.smc2_result import SMC2Result
from numpyro_smc.kernels.smc2_stages import Filters, Moves, SMC2State, advance_all, exchange, rejuvenate, start
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.resample import Decision
from numpyro_smc.programs.resampling import Scheme, resolve
from numpyro_smc.programs.sequence import Program

_GROWTH = 16


class SMC2:
    r"""SMC2 [1]: :math:`p(\theta, x_t \mid y_{0:t})` and :math:`p(y_{0:t})` for every t, in one pass over the data.

    N parameter particles, drawn from the prior, have a particle filter of M state particles each. At step t every
    filter takes in :math:`y_t`, and the parameters are weighed by its increment
    :math:`\hat p(y_t \mid y_{0:t-1}, \theta)`. Where their effective sample size is at most
    ``parameter_ess_threshold * N`` they are resampled and moved by particle Metropolis, whose filters run over
    :math:`y_{0:t}` anew,

    .. math:: \alpha = 1 \wedge \frac{p(z')\, \hat p(y_{0:t} \mid \theta')\, q(z)}
       {p(z)\, \hat p(y_{0:t} \mid \theta)\, q(z')},

    in unconstrained space, with :math:`q` fitted to the particles. If fewer than ``min_acceptance`` are accepted, every
    filter is replaced by one of twice the size, and the weights by
    :math:`W\, \hat p_{2M}(y_{0:t} \mid \theta) / \hat p_M(y_{0:t} \mid \theta)` (the exchange step of [1]).

    For any M, as N grows, parameters and states follow the exact posterior of every prefix. The evidence would be
    unbiased with proposals and M chosen in advance; that both depend on the particles costs a relative bias of O(1/N).
    An evidence after a late exchange is noisier than before: start with M that keeps the acceptance up.

    Cost: O(N M) a step, and O(N M t) a move at step t; moves get rarer as the posterior settles, so that a series of T
    steps costs O(N M T log T) at fixed M. Memory O(N M), independent of T, twice that in a move; ``batch_size`` bounds
    what a stage needs beside it.

    Every stage is compiled once for each number of state particles, whatever the step: 2 programs to begin with, one
    to advance and one to move for each M, and one for each exchange.

    **Streams.** Programs are called with their whole series, and ``until`` says how many steps to take in. Inputs of
    later steps have no influence, so for data that are yet to come give a series of full length with anything (such as
    NaN) in the place of the future: :meth:`resume` goes on with the next observations filled in, and compiles nothing.
    A longer series works too, and is compiled once for each length. What has been taken in must stay as it was: moves
    look at it again. Quantities that a program computes of the whole series before its scan do see the future.

    :param model: a NumPyro model with one ``scan`` and continuous global latents with proper priors: latents before it
        that its steps use.
    :param num_parameter_particles: N, two or more.
    :param num_state_particles: M, at first.
    :param guide: proposal of the states, as for :class:`~numpyro_smc.ParticleFilter`; ``None`` for the model's own
        transition. Twists are left out: they look ahead of the data.
    :param params: values of ``param`` sites, and of latents to condition on.
    :param resampler, resample, ess_threshold: of the state particles, as for :class:`~numpyro_smc.ParticleFilter`. The
        parameters are resampled systematically.
    :param parameter_ess_threshold: fraction of N, in (0, 1].
    :param num_moves: moves of each parameter where they are moved.
    :param proposal: ``"independent"``, a Gaussian with the particles' mean and covariance, as in [1]; or
        ``"random_walk"``, a Gaussian step of :math:`2.38^2 / D` times the covariance, better where the posterior in
        unconstrained space is far from Gaussian: use more moves, and a lower ``min_acceptance``.
    :param min_acceptance: mean acceptance probability below which the state particles are doubled; 0 for never.
    :param max_state_particles: how many there may be in the end; 16 times M by default.
    :param batch_size: parameter particles per chunk of a stage; ``None`` for all at once.
    :raises ValueError: for bad options, and schemes that are not unbiased; when run, for models without global latents
        or with discrete or improper ones, naming them.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_smc import SMC2
        >>> def model(y):
        ...     phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(phi * x, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> smc2 = SMC2(model, num_parameter_particles=100, num_state_particles=50)
        >>> y = jnp.array([0.5, 0.1, -0.3, jnp.nan])                  # the last one is yet to come
        >>> result = smc2.run(random.key(0), y, until=3, progress_bar=False)
        >>> bool(abs(result.log_evidence + 3.65) < 0.5)
        True
        >>> result = smc2.resume(result, y.at[3].set(0.4), progress_bar=False)
        >>> {name: draws.shape for name, draws in result.get_samples(10).items()}
        {'phi': (10,), 'x': (10,)}
        >>> result.mean("phi").shape, result.log_evidence_increments.shape
        ((4,), (4,))

    **References**

    1. *SMC2: an efficient algorithm for sequential analysis of state space models*, N. Chopin, P. Jacob,
       O. Papaspiliopoulos (2013)
    """

    def __init__(
        self,
        model: Program,
        num_parameter_particles: int = 500,
        num_state_particles: int = 100,
        *,
        guide: Program | None = None,
        params: dict[str, Any] | None = None,
        resampler: str | Scheme = "systematic",
        resample: str | Decision = "ess",
        ess_threshold: float = 0.5,
        parameter_ess_threshold: float = 0.5,
        num_moves: int = 1,
        proposal: str = "independent",
        min_acceptance: float = 0.2,
        max_state_particles: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        check_options(
            num_parameter_particles,
            num_state_particles,
            max_state_particles,
            parameter_ess_threshold,
            min_acceptance,
            proposal,
            num_moves,
            batch_size,
        )
        self.num_parameter_particles = int(num_parameter_particles)
        self.num_state_particles = int(num_state_particles)
        self.max_state_particles = int(max_state_particles or _GROWTH * num_state_particles)
        self.parameter_ess_threshold, self.min_acceptance = parameter_ess_threshold, min_acceptance
        self._likelihood = EstimatedLikelihood(
            model,
            self.num_state_particles,
            guide,
            params,
            resampler=resampler,
            resample=resample,
            ess_threshold=ess_threshold,
            keep_paths=False,
            correlated=False,
            sort=None,
            user="SMC2",
        )
        self._moves = Moves(proposal, int(num_moves), batch_size)
        self._settings = _settings(self)
        self._length = Compiled(self._read_length)
        self._start = Compiled(self._start_run)
        self._advance = Compiled(self._advance_run)
        self._rejuvenate = Compiled(self._rejuvenate_run)
        self._exchange = Compiled(self._exchange_run)

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", self.model)
        return (
            f"SMC2({name}, num_parameter_particles={self.num_parameter_particles}, "
            f"num_state_particles={self.num_state_particles})"
        )

    def __fingerprint__(self) -> tuple[Any, ...]:
        return (*vars(self._likelihood).values(), self._moves, self.num_parameter_particles)

    @property
    def model(self) -> Program:
        return self._likelihood.model

    def run(
        self,
        rng_key: Array,
        *args: Any,
        until: int | None = None,
        progress_bar: bool = True,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 10,
        resume: bool = True,
        **kwargs: Any,
    ) -> SMC2Result:
        """Take in a series.

        Arrays in ``args`` and ``kwargs`` are traced, anything else is static, as in ``jax.jit``: a second run with the
        same shapes compiles nothing. **Ctrl-C** ends the run and returns the posterior of the data taken in so far.

        :param rng_key: random key; not used if a checkpoint is resumed.
        :param args: arguments of the model (and of the guide), with the whole series.
        :param until: how many steps to take in; all by default.
        :param progress_bar: show the steps, with log evidence, effective sample size and acceptance.
        :param checkpoint: file to save to every ``checkpoint_every`` steps, at the end, and on Ctrl-C or an error. The
            same call continues there, and ends with the numbers of an uninterrupted run.
        :param resume: whether to continue from ``checkpoint`` if that file exists; if not, it is overwritten.
        :return: an :class:`SMC2Result`.
        :raises FloatingPointError: naming the step, if no parameter explains its observation.
        """
        check_file(checkpoint, checkpoint_every)
        if checkpoint is not None and resume and os.path.exists(checkpoint):
            progress = self._load(checkpoint, args, kwargs)
        else:
            if not jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key):
                rng_key = random.wrap_key_data(rng_key)
            checked_until(until, 0, int(self._length(args, kwargs)))
            state = self._start(rng_key, self.num_state_particles, args, kwargs)
            check_start(state)
            progress = Progress(rng_key, state, np.zeros((0, 0)))
        return self._carry(progress, args, kwargs, until, progress_bar, checkpoint, checkpoint_every)

    def resume(
        self,
        result: SMC2Result | str | os.PathLike,
        *args: Any,
        until: int | None = None,
        progress_bar: bool = True,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 10,
        **kwargs: Any,
    ) -> SMC2Result:
        """Go on with a stream: the same as if the run had never stopped.

        :param result: a result, or a file it was saved to.
        :param args: arguments of the model as for :meth:`run`, with what is known of the series by now.
        :raises ValueError: for a result of other options, and for an ``until`` that it has passed.
        """
        check_file(checkpoint, checkpoint_every)
        if isinstance(result, SMC2Result):
            check_settings(result.settings, self._settings)
            progress = result.progress
        else:
            progress = self._load(result, args, kwargs)
        return self._carry(progress, args, kwargs, until, progress_bar, checkpoint, checkpoint_every)

    def load(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> SMC2Result:
        """Read a result that was saved, given the arguments of the model it was made with.

        :raises ValueError: if the file is of another model or of other options.
        """
        return SMC2Result(self._load(path, args, kwargs), self._settings, int(self._length(args, kwargs)), False)

    def num_compiled(self) -> int:
        """How many programs have been compiled, for tests of recompilation."""
        stages = (self._length, self._start, self._advance, self._rejuvenate, self._exchange)
        return sum(stage.num_compiled() for stage in stages)

    # ---- the steps --------------------------------------------------------------------------------------------------

    def _carry(
        self,
        progress: Progress,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        until: int | None,
        progress_bar: bool,
        checkpoint: str | os.PathLike | None,
        checkpoint_every: int,
    ) -> SMC2Result:
        length = int(self._length(args, kwargs))
        until = checked_until(until, progress.num_steps, length)
        interrupted, saved = False, None
        with tqdm(total=until, initial=progress.num_steps, desc="step", disable=not progress_bar) as bar:
            try:
                while progress.num_steps < until:
                    progress = self._next(progress, args, kwargs)
                    show(bar, progress)
                    if checkpoint is not None and progress.num_steps % checkpoint_every == 0:
                        progress.save(checkpoint, self._settings)
                        saved = progress
            except KeyboardInterrupt:
                interrupted = True
            finally:
                if checkpoint is not None and progress is not saved:
                    progress.save(checkpoint, self._settings)
        return SMC2Result(progress, self._settings, length, interrupted)

    def _next(self, progress: Progress, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Progress:
        """Take in one observation."""
        t, size = progress.num_steps, progress.num_state_particles
        keys = random.split(random.fold_in(random.split(progress.rng_key)[1], t), 3)
        state, increment, ess, broken = self._advance(keys[0], np.asarray(t), progress.state, args, kwargs)
        total, acceptance = checked_increment(increment, broken, t), np.nan
        if ess <= self.parameter_ess_threshold * self.num_parameter_particles:
            state, acceptance = self._rejuvenate(keys[1], np.asarray(t + 1), state, args, kwargs)
            if acceptance < self.min_acceptance and 2 * size <= self.max_state_particles:
                size = 2 * size
                state, change = self._exchange(keys[2], np.asarray(t + 1), state, size, args, kwargs)
                total = total + checked_increment(change, 0, t)
        return progress.extended(state, StepReport(total, float(ess), float(acceptance), size))

    # ---- compiled ---------------------------------------------------------------------------------------------------

    def _read_length(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        return jnp.asarray(Filters(self._likelihood, args, kwargs).latents().length)

    def _start_run(self, rng_key: Array, num_states: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SMC2State:
        filters = Filters(self._likelihood, args, kwargs)
        return start(random.split(rng_key)[0], filters, self.num_parameter_particles, num_states, self._moves)

    def _advance_run(self, rng_key: Array, t: Array, state: SMC2State, args: Any, kwargs: Any) -> Any:
        return advance_all(rng_key, t, state, Filters(self._likelihood, args, kwargs), self._moves)

    def _rejuvenate_run(self, rng_key: Array, t: Array, state: SMC2State, args: Any, kwargs: Any) -> Any:
        return rejuvenate(rng_key, t, state, Filters(self._likelihood, args, kwargs), self._moves)

    def _exchange_run(self, rng_key: Array, t: Array, state: SMC2State, size: int, args: Any, kwargs: Any) -> Any:
        return exchange(rng_key, t, state, Filters(self._likelihood, args, kwargs), self._moves, size)

    def _load(self, path: str | os.PathLike, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Progress:
        def outline(num_states: int) -> Any:
            return jax.eval_shape(partial(self._start_run, random.key(0), num_states, args, kwargs))

        return load_progress(path, self._settings, outline, "SMC2")


def _settings(smc2: SMC2) -> str:
    """What a checkpoint must agree with."""
    likelihood, moves = smc2._likelihood, smc2._moves
    resample = likelihood.resample
    parts = {
        "num_parameter_particles": smc2.num_parameter_particles,
        "num_state_particles": smc2.num_state_particles,
        "max_state_particles": smc2.max_state_particles,
        "resampler": resolve(likelihood.resampler).name,
        "resample": resample if isinstance(resample, str) else getattr(resample, "__name__", "function"),
        "ess_threshold": likelihood.ess_threshold,
        "parameter_ess_threshold": smc2.parameter_ess_threshold,
        "proposal": moves.proposal,
        "num_moves": moves.num_moves,
        "min_acceptance": smc2.min_acceptance,
    }
    return ", ".join(f"{name}={value}" for name, value in parts.items())
