"""Resampling a cloud of particles: scheme, schedule and gradient treatment composed into one function."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.programs.arguments import check_number
from numpyro_smc.programs.resampling import Scheme, available, resolve
from numpyro_smc.programs.resampling.mixing import log_probabilities
from numpyro_smc.programs.weights import log_mean_exp, normalise

GRADIENTS = ("none", "score", "score_rb", "stop_gradient")


class Resampled(NamedTuple):
    """Outcome of a resampling decision.

    - **particles** - pytree with leading particle axis.
    - **log_weights** - ``[N, *batch]``, of mean one (after a scheme with its own ``selection``, only on average).
    - **ancestors** - int32 ``[N, *batch]``; the identity where nothing was resampled, and for schemes that mix.
    - **resampled** - bool ``[*batch]``.
    - **log_prob** - log probability of the ancestors (zeros unless a score gradient is asked for), ``[*batch]``.
    """

    particles: Any
    log_weights: Array
    ancestors: Array
    resampled: Array
    log_prob: Array


Decision = Callable[[Array, Array], Array]


class ResampleFn(Protocol):
    """One resampling decision for a cloud.

    :param allowed: whether resampling makes sense at all before this step.
    :param pivots: int ``[*batch]``, the ancestors that slot 0 must have where the cloud is resampled (conditional
        resampling, for particle Gibbs); ``None`` for ordinary resampling.
    """

    def __call__(
        self,
        rng_key: Array,
        log_weights: Array,
        particles: Any,
        t: Array,
        allowed: Array,
        pivots: Array | None = None,
    ) -> Resampled: ...


def schedule(resample: str | Decision, ess_threshold: float) -> Decision | None:
    """When to resample: a function of log weights ``[N]`` and step to bool; ``None`` for never.

    :param resample: ``"ess"`` (when the effective sample size is at most ``ess_threshold * N``), ``"always"``,
        ``"never"``, or a function ``(log_weights, t) -> bool``.
    """
    check_number("resampling", "(0, 1]", "It is a fraction of num_particles.", ess_threshold=ess_threshold)
    if callable(resample):
        return resample
    if resample == "never":
        return None
    if resample == "always":
        return lambda log_weights, t: jnp.asarray(True)
    if resample == "ess":
        return lambda log_weights, t: normalise(log_weights)[2] <= ess_threshold * log_weights.shape[0]
    raise ValueError(
        f"Unknown resample={resample!r}. Use 'ess', 'always', 'never', or a function (log_weights, t) -> bool."
    )


def build(
    resampler: str | Scheme | Callable[..., Array],
    resample: str | Decision = "ess",
    ess_threshold: float = 0.5,
    gradient: str = "none",
) -> ResampleFn | None:
    """Compose a resampling function for a cloud, or ``None`` when nothing is ever resampled.

    :param resampler: name of a registered scheme, or a scheme.
    :param gradient: how gradients pass: ``"none"`` (through the moved particles, and whatever the scheme itself passes
        on; biased), ``"score"`` and ``"score_rb"`` (score-function terms, unbiased; multinomial or soft scheme and
        fixed schedule only), ``"stop_gradient"`` (log weights carried as
        :math:`\\log w_I - \\operatorname{sg}(\\log w_I)`; targets the gradient of the log evidence). Schemes whose
        particles pass on gradients themselves allow ``"none"`` only.
    :raises ValueError: for unknown names, and for gradient terms with a scheme or schedule they are wrong for.
    """
    scheme = resolve(resampler)
    decide = schedule(resample, ess_threshold)
    if gradient not in GRADIENTS:
        raise ValueError(f"Unknown resampling_gradient={gradient!r}. Known: {', '.join(GRADIENTS)}.")
    if gradient != "none" and scheme.differentiable == "path":
        raise ValueError(
            f"resampling_gradient={gradient!r} is for schemes that copy particles; those of the {scheme.name} scheme "
            f"pass gradients on themselves. Use resampling_gradient='none', or another scheme such as 'multinomial'."
        )
    if gradient.startswith("score"):
        if scheme.log_prob is None:
            raise ValueError(
                f"resampling_gradient={gradient!r} needs the log probability of the ancestors, which the {scheme.name} "
                f"scheme does not have. Use resampler='multinomial', or resampling_gradient='stop_gradient'."
            )
        if resample == "ess":
            raise ValueError(
                f"resampling_gradient={gradient!r} is biased under resample='ess', whose decision depends on the "
                f"parameters. Use resample='always' or a fixed schedule such as lambda log_weights, t: t % 2 == 1."
            )
    if decide is None:
        return None

    def asked(rng_key: Array, log_weights: Array, t: Array) -> Array:
        """Whether one problem is resampled: the schedule says so, and the scheme does not keep the cloud."""
        do = decide(log_weights, t)
        if scheme.keep is not None:
            probability = scheme.keep(log_weights)
            do = do & (random.uniform(rng_key, (), probability.dtype) >= probability)
        return do

    def split(rng_key: Array) -> tuple[Array, Array]:
        """Keys for the decision, where it is random, and for the rest."""
        keys = random.split(rng_key) if scheme.keep is not None else (rng_key, rng_key)
        return keys[0], keys[1]

    def ancestors_of(rng_key: Array, log_weights: Array, pivot: Array | None) -> Array:
        if pivot is None:
            assert scheme.ancestors is not None
            return scheme.ancestors(rng_key, log_weights, log_weights.shape[0])
        if scheme.conditional is None or scheme.transport is not None or scheme.selection is not None:
            raise ValueError(no_conditional(scheme))
        return scheme.conditional(rng_key, log_weights, log_weights.shape[0], pivot, jnp.asarray(0))

    def chosen(rng_key: Array, log_weights: Array, pivot: Array | None) -> tuple[Array, Array, Array]:
        """Ancestors, new log weights and log probability of one problem's resampling."""
        ancestors = ancestors_of(rng_key, lax.stop_gradient(log_weights), pivot)
        dead = jnp.isneginf(log_weights)
        new_log_weights = jnp.zeros_like(log_weights)
        if scheme.selection is not None:
            log_ratio = log_probabilities(log_weights) - jnp.where(dead, 0.0, scheme.selection(log_weights))
            new_log_weights = jnp.where(dead, 0.0, log_ratio)[ancestors]
            if gradient == "none":
                # Their mean is one on average whatever the parameters; without the score only this gradient says so.
                log_mean = log_mean_exp(new_log_weights)
                new_log_weights = new_log_weights - (log_mean - lax.stop_gradient(log_mean))
        if gradient == "stop_gradient":
            carried = jnp.where(dead, 0.0, log_weights)[ancestors]
            new_log_weights = lax.stop_gradient(new_log_weights) + (carried - lax.stop_gradient(carried))
        log_prob = jnp.zeros(())
        if gradient.startswith("score"):
            assert scheme.log_prob is not None
            log_prob = scheme.log_prob(ancestors, log_weights)
        return ancestors, new_log_weights, log_prob

    def moved(
        rng_key: Array, log_weights: Array, particles: Any, pivot: Array | None
    ) -> tuple[Any, Array, Array, Array]:
        """One problem's new particles, with what :func:`chosen` returns."""
        if scheme.transport is None:
            ancestors, new_log_weights, log_prob = chosen(rng_key, log_weights, pivot)
            return jax.tree.map(lambda leaf: leaf[ancestors], particles), new_log_weights, ancestors, log_prob
        size = log_weights.shape[0]
        ancestors = jnp.arange(size, dtype=jnp.int32)
        if scheme.ancestors is not None or pivot is not None:
            ancestors = ancestors_of(rng_key, lax.stop_gradient(log_weights), pivot)
        new_particles, new_log_weights = scheme.transport(rng_key, log_weights, particles)
        alive = jnp.max(log_weights) > -jnp.inf
        new_particles = jax.tree.map(lambda new, old: jnp.where(alive, new, old), new_particles, particles)
        return new_particles, new_log_weights, ancestors, jnp.zeros(())

    def one(
        rng_key: Array, log_weights: Array, particles: Any, t: Array, allowed: Array, pivots: Array | None
    ) -> Resampled:
        decision_key, rng_key = split(rng_key)
        do = asked(decision_key, lax.stop_gradient(log_weights), t) & allowed

        def move(operand: tuple[Array, Any]) -> Resampled:
            log_weights, particles = operand
            new_particles, new_log_weights, ancestors, log_prob = moved(rng_key, log_weights, particles, pivots)
            alive = jnp.max(log_weights) > -jnp.inf
            new_log_weights = jnp.where(alive, new_log_weights, log_weights)
            return Resampled(new_particles, new_log_weights, ancestors, jnp.asarray(True), log_prob)

        def stay(operand: tuple[Array, Any]) -> Resampled:
            log_weights, particles = operand
            identity = jnp.arange(log_weights.shape[0], dtype=jnp.int32)
            return Resampled(particles, log_weights, identity, jnp.asarray(False), jnp.zeros(()))

        return lax.cond(do, move, stay, (log_weights, particles))

    def many(
        rng_key: Array, log_weights: Array, particles: Any, t: Array, allowed: Array, pivots: Array | None
    ) -> Resampled:
        num_particles, batch = log_weights.shape[0], log_weights.shape[1:]
        rank = len(batch)
        flat = log_weights.reshape(num_particles, -1)
        decision_key, rng_key = split(rng_key)
        decision_keys = random.split(decision_key, flat.shape[1])
        do = jax.vmap(asked, (0, 1, None))(decision_keys, lax.stop_gradient(flat), t) & allowed
        identity = jnp.broadcast_to(jnp.arange(num_particles, dtype=jnp.int32)[:, None], flat.shape)
        pivot = None if pivots is None else pivots.reshape(-1)
        by_pivot = None if pivots is None else 0

        def columns(leaf: Array) -> Array:
            return leaf.reshape(num_particles, flat.shape[1], *leaf.shape[1 + rank :])

        def copies(keys: Array, particles: Any, flat: Array) -> tuple[Any, Array, Array, Array]:
            ancestors, new_log_weights, log_prob = jax.vmap(chosen, (0, 1, by_pivot), (1, 1, 0))(keys, flat, pivot)
            ancestors = jnp.where(do, ancestors, identity)

            def gather(leaf: Array) -> Array:
                return columns(leaf)[ancestors, jnp.arange(flat.shape[1])].reshape(leaf.shape)

            return jax.tree.map(gather, particles), new_log_weights, ancestors, log_prob

        def transported(keys: Array, particles: Any, flat: Array) -> tuple[Any, Array, Array, Array]:
            in_columns = jax.tree.map(columns, particles)
            each = jax.vmap(moved, (0, 1, 1, by_pivot), (1, 1, 1, 0))
            new, new_log_weights, ancestors, log_prob = each(keys, flat, in_columns, pivot)

            def select(new: Array, old: Array) -> Array:
                selected = do.reshape((1, -1) + (1,) * (new.ndim - 2))
                return jnp.where(selected, new, columns(old)).reshape(old.shape)

            new = jax.tree.map(select, new, particles)
            return new, new_log_weights, jnp.where(do, ancestors, identity), log_prob

        def move(operand: tuple[Array, Any]) -> tuple[Any, Array, Array, Array]:
            flat, particles = operand
            change = copies if scheme.transport is None else transported
            keys = random.split(rng_key, flat.shape[1])
            particles, new_log_weights, ancestors, log_prob = change(keys, particles, flat)
            alive = do & (jnp.max(flat, axis=0) > -jnp.inf)
            return particles, jnp.where(alive, new_log_weights, flat), ancestors, jnp.where(do, log_prob, 0.0)

        def stay(operand: tuple[Array, Any]) -> tuple[Any, Array, Array, Array]:
            flat, particles = operand
            return particles, flat, identity, jnp.zeros(flat.shape[1])

        particles, flat, ancestors, log_prob = lax.cond(jnp.any(do), move, stay, (flat, particles))
        shape = (num_particles, *batch)
        return Resampled(
            particles, flat.reshape(shape), ancestors.reshape(shape), do.reshape(batch), log_prob.reshape(batch)
        )

    def resample_cloud(
        rng_key: Array, log_weights: Array, particles: Any, t: Array, allowed: Array, pivots: Array | None = None
    ) -> Resampled:
        chosen_form = one if log_weights.ndim == 1 else many
        return chosen_form(rng_key, log_weights, particles, t, allowed, pivots)

    return resample_cloud


