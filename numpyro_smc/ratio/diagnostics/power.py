"""How well the classifier tells pairs of the simulator from shuffled ones, and whether its odds are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array, lax, random

from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.ratio.diagnostics.simulated_posteriors import check_whole_prior
from numpyro_smc.reports.plots import new_axes
from numpyro_smc.reports.summaries import mean_and_error

if TYPE_CHECKING:
    from numpyro_smc.ratio.estimator import RatioEstimator

_CHUNK = 10_000
_PRIOR = 0x7072696F


@dataclass(frozen=True, repr=False)
class ClassifierReport:
    r"""Log ratios of fresh pairs :math:`(\theta, x)` of the simulator, and of shuffled ones.

    :ivar joint: :math:`\log r(\theta_i, x_i)`, ``[P]``. **marginal** - :math:`\log r(\theta_j, x_i)`, ``[P]``.
    :ivar weights: of the marginal pairs, ``[P]``; all one unless another estimator reweighs them.
    :ivar is_calibrated: whether the loss learns the ratio itself.
    """

    joint: np.ndarray
    marginal: np.ndarray
    weights: np.ndarray
    is_calibrated: bool = True

    def __repr__(self) -> str:
        lines = [f"Classifier on {len(self.joint)} pairs: area under the ROC curve {self.area:.4f}"]
        mean, error = self.mutual_information
        lines.append(f"  mean log ratio of joint pairs {mean:.3f} ± {error:.2g}")
        if self.is_calibrated:
            mean, error = self.mean_ratio
            lines.append(f"  mean ratio of marginal pairs {mean:.3f} ± {error:.2g} (1 if the ratio is right)")
        return "\n".join(lines)

    @property
    def mean_ratio(self) -> tuple[float, float]:
        r""":math:`\mathbb E_{p(\theta) p(x)}[r(\theta, x)]`, one if the ratio is right, and its standard error.

        :raises ValueError: for a loss that learns the ratio up to a factor only.
        """
        if not self.is_calibrated:
            raise ValueError(
                "mean_ratio: the loss learns the ratio up to a factor c(x) only, so its mean means nothing."
            )
        return mean_and_error(self.weights * np.exp(self.marginal))

    @property
    def mutual_information(self) -> tuple[float, float]:
        r""":math:`\mathbb E_{p(\theta, x)}[\log r(\theta, x)]` in nats, and its standard error.

        Of the exact ratio it is the mutual information of parameters and output.
        """
        return mean_and_error(self.joint)

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rates, from (0, 0) to (1, 1)."""
        scores = np.concatenate([self.joint, self.marginal])
        order = np.argsort(-scores, kind="stable")
        is_joint = np.r_[np.ones(len(self.joint)), np.zeros(len(self.marginal))][order]
        weights = np.r_[np.ones(len(self.joint)), self.weights][order]
        ends = np.r_[np.flatnonzero(np.diff(scores[order])), len(order) - 1]
        true = np.cumsum(weights * is_joint)[ends] / len(self.joint)
        false = np.cumsum(weights * (1 - is_joint))[ends] / self.weights.sum()
        return np.r_[0.0, false], np.r_[0.0, true]

    @property
    def area(self) -> float:
        """Area under the curve: 0.5 where the pairs cannot be told apart, 1 where they always can."""
        return float(np.trapezoid(*self.curve()[::-1]))

    def table(self) -> list[dict[str, Any]]:
        """One line a quantity."""
        found = {"mean log ratio of joint pairs": self.mutual_information}
        if self.is_calibrated:
            found["mean ratio of marginal pairs"] = self.mean_ratio
        rows = [{"quantity": name, "value": value, "s.e.": error} for name, (value, error) in found.items()]
        return [{"quantity": "area under the ROC curve", "value": self.area, "s.e.": float("nan")}, *rows]

    def plot(self, ax: Any = None) -> Any:
        """The ROC curve.

        :return: the axes.
        """
        ax = new_axes(4.5, 4.5) if ax is None else ax
        ax.plot(*self.curve(), label=f"area {self.area:.3f}")
        ax.plot([0, 1], [0, 1], color="0.4", lw=0.8)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="false positive rate", ylabel="true positive rate")
        ax.legend(frameon=False)
        return ax


def roc(
    estimator: RatioEstimator,
    rng_key: Array,
    num_pairs: int = 10_000,
    params: Sequence[str] | None = None,
    adversary: RatioEstimator | None = None,
) -> ClassifierReport:
    r"""Log ratios of fresh pairs: mutual information, mean ratio, ROC curve.

    With another estimator as ``adversary``, its ratio weighs the marginal pairs: where that is exact, they are then
    distributed as the joint ones, and no classifier does better than chance, an area of 0.5 [1].

    :param num_pairs: P. **params** - whose marginal ratio is taken.

    **References**

    1. *Likelihood-free MCMC with Amortized Approximate Ratio Estimators*, J. Hermans, V. Begy, G. Louppe (2020)
    """
    check_positive("roc", num_pairs=num_pairs)
    check_whole_prior(estimator)
    theta, x, context = estimator.simulate(rng_key, num_pairs)

    def ratios(of: RatioEstimator, theta: Any) -> np.ndarray:
        def one(row: Any) -> Array:
            return of.log_ratio(row[0], row[1], params, row[2])

        mapped = jax.jit(lambda rows: lax.map(one, rows, batch_size=min(_CHUNK, num_pairs)))
        return np.asarray(mapped((theta, x, context)), np.float64)

    if not estimator.has_failures:
        shuffled = np.roll(np.asarray(theta), 1, axis=0)
    else:  # parameters of finite outputs do not follow the prior
        shuffled = np.asarray(estimator.prior(random.fold_in(rng_key, _PRIOR), num_pairs))
    weights = np.ones(num_pairs) if adversary is None else np.exp(ratios(adversary, shuffled))
    return ClassifierReport(ratios(estimator, theta), ratios(estimator, shuffled), weights, estimator.loss.calibrated)


def mean_ratio(
    estimator: RatioEstimator,
    rng_key: Array,
    x: Any,
    num_draws: int = 10_000,
    params: Sequence[str] | None = None,
    context: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    r""":math:`\mathbb E_{p(\theta)}[r(\theta, x)]` at each of some outputs, by draws from the prior: one if the ratio
    is right.

    :param x: ``[B, *event]``. **num_draws** - of the prior, the same for all outputs.
    :param context: ``[B, C]`` or values of the context's sites.
    :return: means and standard errors, ``[B]``. Where few draws carry the ratio both are unreliable, and
        ``estimator.sample(...).calibration`` is better.
    :raises ValueError: for a loss that learns the ratio up to a factor only (NRE-B).
    """
    if not estimator.loss.calibrated:
        raise ValueError(
            "mean_ratio: the loss learns the ratio up to a factor c(x) only, so its mean means nothing. Train with "
            "loss='A', 'C' or 'balanced'."
        )
    theta = estimator.prior(rng_key, num_draws)
    given = None if context is None else estimator._context(context)
    ratios = np.exp(
        np.asarray(
            jax.jit(lambda rows: lax.map(lambda row: estimator.log_ratio(theta, row[0], params, row[1]), rows))(
                (x, given)
            ),
            np.float64,
        )
    )
    return ratios.mean(-1), ratios.std(-1, ddof=1) / np.sqrt(num_draws)
