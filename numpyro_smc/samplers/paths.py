r"""What lies between the start and the posterior: temperatures of the likelihood, or rows of the data.

A path is a family of densities :math:`\gamma_t`, from the start at :math:`t = 0` to the posterior at :math:`t = 1`. Of
every particle it keeps what the ratio of any two of them needs, so that the next weights cost no evaluation.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax

from numpyro_smc.programs.unconstrained import Split, UnconstrainedModel
from numpyro_smc.programs.weights import normalise

_PRECISION = 1e-4
_MAX_BISECTIONS = 128


class Path(Protocol):
    """A family of densities over unconstrained positions ``[D]``."""

    model: UnconstrainedModel

    def kept(self, position: Array) -> Array:
        """What is kept of one particle: a scalar or a vector."""

    def log_density(self, position: Array, temperature: Array) -> Array:
        r"""Unnormalised :math:`\log\gamma_t` at one position."""

    def log_likelihood(self, kept: Array, temperature: Array) -> Array:
        r"""Of the data that count at :math:`t`, untempered; per particle, ``[N]``."""

    def log_ratio(self, kept: Array, before: Array, after: Array) -> Array:
        r""":math:`\log\gamma_{t'} - \log\gamma_t` per particle, ``[N]``."""

    def next(self, kept: Array, log_weights: Array, temperature: Array, target_ess: float) -> Array:
        """How far the weighted particles can go before their effective sample size falls below ``target_ess * N``."""

    def at(self, scheduled: Array) -> Array:
        """The temperature that an entry of a given schedule stands for."""

    def start(self, position: Array) -> tuple[Array, Split]:
        """:meth:`kept` at one position, and the log densities by which it is decided whether a run can start."""


class Temperatures:
    r""":math:`\gamma_\beta = \pi_0 L^\beta`; a scalar, :math:`\log L`, is kept."""

    def __init__(self, model: UnconstrainedModel) -> None:
        self.model = model

    def kept(self, position: Array) -> Array:
        return self.model.split(position).likelihood

    def log_density(self, position: Array, temperature: Array) -> Array:
        split = self.model.split(position)
        return split.base + temperature * split.likelihood

    def log_likelihood(self, kept: Array, temperature: Array) -> Array:
        return kept

    def log_ratio(self, kept: Array, before: Array, after: Array) -> Array:
        return tempered(after - before, kept)

    def next(self, kept: Array, log_weights: Array, temperature: Array, target_ess: float) -> Array:
        def log_weights_at(new: Array) -> Array:
            return log_weights + self.log_ratio(kept, temperature, new)

        return next_temperature(log_weights_at, temperature, target_ess, kept.shape[0])

    def at(self, scheduled: Array) -> Array:
        return scheduled

    def start(self, position: Array) -> tuple[Array, Split]:
        split = self.model.split(position)
        return split.likelihood, split


class Rows:
    r""":math:`\gamma_{n / n_\text{max}}(u) = \pi_0(u) \prod_{i \le n} p(y_i \mid u)`: data tempering [1].

    The log likelihoods of all rows are kept; what is observed outside the plate belongs to the first row.

    :param plate: name of the plate whose elements are the rows.
    :param row_counts: a given schedule, checked against the number of rows.
    :raises ValueError: naming plate and sites, see :meth:`UnconstrainedModel.plate`; for a schedule that does not end
        at the number of rows.

    **References**

    1. *A sequential particle filter method for static models*, N. Chopin (2002)
    """

    def __init__(self, model: UnconstrainedModel, plate: str, row_counts: Sequence[int] | None = None) -> None:
        self.model = model
        self.plate = model.plate(plate)
        self.num_rows = self.plate.shape[0]
        if row_counts is not None and row_counts[-1] != self.num_rows:
            raise ValueError(
                f"{model.user}: row_counts ends at {row_counts[-1]}, but plate '{plate}' has {self.num_rows} rows. Let "
                f"it end there."
            )

    def kept(self, position: Array) -> Array:
        return self.model.split(position, self.plate).likelihood

    def log_density(self, position: Array, temperature: Array) -> Array:
        split = self.model.split(position, self.plate)
        return split.base + self._sum(split.likelihood, jnp.zeros_like(temperature), temperature)

    def log_likelihood(self, kept: Array, temperature: Array) -> Array:
        return self._sum(kept, jnp.zeros_like(temperature), temperature)

    def log_ratio(self, kept: Array, before: Array, after: Array) -> Array:
        return self._sum(kept, before, after)

    def next(self, kept: Array, log_weights: Array, temperature: Array, target_ess: float) -> Array:
        """The most rows with that effective sample size; one more where there is no such number."""
        row, so_far = jnp.arange(self.num_rows), self._count(temperature)
        gains = jnp.cumsum(jnp.where(row >= so_far, kept, 0.0), axis=1)
        ess = normalise(log_weights[:, None] + gains)[2]
        enough = (row >= so_far) & (ess >= target_ess * kept.shape[0])
        furthest = jnp.max(jnp.where(enough, row + 1, so_far + 1))
        return (furthest / self.num_rows).astype(temperature.dtype)

    def at(self, scheduled: Array) -> Array:
        return scheduled / self.num_rows

    def start(self, position: Array) -> tuple[Array, Split]:
        base, rows = self.model.split(position, self.plate)
        total = jnp.sum(rows)
        # Later rows may rule out what the first does not.
        return rows, Split(base, jnp.where(jnp.isneginf(total), rows[0], total))

    def _count(self, temperature: Array) -> Array:
        return jnp.rint(temperature * self.num_rows).astype(jnp.int32)

    def _sum(self, rows: Array, before: Array, after: Array) -> Array:
        row = jnp.arange(self.num_rows)
        counts = (row >= self._count(before)) & (row < self._count(after))
        return jnp.sum(jnp.where(counts, rows, 0.0), axis=-1)


def tempered(temperature: Array, log_likelihood: Array) -> Array:
    r""":math:`\beta \log L`, with dead particles dead at every temperature and ``0 * -inf`` never formed."""
    dead = jnp.isneginf(log_likelihood)
    return jnp.where(dead, -jnp.inf, temperature * jnp.where(dead, 0.0, log_likelihood))


def next_temperature(
    log_weights_at: Callable[[Array], Array], temperature: Array, target_ess: float, num_particles: int
) -> Array:
    """The temperature, at most 1, at which the effective sample size falls to its target, by bisection.

    :param log_weights_at: log weights as a function of the new temperature.
    :param target_ess: fraction of ``num_particles``, or of the effective sample size without the particles whose
        likelihood is zero, if that is smaller.
    """
    goal = target_ess * jnp.minimum(num_particles, normalise(log_weights_at(temperature))[2])

    def is_coarse(bounds: tuple[Array, Array, Array]) -> Array:
        low, high, steps = bounds
        return (high - low > _PRECISION * low) & (steps < _MAX_BISECTIONS)

    def halve(bounds: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, steps = bounds
        middle = 0.5 * (low + high)
        enough = normalise(log_weights_at(temperature + middle))[2] >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), steps + 1

    bounds = (jnp.zeros_like(temperature), 1.0 - temperature, jnp.zeros((), jnp.int32))
    low = lax.while_loop(is_coarse, halve, bounds)[0]
    enough = normalise(log_weights_at(jnp.ones_like(temperature)))[2] >= goal
    return jnp.where(enough, 1.0, temperature + low).astype(temperature.dtype)
