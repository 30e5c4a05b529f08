"""How noisy an estimator's gradient is: its mean, variance and signal-to-noise ratios over independent draws."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.infer.elbo import ELBO

from numpyro_smc.programs.arguments import check_if_given, check_number, check_positive
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.density import log_weights
from numpyro_smc.programs.inputs import as_data, as_params, check_program, one_key
from numpyro_smc.programs.weights import effective_sample_size
from numpyro_smc.reports.plots import new_axes

#: Which parameters: a prefix of their names, the names, or a predicate.
Names = str | Collection[str] | Callable[[str], bool]

PERCENTILES = (5, 25, 50, 75, 95)

_EPS = 1e-15
_BYTES_AT_ONCE = 2**26  # gradients that are on the device at a time
_BYTES_KEPT = 2**28  # gradients that are kept on the host, so as not to be drawn a second time


@dataclass(frozen=True, repr=False)
class GradientStatistics:
    r"""What :func:`gradient_statistics` found, of the ascent gradient (minus that of the loss). Averages are over the
    entries of the gradient whose variance exceeds ``min_variance``; percentiles, smallest and largest are of all.

    - **mean**, **variance**, **snr** - by parameter, structured like the parameter.
    - **average_magnitude**, **average_variance**, **average_snr** - averages of \|mean\|, variance and SNR;
      **keep_ratio** - the share of entries they are over.
    - **snr_percentiles** - by percentage (5, 25, 50, 75, 95); **snr_min**, **snr_max**.
    - **dsnr** - directional signal-to-noise ratio.
    - **direction** - cosine between the mean and the oracle, ``None`` without one.
    - **ess** - mean effective sample size of the ``num_particles`` importance weights; ``None`` where model and guide
      have none, for example with enumerated sites.
    """

    mean: dict[str, Any]
    variance: dict[str, Any]
    snr: dict[str, Any]
    average_magnitude: float
    average_variance: float
    average_snr: float
    keep_ratio: float
    snr_percentiles: dict[int, float]
    snr_min: float
    snr_max: float
    dsnr: float
    direction: float | None
    ess: float | None
    num_samples: int
    num_particles: int
    min_variance: float

    def table(self) -> list[dict[str, Any]]:
        """One row per parameter, then one of all (if there are several): the averages and the median SNR."""
        sites = {name: tuple(map(_flat, (self.mean[name], self.variance[name], self.snr[name]))) for name in self.mean}
        if len(sites) > 1:
            sites["(all)"] = tuple(np.concatenate(parts) for parts in zip(*sites.values(), strict=True))
        rows = []
        for name, (mean, variance, snr) in sites.items():
            kept = ~(variance <= self.min_variance)
            averages = [_average(values, kept) for values in (abs(mean), variance, snr)]
            row = dict(zip(("|mean|", "variance", "snr"), averages, strict=True))
            rows.append({"parameter": name, "entries": mean.size, **row, "median snr": _percentile(snr, 50)})
        return rows

    def __repr__(self) -> str:
        head = f"GradientStatistics of {self.num_samples} draws, {self.keep_ratio:.0%} of entries: DSNR {self.dsnr:.4g}"
        if self.direction is not None:
            head += f", cosine with the oracle {self.direction:.4f}"
        if self.ess is not None:
            head += f", ESS {self.ess:.3g} of {self.num_particles}"
        rows = self.table()
        cells = [list(rows[0])]
        cells += [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        return "\n".join([head, *lines])

    def plot(self, ax: Any = None) -> Any:
        """Percentiles of the entries' SNR by parameter: 5 to 95, 25 to 75, and the median.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = new_axes(height=1.2 + 0.4 * len(self.snr)) if ax is None else ax
        for i, values in enumerate(self.snr.values()):
            p5, p25, p50, p75, p95 = (_percentile(_flat(values), q) for q in PERCENTILES)
            ax.plot([p5, p95], [i, i], color="C0", lw=1)
            ax.plot([p25, p75], [i, i], color="C0", lw=5, solid_capstyle="butt", alpha=0.5)
            ax.plot(p50, i, "o", color="C0", ms=5)
        ax.set_yticks(range(len(self.snr)), list(self.snr))
        ax.set_ylim(len(self.snr) - 0.5, -0.5)
        ax.set_xscale("log")
        ax.set_xlabel("signal-to-noise ratio of the gradient's entries")
        return ax


