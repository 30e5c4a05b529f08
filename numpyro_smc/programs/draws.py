"""One draw per sample site for the whole cloud of particles, although programs are written for a single particle."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.custom_batching import custom_vmap
from numpyro.distributions import (
    DirichletMultinomial,
    Distribution,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    MultinomialLogits,
    MultinomialProbs,
    TransformedDistribution,
)
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.primitives import Messenger

from numpyro_smc.programs.supports import innermost

_MULTINOMIALS = (DirichletMultinomial, MultinomialLogits, MultinomialProbs)


def _batch_size_first(fn: Distribution, is_batched: list[bool], axis_size: int) -> Distribution | None:
    """``fn`` with the particle axis as its leading batch dimension, or ``None`` where NumPyro cannot say."""
    leaves, treedef = jax.tree.flatten(fn)
    leaves = [
        leaf if batched else jnp.broadcast_to(leaf, (axis_size, *jnp.shape(leaf)))
        for leaf, batched in zip(leaves, is_batched, strict=True)
    ]
    try:
        promoted = promote_batch_shape(jax.tree.unflatten(treedef, leaves))
    except NotImplementedError:
        return None
    return promoted if promoted.batch_shape == (axis_size, *fn.batch_shape) else None


def _draw_plain(rng_key: Array, fn: Distribution, index: Array, sample_shape: tuple[int, ...]) -> Array:
    """A draw of ``fn``; under vmap over ``index`` with one key, a single draw of the batched distribution."""

    dtypes = []

    @custom_vmap
    def draw_one(rng_key: Array, fn: Distribution, index: Array) -> Array:
        del index
        value = jnp.asarray(fn.sample(rng_key, sample_shape))
        dtypes.append(value.dtype)
        return value

    @draw_one.def_vmap
    def draw_cloud(axis_size: int, in_batched: Any, rng_key: Array, fn: Distribution, index: Array) -> Any:
        key_batched, fn_batched, _ = in_batched
        is_batched = jax.tree.leaves(fn_batched)
        if not key_batched:
            if not any(is_batched):
                return fn.sample(rng_key, (axis_size, *sample_shape)), True
            promoted = _batch_size_first(fn, is_batched, axis_size)
            if promoted is not None:
                # A batch of multinomials is drawn in floats, one of them in integers.
                values = jnp.asarray(promoted.sample(rng_key, sample_shape), dtypes[0])
                return jnp.moveaxis(values, len(sample_shape), 0), True
            rng_key = jax.vmap(random.fold_in, (None, 0))(rng_key, jnp.arange(axis_size))
        axes = jax.tree.unflatten(jax.tree.structure(fn), [0 if batched else None for batched in is_batched])
        return jax.vmap(lambda key, one: one.sample(key, sample_shape), (0, axes))(rng_key, fn), True

    return draw_one(rng_key, fn, index)


def _hides_parameters(fn: Distribution) -> bool:
    """Whether a distribution has traced parameters that are no leaves of it, as a multinomial's count."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(list(fn.tree_flatten()[1])))


def _sample(rng_key: Array, fn: Distribution, sample_shape: tuple[int, ...]) -> Array:
    """``fn.sample``, which for one multinomial with a traced count draws ``total_count_max`` trials instead.

    NumPyro minds counts of batches only: ``jit(lambda n: Multinomial(n, p, total_count_max=4).sample(key))`` adds up
    to 4 for every ``n``.
    """
    count = vars(fn).get("total_count")
    if not isinstance(fn, _MULTINOMIALS) or not isinstance(count, jax.core.Tracer) or jnp.ndim(count):
        return fn.sample(rng_key, sample_shape)
    batch = copy.copy(fn)
    batch.total_count, batch._batch_shape = count[None], (1,)
    return batch.sample(rng_key, sample_shape).reshape(fn.shape(sample_shape)).astype(int)