def no_conditional(scheme: Scheme) -> str:
    """What to say of a scheme that cannot keep a reference."""
    known = [name for name in available() if resolve(name).conditional is not None]
    return (
        f"Resampler '{scheme.name}' has no conditional version, which particle Gibbs needs to keep its reference path. "
        f"Use one of {', '.join(known)}."
    )


def replace_dead(resample: ResampleFn | None) -> ResampleFn:
    """Resample, then put a copy of the heaviest particle, without gradient, in the place of every dead one.

    A particle is dead when its weight is zero in floating-point numbers. It stays so, and counts for nothing; but where
    it has gone derivatives may overflow, and zero times infinity would end up in the gradients of all others.
    """

    def replaced(
        rng_key: Array, log_weights: Array, particles: Any, t: Array, allowed: Array, pivots: Array | None = None
    ) -> Resampled:
        if resample is None:
            num_particles, batch = log_weights.shape[0], log_weights.shape[1:]
            identity = jnp.arange(num_particles, dtype=jnp.int32).reshape((-1,) + (1,) * len(batch))
            ancestors = jnp.broadcast_to(identity, log_weights.shape)
            new = Resampled(particles, log_weights, ancestors, jnp.zeros(batch, bool), jnp.zeros(batch))
        else:
            new = resample(rng_key, log_weights, particles, t, allowed, pivots)
        dead = lax.stop_gradient(new.log_weights) < jnp.log(jnp.finfo(log_weights.dtype).tiny)
        heaviest = jnp.argmax(new.log_weights, axis=0, keepdims=True)

        def replace(leaf: Array) -> Array:
            extra = (1,) * (leaf.ndim - dead.ndim)
            copy = jnp.take_along_axis(lax.stop_gradient(leaf), heaviest.reshape(heaviest.shape + extra), axis=0)
            return jnp.where(dead.reshape(dead.shape + extra), copy, leaf)

        log_weights = jnp.where(dead, -jnp.inf, new.log_weights)
        return new._replace(particles=jax.tree.map(replace, new.particles), log_weights=log_weights)

    return replaced
