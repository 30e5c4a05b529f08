"""How far a guide is from the posterior, and which of its latent units carry anything of the data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_smc.programs.arguments import check_number, check_positive
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.density import Pair, log_weights
from numpyro_smc.programs.inputs import checked_call
from numpyro_smc.programs.sites import BatchPlates, Site, is_latent
from numpyro_smc.programs.weights import normalise
from numpyro_smc.reports.plots import new_axes
from numpyro_smc.reports.summaries import mean_and_error

Program = Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class BoundGap:
    r"""What :func:`kl_q_p` found: per element of the plates that enclose model and guide, ``[*plates]``.

    - **bound** - :math:`L_K`; **elbo** - the mean log weight; **gap** - their difference.
    - **ess** - effective sample size of the :math:`K` weights.
    - **num_particles** - :math:`K`; **plates** - names, sizes and scale of the plates.
    """

    bound: Array
    elbo: Array
    ess: Array
    num_particles: int = field(metadata={"static": True})
    plates: BatchPlates = field(metadata={"static": True})

    @property
    def gap(self) -> Array:
        return self.bound - self.elbo

    def table(self) -> list[dict[str, Any]]:
        """One row per quantity: mean over elements and its standard error, and the total over the full plates."""
        rows = []
        for name in ("bound", "elbo", "gap", "ess"):
            mean, error = mean_and_error(getattr(self, name))
            row: dict[str, Any] = {"quantity": name, "mean": mean, "s.e.": error}
            if name != "ess":
                size = self.bound.size * self.plates.scale
                row |= {"total": size * row["mean"], "total s.e.": size * row["s.e."]}
            rows.append(row)
        return rows

    def __repr__(self) -> str:
        sizes = [f"{name} {size}" for name, size in zip(self.plates.names, self.plates.shape, strict=True)]
        bound, elbo, gap, ess = (f"{row['mean']:.5g} ± {row['s.e.']:.2g}" for row in self.table())
        return (
            f"BoundGap of {self.num_particles} particles, means over {', '.join(sizes) or 'one whole model'}:\n"
            f"  bound {bound}, ELBO {elbo}, gap {gap}, ESS {ess}"
        )

    def plot(self, ax: Any = None) -> Any:
        """Histogram of the elements' gaps, with their mean.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = ax or new_axes()
        values = np.ravel(self.gap)
        ax.hist(values, bins="auto", color="C0", alpha=0.6)
        ax.axvline(values.mean(), color="0.2", lw=1, label=f"mean {values.mean():.4g}")
        ax.set_xlabel(f"$L_{{{self.num_particles}}}$ - ELBO (nats)")
        ax.set_ylabel("elements")
        ax.legend(frameon=False)
        return ax


def kl_q_p(
    rng_key: Array,
    model: Program,
    guide: Program,
    params: dict[str, Any],
    *args: Any,
    num_particles: int = 5000,
    batch_size: int | None = None,
    **kwargs: Any,
) -> BoundGap:
    r"""The gap between a tight bound of the log evidence and the evidence lower bound, near KL(guide, posterior).

    With importance log weights :math:`\ell_k = \log p(x, z_k) - \log q(z_k)` of :math:`K` draws from the guide,

    .. math:: L_K = \log \frac1K \sum_k e^{\ell_k}, \qquad \mathrm{ELBO} = \frac1K \sum_k \ell_k, \qquad
       \mathrm{KL}(q \,\|\, p(z \mid x)) = \log p(x) - \mathbb E[\ell_k] \approx L_K - \mathrm{ELBO},

    for each element of the plates that enclose every sample site of model and guide, or for the whole model.

    Trust: :math:`\mathbb E[L_K] \le \log p(x)`, so that the gap is too small by :math:`\log p(x) - L_K`; where ``ess``
    is a few, it is a lower limit. Standard errors are over elements: how far other data of the same kind would differ.
    Discrete and continuous guides alike. Cost: :math:`K` runs of guide and model, without gradients, compiled once for
    all data of one shape; memory of ``batch_size`` runs, plus the log densities.

    :param params: constrained values of the ``param`` sites.
    :param args: arguments of model and guide; also ``kwargs``.
    :param num_particles: :math:`K`.
    :param batch_size: particles that are evaluated at a time; all if ``None``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc import kl_q_p
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...         numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Bernoulli(logits=2 * (x - numpyro.param("threshold", 0.0))))
        >>> x = jnp.array([1.9, 0.1, -0.7])
        >>> exact, early = (kl_q_p(random.key(0), model, guide, {"threshold": t}, x).gap for t in (1.42, 0.0))
        >>> bool(exact.max() < 0.01) and bool(early.min() > 0.01)
        True

    **References**

    1. *Importance Weighted Autoencoders*, Y. Burda, R. Grosse, R. Salakhutdinov (2016)
    2. *Optimal Variance Control of the Score-Function Gradient Estimator for Importance-Weighted Bounds*, V. Lievin,
       A. Dittadi, A. Christensen, O. Winther (2020)
    """
    check_positive("kl_q_p", num_particles=num_particles, batch_size=1 if batch_size is None else batch_size)
    rng_key, params, args, kwargs = checked_call(
        "kl_q_p", rng_key, model, guide, params, args, kwargs, options=(kl_q_p,)
    )
    return _compiled_gap(model, guide, num_particles, batch_size)(rng_key, params, args, kwargs)