def gradient_statistics(
    rng_key: Array,
    loss: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: dict[str, Any],
    *args: Any,
    num_samples: int = 200,
    names: Names | None = None,
    min_variance: float = 1e-15,
    batch_size: int | None = None,
    oracle: dict[str, Any] | None = None,
    **kwargs: Any,
) -> GradientStatistics:
    r"""Mean, variance and signal-to-noise ratios of the gradient that a loss estimates.

    From :math:`M` independent draws :math:`g^{(m)}` of the ascent gradient with respect to ``params``, with entries
    :math:`g_i`, their mean :math:`\bar g` and their variance :math:`s_i^2` (unbiased):

    .. math:: \mathrm{SNR}_i = \frac{|\bar g_i|}{s_i}, \qquad
       \mathrm{DSNR} = \frac1M \sum_m \frac{\lVert g^{(m)}_\parallel \rVert}{\lVert g^{(m)}_\perp \rVert} ,

    where :math:`g_\parallel` is along :math:`\bar g` and :math:`g_\perp` is the rest. As :math:`\bar g` is itself
    estimated, both are too large by chance for small M: pure noise has SNR about :math:`0.8 / \sqrt M`.

    Works with any NumPyro ELBO. Cost: ``num_samples`` gradients, or twice as many where together they exceed 256 MiB
    (they are then drawn again with the same keys), and as many evaluations of the weights; compiled, in memory of
    ``batch_size`` gradients plus 64 MiB.

    :param params: constrained values, as :meth:`~numpyro.infer.svi.SVI.get_params` gives them; with the values of
        mutable sites, if the loss needs any. Schedules of the loss must be numbers here.
    :param args: arguments of model and guide; also ``kwargs``.
    :param num_samples: :math:`M \ge 2`.
    :param names: parameters to differentiate by: a prefix, a collection of names, or a predicate; all if ``None``.
    :param min_variance: entries below it are left out of the averages.
    :param batch_size: draws of the gradient that are vectorised; one after the other if ``None``.
    :param oracle: the gradient to compare the direction of the mean with, by parameter.
    :raises ValueError: if no parameter has such a name, or if there are fewer than two samples.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc import OVIS, VIMCO, gradient_statistics
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = numpyro.param("slope", 0.0)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Normal(slope * x, 0.7))
        >>> x = jnp.linspace(-2.0, 2.0, 20)
        >>> snr = [
        ...     gradient_statistics(random.key(0), loss, model, guide, {"slope": 0.4}, x).average_snr
        ...     for loss in (VIMCO(num_particles=100), OVIS(num_particles=100))
        ... ]
        >>> snr[0] < snr[1]
        True

    **References**

    1. *Tighter Variational Bounds are Not Necessarily Better*, T. Rainforth et al. (2018)
    """
    check_positive("gradient_statistics", num_samples=num_samples)
    if num_samples < 2:
        raise ValueError(f"gradient_statistics: num_samples must be at least 2 for a variance, got {num_samples}.")
    check_if_given("gradient_statistics", batch_size=batch_size)
    check_number("gradient_statistics", "[0, inf)", min_variance=min_variance)
    if not isinstance(loss, ELBO):
        raise TypeError(f"gradient_statistics: loss must be an ELBO, such as IWELBO(num_particles=10), got {loss!r}.")
    rng_key, params = one_key("gradient_statistics", rng_key), as_params("gradient_statistics", params)
    args, kwargs = as_data("gradient_statistics", (args, kwargs))
    if type(loss).__module__.startswith(("numpyro_smc.", "numpyro.")):  # others may have parameters of their own
        check_program(
            "gradient_statistics",
            model,
            guide,
            params,
            args,
            kwargs,
            options=(gradient_statistics,),
            needs_data=False,
            may_be_nan=True,
        )
    selected = _select(params, names)
    if oracle is not None and (missing := [name for name in selected if name not in oracle]):
        raise ValueError(f"gradient_statistics: oracle has no gradient of {missing}; it has {list(oracle)}.")
    gradients, mean_ess = _compiled(loss, model, guide, selected, batch_size)
    gradient_key, weight_key = random.split(rng_key)
    keys = random.split(gradient_key, num_samples)
    bytes_of_one = 4 * max(sum(leaf.size for leaf in _float_leaves([params[name] for name in selected])), 1)
    num_chunks = -(-num_samples // max(_BYTES_AT_ONCE // bytes_of_one, 1))
    length = -(-num_samples // num_chunks)

    def draws() -> Iterator[np.ndarray]:
        for start in range(0, num_samples, length):
            # The last chunk is moved back to be of full length, so that one program serves all.
            first = min(start, num_samples - length)
            found = gradients(keys[first : first + length], params, args, kwargs)
            yield np.asarray(found, np.float64)[start - first :]

    kept = list(draws()) if num_samples * bytes_of_one <= _BYTES_KEPT else None
    mean, variance = _mean_and_variance(kept or draws())
    norm = np.linalg.norm(mean)
    unit = mean / norm if norm else mean
    snr = abs(mean) / np.maximum(np.sqrt(variance), _EPS)
    above = ~(variance <= min_variance)  # keeps what is not a number, so that it shows

    def by_name(flat: np.ndarray) -> dict[str, Any]:
        return dict(zip(selected, _unflatten(flat, [params[name] for name in selected]), strict=True))

    return GradientStatistics(
        mean=by_name(mean),
        variance=by_name(variance),
        snr=by_name(snr),
        average_magnitude=_average(abs(mean), above),
        average_variance=_average(variance, above),
        average_snr=_average(snr, above),
        keep_ratio=float(above.mean()),
        snr_percentiles={q: _percentile(snr, q) for q in PERCENTILES},
        snr_min=float(snr.min()),
        snr_max=float(snr.max()),
        dsnr=float(np.mean(np.concatenate([_directional(chunk, unit) for chunk in kept or draws()]))),
        direction=None if oracle is None else _cosine(mean, _flat([oracle[name] for name in selected])),
        ess=mean_ess(random.split(weight_key, num_samples), params, args, kwargs),
        num_samples=num_samples,
        num_particles=loss.num_particles,
        min_variance=min_variance,
    )


@lru_cache(maxsize=32)
def _compiled(
    loss: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    names: tuple[str, ...],
    batch_size: int | None,
) -> tuple[Callable[..., Array], Callable[..., float | None]]:
    """Functions of keys, parameters and arguments: ascent gradients, one row per key; and the mean ESS."""

    def gradients(keys: Array, params: dict[str, Any], args: Any, kwargs: Any) -> Array:
        values, treedef = jax.tree.flatten([params[name] for name in names])

        def bound(floats: list[Array], rng_key: Array) -> Array:
            rest = iter(floats)
            leaves = [next(rest) if _is_float(value) else value for value in values]
            chosen = dict(zip(names, jax.tree.unflatten(treedef, leaves), strict=True))
            return -loss.loss(rng_key, params | chosen, model, guide, *args, **kwargs)

        def gradient(rng_key: Array) -> Array:
            return jnp.concatenate([jnp.ravel(part) for part in jax.grad(bound)(_float_leaves(values), rng_key)])

        return lax.map(gradient, keys, batch_size=batch_size)

    def ess(keys: Array, params: dict[str, Any], args: Any, kwargs: Any) -> Array:
        options: Any = {"batch_size": getattr(loss, "batch_size", None), "plates": getattr(loss, "plates", "auto")}

        def one(rng_key: Array) -> Array:
            weights = log_weights(
                rng_key, model, guide, params, args, kwargs, num_particles=loss.num_particles, **options
            )
            return jnp.mean(effective_sample_size(weights.values))

        return jnp.mean(lax.map(one, keys, batch_size=batch_size))

    compiled_ess = Compiled(ess)

    def mean_ess(*arguments: Any) -> float | None:
        if loss.num_particles == 1:
            return 1.0
        try:
            return float(compiled_ess(*arguments))
        except (ValueError, NotImplementedError):
            return None

    return Compiled(gradients), mean_ess


def _select(params: dict[str, Any], names: Names | None) -> tuple[str, ...]:
    """Names of the parameters to differentiate by, in the order of ``params``."""
    if names is None:
        selected = tuple(params)
    elif isinstance(names, str):
        selected = tuple(name for name in params if name.startswith(names))
    elif callable(names):
        selected = tuple(name for name in params if names(name))
    else:
        if unknown := sorted(set(names) - set(params)):
            raise ValueError(f"gradient_statistics: names has no parameter {unknown}; there are {list(params)}.")
        selected = tuple(name for name in params if name in names)
    if not selected:
        raise ValueError(f"gradient_statistics: names selects none of the parameters {list(params)}.")
    return selected


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _float_leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in _float_leaves(tree)] or [np.zeros(0)])


