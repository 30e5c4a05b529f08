"""Losses of training on the Hodgkin-Huxley neuron: of replicates side by side, and of the density ratios of twists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers
from numpyro.infer.elbo import ELBO

from numpyro_smc.engines.alternation import current_phase


class Pool(NamedTuple):
    """Series simulated to train the twist on: a first axis for replicates of the parameters, then one for series."""

    x: Array  # [R, S, T, 4 C]
    seen: Array  # observations that the model sees, [R, S, K, C]
    uses: Array  # steps of the twist taken with them


class Batches(ELBO):
    """A loss of several replicates of the parameters, each averaged over a batch of series drawn with replacement.

    :param ratio_loss: in steps that train the twist.
    """

    def __init__(self, loss: ELBO, size: int, ratio_loss: RatioLoss | None = None) -> None:
        super().__init__(num_particles=loss.num_particles)
        self.loss_of_series = loss
        self.size = size
        self.ratio_loss = ratio_loss
        self.can_infer_discrete = loss.can_infer_discrete

    def loss_with_mutable_state(
        self, rng_key: Array, param_map: Any, model: Any, guide: Any, data: Array, params: Any = None
    ) -> Any:
        """The sum over replicates; ``param_map`` has them on its leading axes, ``data`` is ``[series, T, C]``.

        The mutable state ``"pool"`` holds the :class:`Pool` of ``ratio_loss``, which steps of the model throw away.
        """
        pool = param_map.get("pool")
        replicates = {name: value for name, value in param_map.items() if name != "pool"}
        keys = random.split(rng_key, len(jax.tree.leaves(replicates)[0]))

        def bound_step(replicates: Any, pool: Any) -> tuple[Array, Any]:
            def one(key: Array, replicate: Any) -> Array:
                batch_key, key = random.split(key)
                batch = data[random.randint(batch_key, (self.size,), 0, len(data))]
                losses = jax.vmap(lambda key, y: self.loss_of_series.loss(key, replicate, model, guide, y, params))
                return jnp.mean(losses(random.split(key, self.size), batch))

            loss = jnp.sum(jax.vmap(one)(keys, hold(replicates, of_twist=True)))
            return loss, None if pool is None else pool._replace(uses=jnp.zeros_like(pool.uses))

        phase = current_phase()
        if self.ratio_loss is None or phase is None:
            loss, pool = bound_step(replicates, pool)
        else:
            twist_step = partial(self.ratio_loss, keys)
            loss, pool = lax.cond(phase, twist_step, bound_step, replicates, pool)
        return {"loss": loss, "mutable_state": None if pool is None else {"pool": pool}}


def hold(params: Mapping[str, Any], of_twist: bool) -> dict[str, Any]:
    """The parameters, without gradient for those of the twist, or for all others."""
    return {
        name: lax.stop_gradient(value) if name.startswith("twist") == of_twist else value
        for name, value in params.items()
    }


@dataclass(frozen=True)
class RatioLoss:
    """The density-ratio loss of :class:`numpyro_smc.SIXO`, of some simulated series at random steps of each.

    To simulate costs more than a step of the twist: a pool of series serves several steps. Neighbouring states say much
    the same, so a step takes few of each series. Negatives are latents of another series.

    :param num_series: simulated series in the pool.
    :param num_uses: steps of the twist before the pool is drawn anew.
    :param size: series per step, drawn without replacement.
    :param num_times: steps of each of them, drawn with replacement.
    :param last: the twist counts before this step.
    """

    model: Callable[..., Any]
    build_twist: Callable[[Array, Array], Any]
    num_series: int
    num_uses: int
    size: int
    num_times: int
    last: int
    subsample: int
    fixed: Any = None

    def __call__(self, keys: Array, replicates: Any, pool: Pool) -> tuple[Array, Pool]:
        """The sum over replicates, and the pool it used."""
        replicates = hold(replicates, of_twist=False)
        keys, pool_keys = jax.vmap(random.split, out_axes=1)(keys)
        pool = lax.cond(
            pool.uses % self.num_uses == 0, lambda pool: self.draw(pool_keys, replicates), lambda pool: pool, pool
        )
        losses = jax.vmap(self.of_replicate)(keys, replicates, pool.x, pool.seen)
        return jnp.sum(losses), pool._replace(uses=pool.uses + 1)

    def draw(self, keys: Array, replicates: Any) -> Pool:
        """A pool that nothing has used."""

        def one(key: Array, of_model: Any) -> Any:
            with handlers.block():
                return handlers.seed(self.model, key)(None, of_model)

        def of_replicate(key: Array, replicate: Any) -> Any:
            of_model = self.fixed if self.fixed is not None else {"current": replicate["current"]}
            return jax.vmap(one, (0, None))(random.split(key, self.num_series), of_model)

        x, y = lax.stop_gradient(jax.vmap(of_replicate)(keys, replicates))
        return Pool(x, y[:, :, :: self.subsample], jnp.zeros((), jnp.int32))

    def of_replicate(self, rng_key: Array, params: Any, x: Array, seen: Array) -> Array:
        """The loss of one replicate, of a pool ``x`` and ``seen``."""

        def logits(key: Array, positive: Array, negative: Array, seen: Array) -> Any:
            times = random.randint(key, (self.num_times,), 0, self.last)
            with handlers.block(), handlers.substitute(data=params):
                inputs, log_twist = self.build_twist(seen, times)
            return [jax.vmap(log_twist)(path[times], inputs) for path in (positive, negative)]

        series_key, time_key = random.split(rng_key)
        series = random.permutation(series_key, self.num_series)[: self.size]
        others = jnp.roll(series, 1)
        positive, negative = jax.vmap(logits)(random.split(time_key, self.size), x[series], x[others], seen[series])
        return jnp.mean(jax.nn.softplus(-positive) + jax.nn.softplus(negative))
