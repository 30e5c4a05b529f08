"""Is an evidence estimate unbiased?"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.typing import ArrayLike

from numpyro_smc.programs.arguments import check_callable, check_if_given, check_number, check_positive
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.programs.pareto import LARGE_PARETO_K, pareto_k
from numpyro_smc.reports.plots import new_axes
from numpyro_smc.reports.tables import write_csv
from numpyro_smc.verify.replicates import replicates

#: From a random key to one log evidence estimate; or what has it as its method ``log_evidence``.
Estimator = Callable[..., ArrayLike] | Any

_FEWEST = 25
_SHOWN = 8


@dataclass(frozen=True, repr=False)
class EvidenceCheck:
    """What :func:`check_unbiased_evidence` found; arrays have the shape ``[*batch]`` of one estimate.

    :ivar log_estimates: ``[num_replicates, *batch]``.
    :ivar log_reference: the log evidence that the estimates should average to.
    :ivar ratio: mean of the estimates over the reference. **standard_error** - of it, the reference's own included.
    :ivar relative_variance: of one estimate, over the square of the mean.
    :ivar pareto_k: shape of the upper tail of the estimates, of the reference's too if these are heavier.
    :ivar num_standard_errors: beyond which a deviation is a failure.
    """

    log_estimates: np.ndarray
    log_reference: np.ndarray
    ratio: np.ndarray
    standard_error: np.ndarray
    relative_variance: np.ndarray
    pareto_k: np.ndarray
    num_standard_errors: float

    @property
    def z(self) -> np.ndarray:
        """Deviation of the ratio from one, in standard errors."""
        deviation = self.ratio - 1.0
        return np.divide(deviation, self.standard_error, out=np.zeros_like(deviation), where=deviation != 0)

    @property
    def passed(self) -> bool | None:
        """``None`` if nothing can be said, because some estimates have too heavy a tail and none failed."""
        verdicts = [self._verdict(i) for i in range(self.ratio.size)]
        if "biased" in verdicts:
            return False
        return None if "inconclusive" in verdicts else True

    @property
    def verdict(self) -> str:
        """In words."""
        if self.passed is None:
            return (
                f"Inconclusive: the tail is too heavy for a mean (Pareto k {self.pareto_k.max():.2f}, above "
                f"{LARGE_PARETO_K}). Use more particles, or an easier data set."
            )
        seen = self.num_standard_errors * float(np.max(self.standard_error))
        if self.passed:
            return f"No bias found; one above {seen:.2g} of the evidence would have been seen."
        return f"Biased: off by {self.z.flat[np.argmax(np.abs(self.z))]:+.1f} standard errors."

    def table(self) -> list[dict[str, Any]]:
        """A line for each element of the batch."""
        indices = list(np.ndindex(*self.ratio.shape))
        columns = {
            "log evidence": self.log_reference,
            "ratio": self.ratio,
            "s.e.": self.standard_error,
            "z": self.z,
            "relative variance": self.relative_variance,
            "Pareto k": self.pareto_k,
        }
        return [
            {"element": ",".join(map(str, index)) or "all"}
            | {name: float(values[index]) for name, values in columns.items()}
            | {"verdict": self._verdict(i)}
            for i, index in enumerate(indices)
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`table`."""
        write_csv(path, self.table())

    def __repr__(self) -> str:
        lines = [f"EvidenceCheck of {len(self.log_estimates)} estimates: {self.verdict}"]
        order = np.sort(np.argsort(-np.abs(self.z).ravel(), kind="stable")[:_SHOWN])
        table = self.table()
        for i in order:
            line = table[i]
            lines.append(
                f"  {line['element']}: mean ratio {line['ratio']:.4f} ± {line['s.e.']:.2g} ({line['z']:+.1f} s.e.), "
                f"relative variance {line['relative variance']:.3g}, Pareto k {line['Pareto k']:.2f}"
            )
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Histogram of the estimates over the reference, their mean, and where it should be.

        :param ax: Matplotlib axes; new ones by default.
        :return: the axes.
        """
        ax = new_axes() if ax is None else ax
        with np.errstate(over="ignore"):
            ratios = np.exp(self.log_estimates - self.log_reference)
        ax.hist(np.minimum(ratios, np.quantile(ratios, 0.995)).ravel(), bins=50, color="0.8")
        for i, (mean, error) in enumerate(zip(self.ratio.flat, self.standard_error.flat, strict=True)):
            ax.axvspan(mean - error, mean + error, color="C0", alpha=0.4, lw=0, label=None if i else "mean ± 1 s.e.")
        ax.axvline(1.0, color="k", lw=0.8, label="unbiased")
        ax.set(xlabel="estimate / evidence (largest 0.5 % at the edge)", ylabel="replicates")
        ax.legend(frameon=False)
        return ax

    def _verdict(self, i: int) -> str:
        z, k = self.z.flat[i], self.pareto_k.flat[i]
        if np.isnan(z):
            return "biased"
        if k > LARGE_PARETO_K:
            return "inconclusive"
        return "unbiased" if abs(z) <= self.num_standard_errors else "biased"


def check_unbiased_evidence(
    rng_key: Array,
    estimator: Estimator,
    *args: Any,
    exact: ArrayLike | None = None,
    reference: Estimator | None = None,
    num_replicates: int = 1000,
    num_standard_errors: float = 5.0,
    batch_size: int | None = None,
    **kwargs: Any,
) -> EvidenceCheck:
    r"""Whether an evidence estimate is unbiased: the mean of :math:`\hat Z / Z` over independent replicates is one.

    From R estimates the mean of :math:`r_i = e^{\log\hat Z_i - \log Z}` is compared with one, by its standard error.
    Without an exact value a second estimator takes its place, of which as many replicates are drawn: one with ten times
    the particles has a tenth of the bias, if there is any; one of another kind, known to be unbiased, is better still.
    The logarithm of an unbiased estimate is biased, which is why the mean is taken of the estimates themselves.

    Trust: for each element of the batch a false alarm has probability 6e-7 at 5 standard errors, where the mean is
    normal. It is not where a few estimates dominate: with a Pareto :math:`\hat k` above 0.7 the verdict is refused
    (``passed`` is ``None``). Biases below 5 standard errors are not seen; the verdict says how large these are.
    Single precision adds :math:`10^{-6} (1 + |\log Z|)` to the standard error.
    Cost: R runs of each estimator, vectorised in one compiled program where JAX can trace them.

    :param estimator: a function of a random key (and of **args** and **kwargs**) to :math:`\log\hat Z`, a number or
        ``[*batch]``; or what has such a method ``log_evidence``, as :class:`~numpyro_smc.ParticleFilter` does.
    :param exact: :math:`\log Z`, a number or ``[*batch]``.
    :param reference: another estimator, instead.
    :param num_replicates: R, 25 or more.
    :param num_standard_errors: beyond which a deviation is a failure.
    :param batch_size: replicates that are vectorised; all by default.
    :return: verdict, table and plot.
    :raises ValueError: unless there is either an exact value or a reference; if none of the estimates is positive.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_smc import ParticleFilter
        >>> from numpyro_smc.verify import check_unbiased_evidence
        >>> def model(y):
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> few, many = (ParticleFilter(model, num_particles) for num_particles in (20, 200))
        >>> y = jnp.array([0.5, 0.1, -0.3])
        >>> found = check_unbiased_evidence(random.key(0), few, y, reference=many, num_replicates=200)
        >>> found.passed, bool(found.relative_variance < 0.1)
        (True, True)

    **References**

    1. *Feynman-Kac Formulae*, P. Del Moral (2004)
    2. *Pareto Smoothed Importance Sampling*, A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024)
    """
    check_if_given("check_unbiased_evidence", batch_size=batch_size)
    check_number("check_unbiased_evidence", "(0, inf)", num_standard_errors=num_standard_errors)
    rng_key = one_key("check_unbiased_evidence", rng_key)
    for name, given in (("estimator", estimator), ("reference", reference)):
        if given is not None:
            check_callable("check_unbiased_evidence", **{name: getattr(given, "log_evidence", given)})
    if exact is not None and not (np.asarray(exact).dtype.kind in "iuf" and np.isfinite(exact).all()):
        raise ValueError(f"check_unbiased_evidence: exact must be finite, the log evidence, got {exact!r}.")
    check_positive("check_unbiased_evidence", num_replicates=num_replicates)
    if num_replicates < _FEWEST:
        raise ValueError(
            f"check_unbiased_evidence: num_replicates is {num_replicates}; the tail of fewer than {_FEWEST} estimates "
            f"tells nothing. Use hundreds."
        )
    if (exact is None) == (reference is None):
        raise ValueError(
            "check_unbiased_evidence: give either exact=, the log evidence, or reference=, an estimator to compare "
            "with, such as the same one with ten times the particles."
        )
    key, reference_key = random.split(rng_key)

    def estimates(estimator: Estimator, rng_key: Array) -> np.ndarray:
        function = getattr(estimator, "log_evidence", estimator)

        def one(key: Array) -> Array:
            return jnp.asarray(function(key, *args, **kwargs))

        return np.asarray(replicates(one, rng_key, num_replicates, batch_size=batch_size), np.float64)

    found = estimates(estimator, key)
    if reference is None:
        log_reference = np.broadcast_to(np.asarray(exact, np.float64), found.shape[1:])
        reference_error, reference_k = np.zeros(()), np.array(-np.inf)
    else:
        others = estimates(reference, reference_key)
        log_reference = _log_mean(others)
        _, relative_variance = _mean_and_variance(others, log_reference)
        reference_error, reference_k = np.sqrt(relative_variance / num_replicates), _tail(others)
    if not np.isfinite(log_reference).all():
        raise ValueError(
            f"check_unbiased_evidence: the log evidence to compare with is {log_reference}; it must be finite."
        )
    ratio, variance = _mean_and_variance(found, log_reference)
    rounding = 1e-6 * (1.0 + np.abs(log_reference))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_variance = np.where(ratio > 0, variance / ratio**2, np.inf)
    return EvidenceCheck(
        log_estimates=found,
        log_reference=np.asarray(log_reference),
        ratio=ratio,
        standard_error=np.sqrt(variance / num_replicates + reference_error**2 + rounding**2),
        relative_variance=np.asarray(relative_variance),
        pareto_k=np.asarray(np.maximum(_tail(found), reference_k)),
        num_standard_errors=num_standard_errors,
    )


def _log_mean(log_values: np.ndarray) -> np.ndarray:
    largest = np.max(log_values, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return largest + np.log(np.mean(np.exp(log_values - largest), axis=0))


def _mean_and_variance(log_values: np.ndarray, log_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the values over a scale."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.exp(log_values - log_scale)
        return np.asarray(values.mean(0)), np.asarray(values.var(0, ddof=1))


def _tail(log_values: np.ndarray) -> np.ndarray:
    """Pareto's k; of estimates that vanish nearly always it is not a number, and counts as infinite."""
    with np.errstate(invalid="ignore"):
        shapes = pareto_k(np.where(np.isfinite(log_values), log_values, -np.inf))  # type: ignore[arg-type]
    return np.where(np.isnan(shapes), np.inf, shapes)
