"""What SMC2 returns: parameters and last states, the evidence of every prefix, and how it got there."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.engines.identity import Identity
from numpyro_smc.filtering.smoothing.genealogy import draw_final, take
from numpyro_smc.kernels.smc2_progress import LEVELS, Progress, Summary, last_states
from numpyro_smc.programs.arguments import check_positive, checked_levels
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.programs.resampling import systematic
from numpyro_smc.reports.arviz_export import inference_data
from numpyro_smc.reports.plots import new_axes


class SMC2Result:
    r"""The outcome of :meth:`SMC2.run`, after the first T observations. Arrays over time have one entry per step.

    :ivar log_evidence: :math:`\log \hat p(y_{0:T-1})`: the sum of ``log_evidence_increments``.
    :ivar log_evidence_increments: :math:`\log \hat p(y_t \mid y_{0:t-1})`, ``[T]``; the cumulative sums are the log
        evidences of all prefixes. Where the state particles were doubled, with the weights of that exchange.
    :ivar samples: parameters and deterministic sites of them alone, in their supports, ``[N, ...]`` by site.
    :ivar log_weights: their log weights, of mean one, ``[N]``.
    :ivar ess: effective sample size of the parameters after weighing, before any resampling, ``[T]``.
    :ivar acceptance: mean acceptance probability of the moves, ``[T]``; not a number where there were none.
    :ivar num_state_particles: number of particles of each filter after the step, ``[T]``.
    :ivar num_parameter_particles: N.
    :ivar length: number of steps of the program; T is fewer after an interruption or with ``until``.
    :ivar interrupted: whether Ctrl-C ended the run.
    """

    def __init__(self, progress: Progress, settings: str, of: Identity, length: int, interrupted: bool) -> None:
        self.progress, self.settings, self.length, self.interrupted = progress, settings, length, interrupted
        self.of = of
        log_weights = progress.state.log_weights
        self.samples: dict[str, Array] = progress.state.particles.parameters
        self.log_weights = log_weights - jax.nn.logsumexp(log_weights) + jnp.log(float(len(log_weights)))
        self.num_parameter_particles = len(log_weights)
        self.log_evidence = progress.log_evidence
        self.log_evidence_increments = progress.column("increment")
        self.ess = progress.column("ess")
        self.acceptance = progress.column("acceptance")
        self.num_state_particles = progress.column("num_state_particles").astype(int)

    @property
    def num_steps(self) -> int:
        """Number of observations taken in, T."""
        return self.progress.num_steps

    def __repr__(self) -> str:
        part = "" if self.num_steps == self.length else f" of {self.length}"
        head = f"SMC2Result: log evidence {self.log_evidence:.4f} of the first {self.num_steps}{part} steps"
        if self.interrupted:
            head += " (interrupted)"
        lines = [head]
        if self.num_steps:
            moved = np.isfinite(self.acceptance)
            lines.append(
                f"  {self.num_parameter_particles} parameter particles, moved at {moved.sum()} steps"
                + (f", acceptance: lowest {self.acceptance[moved].min():.2f}" if moved.any() else "")
            )
            lines.append(
                f"  state particles of each: {self.num_state_particles[0]} at first, {self.num_state_particles[-1]} in "
                f"the end; effective sample size of the parameters: lowest {self.ess.min():.0f} at step "
                f"{int(self.ess.argmin())}"
            )
            summary = self._summaries
            for name in sorted(self.samples):
                lines.append(f"  {name}: {_spread(summary.mean[name][-1], summary.deviation[name][-1])}")
        return "\n".join(lines)

    def get_samples(self, num_samples: int | None = None, rng_key: Array | None = None) -> dict[str, Array]:
        """Equally weighted draws from the posterior: parameters, and the sites of the last step that was taken in.

        :param num_samples: N by default. **rng_key** - ``random.key(0)`` by default.
        :return: by site, ``[num_samples, ...]``.
        """
        num_samples = self.num_parameter_particles if num_samples is None else num_samples
        check_positive("get_samples", num_samples=num_samples)
        rng_key = random.key(0) if rng_key is None else one_key("get_samples", rng_key)
        key_order, key_parameters, key_states = random.split(rng_key, 3)
        # Systematic ancestors ascend: shuffled, so that a part of the draws is as good as any other.
        chosen = random.permutation(key_order, systematic(key_parameters, self.log_weights, num_samples))
        draws = {name: value[chosen] for name, value in self.samples.items()}
        if not self.num_steps:
            return draws
        filtered = self.progress.state.particles.filtered
        states = last_states(filtered.values, filtered.particles.log_weights)
        return draws | _draw_states(key_states, chosen, states, filtered.particles.log_weights)

    def mean(self, site: str) -> np.ndarray:
        """Mean of a parameter, or of a site of the step, given the data up to each step: ``[T, ...]``."""
        return np.asarray(self._of(site, self._summaries.mean))

    def standard_deviation(self, site: str) -> np.ndarray:
        """Standard deviation of a parameter, or of a site of the step, given the data up to each step: ``[T, ...]``."""
        return np.asarray(self._of(site, self._summaries.deviation))

    def quantile(self, site: str, q: Any) -> np.ndarray:
        """Quantiles of a parameter given the data up to each step, ``[*shape(q), T, ...]``.

        :param q: of the levels that are recorded, 0.05, 0.25, 0.5, 0.75 and 0.95.
        :raises ValueError: for other levels.
        """
        levels = checked_levels("quantile", q)
        places = np.abs(levels.reshape(-1, 1) - np.asarray(LEVELS))
        if (places.min(axis=1) > 1e-6).any():
            raise ValueError(f"quantile: q={q!r}; recorded at every step are the levels {LEVELS}.")
        kept = np.moveaxis(np.asarray(self._of(site, self._summaries.quantiles)), 1, 0)
        return kept[places.argmin(axis=1)].reshape(levels.shape + kept.shape[1:])

    def table(self) -> list[dict[str, Any]]:
        """One row a step: log evidence of the prefix, effective sample size, acceptance and state particles."""
        totals = np.cumsum(self.log_evidence_increments)
        return [
            {
                "step": t,
                "log evidence": float(totals[t]),
                "increment": float(self.log_evidence_increments[t]),
                "effective sample size": float(self.ess[t]),
                "acceptance": float(self.acceptance[t]),
                "state particles": int(self.num_state_particles[t]),
            }
            for t in range(self.num_steps)
        ]

    def to_arviz(self, num_samples: int | None = None, rng_key: Array | None = None) -> Any:
        """Draws of :meth:`get_samples` as ArviZ data.

        Groups: ``posterior`` (one chain) and ``sample_stats`` (``ess``, ``acceptance_rate``, ``num_state_particles``
        and ``log_evidence_increment`` per step); the log evidence is an attribute.
        """
        stats = {
            "ess": self.ess,
            "acceptance_rate": self.acceptance,
            "num_state_particles": self.num_state_particles,
            "log_evidence_increment": self.log_evidence_increments,
        }
        attributes = {"log_evidence": self.log_evidence, "num_parameter_particles": self.num_parameter_particles}
        return inference_data(self.get_samples(num_samples, rng_key), stats, attributes)

    def plot(self, site: str | None = None, data: Any = None, *, ax: Any = None) -> Any:
        """The posterior of a site over time: of a parameter median, 50 % and 90 % bands; of a state mean and two
        standard deviations.

        :param site: the first parameter by default.
        :param data: ``[T, ...]``, drawn as points; or ``None``.
        :param ax: Matplotlib axes; new ones by default.
        :return: the axes.
        """
        site = min(self.samples) if site is None else site
        ax = new_axes(9.0) if ax is None else ax
        if site in self.samples:
            low, lower, middle, upper, high = self.quantile(site, LEVELS)
            bands, label = [(low, high), (lower, upper)], f"{site}: median, 50 % and 90 % bands"
        else:
            middle, spread = self.mean(site), 2.0 * self.standard_deviation(site)
            bands, label = [(middle - spread, middle + spread)], f"{site}: mean and two standard deviations"
        times = np.arange(self.num_steps)
        for i, column in enumerate(_columns(middle)[:8]):
            (line,) = ax.plot(times, column, lw=1.2, label=label if i == 0 else None)
            for low, high in bands:
                shade = {"color": line.get_color(), "alpha": 0.2, "lw": 0}
                ax.fill_between(times, _columns(low)[i], _columns(high)[i], **shade)
        if data is not None:
            ax.plot(times, np.asarray(data).reshape(len(data), -1)[: self.num_steps, :8], ".", ms=3, color="0.3")
        ax.set_xlabel("step")
        ax.legend(frameon=False)
        return ax

    def save(self, path: str | os.PathLike) -> None:
        """Write the run to a file (``.npz``), from which :meth:`SMC2.resume` and :meth:`SMC2.load` go on."""
        self.progress.save(path, self.settings, self.of)

    @cached_property
    def _summaries(self) -> Summary:
        if not self.num_steps:
            raise ValueError("SMC2Result: no observation has been taken in, so there is no posterior yet.")
        return self.progress.summaries()

    def _of(self, site: str, found: dict[str, Array]) -> Array:
        if site not in found:
            raise KeyError(f"No site '{site}' here. Known: {', '.join(sorted(found))}.")
        return found[site]


@jax.jit
def _draw_states(rng_key: Array, chosen: Array, states: dict[str, Array], log_weights: Array) -> dict[str, Array]:
    """The sites of one state particle of each chosen parameter, drawn by its filter's weights."""

    def draw(rng_key: Array, index: Array) -> dict[str, Array]:
        last = draw_final(rng_key, log_weights[index], 1)
        return {name: take(value[index], last, log_weights.ndim - 2)[0] for name, value in states.items()}

    return jax.vmap(draw)(random.split(rng_key, len(chosen)), chosen)


def _columns(values: Any) -> np.ndarray:
    """``[T, ...]`` as curves, ``[curves, T]``."""
    values = np.asarray(values)
    return values.reshape(len(values), -1).T


def _spread(mean: Any, deviation: Any) -> str:
    """Means and standard deviations, of the first four elements."""
    pairs = list(zip(np.ravel(mean), np.ravel(deviation), strict=True))
    shown = ", ".join(f"{m:.4g} ± {s:.2g}" for m, s in pairs[:4])
    return shown + (f", ... ({len(pairs)} elements)" if len(pairs) > 4 else "")
