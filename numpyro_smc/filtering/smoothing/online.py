"""Online smoothing of additive functionals by PaRIS: one observation at a time, memory that does not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step, check_markov
from numpyro_smc.filtering.smoothing.methods import BACKWARD_DRAWS, backward_draw, check_num_draws
from numpyro_smc.filtering.smoothing.pairs import Functional, weighted_sum
from numpyro_smc.filtering.smoothing.paris import carry_forward, zero_statistic
from numpyro_smc.filtering.smoothing.runs import check_bound
from numpyro_smc.filtering.streaming import FilterState, take_step
from numpyro_smc.programs.arguments import check_callable, check_positive
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.sequence import Sequence

if TYPE_CHECKING:
    from numpyro_smc.filtering.filter import ParticleFilter


class OnlineSmootherState(NamedTuple):
    """A running filter with a statistic of every particle's past; a pytree of arrays.

    - **filter** - the running filter. **rng_key** - of the backward draws.
    - **statistic** - :math:`\\tau_t^i`, ``[N, *batch, ...]``, as the functional returned it; ``None`` before the first
      observation. **value** - its smoothed expectation, the sum over the steps so far.
    """

    filter: FilterState
    rng_key: Array
    statistic: Any
    value: Any


class OnlineSmoother:
    r"""Smoothed expectation of :math:`\sum_t f_t(x_{t-1}, x_t)` given all observations so far, online (PaRIS) [1].

    Every particle carries the conditional expectation of the sum over its past, updated by :math:`\tilde N` draws from
    the backward kernel,

    .. math:: \tau_t^i = \frac1{\tilde N} \sum_{k=1}^{\tilde N} \Big[\tau_{t-1}^{J_t^{i,k}}
       + f_t(x_{t-1}^{J_t^{i,k}}, x_t^i)\Big], \qquad
       \mathbb E\Big[\sum_{s \le t} f_s \,\Big|\, y_{0:t}\Big] \approx \sum_i W_t^i \tau_t^i .

    Consistent in N with a bias of order 1/N; the variance grows linearly in t for :math:`\tilde N \ge 2`, and as
    :math:`t^2` for one draw. Twists are left out, as in every stream. Memory O(N). Cost of a step:
    O(:math:`\tilde N` N), O(N^2) for exact draws.

    :param particle_filter: the filter; it needs no history.
    :param functional: ``(t, carry, values)`` to an array or a pytree, see :meth:`~numpyro_smc.FilterResult.smooth`.
    :param num_backward_draws: :math:`\tilde N \ge 2`.
    :param backward: ``"mcmc"`` (``num_mcmc_steps`` independence-Metropolis moves from the ancestor [2]),
        ``"rejection"`` (``log_bound``, ``max_trials``) or ``"exact"``, ``batch_size`` particles at a time.
    :raises ValueError: for bad options; if the carry is not determined by the step's own latents.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_smc import ParticleFilter
        >>> from numpyro_smc.filtering.smoothing.online import OnlineSmoother
        >>> def model(y):
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        ...         numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> smoother = OnlineSmoother(ParticleFilter(model, 200), lambda t, x, values: values["x"] * x)
        >>> y = jnp.array([0.3, 0.8, 0.6])
        >>> state = smoother.init(random.key(0), y[:1])
        >>> for y_t in y:
        ...     state = smoother.update(state, y_t)
        >>> bool(0.0 < state.value < 2.0)
        True

    **References**

    1. *Efficient particle-based online smoothing in general hidden Markov models: the PaRIS algorithm*, J. Olsson,
       J. Westerborn (2017)
    2. *On backward smoothing algorithms*, H.-D. Dau, N. Chopin (2023)
    """

    def __init__(
        self,
        particle_filter: ParticleFilter,
        functional: Functional,
        *,
        num_backward_draws: int = 2,
        backward: str = "mcmc",
        num_mcmc_steps: int = 1,
        log_bound: Any = None,
        max_trials: int = 20,
        batch_size: int = 100,
    ) -> None:
        check_num_draws("OnlineSmoother", num_backward_draws)
        check_positive("OnlineSmoother", num_mcmc_steps=num_mcmc_steps, max_trials=max_trials, batch_size=batch_size)
        check_callable("OnlineSmoother", functional=functional)
        if not hasattr(particle_filter, "scheme"):
            raise TypeError(f"OnlineSmoother: particle_filter must be a ParticleFilter, got {particle_filter!r}.")
        if backward not in BACKWARD_DRAWS:
            known = ", ".join(map(repr, BACKWARD_DRAWS))
            raise ValueError(f"OnlineSmoother: unknown backward={backward!r}. Use one of {known}.")
        if backward == "mcmc" and particle_filter.scheme is not None and particle_filter.scheme.mixes:
            raise ValueError(
                f"OnlineSmoother: resampler '{particle_filter.scheme.name}' mixes particles, which then have no "
                f"ancestors to start moves from. Use backward='exact', or a scheme such as 'systematic'."
            )
        self.particle_filter = particle_filter
        self.functional = functional
        self.num_backward_draws = num_backward_draws
        self.options = (backward, num_mcmc_steps, log_bound, max_trials, batch_size)
        self._compiled_update = Compiled(self._update)

    def __repr__(self) -> str:
        name = getattr(self.functional, "__name__", str(self.functional))
        return f"OnlineSmoother({self.particle_filter!r}, {name}, num_backward_draws={self.num_backward_draws})"

    def init(
        self, rng_key: Array, *args: Any, params: dict[str, Any] | None = None, **kwargs: Any
    ) -> OnlineSmootherState:
        """Start a stream; arguments are those of :meth:`~numpyro_smc.ParticleFilter.init`, whose particles it has."""
        filter_state = self.particle_filter.init(rng_key, *args, params=params, **kwargs)
        return OnlineSmootherState(filter_state, random.fold_in(filter_state.rng_key, 1), None, None)

    def update(
        self, state: OnlineSmootherState, x: Any = None, *, guide_x: Any = None, data: dict[str, Any] | None = None
    ) -> OnlineSmootherState:
        """Take in one observation, as :meth:`~numpyro_smc.ParticleFilter.update` does.

        :raises ValueError: if a density exceeds the bound of rejection.
        """
        program, arrays = state.filter.program, state.filter._replace(program=None)
        guide_x = x if guide_x is None else guide_x
        new, wrong = self._compiled_update(state._replace(filter=arrays), program, x, guide_x, data or {})
        if self.options[0] == "rejection":
            check_bound("OnlineSmoother", wrong)
        return new._replace(filter=new.filter._replace(program=program))

    def _update(
        self, state: OnlineSmootherState, program: Any, x: Any, guide_x: Any, data: dict[str, Any]
    ) -> tuple[OnlineSmootherState, Array]:
        before = state.filter
        after, info, sequence = take_step(self.particle_filter, before, program, x, guide_x, data)
        check_markov(sequence, "OnlineSmoother")
        cloud, log_weights = before.particles
        step = Step(before.t, x, cloud, log_weights, after.values, info.ancestors)
        statistic, wrong = self._carry_forward(state, sequence, step)
        weights = jax.nn.softmax(after.particles.log_weights, axis=0)
        value = jax.tree.map(lambda leaf: weighted_sum(leaf, weights), statistic)
        return OnlineSmootherState(after, state.rng_key, statistic, value), wrong

    def _carry_forward(self, state: OnlineSmootherState, sequence: Sequence, step: Step) -> tuple[Any, Array]:
        kernel = BackwardKernel(sequence, jax.tree.map(lambda leaf: leaf[None], step), step.log_weights)
        numbers = jnp.arange(kernel.num_particles, dtype=jnp.int32)
        everyone = jnp.broadcast_to(numbers.reshape((-1,) + (1,) * kernel.rank), step.log_weights.shape)
        draw = backward_draw(kernel, *self.options)
        key = random.fold_in(state.rng_key, step.t)
        parents, wrong = draw(key, kernel, step, everyone, self.num_backward_draws)
        statistic = state.statistic
        if statistic is None:
            statistic = zero_statistic(sequence, step, self.functional)
        return carry_forward(sequence, step, parents, self.functional, statistic), wrong
