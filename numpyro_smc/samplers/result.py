"""What a tempered sampler returns: weighted particles, the evidence, and how it got there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.programs.arguments import check_number, check_positive, checked_levels
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.programs.resampling import systematic
from numpyro_smc.reports.arviz_export import inference_data
from numpyro_smc.reports.plots import new_axes
from numpyro_smc.samplers.genealogy import log_scale_error, mean_error
from numpyro_smc.samplers.progress import Progress
from numpyro_smc.samplers.thermodynamics import LogEvidence, Thermodynamics

_UNCERTAIN = 0.3


@dataclass(repr=False)
class SMCResult:
    r"""The outcome of :meth:`SMCSampler.run`; arrays over stages have one entry per temperature after the start.

    :ivar samples: latent and deterministic sites in their supports, ``[K, ...]``.
    :ivar log_weights: their log weights, of mean one, ``[K]``.
    :ivar log_evidence: :math:`\log \hat p(x)`, the stepping-stone estimate [1]: the sum of
        ``log_evidence_increments``. Not a number if the run was interrupted.
    :ivar log_evidence_se: its standard error, from the run's genealogy. Above about 0.3 few families are left, and it
        is itself uncertain; infinite if only one is. Not a number if the run was interrupted.
    :ivar betas: the temperatures, ``[stages]``; the last is 1 unless the run was interrupted. Of data tempering, the
        fractions of the rows.
    :ivar ess: effective sample size on arrival at each temperature, before resampling, ``[stages]``.
    :ivar acceptance: mean acceptance probability of the moves, ``[stages]``.
    :ivar step_sizes: step size after the moves, in units of the cloud's spread, ``[stages]``.
    :ivar resampled: whether the stage resampled, ``[stages]``.
    :ivar log_evidence_increments: ``[stages]``. Of temperatures the stepping stones
        :math:`\log \hat Z_{\beta_k} / \hat Z_{\beta_{k-1}}`; of data tempering the cumulative sums are
        :math:`\log \hat p(y_{1:n})` at ``row_counts``.
    :ivar log_likelihoods: mean log likelihood after the moves, ``[stages]``; of the rows so far.
    :ivar num_particles: N. **interrupted** - whether Ctrl-C ended the run; the particles then follow the tempered
        posterior at ``betas[-1]``.
    :ivar row_counts: number of rows of the data at each stage of data tempering, ``[stages]``; ``None`` otherwise.
    :ivar families: from which initial group each particle descends, ``[K]``, for :meth:`standard_error`.
    :ivar thermodynamics: moments of the log likelihood by temperature, from 0, for :meth:`path_sampling`; ``None``
        where that does not apply.

    **References**

    1. *Improving marginal likelihood estimation for Bayesian phylogenetic model selection*, W. Xie, P. Lewis, Y. Fan,
       L. Kuo, M.-H. Chen (2011)
    """

    samples: dict[str, Array]
    log_weights: Array
    log_evidence: float
    log_evidence_se: float
    betas: np.ndarray
    ess: np.ndarray
    acceptance: np.ndarray
    step_sizes: np.ndarray
    resampled: np.ndarray
    log_evidence_increments: np.ndarray
    log_likelihoods: np.ndarray
    num_particles: int
    families: np.ndarray
    interrupted: bool = False
    row_counts: np.ndarray | None = None
    thermodynamics: Thermodynamics | None = None

    @classmethod
    def of(
        cls,
        progress: Progress,
        samples: dict[str, Array],
        log_weights: Array,
        families: np.ndarray,
        num_particles: int,
        *,
        interrupted: bool,
        num_rows: int | None,
        integrable: bool,
    ) -> SMCResult:
        """The result of a run, from its reports and its last cloud."""
        column, done = progress.column, progress.temperature >= 1.0
        variance = float(column("relative_variance")[-1]) if progress.num_stages else 0.0
        return cls(
            samples=samples,
            log_weights=log_weights - jax.nn.logsumexp(log_weights) + jnp.log(float(len(log_weights))),
            log_evidence=progress.log_evidence if done else math.nan,
            log_evidence_se=log_scale_error(variance) if done else math.nan,
            betas=column("temperature"),
            ess=column("ess"),
            acceptance=column("acceptance"),
            step_sizes=column("step_size"),
            resampled=column("resampled") > 0,
            log_evidence_increments=column("increment"),
            log_likelihoods=column("log_likelihood"),
            num_particles=num_particles,
            interrupted=interrupted,
            row_counts=None if num_rows is None else np.rint(column("temperature") * num_rows).astype(int),
            families=families,
            thermodynamics=Thermodynamics.of(progress) if integrable and progress.num_stages else None,
        )

    def __repr__(self) -> str:
        head = f"SMCResult: log evidence {self.log_evidence:.4f} ± {self.log_evidence_se:.2g}"
        if self.log_evidence_se > _UNCERTAIN:
            head += " (few families of particles are left: use more particles or moves)"
        if self.interrupted:
            head = f"SMCResult: interrupted at temperature {self.betas[-1] if len(self.betas) else 0.0:.3g}"
        stages = "temperatures" if self.row_counts is None else "numbers of rows"
        lines = [head, f"  {len(self.betas)} {stages}, {self.num_particles} particles"]
        if len(self.betas):
            lines.append(
                f"  effective sample size: lowest {self.ess.min():.0f} at stage {int(self.ess.argmin())}; acceptance: "
                f"lowest {self.acceptance.min():.2f} at stage {int(self.acceptance.argmin())}"
            )
        return "\n".join([*lines, f"  sites: {sorted(self.samples)}"])

    def get_samples(self, num_samples: int | None = None, rng_key: Array | None = None) -> dict[str, Array]:
        """Equally weighted draws from the posterior, ``[num_samples, ...]`` by site.

        The particles themselves where they weigh the same and all are wanted; otherwise a systematic resample of them.

        :param num_samples: N by default. **rng_key** - of the resampling; ``random.key(0)`` by default.
        """
        num_samples = self.num_particles if num_samples is None else num_samples
        check_positive("get_samples", num_samples=num_samples)
        rng_key = random.key(0) if rng_key is None else one_key("get_samples", rng_key)
        if num_samples == len(self.log_weights) and bool(jnp.all(self.log_weights == self.log_weights[0])):
            return dict(self.samples)
        key_order, key_ancestors = random.split(rng_key)
        ancestors = systematic(key_ancestors, self.log_weights, num_samples)
        # Systematic ancestors ascend: shuffled, so that a part of the draws is as good as any other.
        ancestors = random.permutation(key_order, ancestors)
        return {name: value[ancestors] for name, value in self.samples.items()}

    def get_weighted_samples(self) -> tuple[dict[str, Array], Array]:
        """All particles by site, ``[K, ...]``, and their log weights of mean one, ``[K]``."""
        return dict(self.samples), self.log_weights

    def mean(self, site: str) -> Array:
        """Posterior mean of a site."""
        return jnp.tensordot(self._weights, self._site(site), axes=1)

    def standard_error(self, values: Any) -> np.ndarray:
        r"""Monte Carlo standard error of the weighted mean of any function of the particles, from the genealogy [1].

        The function decides: a mean that the moves mix well has a small error however few families are left; the share
        of a mode that no move leaves does not, and its error falls as :math:`N^{-1/2}` only. With a handful of families
        left (``log_evidence_se`` above 0.3) the error is itself uncertain.

        :param values: of each particle, ``[K, ...]``; such as ``result.samples["x"] > 0`` for a share.
        :return: ``[...]``.

        **References**

        1. *A general theory of particle filters in hidden Markov models and some applications*, H. Chan, T. Lai (2013)
        """
        values = np.asarray(values, np.float64)
        if len(values) != len(self.log_weights):
            raise ValueError(
                f"standard_error: values has {len(values)} rows; expected one for each of the {len(self.log_weights)} "
                f"particles in samples."
            )
        return mean_error(values, np.asarray(self._weights, np.float64), self.families)

    def quantile(self, site: str, q: Any) -> np.ndarray:
        """Posterior quantiles of a site, ``[*shape(q), ...]``."""
        values, weights = np.asarray(self._site(site)), np.asarray(self._weights, np.float64)
        flat = values.reshape(len(values), -1)
        order = np.argsort(flat, axis=0)
        cumulative = np.cumsum(weights[order], axis=0)
        levels = checked_levels("quantile", q)
        rows = (cumulative[None] < levels.reshape(-1, 1, 1) * cumulative[-1]).sum(axis=1)
        sorted_values = np.take_along_axis(flat, order, axis=0)
        chosen = np.take_along_axis(sorted_values, np.minimum(rows, len(flat) - 1), axis=0)
        return chosen.reshape(levels.shape + values.shape[1:])

    def path_sampling(self) -> LogEvidence:
        r"""The log evidence by thermodynamic integration, from the same run [1, 2].

        With :math:`m_k` and :math:`v_k` the mean and variance of :math:`\log L` under :math:`\pi_0 L^{\beta_k}`,

        .. math:: \log p(x) = \int_0^1 m(\beta)\,d\beta \approx \sum_k
           \tfrac{\Delta_k}2 (m_{k-1} + m_k) - \tfrac{\Delta_k^2}{12} (v_k - v_{k-1}),
           \qquad \Delta_k = \beta_k - \beta_{k-1} .

        A check on ``log_evidence`` that weighs the run's stages differently. Not unbiased: the temperatures of a
        ``target_ess`` are few for a quadrature, above all near 0, where a vague start has a heavy tail of tiny
        likelihoods; look at the **correction**, and use a ``target_ess`` of 0.9 or more. From a guide the log
        likelihood is the log importance weight.

        :raises ValueError: after an interruption, for data tempering and persistent sampling, and where some draw of
            the start has no likelihood, so that :math:`m_0 = -\infty`.

        **References**

        1. *Simulating normalizing constants: from importance sampling to bridge sampling to path sampling*, A. Gelman,
           X.-L. Meng (1998)
        2. *Improving power posterior estimation of statistical evidence*, N. Friel, M. Hurn, J. Wyse (2014)
        """
        if self.interrupted:
            raise ValueError("path_sampling: the run was interrupted before temperature 1; resume it.")
        if self.thermodynamics is None:
            raise ValueError(
                "path_sampling: integrates over temperatures, of which data tempering has none and persistent sampling "
                "keeps mixtures. Use log_evidence, or SMCSampler with tempering='adaptive'."
            )
        return self.thermodynamics.integral()

    def stepping_stone(self) -> LogEvidence:
        """The run's own estimate, ``log_evidence``, in the form of :meth:`path_sampling`."""
        return LogEvidence(self.log_evidence, self.log_evidence_se)

    def print_summary(self, prob: float = 0.9) -> None:
        """Print mean, standard deviation, median and central interval of every site, and the evidence.

        :param prob: probability of the interval.
        """
        check_number("print_summary", "(0, 1)", prob=prob)
        tail = (1.0 - prob) / 2.0
        header = ["", "mean", "std", "median", f"{100 * tail:.1f}%", f"{100 * (1 - tail):.1f}%"]
        rows = []
        for name, values in sorted(self.samples.items()):
            mean = np.asarray(self.mean(name), np.float64)
            spread = np.asarray(jnp.tensordot(self._weights, (values - mean) ** 2, axes=1)) ** 0.5
            low, median, high = self.quantile(name, [tail, 0.5, 1.0 - tail])
            for index in np.ndindex(mean.shape):
                label = name + (f"[{','.join(map(str, index))}]" if index else "")
                rows.append([label, *(f"{a[index]:.2f}" for a in (mean, np.asarray(spread), median, low, high))])
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        print()
        for row in [header, *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        print(f"\n{self!r}")

    def to_arviz(self, num_samples: int | None = None, rng_key: Array | None = None) -> Any:
        """Draws of :meth:`get_samples` as ArviZ data.

        Groups: ``posterior`` (one chain) and ``sample_stats`` (``beta``, ``ess``, ``acceptance_rate``, ``step_size``,
        ``log_evidence_increment`` and, of data tempering, ``row_count`` per stage); log evidence and standard error are
        attributes.
        """
        stats = {
            "beta": self.betas,
            "ess": self.ess,
            "acceptance_rate": self.acceptance,
            "step_size": self.step_sizes,
            "log_evidence_increment": self.log_evidence_increments,
        }
        if self.row_counts is not None:
            stats["row_count"] = self.row_counts
        attributes = {
            "log_evidence": self.log_evidence,
            "log_evidence_se": self.log_evidence_se,
            "num_particles": self.num_particles,
        }
        return inference_data(self.get_samples(num_samples, rng_key), stats, attributes)

    def plot(self, ax: Any = None) -> Any:
        """Temperature, effective sample size (as a fraction of N) and acceptance over the stages.

        :param ax: Matplotlib axes; new ones by default.
        :return: the axes.
        """
        ax = new_axes() if ax is None else ax
        stages = np.arange(1, len(self.betas) + 1)
        curves = {"temperature": self.betas, "ESS / N": self.ess / self.num_particles, "acceptance": self.acceptance}
        for name, values in curves.items():
            ax.plot(stages, values, marker=".", label=name)
        ax.set(xlabel="stage", ylim=(0, None))
        ax.legend(frameon=False)
        return ax

    @property
    def _weights(self) -> Array:
        weights = jnp.exp(self.log_weights)
        return weights / jnp.sum(weights)

    def _site(self, site: str) -> Array:
        if site not in self.samples:
            raise KeyError(f"No site '{site}' in this result. Known: {', '.join(sorted(self.samples))}.")
        return self.samples[site]
