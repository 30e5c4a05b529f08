"""An estimate of log evidence: per data point, with its error, what it bounds, and a verdict in words."""

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.programs.arguments import check_number
from numpyro_smc.programs.pareto import LARGE_PARETO_K
from numpyro_smc.programs.sites import BatchPlates
from numpyro_smc.programs.weights import leave_one_out, normalise
from numpyro_smc.reports.plots import new_axes

LARGE_ERROR, SMALL_ESS, LOW_ACCEPTANCE = 0.5, 3.0, 0.15
FEW = 0.02  # share of the elements whose trouble does not condemn the whole
# Annealed draws that all pass by a narrow mode agree with each other, and nothing in them tells of it.
_UNSEEN = ("No sign of trouble", " unless the draws have missed a mode, which they cannot tell")
_PROVISOS = {"smc": _UNSEEN, "ais": _UNSEEN}


@jax.jit
def log_mean_and_error(log_weights: Array) -> tuple[Array, Array, Array]:
    r"""Log mean weight, its jackknife standard error and the effective sample size, over the leading axis.

    The jackknife takes the spread of the log means that leave one weight out,
    :math:`\tfrac{C-1}{C}\sum_c (\ell_{-c} - \bar\ell)^2`: it is large where one weight is most of the sum.

    :param log_weights: of independent draws, ``[C, ...]``.
    :return: each ``[...]``; the error of a single weight is not a number.
    """
    num = log_weights.shape[0]
    _, value, ess = normalise(log_weights)
    if num == 1:
        return value, jnp.full_like(value, jnp.nan), ess
    others = leave_one_out(log_weights).others
    error = jnp.sqrt((num - 1) / num * jnp.sum((others - jnp.mean(others, axis=0)) ** 2, axis=0))
    return value, jnp.where(jnp.isfinite(value) & jnp.isfinite(error), error, jnp.inf), ess


