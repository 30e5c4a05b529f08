"""Training of ratio networks: compiled epochs, validation, early stopping, and restarts that lose nothing."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array, random
from tqdm import tqdm

from numpyro_smc.engines.checkpoint import check_folder, identity_of
from numpyro_smc.programs.arguments import check_if_given, check_positive
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.ratio.datasets import RatioData, SimulationData
from numpyro_smc.ratio.description import digest_of
from numpyro_smc.ratio.learning_rates import ConstantRate, LearningRate, learning_rate_schedule
from numpyro_smc.ratio.losses import BalancedLoss, RatioLoss
from numpyro_smc.ratio.masks import MaskLaw, default_mask_law
from numpyro_smc.ratio.ratio_network import RatioNetwork, RatioWeights
from numpyro_smc.ratio.steps import MAX_STEPS_PER_CALL, Batch, Program, as_batch, initial_state, train, validate
from numpyro_smc.ratio.training_checks import check_kinds, check_learned, check_masks, check_number
from numpyro_smc.ratio.training_result import RatioFit, TrainingProgress

__all__ = ["fit"]

_ROWS_FOR_MOMENTS = 2**18


def fit(
    rng_key: Array,
    network: RatioNetwork,
    loss: RatioLoss,
    data: SimulationData,
    *,
    masks: MaskLaw | None = None,
    validation: float | RatioData | None = 0.1,
    batch_size: int = 256,
    max_epochs: int = 100,
    steps_per_epoch: int | None = None,
    learning_rate: float = 3e-3,
    schedule: str | LearningRate | Callable[[Array], Array] = "cosine",
    weight_decay: float = 1e-4,
    clip_norm: float | None = 10.0,
    patience: int | None = 20,
    keep: str = "best",
    weights: RatioWeights | None = None,
    log_weight: Callable[[Array, Array, Array | None, Array | None], Array] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress_bar: bool = True,
) -> RatioFit:
    r"""Train a ratio network on simulations, with AdamW.

    * **Compiled once.** Another call with the same network, loss and shapes compiles nothing.
    * **Validation** uses the same masks and contrasts in every epoch, so that epochs differ by their weights alone.
    * **Non-finite steps are skipped**: one whose loss or gradient is not finite changes nothing. All are counted.
    * **Ctrl-C** ends the training and returns the best epoch so far.
    * **Restarts are exact.** With ``checkpoint``, the same call continues after the last finished epoch, and ends with
      the numbers of an uninterrupted run (on the same machine) to the bit; with a larger ``max_epochs`` it goes on.

    Cost: per step, one evaluation and gradient of the trunk per row and contrast (see the loss), one of the embedding
    per row.

    :param rng_key: random key.
    :param network: the network.
    :param loss: such as :class:`~numpyro_smc.ratio.losses.ContrastiveLoss`.
    :param data: simulations; those in memory stay on the device.
    :param masks: law of the masks, one a row, if the network has masks; by default uniform masks of up to eight
        parameters, and masks of one, two or all of more.
    :param validation: simulations to validate on, or their part of ``data``; ``None`` to watch the training loss.
    :param batch_size: rows of a step.
    :param max_epochs: number of epochs, over which a cosine schedule falls.
    :param steps_per_epoch: by default those of one pass over the data, rows that fill no batch left out.
    :param learning_rate: of the first epoch. Thin posteriors are learned late: on two moons a rate of 0.001 ends at a
        C2ST of
        0.79 where 0.003 ends at 0.56, at equal cost.
    :param schedule: ``"constant"``, ``"cosine"``, ``"plateau"``, a
        :class:`~numpyro_smc.ratio.learning_rates.LearningRate`, or an optax schedule, a function of the step, by whose
        values ``learning_rate`` is multiplied.
    :param weight_decay: of AdamW, on all trained weights.
    :param clip_norm: largest global norm of the gradient; ``None`` for no limit.
    :param patience: epochs without a better validation loss before the training ends; ``None`` for no such end.
    :param keep: the weights returned: of the ``"best"`` epoch, or of the ``"last"``.
    :param weights: to start from; their standardisation is kept.
    :param log_weight: ``log_weight(theta, x, mask, context)``: log weights of the marginal class, ``theta`` being
        ``[1, B, D]``, with :class:`~numpyro_smc.ratio.losses.BinaryLoss` only. With the log ratio of another estimator,
        the trained network learns what that one lacks.
    :param checkpoint: file written after every epoch, from which the same call continues.
    :param progress_bar: show epochs and losses.
    :return: a :class:`~numpyro_smc.ratio.training_result.RatioFit`.
    :raises ValueError: if an argument makes no sense, there are too few simulations for a batch, a batch has too few
        rows for the loss, or ``checkpoint`` is of another training.
    :raises FloatingPointError: if no epoch had a finite loss.

    **Example**

    .. doctest::

        >>> from jax import numpy as jnp, random
        >>> from numpyro_smc.ratio.datasets import RatioData
        >>> from numpyro_smc.ratio.losses import BinaryLoss
        >>> from numpyro_smc.ratio.networks import mlp
        >>> from numpyro_smc.ratio.ratio_network import RatioNetwork
        >>> from numpyro_smc.ratio.training import fit
        >>> theta = random.normal(random.key(0), (2000, 1))
        >>> x = theta + 0.5 * random.normal(random.key(1), (2000, 1))
        >>> network = RatioNetwork(size=1, trunk=mlp(width=16, num_layers=1))
        >>> data = RatioData(theta, x)
        >>> result = fit(random.key(2), network, BinaryLoss(), data, max_epochs=10, progress_bar=False)
        >>> log_ratios = network.log_ratio(result.weights, jnp.array([[1.0], [-1.0]]), jnp.array([1.0]))
        >>> bool(log_ratios[0] > 0 > log_ratios[1])
        True
    """
    rng_key = one_key("fit", rng_key)
    check_positive("fit", batch_size=batch_size, max_epochs=max_epochs)
    check_if_given("fit", steps_per_epoch=steps_per_epoch, patience=patience)
    check_number("learning_rate", learning_rate, may_be_zero=True)
    check_number("weight_decay", weight_decay, may_be_zero=True)
    if clip_norm is not None:
        check_number("clip_norm", clip_norm, remedy="None is for no limit.")
    check_kinds(network=network, loss=loss, data=data, masks=masks, validation=validation, weights=weights)
    if keep not in ("best", "last"):
        raise ValueError(f"fit: keep must be 'best' or 'last', got {keep!r}.")
    if masks is not None and not network.has_masks:
        raise ValueError("fit: masks are given, but the network has none; build it with has_masks=True.")
    if network.has_masks and masks is None:
        masks = default_mask_law(network.size)
    if masks is not None:
        check_masks(masks, network.size)
    rule, step_rate = _rule_and_step_rate(schedule)
    program = Program(network, loss, masks, batch_size, weight_decay, clip_norm, log_weight, step_rate)

    init_key, split_key, epochs_key, validation_key = random.split(rng_key, 4)
    held_out = validation if isinstance(validation, RatioData) else None
    if validation is not None and not isinstance(validation, RatioData):
        data, held_out = data.split(split_key, validation)
    if data.num_batches(batch_size) == 0:
        raise ValueError(
            f"fit: batch_size={batch_size} is more than the {len(data)} simulations to train on; lower it."
        )
    num_steps = steps_per_epoch or data.num_batches(batch_size)
    start = None if weights is None else identity_of("", weights).tobytes().hex()
    if weights is None:
        some = data.first(_ROWS_FOR_MOMENTS)
        weights = network.init(init_key, some.theta, some.x, some.context)
    standardization = weights.standardization
    validated = None if held_out is None else _Validation(program, held_out, validation_key)

    progress = TrainingProgress(initial_state(program, weights.trained), weights.trained)
    check_folder("fit", checkpoint)
    settings: dict[str, Any] = {}
    if checkpoint is not None:
        settings = _settings(rng_key, program, data, held_out, num_steps, learning_rate, rule, max_epochs, start)
        if os.path.exists(checkpoint):
            progress = progress.load(checkpoint, settings)
    epochs = _Epochs(program, standardization, data, num_steps, num_steps * max_epochs)

    ending = "all of them"
    with tqdm(total=max_epochs, initial=len(progress.table), unit="epoch", disable=not progress_bar) as bar:
        try:
            while len(progress.table) < max_epochs:
                monitored = progress.monitored
                if patience is not None and monitored and len(monitored) - progress.best_epoch >= patience:
                    ending = f"{patience} without a better loss"
                    break
                rate = rule.rate(learning_rate, monitored, max_epochs)
                if rate is None:
                    ending = "lowest learning rate"
                    break
                started, number = time.perf_counter(), len(progress.table)
                state, row = epochs.run(progress.state, random.fold_in(epochs_key, number), rate)
                if validated is not None:
                    row |= validated.run(standardization, state.trained)
                shown_rate = rate if step_rate is None else rate * float(step_rate(state.step - 1))
                row = {"epoch": number + 1, **row, "learning_rate": shown_rate}
                progress = progress.followed_by(state, row | {"seconds": time.perf_counter() - started})
                if checkpoint is not None:
                    progress.save(checkpoint, settings)
                bar.update()
                shown = {name: f"{row[name]:.4g}" for name in ("loss", "validation_loss") if name in row}
                bar.set_postfix(shown | {"best": progress.best_epoch})
        except KeyboardInterrupt:
            if not progress.table:
                raise
            ending = "interrupted"
    check_learned(progress.monitored, keep, program, learning_rate)
    chosen = progress.best if keep == "best" else progress.state.trained
    return RatioFit(RatioWeights(chosen, standardization), list(progress.table), progress.best_epoch, ending)


def _rule_and_step_rate(schedule: Any) -> tuple[LearningRate, Callable[[Array], Array] | None]:
    if isinstance(schedule, str):
        return learning_rate_schedule(schedule), None
    return (schedule, None) if isinstance(schedule, LearningRate) else (ConstantRate(), schedule)


class _Epochs:
    """Epochs of steps, in calls short enough for Ctrl-C to be heard within about a second."""

    def __init__(
        self, program: Program, standardization: Any, data: SimulationData, num_steps: int, num_planned: int
    ) -> None:
        self.program, self.standardization, self.data = program, standardization, data
        self.num_steps, self.num_planned = num_steps, np.float32(num_planned)
        self.steps_per_call, self.has_warned = 1, False
        self.latest: tuple[RatioData, Batch] | None = None

    def run(self, state: Any, rng_key: Array, rate: float) -> tuple[Any, dict[str, float]]:
        losses, kept, done = np.empty(0), np.empty(0, bool), 0
        while done < self.num_steps:
            done_before = done
            chunks_key, steps_key = random.split(random.fold_in(rng_key, done))
            for number, chunk in enumerate(self.data.chunks(chunks_key)):
                chunk_key = random.fold_in(steps_key, number)
                num = min(len(chunk) // self.program.batch_size, self.num_steps - done)
                state, chunk_losses, chunk_kept = self._chunk(state, chunk, chunk_key, np.float32(rate), num)
                losses, kept, done = np.append(losses, chunk_losses), np.append(kept, chunk_kept), done + num
                if done == self.num_steps:
                    break
            if done == done_before:
                raise ValueError(
                    f"fit: no chunk of the data has batch_size={self.program.batch_size} simulations that are finite; "
                    f"lower it, or raise the chunks' size."
                )
        if not kept.all() and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"fit: {(~kept).sum()} of {len(kept)} steps had a non-finite loss or gradient and were skipped; such "
                f"steps are counted in RatioFit.num_skipped.",
                stacklevel=3,
            )
        good = losses[np.isfinite(losses)]
        row = {"loss": math.nan, "loss_sd": math.nan}
        if len(good):
            row = {"loss": float(good.mean()), "loss_sd": float(good.std())}
        return state, row | {"num_skipped": int((~kept).sum())}

    def _chunk(self, state: Any, chunk: RatioData, rng_key: Array, rate: Any, num: int) -> tuple:
        if self.latest is None or self.latest[0] is not chunk:
            self.latest = chunk, as_batch(chunk)
        order_key, steps_key = random.split(rng_key)
        order, done = random.permutation(order_key, len(chunk)), 0
        losses, kept = np.empty(num), np.empty(num, bool)
        while done < num:
            stop, started = min(num, done + self.steps_per_call), time.perf_counter()
            state, new_losses, new_kept = train(
                self.program,
                self.standardization,
                state,
                self.latest[1],
                order,
                steps_key,
                rate,
                self.num_planned,
                np.int32(done),
                np.int32(stop),
            )
            losses[done:stop], kept[done:stop] = new_losses[: stop - done], new_kept[: stop - done]
            elapsed = time.perf_counter() - started
            if elapsed < 0.25:
                self.steps_per_call = min(2 * self.steps_per_call, MAX_STEPS_PER_CALL)
            elif elapsed > 1.0:
                self.steps_per_call = max(self.steps_per_call // 2, 1)
            done = stop
        return state, losses, kept


class _Validation:
    """The loss of held-out simulations."""

    def __init__(self, program: Program, data: RatioData, rng_key: Array) -> None:
        self.program, self.rng_key, self.batch = program, rng_key, as_batch(data)
        self.num_batches = math.ceil(len(data) / program.batch_size)
        if len(data) // self.num_batches < program.loss.smallest_batch:
            raise ValueError(
                f"fit: validation has {len(data)} simulations, too few for batches of at least "
                f"{program.loss.smallest_batch} rows, which the loss needs. Hold out more, or lower num_classes."
            )

    def run(self, standardization: Any, trained: Any) -> dict[str, float]:
        losses = np.asarray(
            validate(self.program, standardization, trained, self.batch, self.rng_key, self.num_batches), np.float64
        )
        return {"validation_loss": float(losses.mean()), "validation_loss_sd": float(losses.std())}


def _settings(
    rng_key: Array,
    program: Program,
    data: SimulationData,
    held_out: RatioData | None,
    num_steps: int,
    learning_rate: float,
    rule: LearningRate,
    max_epochs: int,
    start: str | None,
) -> dict[str, Any]:
    """What a checkpoint must have been written with."""
    network = program.network
    has_horizon = isinstance(program.loss, BalancedLoss) or not isinstance(rule, ConstantRate)
    has_horizon |= program.step_rate is not None
    architecture = (network.trunk, network.embedding, network.has_masks, network.marginals, network.context_size)
    return {
        "random key": np.asarray(random.key_data(rng_key)).tolist(),
        "network": digest_of(*architecture, network.size, network.log_parameters, network.standardize_x),
        "initial weights": start,
        "loss": digest_of(program.loss),
        "masks": digest_of(program.masks),
        "log_weight": digest_of(program.log_weight),
        "batch_size": program.batch_size,
        "weight_decay": program.weight_decay,
        "clip_norm": program.clip_norm,
        "steps_per_epoch": num_steps,
        "learning_rate": learning_rate,
        "schedule": digest_of(rule, program.step_rate),
        "max_epochs (which the schedule depends on)": max_epochs if has_horizon else None,
        "simulations": data.digest(),
        "validation": None if held_out is None else held_out.digest(),
    }