def draw(rng_key: Array, fn: Distribution, index: Array, sample_shape: tuple[int, ...] = ()) -> tuple[Array, list[Any]]:
    """One draw of ``fn`` for the particle ``index``, as a single draw for the whole cloud when vmapped over ``index``.

    :param rng_key: key of this site and step, shared by all particles.
    :param fn: distribution of one particle.
    :param index: the particle's number; what ``vmap`` maps over.
    :param sample_shape: shape of extra independent draws.
    :return: the value and, for transformed distributions, the intermediates its ``log_prob`` accepts.
    """
    if isinstance(fn, MaskedDistribution | Independent):
        return draw(rng_key, fn.base_dist, index, sample_shape)
    if isinstance(fn, ExpandedDistribution):
        value, intermediates = fn._sample(
            lambda key, shape: draw(key, fn.base_dist, index, shape), rng_key, sample_shape
        )
        return value, intermediates
    if isinstance(fn, TransformedDistribution) and type(fn).sample is TransformedDistribution.sample:
        value, _ = draw(rng_key, fn.base_dist, index, sample_shape)
        intermediates = []
        for transform in fn.transforms:
            before = value
            value, between = transform.call_with_intermediates(before)
            intermediates.append([before, between])
        return value, intermediates
    if any(isinstance(field, Distribution) for field in vars(fn).values()) or _hides_parameters(fn):
        # A distribution that samples through another one: NumPyro cannot promote the inner batch shape.
        return _sample(random.fold_in(rng_key, index), fn, sample_shape), []
    return _draw_plain(rng_key, fn, index, sample_shape), []


def cannot_be_drawn(name: str, fn: Distribution, user: str | None = None) -> ValueError:
    return ValueError(
        f"{user + ': site' if user else 'Site'} '{name}' is to be drawn, and its distribution, "
        f"{type(innermost(fn)).__name__}, cannot be drawn from. Give it a proper prior, or a value (condition the "
        f"model on it, or params={{'{name}': ...}}; kernels of MCMC take init_params), or sample '{name}' in a guide."
    )


class CloudDraws(Messenger):
    """Give every unobserved site of one particle's program its draw, with one key per site.

    Sites drawn here carry ``"drawn": True`` in their message. Sites whose data end at some step carry ``"given_until"``
    and are drawn from then on. Keys asked for by ``numpyro.prng_key`` differ per particle.

    :param rng_key: key of this step.
    :param index: the particle's number; ``None`` outside any vectorisation over particles (reverse-mode differentiation
        of a draw that was never vmapped needs this).
    """

    def __init__(self, rng_key: Array, index: Array | None = None) -> None:
        super().__init__(None)
        self.rng_key = rng_key
        self.index = index

    def _next_key(self) -> Array:
        self.rng_key, rng_key = random.split(self.rng_key)
        return rng_key

    def _draw(self, rng_key: Array, msg: dict[str, Any], sample_shape: tuple[int, ...]) -> tuple[Array, list[Any]]:
        fn = msg["fn"]
        try:
            if self.index is None and not _hides_parameters(innermost(fn)):
                return fn(rng_key=rng_key, sample_shape=sample_shape, sample_intermediates=True)
            return draw(rng_key, fn, jnp.asarray(0) if self.index is None else self.index, sample_shape)
        except NotImplementedError as error:
            raise cannot_be_drawn(msg["name"], fn) from error

    def process_message(self, msg: dict[str, Any]) -> None:
        # Inside a scan NumPyro has given each step its own key already.
        if msg["type"] == "prng_key" and msg["value"] is None and msg["kwargs"].get("rng_key") is None:
            rng_key = self._next_key()
            msg["value"] = rng_key if self.index is None else random.fold_in(rng_key, self.index)
        elif msg["type"] == "plate" and msg["value"] is None:
            msg["kwargs"]["rng_key"] = self._next_key()
        elif msg["type"] == "sample" and msg["value"] is None:
            sample_shape = msg["kwargs"].get("sample_shape", ())
            rng_key = self._next_key()
            if "given_until" in msg:
                now, end, given = msg["given_until"]
                msg["value"] = lax.cond(
                    now < end,
                    lambda: jnp.broadcast_to(given, sample_shape + msg["fn"].shape()),
                    lambda: self._draw(rng_key, msg, sample_shape)[0].astype(given.dtype),
                )
            else:
                value, intermediates = self._draw(rng_key, msg, sample_shape)
                msg["value"] = value
                msg["intermediates"] = intermediates if isinstance(msg["fn"], TransformedDistribution) else []
                msg["drawn"] = True