@dataclass(frozen=True, repr=False)
class Evidence:
    r"""Log evidence, per element of the plates that enclose model and guide (``[*plates]``; scalar without any).

    - **method** - how it was estimated; **num_samples** - independent weights per element.
    - **per_datapoint** - estimates; **per_datapoint_error** - their Monte Carlo standard errors; **ess** - effective
      sample sizes.
    - **mean_log_weight** - the bound without averaging: far below ``per_datapoint`` where weights are uneven.
    - **value**, **standard_error** - of the log evidence of the full data, the sum over elements; **mean** - of one.
    - **bound** - ``"lower"``: the estimate of the evidence itself is unbiased, so its logarithm is below the truth on
      average, by about **shortfall**.
    - **pareto_k** - tail shape of the weights, of importance sampling; **acceptance**, **step_sizes**, **betas** - by
      temperature and element, of annealing; **certificate** - gap of the same chains on simulated data.
    - **narrow** - sites where the guide's support is known to be smaller than the model's.
    - **verdict** - whether to trust it, in words; **concerns** - what speaks against it.
    """

    method: str
    num_samples: int
    per_datapoint: Array
    per_datapoint_error: Array
    ess: Array
    plates: BatchPlates
    mean_log_weight: Array | None = None
    pareto_k: Array | None = None
    acceptance: Array | None = None
    step_sizes: Array | None = None
    betas: Array | None = None
    certificate: Any = field(default=None)
    bound: str = "lower"
    narrow: frozenset[str] = frozenset()

    @property
    def value(self) -> float:
        return self.plates.scale * float(np.sum(np.asarray(self.per_datapoint, np.float64)))

    @property
    def standard_error(self) -> float:
        """Monte Carlo error of ``value``; of a subsampled plate also that of the subsample."""
        values, scale = np.asarray(self.per_datapoint, np.float64).ravel(), self.plates.scale
        variance = float(np.sum(np.asarray(self.per_datapoint_error, np.float64) ** 2))
        if scale != 1.0 and values.size > 1:
            variance += (1.0 - 1.0 / scale) * values.size * values.var(ddof=1)
        return scale * math.sqrt(variance)

    @property
    def mean(self) -> float:
        return float(np.mean(np.asarray(self.per_datapoint, np.float64)))

    @property
    def shortfall(self) -> float:
        """Half the squared standard errors, summed: how far the value is below the truth on average, to first order."""
        errors = np.asarray(self.per_datapoint_error, np.float64)
        return self.plates.scale * float(np.sum(errors**2)) / 2.0

    def interval(self, probability: float = 0.95) -> tuple[float, float]:
        """Interval for the log evidence of the full data, from Student's t; the shortfall widens it upwards."""
        check_number("interval", "(0, 1)", probability=probability)
        width = _student_quantile(probability, self.num_samples - 1) * self.standard_error
        return self.value - width, self.value + width + self.shortfall

    @property
    def concerns(self) -> list[str]:
        total = np.size(self.per_datapoint)
        found = self._concerns().items()
        return [f"{n} of {total} elements {text}" if total > 1 else f"the weights {text}" for text, n in found]

    @property
    def verdict(self) -> str:
        if self.num_samples < 2:
            return "No error can be stated from a single weight: use more."
        if self.narrow:
            sites = ", ".join(f"'{name}'" for name in sorted(self.narrow))
            return (
                f"Not to be trusted: the guide's support of site {sites} is smaller than the model's, so that what the "
                f"posterior has outside is missing from the value. Use a guide with the model's support."
            )
        concerns = "; ".join(self.concerns)
        remedies = {"importance": "a better guide, or annealing", "smc": "more particles or moves"}
        remedy = remedies.get(self.method, "more temperatures or chains, or a start from a fitted guide")
        if max(self._concerns().values(), default=0) > FEW * np.size(self.per_datapoint):
            text = f"Not to be trusted: {concerns}. The value is likely too low. Use {remedy}."
        else:
            low, high = self.interval()
            head, proviso = _PROVISOS.get(self.method, ("Trustworthy", ""))
            text = f"{head}: the log evidence is in [{low:.6g}, {high:.6g}] (95%){proviso}, the value a lower bound"
            text += f" that is {self.shortfall:.2g} too low on average."
            text += f" But {concerns}: use {remedy} if these matter." if concerns else ""
        return text if self.certificate is None else f"{text} {self.certificate.verdict}"

    def table(self) -> list[dict[str, Any]]:
        """Rows of the log evidence of the full data and per element."""
        size = np.size(self.per_datapoint) * self.plates.scale
        rows = [{"quantity": "log evidence", "value": self.value, "s.e.": self.standard_error, "bound": self.bound}]
        if np.size(self.per_datapoint) > 1:
            error = self.standard_error / size
            rows.append({"quantity": "per element", "value": self.mean, "s.e.": error, "bound": self.bound})
        if self.mean_log_weight is not None:
            loose = self.plates.scale * float(np.sum(np.asarray(self.mean_log_weight, np.float64)))
            rows.append({"quantity": "mean log weight", "value": loose, "s.e.": math.nan, "bound": "lower"})
        return rows

    def __repr__(self) -> str:
        sizes = [f"{name} {size}" for name, size in zip(self.plates.names, self.plates.shape, strict=True)]
        return (
            f"Evidence by {self.method} ({self.num_samples} weights, {', '.join(sizes) or 'one whole model'}):\n"
            f"  log evidence {self.value:.6g} ± {self.standard_error:.2g}, smallest ESS {np.min(self.ess):.3g}\n"
            f"  {self.verdict}"
        )

    def plot(self, ax: Any = None) -> Any:
        """Each element's estimate with two standard errors, in increasing order.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = ax or new_axes()
        values, errors = np.ravel(self.per_datapoint), np.ravel(self.per_datapoint_error)
        order = np.argsort(values)
        ax.errorbar(np.arange(values.size), values[order], 2.0 * errors[order], fmt=".", ms=3, lw=0.8)
        ax.set_xlabel("element, sorted")
        ax.set_ylabel("log evidence (± 2 s.e.)")
        return ax

    def plot_acceptance(self, ax: Any = None) -> Any:
        """Acceptance by temperature: mean over elements, and their range.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        :raises ValueError: if the method has no annealed chains.
        """
        if self.acceptance is None:
            raise ValueError(f"Evidence.plot_acceptance: {self.method} has no annealed chains.")
        ax = ax or new_axes()
        acceptance = np.asarray(self.acceptance).reshape(len(self.acceptance), -1)
        steps = np.arange(1, len(acceptance) + 1)
        ax.plot(steps, acceptance.mean(1), label="mean over elements")
        ax.fill_between(steps, acceptance.min(1), acceptance.max(1), alpha=0.25, lw=0, label="range")
        ax.set(xlabel="temperature", ylabel="acceptance", ylim=(0.0, 1.0))
        ax.legend(frameon=False)
        return ax

    def _concerns(self) -> dict[str, int]:
        """How many elements have which trouble."""
        few = min(SMALL_ESS, self.num_samples / 2)
        found = {
            "have no finite estimate": ~np.isfinite(self.per_datapoint),
            f"have a standard error above {LARGE_ERROR}": np.asarray(self.per_datapoint_error) > LARGE_ERROR,
            "hang on one or two draws": np.asarray(self.ess) < few,
        }
        if self.pareto_k is not None:
            found[f"have a Pareto k above {LARGE_PARETO_K}"] = np.asarray(self.pareto_k) > LARGE_PARETO_K
        if self.acceptance is not None and len(self.acceptance):
            rarely = np.min(smoothed(self.acceptance), axis=0) < LOW_ACCEPTANCE
            found[f"have chains that accept under {LOW_ACCEPTANCE:.0%} at some temperature"] = rarely
        return {text: int(np.sum(where)) for text, where in found.items() if np.any(where)}


def smoothed(acceptance: Array) -> np.ndarray:
    """Acceptance averaged over up to nine neighbouring temperatures."""
    values = np.asarray(acceptance, np.float64)
    width = min(9, len(values))
    sums = np.cumsum(np.concatenate([np.zeros_like(values[:1]), values]), axis=0)
    return (sums[width:] - sums[:-width]) / width


def _student_quantile(probability: float, degrees: int) -> float:
    """Two-sided quantile of Student's t, by the expansion around the normal one (0.5% off at 5 degrees of freedom)."""
    z = NormalDist().inv_cdf(0.5 + probability / 2.0)
    if degrees < 1:
        return math.inf
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
