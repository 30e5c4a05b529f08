"""The compiled programs of a training: some steps over batches of a chunk of simulations, and the validation loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax, random

from numpyro_smc.ratio.datasets import RatioData
from numpyro_smc.ratio.losses import RatioLoss
from numpyro_smc.ratio.masks import MaskLaw
from numpyro_smc.ratio.ratio_network import RatioNetwork, RatioWeights, Standardization

__all__ = ["MAX_STEPS_PER_CALL", "Batch", "Program", "TrainingState", "as_batch", "initial_state", "train", "validate"]

MAX_STEPS_PER_CALL = 1024


class Batch(NamedTuple):
    """Simulations on the device."""

    theta: Array
    x: Array
    context: Array | None


class TrainingState(NamedTuple):
    """What a step changes.

    :ivar trained: weights of the network that are trained.
    :ivar moments: of the optimiser.
    :ivar step: number of steps taken, those that were skipped included.
    """

    trained: dict[str, Any]
    moments: Any
    step: Array


@dataclass(frozen=True)
class Program:
    """What is the same in all steps, and decides what is compiled.

    :ivar log_weight: ``(theta, x, mask, context)`` to log weights of the marginal class.
    :ivar step_rate: from the step to a factor of the learning rate.
    """

    network: RatioNetwork
    loss: RatioLoss
    masks: MaskLaw | None
    batch_size: int
    weight_decay: float
    clip_norm: float | None
    log_weight: Callable[..., Array] | None = None
    step_rate: Callable[[Array], Array] | None = None

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW without its rate, which the caller changes from epoch to epoch."""
        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(clip, optax.scale_by_adam(), optax.add_decayed_weights(self.weight_decay))

    def batch_loss(
        self, trained: Any, standardization: dict[str, Standardization], batch: Batch, rng_key: Array, progress: Array
    ) -> Array:
        """The loss of one batch, with masks and contrasts of the key."""
        weights = RatioWeights(trained, standardization)
        mask_key, contrast_key = random.split(rng_key)
        mask = None if self.masks is None else self.masks.sample(mask_key, *batch.theta.shape)
        features = self.network.features(weights, batch.x, batch.context)
        log_ratio = partial(self.network.log_ratio_of_features, weights)
        log_weight = None
        if self.log_weight is not None:
            given = self.log_weight

            def log_weight(theta: Array) -> Array:
                return lax.stop_gradient(given(theta, batch.x, mask, batch.context))

        return self.loss(contrast_key, log_ratio, batch.theta, features, mask, progress, log_weight)


def as_batch(data: RatioData) -> Batch:
    """Simulations on the device, in its floating-point precision."""
    context = None if data.context is None else jnp.asarray(data.context, float)
    return Batch(jnp.asarray(data.theta, float), jnp.asarray(data.x, float), context)


def initial_state(program: Program, trained: Any) -> TrainingState:
    return TrainingState(trained, program.optimizer().init(trained), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames="program")
def train(
    program: Program,
    standardization: dict[str, Standardization],
    state: TrainingState,
    chunk: Batch,
    order: Array,
    rng_key: Array,
    rate: Array,
    num_planned: Array,
    start: Array,
    stop: Array,
) -> tuple[TrainingState, Array, Array]:
    """Steps over batches ``start`` to ``stop`` of a chunk, at most :data:`MAX_STEPS_PER_CALL`.

    :param order: of the rows, ``[n]``.
    :param rng_key: of the chunk; step ``i`` uses the key folded with ``i``.
    :param rate: learning rate.
    :param num_planned: steps of the whole training, for the progress.
    :return: the state; losses and whether each step was kept, ``[MAX_STEPS_PER_CALL]``. A step whose loss or gradient
        is not finite changes nothing.
    """
    optimizer = program.optimizer()

    def step(i: Array, carry: tuple[TrainingState, Array, Array]) -> tuple[TrainingState, Array, Array]:
        state, losses, kept = carry
        rows = lax.dynamic_slice_in_dim(order, i * program.batch_size, program.batch_size)
        batch = jax.tree.map(lambda values: values[rows], chunk)
        progress = state.step / num_planned
        arguments = (standardization, batch, random.fold_in(rng_key, i), progress)
        loss, gradient = jax.value_and_grad(program.batch_loss)(state.trained, *arguments)
        updates, moments = optimizer.update(gradient, state.moments, state.trained)
        scale = -rate if program.step_rate is None else -rate * program.step_rate(state.step)
        trained = jax.tree.map(lambda value, update: value + scale * update, state.trained, updates)
        squares = [jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient)]
        keep = jnp.isfinite(loss) & jnp.isfinite(jnp.stack(squares).sum())
        old, new = (state.trained, state.moments), (trained, moments)
        trained, moments = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
        state = TrainingState(trained, moments, state.step + 1)
        return state, losses.at[i - start].set(loss), kept.at[i - start].set(keep)

    blank = jnp.zeros(MAX_STEPS_PER_CALL), jnp.ones(MAX_STEPS_PER_CALL, bool)
    return lax.fori_loop(start, stop, step, (state, *blank))


@partial(jax.jit, static_argnames=("program", "num_batches"))
def validate(
    program: Program,
    standardization: dict[str, Standardization],
    trained: Any,
    data: Batch,
    rng_key: Array,
    num_batches: int,
) -> Array:
    """Losses of ``num_batches`` equal batches of the data, ``[num_batches]``; a few rows may be left over."""
    size = len(data.theta) // num_batches
    batches = jax.tree.map(lambda a: a[: size * num_batches].reshape(num_batches, size, *a.shape[1:]), data)

    def loss(arguments: tuple[Array, Batch]) -> Array:
        i, batch = arguments
        return program.batch_loss(trained, standardization, batch, random.fold_in(rng_key, i), jnp.ones(()))

    return lax.map(loss, (jnp.arange(num_batches), batches))