@lru_cache(maxsize=32)
def _compiled_gap(model: Program, guide: Program, num_particles: int, batch_size: int | None) -> Compiled:
    # Kept, so that a second call finds its compiled program.
    def gap(rng_key: Array, params: dict[str, Any], args: Any, kwargs: Any) -> BoundGap:
        weights = log_weights(
            rng_key,
            model,
            guide,
            params,
            args,
            kwargs,
            num_particles=num_particles,
            batch_size=batch_size,
            user="kl_q_p",
        )
        _, bound, ess = normalise(weights.values)
        return BoundGap(bound, jnp.mean(weights.values, axis=0), ess, num_particles, weights.plates)

    return Compiled(gap)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ActiveUnits:
    r"""What :func:`active_units` found.

    - **variances** - by latent site, the variance over the data of each unit's posterior mean, ``[...]``, the shape of
      one datum's latent.
    - **active** - whether it exceeds **threshold**; **counts** and **sizes** - active units and all units, by site;
      **num_active** and **num_units** - in total.
    """

    variances: dict[str, Array]
    threshold: float = field(metadata={"static": True})

    @property
    def active(self) -> dict[str, Array]:
        return {name: values > self.threshold for name, values in self.variances.items()}

    @property
    def counts(self) -> dict[str, Array]:
        return {name: jnp.sum(active) for name, active in self.active.items()}

    @property
    def sizes(self) -> dict[str, int]:
        return {name: values.size for name, values in self.variances.items()}

    @property
    def num_active(self) -> Array:
        return jnp.sum(jnp.stack(list(self.counts.values())))

    @property
    def num_units(self) -> int:
        return sum(self.sizes.values())

    def table(self) -> list[dict[str, Any]]:
        """One row per site, then one of all (if there are several)."""
        counts = {name: int(count) for name, count in self.counts.items()}
        rows: list[dict[str, Any]] = [
            {"site": name, "active": counts[name], "units": size} for name, size in self.sizes.items()
        ]
        if len(rows) > 1:
            rows.append({"site": "(all)", "active": sum(counts.values()), "units": self.num_units})
        return rows

    def __repr__(self) -> str:
        sites = ", ".join(f"{row['site']} {row['active']} of {row['units']}" for row in self.table())
        return f"ActiveUnits (variance above {self.threshold:g}): {sites}"

    def plot(self, ax: Any = None) -> Any:
        """Variances of the units of each site, sorted, with the threshold.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = ax or new_axes()
        for row in self.table()[: len(self.variances)]:
            values = np.sort(np.ravel(self.variances[row["site"]]))[::-1]
            ax.plot(np.arange(1, values.size + 1), values, label=f"{row['site']}: {row['active']} of {row['units']}")
        ax.axhline(self.threshold, color="0.3", lw=0.8)
        ax.set_yscale("log")
        ax.set_xlabel("units, sorted")
        ax.set_ylabel("variance of the posterior mean over data")
        ax.legend(frameon=False)
        return ax


def active_units(
    rng_key: Array,
    model: Program,
    guide: Program,
    params: dict[str, Any],
    *args: Any,
    num_samples: int = 1000,
    threshold: float = 1e-3,
    batch_size: int | None = None,
    **kwargs: Any,
) -> ActiveUnits:
    r"""Units of the latent code whose posterior mean varies over the data.

    A unit :math:`d` of a latent site is active [1] if

    .. math:: A_d = \operatorname{Var}_n\big(\mathbb E_{q(z \mid x_n)}[z_d]\big) > \text{threshold},

    the variance (with N - 1) being over the elements :math:`n` of the plates that enclose every sample site of model
    and guide, and the expectation the mean of S = ``num_samples`` draws from the guide. Units are what else a site's
    value has: event dimensions, further plates, steps of a scan. Categories count by their number.

    Trust: the draws add :math:`\operatorname{Var}_q(z_d) / S` to :math:`A_d`, which must be well below the threshold.
    Cost: S runs of the guide, compiled once for all data of one shape; memory of ``batch_size`` runs.

    :param params: constrained values of the ``param`` sites.
    :param args: arguments of model and guide; also ``kwargs``.
    :param num_samples: draws of each element's code.
    :param threshold: of :math:`A_d`.
    :param batch_size: draws at a time; all if ``None``.
    :raises ValueError: if no plate of two or more elements encloses both programs.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc import active_units
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)
        >>> def guide(x):
        ...     with numpyro.plate("data", len(x)):
        ...         loc = x[:, None] * jnp.array([0.5, 0.0, 0.0])
        ...         numpyro.sample("z", dist.Normal(loc, jnp.array([0.7, 0.1, 0.1])).to_event(1))
        >>> active_units(random.key(0), model, guide, {}, jnp.linspace(-2.0, 2.0, 50))
        ActiveUnits (variance above 0.001): z 1 of 3

    **References**

    1. *Importance Weighted Autoencoders*, Y. Burda, R. Grosse, R. Salakhutdinov (2016)
    """
    check_positive("active_units", num_samples=num_samples, batch_size=1 if batch_size is None else batch_size)
    rng_key, params, args, kwargs = checked_call(
        "active_units", rng_key, model, guide, params, args, kwargs, options=(active_units,), needs_data=False
    )
    check_number("active_units", "[0, inf)", threshold=threshold)
    variances = _compiled_variances(model, guide, num_samples, batch_size)
    return ActiveUnits(variances(rng_key, params, args, kwargs), float(threshold))


@lru_cache(maxsize=32)
def _compiled_variances(model: Program, guide: Program, num_samples: int, batch_size: int | None) -> Compiled:
    length = min(batch_size or num_samples, num_samples)

    def variances(rng_key: Array, params: dict[str, Any], args: Any, kwargs: Any) -> dict[str, Array]:
        plate_key, rng_key = random.split(rng_key)
        pair = Pair(model, guide, args, kwargs, plate_key, user="active_units")

        def code(rng_key: Array, index: Array) -> dict[str, Array]:
            guide_key, model_key = random.split(rng_key)
            draw = pair.draw(guide_key, index, params)
            # The model only says which plates enclose it: its densities are not computed.
            plates = pair.densities(draw, pair.run_model(model_key, index, params, draw)).plates
            if np.prod(plates.shape) < 2 or not plates.shape:
                raise ValueError(
                    "active_units compares the elements of a plate, and no plate of two or more elements encloses "
                    "every sample site of model and guide. Put the data's plate around both programs."
                )
            latents = {n: s for n, s in draw.trace.items() if is_latent(s) and not s["infer"].get("is_auxiliary")}
            return {name: _elements_first(site, plates) for name, site in latents.items()}

        def batch_sum(number: Array) -> dict[str, Array]:
            index = number * length + jnp.arange(length)
            codes = jax.vmap(code, (None, 0))(random.fold_in(rng_key, number), index)
            return {name: jnp.tensordot(jnp.where(index < num_samples, 1.0, 0.0), z, 1) for name, z in codes.items()}

        def add(number: Array, total: dict[str, Array]) -> dict[str, Array]:
            return jax.tree.map(jnp.add, total, batch_sum(number))

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(batch_sum, jnp.array(0)))
        total = lax.fori_loop(0, -(-num_samples // length), add, zeros)
        return {name: jnp.var(z / num_samples, axis=0, ddof=1) for name, z in total.items()}

    return Compiled(variances)


def _elements_first(site: Site, plates: BatchPlates) -> Array:
    """The site's value as numbers, ``[elements, ...]``, one row per element of the plates."""
    value = jnp.asarray(site["value"], jnp.result_type(float))
    rank = value.ndim - site["fn"].event_dim
    axes = [rank + dim for dim in plates.dims]
    value = jnp.moveaxis(value, axes, range(len(axes)))
    return value.reshape(-1, *value.shape[len(axes) :])
