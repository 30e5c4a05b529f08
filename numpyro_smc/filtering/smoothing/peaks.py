"""Bounds of a step's density over the particles it may have come from, read off the step's distributions."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import gammaln
from numpyro.distributions import ExpandedDistribution, Independent, MaskedDistribution
from numpyro.ops.provenance import eval_provenance

from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step
from numpyro_smc.programs.replay import replay_step
from numpyro_smc.programs.sites import remaining_scale, sum_per_problem

#: ``(kernel, step, future [M, ...])`` to a bound of the log densities that lead to each state, ``[M, *batch]``.
LogBound = Callable[[BackwardKernel, Step, dict[str, Array]], Array]

_LOG_TWO_PI = math.log(2.0 * math.pi)

_PEAKS: dict[type, Callable[[Any], Array]] = {
    dist.Normal: lambda fn: -jnp.log(fn.scale) - _LOG_TWO_PI / 2,
    dist.Laplace: lambda fn: -jnp.log(2.0 * fn.scale),
    dist.Cauchy: lambda fn: -jnp.log(math.pi * fn.scale),
    dist.Uniform: lambda fn: -jnp.log(fn.high - fn.low),
    dist.StudentT: lambda fn: (
        gammaln((fn.df + 1.0) / 2) - gammaln(fn.df / 2) - 0.5 * jnp.log(fn.df * math.pi) - jnp.log(fn.scale)
    ),
    dist.MultivariateNormal: lambda fn: (
        -jnp.sum(jnp.log(jnp.diagonal(fn.scale_tril, axis1=-2, axis2=-1)), -1) - fn.event_shape[0] * _LOG_TWO_PI / 2
    ),
}


def log_peak(fn: Any) -> Array | None:
    """The largest log density of a distribution, ``[*batch_shape]``, or a bound of it; ``None`` where none is known."""
    if isinstance(fn, MaskedDistribution | Independent | ExpandedDistribution):
        inner = log_peak(fn.base_dist)
        if inner is None:
            return None
        if isinstance(fn, MaskedDistribution):
            return jnp.where(jnp.asarray(fn._mask), inner, 0.0)
        if isinstance(fn, Independent):
            inner = jnp.broadcast_to(inner, fn.base_dist.batch_shape)
            return jnp.sum(inner, axis=tuple(range(-fn.reinterpreted_batch_ndims, 0)))
        return jnp.broadcast_to(inner, fn.batch_shape)
    if fn.is_discrete:
        return jnp.zeros(fn.batch_shape)
    known = _PEAKS.get(type(fn))
    return None if known is None else jnp.broadcast_to(known(fn), fn.batch_shape)


def known_bound(kernel: BackwardKernel) -> LogBound:
    """A bound from the distributions of the step: their peaks, but the exact value of whatever the past leaves alone.

    :raises ValueError: naming the site, if the peak of a distribution is not known or depends on the past itself.
    """
    sequence = kernel.sequence
    first = jax.tree.map(lambda leaf: leaf[0], kernel.steps)
    example_past = jax.tree.map(lambda leaf: leaf[0], first.cloud.particles)
    example = {name: first.values[name][0] for name in kernel.latents}

    def terms(step: Step, past: Any, future: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Log densities by site, and their peaks."""
        trace = replay_step(sequence, step.t, step.x, past, step.cloud.shared, future)[2]
        sites = {
            name: site
            for name, site in trace.items()
            if site["type"] == "sample" and (site["is_observed"] or name not in sequence.given)
        }
        peaks = {}
        for name, site in sites.items():
            peak = log_peak(site["fn"])
            if peak is not None:
                peaks[name] = sum_per_problem(remaining_scale(site, sequence.plates) * peak, sequence.plates)
        return {name: sequence.log_density(site) for name, site in sites.items()}, peaks

    densities, peaks = eval_provenance(
        lambda past, future: terms(first, past, future), past=example_past, future=example
    )
    of_past = {name for name, uses in densities.items() if "past" in uses}
    for name in sorted(of_past):
        if name not in peaks or "past" in peaks[name]:
            what = "depends on the state before the step" if name in peaks else "is not known to this package"
            raise ValueError(
                f"method='backward_rejection': the largest density of site '{name}' {what}. Give log_bound=, an upper "
                f"bound of the log density of a step's sites given the state before it (a number, or one per step), "
                f"or use method='backward_mcmc'."
            )
    if sequence.after is not None:
        raise ValueError(
            "method='backward_rejection': the likelihood stands after the scan, where no bound is known. Give "
            "log_bound=, or move the statement into the step."
        )

    def bound(kernel: BackwardKernel, step: Step, future: dict[str, Array]) -> Array:
        past = jax.tree.map(lambda leaf: leaf[0], step.cloud.particles)

        def one(future: dict[str, Array]) -> Array:
            values, peaks = terms(step, past, future)
            return sum((peaks if n in of_past else values)[n] for n in values) + jnp.zeros(sequence.batch_shape)

        return jax.vmap(one)(future)

    return bound


def given_bound(log_bound: Any) -> LogBound:
    """A bound given by the user: a number, or one per step ``[T]``."""
    levels = jnp.asarray(log_bound, jnp.result_type(float))

    def bound(kernel: BackwardKernel, step: Step, future: dict[str, Array]) -> Array:
        num_states = len(next(iter(future.values())))
        level = levels if levels.ndim == 0 else levels[step.t]
        return jnp.broadcast_to(level, (num_states, *kernel.sequence.batch_shape))

    return bound