def _unflatten(flat: np.ndarray, like: Any) -> Any:
    """Entries in the structure of ``like``; leaves that are not differentiated become ``None``."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([np.size(leaf) if _is_float(leaf) else 0 for leaf in leaves])
    parts = np.split(flat, ends[:-1])
    new = [p.reshape(np.shape(x)) if _is_float(x) else None for p, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, new)


def _mean_and_variance(chunks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Per entry, with the variance shifted by the first draw."""
    number, shift, total, squares = 0, np.zeros(()), np.zeros(()), np.zeros(())
    for chunk in chunks:
        shift = chunk[0] if number == 0 else shift
        number += len(chunk)
        total = total + (chunk - shift).sum(0)
        squares = squares + ((chunk - shift) ** 2).sum(0)
    variance = np.maximum(squares - np.square(total) / number, 0.0) / (number - 1)
    return shift + total / number, variance


def _directional(gradients: np.ndarray, unit: np.ndarray) -> np.ndarray:
    along = gradients @ unit
    across = np.linalg.norm(gradients - along[:, None] * unit, axis=1)
    return abs(along) / (_EPS + across)


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def _average(values: np.ndarray, kept: np.ndarray) -> float:
    return float(values[kept].mean()) if kept.any() else float("nan")


def _percentile(values: np.ndarray, q: int) -> float:
    """The value that exceeds ``q`` percent of the others (no interpolation)."""
    return float(np.sort(values)[min(q * values.size // 100, values.size - 1)])
