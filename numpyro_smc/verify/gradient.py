"""Is a stochastic gradient the gradient of what it should be?"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from numpyro_smc.programs.arguments import check_between, check_callable, check_if_given, check_positive
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.programs.pareto import LARGE_PARETO_K, pareto_k
from numpyro_smc.programs.simulator import element_names
from numpyro_smc.reports.plots import new_axes
from numpyro_smc.reports.tables import write_csv
from numpyro_smc.verify.replicates import replicates

_FEWEST = 25
_SHOWN = 8
# Of f at p + h, p - h, p + 2h, p - 2h: the derivative times h, up to terms of the order of h to the fifth.
_STEPS = np.array([1.0, -1.0, 2.0, -2.0])
_COEFFICIENTS = np.array([8.0, -8.0, -1.0, 1.0]) / 12.0


@dataclass(frozen=True, repr=False)
class GradientCheck:
    """What :func:`check_gradient` found, by coordinate: arrays ``[D]``.

    :ivar names: of the coordinates.
    :ivar gradient: mean of the stochastic gradients.
    :ivar expected: the exact gradient, or the mean of the differences.
    :ivar standard_error: of the difference of the two.
    :ivar pareto_k: shape of the tail of the deviations from their mean.
    :ivar num_replicates: R. **level** - probability of a false alarm, of all coordinates together.
    """

    names: tuple[str, ...]
    gradient: np.ndarray
    expected: np.ndarray
    standard_error: np.ndarray
    pareto_k: np.ndarray
    num_replicates: int
    level: float

    @property
    def z(self) -> np.ndarray:
        """Deviation from the expected gradient, in standard errors."""
        deviation = self.gradient - self.expected
        return np.divide(deviation, self.standard_error, out=np.zeros_like(deviation), where=deviation != 0)

    @property
    def threshold(self) -> float:
        """Largest deviation that passes, in standard errors (Bonferroni)."""
        return NormalDist().inv_cdf(1.0 - self.level / (2.0 * len(self.names)))

    @property
    def passed(self) -> bool | None:
        """``None`` if nothing can be said, because some coordinates have too heavy a tail and none of the others
        failed."""
        heavy = self.pareto_k > LARGE_PARETO_K
        fails = ~(np.abs(self.z) <= self.threshold)
        if np.any(fails & (~heavy | np.isnan(self.z))):
            return False
        return None if heavy.any() else True

    @property
    def verdict(self) -> str:
        """In words."""
        if self.passed is None:
            return (
                f"Inconclusive: the gradient's tail is too heavy for a mean (Pareto k {self.pareto_k.max():.2f}, above "
                f"{LARGE_PARETO_K})."
            )
        if self.passed:
            seen = float(np.max(self.threshold * self.standard_error))
            return f"No bias found; one above {seen:.2g} would have been seen in every coordinate."
        worst = int(np.argmax(np.nan_to_num(np.abs(self.z), nan=np.inf)))
        return f"Biased: '{self.names[worst]}' is off by {self.z[worst]:+.1f} standard errors."

    def table(self) -> list[dict[str, Any]]:
        """A line for each coordinate."""
        columns = (self.gradient, self.expected, self.standard_error, self.z, self.pareto_k)
        names = ("gradient", "expected", "s.e.", "z", "Pareto k")
        return [
            {"coordinate": name} | dict(zip(names, map(float, values), strict=True))
            for name, *values in zip(self.names, *columns, strict=True)
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`table`."""
        write_csv(path, self.table())

    def __repr__(self) -> str:
        lines = [f"GradientCheck of {self.num_replicates} gradients, {len(self.names)} coordinates: {self.verdict}"]
        table = self.table()
        for i in np.sort(np.argsort(-np.nan_to_num(np.abs(self.z), nan=np.inf), kind="stable")[:_SHOWN]):
            line = table[i]
            lines.append(
                f"  {line['coordinate']}: {line['gradient']:.4g}, expected {line['expected']:.4g} ± {line['s.e.']:.2g} "
                f"({line['z']:+.1f} s.e.)"
            )
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Deviations of all coordinates in standard errors, and the bounds of the verdict.

        :param ax: Matplotlib axes; new ones by default.
        :return: the axes.
        """
        ax = new_axes() if ax is None else ax
        ax.plot(self.z, np.arange(len(self.z)), "o", ms=4)
        for bound in (-self.threshold, self.threshold):
            ax.axvline(bound, color="0.5", lw=0.8)
        if len(self.names) <= 40:
            ax.set_yticks(range(len(self.names)), self.names)
        ax.set(xlabel="deviation of the mean gradient / standard error")
        return ax


def check_gradient(
    rng_key: Array,
    value: Callable[[Array, Any], ArrayLike],
    params: Any,
    *,
    gradient: Callable[[Array, Any], Any] | None = None,
    exact: Any = None,
    num_replicates: int = 1000,
    step_size: float = 0.05,
    level: float = 1e-6,
    batch_size: int | None = None,
) -> GradientCheck:
    r"""Whether the gradient of a stochastic value is, on average, the gradient of its average.

    For :math:`f(p) = \mathbb E\, v(\omega, p)` the mean of R stochastic gradients :math:`g(\omega_i, p)` is compared,
    coordinate by coordinate, with differences of the value at the same :math:`\omega_i`,

    .. math:: d_j = \frac{8\,[v(p + h e_j) - v(p - h e_j)] - [v(p + 2h e_j) - v(p - 2h e_j)]}{12 h}
              = \partial_j f + O(h^4) \text{ on average},

    or with an exact gradient. What automatic differentiation of :math:`v` leaves out (resampling, discrete draws,
    ``stop_gradient``) is in the differences, since they see only values.

    Trust: a false alarm has probability ``level`` for all coordinates together (Bonferroni), where means are normal;
    with a Pareto :math:`\hat k` of the deviations above 0.7 the verdict is refused (``passed`` is ``None``). The
    :math:`O(h^4)` of the differences is not in the standard error: a failure that goes away with half the ``step_size``
    is theirs. Where values jump in p (resampling), the variance of the differences grows as :math:`1/h`.
    Cost: R gradients and 4 R D values, vectorised in one compiled program where JAX can trace them.

    :param value: of a random key and parameters, a scalar: a loss, a bound, a log evidence.
    :param params: the parameters, any tree of floats.
    :param gradient: of a random key and parameters to the stochastic gradient, structured like ``params``; by default
        ``jax.grad`` of ``value``.
    :param exact: the expected gradient, structured like ``params``, instead of differences.
    :param num_replicates: R, 25 or more.
    :param step_size: :math:`h`, relative to :math:`1 + |p_j|`.
    :param level: probability of a false alarm.
    :param batch_size: replicates that are vectorised; all by default.
    :return: verdict, table and plot.
    :raises ValueError: for bad numbers, or if a gradient is not structured like ``params``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_smc.verify import check_gradient
        >>> def value(rng_key, p):
        ...     z = p["mean"] + jnp.exp(p["log_scale"]) * random.normal(rng_key)
        ...     return z ** 2
        >>> params = {"mean": 0.5, "log_scale": 0.0}
        >>> check_gradient(random.key(0), value, params).passed
        True
        >>> def forgets_the_scale(rng_key, p):
        ...     return {"mean": 2 * (p["mean"] + random.normal(rng_key)), "log_scale": 0.0}
        >>> check_gradient(random.key(0), value, params, gradient=forgets_the_scale).passed
        False

    **References**

    1. *Monte Carlo Gradient Estimation in Machine Learning*, S. Mohamed et al. (2020)
    """
    check_if_given("check_gradient", batch_size=batch_size)
    check_callable("check_gradient", value=value)
    rng_key = one_key("check_gradient", rng_key)
    check_positive("check_gradient", num_replicates=num_replicates)
    if num_replicates < _FEWEST:
        raise ValueError(
            f"check_gradient: num_replicates is {num_replicates}; use at least {_FEWEST}, better hundreds."
        )
    check_between("check_gradient", 1e-6, 1.0, step_size=step_size)
    check_between("check_gradient", 1e-15, 1.0, level=level)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float, leaf)), params)
    position, unravel = ravel_pytree(params)
    grad = jax.grad(value, argnums=1) if gradient is None else gradient
    steps = step_size * (1.0 + jnp.abs(position))

    def along(rng_key: Array, position: Array) -> Array:
        return jnp.asarray(value(rng_key, unravel(position)))

    def one(rng_key: Array) -> tuple[Array, Array]:
        found = grad(rng_key, unravel(position))
        trees = [str(jax.tree.structure(tree)) for tree in (found, params)]
        if trees[0] != trees[1]:
            raise ValueError(f"check_gradient: the gradient is structured as {trees[0]}, the parameters as {trees[1]}.")
        flat = ravel_pytree(found)[0]
        if exact is not None:
            return flat, jnp.zeros_like(flat)
        moved = position + (_STEPS[:, None, None] * jnp.diag(steps)).reshape(-1, position.size)
        values = jax.vmap(lambda p: along(rng_key, p))(moved).reshape(len(_STEPS), -1)
        return flat, jnp.tensordot(jnp.asarray(_COEFFICIENTS, values.dtype), values, 1) / steps

    gradients, differences = (
        np.asarray(part, np.float64) for part in replicates(one, rng_key, num_replicates, batch_size=batch_size)
    )
    expected = differences.mean(0) if exact is None else np.asarray(ravel_pytree(exact)[0], np.float64)
    if expected.shape != (position.size,):
        raise ValueError(
            f"check_gradient: exact holds {expected.size} numbers, and there are {position.size} parameters."
        )
    deviations = gradients - differences
    centred = np.abs(deviations - deviations.mean(0))
    rounding = 1e-6 * (1.0 + np.abs(gradients).max(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        tails = pareto_k(np.log(centred))  # type: ignore[arg-type]
    return GradientCheck(
        names=_names(params),
        gradient=gradients.mean(0),
        expected=expected,
        standard_error=np.sqrt(deviations.var(0, ddof=1) / num_replicates + rounding**2),
        pareto_k=np.where(centred.max(0) == 0.0, 0.0, np.where(np.isnan(tails), np.inf, tails)),
        num_replicates=num_replicates,
        level=level,
    )


def _names(params: Any) -> tuple[str, ...]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [(jax.tree_util.keystr(path, simple=True, separator=".") or "parameter", leaf) for path, leaf in paths]
    return tuple(element for name, leaf in names for element in element_names(name, np.shape(leaf)))
