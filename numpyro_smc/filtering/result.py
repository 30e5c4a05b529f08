"""What a particle filter returns: evidence, weighted particles, and the questions one asks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.filtering import forecasting
from numpyro_smc.filtering.lost import lost_particles
from numpyro_smc.filtering.smoothing.questions import Smoothing
from numpyro_smc.programs.arguments import check_number, check_positive, checked_levels
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.programs.streams import reported_draws
from numpyro_smc.reports.arviz_export import inference_data
from numpyro_smc.reports.plots import plot_filter

if TYPE_CHECKING:
    from numpyro_smc.filtering.filter import ParticleFilter


class History(NamedTuple):
    """Arrays of one run: a pytree. Leading axis time, then particles; ``None`` where no history was kept.

    - **increments** ``[T, *batch]``, **initial_increment** ``[*batch]``: their sum is the log evidence.
    - **ess**, **resampled** ``[T, *batch]``; **ancestors** ``[T, N, *batch]``.
    - **initial** and **steps**: particles (``cloud``), site values (``values``) and filtering log weights
      (``log_weights``).
    - **log_weights** ``[N, *batch]`` and **cloud**: the final particles.
    - **global_values**: the global latents of this run. **bound**: the objective, scales included.
    - **combined**: names (without values) of deterministic sites that are not of one problem each, as a total over the
      elements of a plate: they have values along paths only.
    """

    increments: Array
    initial_increment: Array
    ess: Array
    resampled: Array
    ancestors: Array | None
    initial: Any
    steps: Any
    log_weights: Array
    cloud: Any
    global_values: dict[str, Array]
    bound: Array
    combined: dict[str, None]


class FilterResult(Smoothing):
    """The outcome of :meth:`ParticleFilter.run`. Batch axes are those of the plates that enclose the whole program.

    - **log_evidence** - ``[*batch]``; **log_evidence_increments** - ``[T, *batch]``, one per step.
    - **total_log_evidence** - of all data together: the sum over the batch, with the scales of subsampling and of
      handlers, and the data about global latents that stand outside of the plates. What FIVO bounds.
    - **ess** - effective sample size after weighing each step, ``[T, *batch]``. **resampled** - ``[T, *batch]``.
    - **ancestors** - index of each particle's parent at the step before, ``[T, N, *batch]``.
    - **particles** - values of each site, ``[T, N, ...]``, and of the sites before the scan, ``[N, ...]``.
    - **log_weights** - filtering log weights of mean one, ``[T, N, *batch]``.
    """

    def __init__(
        self, particle_filter: ParticleFilter, rng_key: Array, program: Any, log_evidence: Array, history: History
    ) -> None:
        self.filter = particle_filter
        self.rng_key = rng_key
        self.program = program
        self.log_evidence = log_evidence
        self.history = history

    @property
    def log_evidence_increments(self) -> Array:
        return self.history.increments

    @property
    def total_log_evidence(self) -> Array:
        return self.history.bound

    @property
    def ess(self) -> Array:
        return self.history.ess

    @property
    def resampled(self) -> Array:
        return self.history.resampled

    @property
    def ancestors(self) -> Array:
        self._need_history("ancestors")
        self._need_genealogy("ancestors")
        assert self.history.ancestors is not None
        return self.history.ancestors

    @property
    def log_weights(self) -> Array:
        self._need_history("log_weights")
        return self.history.steps["log_weights"]

    @property
    def particles(self) -> dict[str, Array]:
        self._need_history("particles")
        return self.history.initial["values"] | self.history.steps["values"]

    @property
    def num_steps(self) -> int:
        return self.history.increments.shape[0]

    def __repr__(self) -> str:
        evidence = np.asarray(self.log_evidence)
        shown = (
            f"{evidence:.4f}" if evidence.ndim == 0 else f"{evidence.sum():.4f} over a batch of shape {evidence.shape}"
        )
        total = float(self.total_log_evidence)
        if not np.isclose(total, evidence.sum(), rtol=1e-4, atol=1e-3):
            shown += f", total {total:.4f}"
        ess = np.asarray(self.ess)
        scheme = self.filter.scheme
        if scheme is not None and not scheme.unbiased:
            shown += f" (resampler '{scheme.name}' is not known to be unbiased)"
        sites = sorted(self.history.steps["values"]) if self.history.steps is not None else "not kept (history=False)"
        return (
            f"FilterResult: log evidence {shown}\n"
            f"  {self.num_steps} steps, {self.filter.num_particles} particles, resampled at "
            f"{np.asarray(self.resampled).mean():.0%} of steps\n"
            f"  effective sample size: median {np.median(ess):.0f}, lowest {ess.min():.0f} at step "
            f"{int(ess.reshape(len(ess), -1).min(1).argmin())}\n"
            f"  sites: {sites}"
        )

    # ---- filtering ----------------------------------------------------------------------------------------------

    def mean(self, site: str, log_weights: Array | None = None) -> Array:
        """Filtering mean of a site at each step, ``[T, ...]`` (``[...]`` for a site before the scan).

        :param log_weights: of a step's particles in place of the filtering ones: :meth:`smoothing_log_weights`.
        """
        values, weights, axis = self._weighted(site, log_weights)
        return jnp.sum(jnp.where(weights > 0, values * weights, 0.0), axis=axis)

    def quantile(self, site: str, q: Any, log_weights: Array | None = None) -> Array:
        """Filtering quantiles of a site at each step: ``[*shape(q), T, ...]``,
        by inversion of the weighted distribution.

        :param log_weights: as of :meth:`mean`.
        """
        levels = checked_levels("quantile", q)
        values, weights, axis = self._weighted(site, log_weights)
        weights = jnp.broadcast_to(weights, values.shape)
        order = jnp.argsort(values, axis=axis)
        values, weights = jnp.take_along_axis(values, order, axis), jnp.take_along_axis(weights, order, axis)
        cumulative = jnp.cumsum(weights, axis=axis)

        def one(level: Array) -> Array:
            below = jnp.sum(
                cumulative < level * jnp.take(cumulative, jnp.array([-1]), axis=axis), axis=axis, keepdims=True
            )
            index = jnp.minimum(below, values.shape[axis] - 1)
            return jnp.squeeze(jnp.take_along_axis(values, index, axis), axis)

        return jax.vmap(one)(jnp.asarray(levels).reshape(-1)).reshape(levels.shape + one(jnp.asarray(0.5)).shape)

    # ---- forecasts ----------------------------------------------------------------------------------------------

    def forecast(self, rng_key: Array, steps: int, num_samples: int = 1000, *, xs: Any = None) -> dict[str, Array]:
        """Draws of latents and observations beyond the end of the series.

        Arrays that the body closes over and indexes by time must reach beyond the data: JAX repeats their last entry.
        Sites after the scan are not forecast.

        :param steps: number of further steps.
        :param xs: the body's inputs for those steps (``[steps, ...]``), where the model needs them: covariates. Integer
            time counters are continued, and inputs that are only observed are not needed.
        :return: by site, ``[num_samples, steps, ...]``.
        :raises ValueError: if the body needs inputs that are not given.
        """
        check_positive("forecast", steps=steps, num_samples=num_samples)
        rng_key = one_key("forecast", rng_key)
        later = forecasting.later_inputs(self.filter, self.rng_key, self.program, self.history, steps, xs)
        timed = (self.num_steps + jnp.arange(steps), later)
        asked = (rng_key, self.rng_key, self.program, self.history, timed, num_samples)
        return self.filter._compiled_answer(forecasting.forecast, *asked)

    # ---- reports ------------------------------------------------------------------------------------------------

    def to_arviz(self, rng_key: Array | None = None, num_samples: int = 1000, method: str = "genealogy") -> Any:
        """Paths drawn from the posterior with the filter's statistics, as ArviZ data.

        Groups: ``posterior`` (one chain of ``num_samples`` paths) and ``sample_stats`` (``ess``,
        ``log_evidence_increment`` per step); the log evidence, summed over the batch, and the total are attributes.
        """
        draws = self.sample_posterior(reported_draws() if rng_key is None else rng_key, num_samples, method)
        stats = {"ess": self.ess, "log_evidence_increment": self.log_evidence_increments}
        attributes = {
            "log_evidence": float(np.sum(np.asarray(self.log_evidence))),
            "total_log_evidence": float(self.total_log_evidence),
            "num_particles": self.filter.num_particles,
        }
        return inference_data(draws, stats, attributes)

    def plot(
        self,
        site: str | None = None,
        data: Any = None,
        *,
        probability: float = 0.9,
        log_weights: Array | None = None,
        ax: Any = None,
    ) -> Any:
        """Filtered median and central band of a site over time, with the data as points.

        Returns the matplotlib axes.

        :param log_weights: as of :meth:`mean`; smoothed bands with :meth:`smoothing_log_weights`.
        """
        self._need_history("plot")
        check_number("plot", "(0, 1)", probability=probability)
        site = next(iter(self.history.steps["values"])) if site is None else site
        tail = (1.0 - probability) / 2.0
        bands = np.asarray(self.quantile(site, jnp.array([tail, 0.5, 1.0 - tail]), log_weights))
        return plot_filter(bands, data, site, probability, ax)

    # ---- checks -------------------------------------------------------------------------------------------------

    def check_finite(self) -> None:
        """:raises FloatingPointError: naming the first step whose weights all vanish or are not a number."""
        steps = np.concatenate([np.asarray(self.history.initial_increment)[None], np.asarray(self.history.increments)])
        broken = ~np.isfinite(steps).reshape(len(steps), -1).all(axis=1)
        if not broken.any():
            return
        first = int(broken.argmax()) - 1
        where = "before the first step" if first < 0 else f"at step {first}"
        sites = forecasting.not_finite(self.filter, self.rng_key, self.program, first)
        raise lost_particles("ParticleFilter", where, sites, steps[first + 1])

    def _weighted(self, site: str, log_weights: Array | None = None) -> tuple[Array, Array, int]:
        """Values of a site, weights that sum to one and broadcast with them, and the particle axis."""
        self._check_of_elements(site)
        if site not in self.particles:
            raise KeyError(f"No site '{site}' in this filter. Known: {', '.join(sorted(self.particles))}.")
        initial = site in self.history.initial["values"] and site not in self.history.steps["values"]
        part = self.history.initial if initial else self.history.steps
        if initial and log_weights is not None:
            raise ValueError(
                f"Site '{site}' stands before the scan, and log_weights are those of the steps' particles."
            )
        values = part["values"][site]
        log_weights = part["log_weights"] if log_weights is None else log_weights
        axis = 0 if initial else 1
        weights = jnp.exp(log_weights) / log_weights.shape[axis]
        return values, weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim)), axis
