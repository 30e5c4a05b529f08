"""Training and evaluation on the Hodgkin-Huxley neuron: several initial currents in one compiled program."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax, random
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from benchmarks.hodgkin_huxley_losses import Batches, RatioLoss
from models import hodgkin_huxley as hh
from models import hodgkin_huxley_guides as guides
from numpyro_smc import FIVO, SIXO, FitResult, alternating, bootstrap, fit


class Method(NamedTuple):
    """A bound and its guide."""

    proposal: str
    twisted: bool
    hold_prior: bool = True


#: As published, and with bootstrap proposals that are held: no gradient goes to the current through them.
METHODS = {
    "fivo-bootstrap": Method("bootstrap", False, hold_prior=False),
    "fivo-bootstrap-held": Method("bootstrap", False),
    "fivo-filtering": Method("filtering", False),
    "sixo-bootstrap": Method("bootstrap", True, hold_prior=False),
    "sixo-bootstrap-held": Method("bootstrap", True),
    "sixo-smoothing": Method("smoothing", True),
}


def make_data(seed: int, num_series: int, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """States and observations of the model at the true current; observations that no model sees are zero."""
    x, y = hh.simulate(random.key(seed), num_series, hh.make_model(**settings))
    subsample = settings.get("subsample", hh.SUBSAMPLE)
    seen = np.arange(y.shape[1]) % subsample == 0
    return x, np.where(seen[:, None], y, 0.0)


def build(method: str, options: argparse.Namespace, seed: int, fixed: Any = None, **settings: Any) -> SVI:
    """The method's :class:`SVI`, whose loss takes ``(data, params)``.

    :param fixed: the ``params`` that the loss will be called with.
    """
    proposal, twisted, hold_prior = METHODS[method]
    model = hh.make_model(**settings)
    guide = guides.make_guide(
        proposal,
        "learned" if twisted else "none",
        random.key(1000 + seed),
        residual=options.residual,
        hold_prior=hold_prior,
        init_log_scale=options.init_log_scale,
        width=options.mlp_size,
        hidden_size=options.rnn_size,
        **{name: value for name, value in settings.items() if name != "noise"},
    )
    rate = schedule(options.lr, options.final_lr, options.milestones, options.num_train_steps)
    of_current = optax.chain(optax.clip(options.clip), optax.adam(rate))
    optim: Any = optax.multi_transform(
        {"current": of_current, "network": optax.adam(options.proposal_lr)}, label_parameters
    )
    particles = options.num_train_particles
    if not twisted:
        return SVI(model, guide, optim, Batches(FIVO(particles), options.batch_size))
    num_steps, subsample = settings.get("num_steps", hh.NUM_STEPS), settings.get("subsample", hh.SUBSAMPLE)
    compartments = settings.get("num_compartments", 1)
    twist = guides.learned_twist(random.key(0), num_steps, compartments, subsample, options.mlp_size, options.rnn_size)
    ratio_loss = RatioLoss(
        model,
        twist,
        num_series=options.num_tilt_series,
        num_uses=options.num_tilt_uses,
        size=options.tilt_batch_size,
        num_times=options.num_tilt_times,
        last=(num_steps - 1) // subsample * subsample,
        subsample=subsample,
        fixed=fixed,
    )
    twist_rate = schedule(options.tilt_lr, options.final_tilt_lr, options.tilt_milestones, twist_steps(options))
    turns = {"num_steps": options.inner_steps[0], "num_twist_steps": options.inner_steps[1]}
    optim = alternating(optim, optax.adam(twist_rate), **turns)
    return SVI(model, guide, optim, Batches(SIXO(particles), options.batch_size, ratio_loss))


def schedule(rate: float, final_rate: float, milestones: list[int], num_steps: int) -> optax.Schedule:
    """Halved at each milestone if there are any, as published; else a cosine from the first rate to the last."""
    if milestones:
        return optax.piecewise_constant_schedule(rate, {step: 0.5 for step in milestones})
    return optax.cosine_decay_schedule(rate, num_steps, final_rate / rate)


def twist_steps(options: argparse.Namespace) -> int:
    """Steps of the twist among ``num_train_steps`` of the model."""
    turns = options.inner_steps
    return max(options.num_train_steps // turns[0] * turns[1], 1)


def label_parameters(params: Mapping[str, Any]) -> dict[str, Any]:
    """The optimiser of each parameter: the current's, or the networks'."""
    return {
        name: jax.tree.map(lambda _, name=name: "current" if name == "current" else "network", value)
        for name, value in params.items()
    }


def start(svi: SVI, rng_key: Array, y: Array, currents: list[float] | None, fixed: Any = None) -> SVIState:
    """The initial state: one replicate per current, networks alike; without currents one replicate."""
    init_key, key = random.split(rng_key)
    params = svi.get_params(svi.init(init_key, y, fixed))
    size = 1 if currents is None else len(currents)
    stacked = jax.tree.map(lambda value: jnp.repeat(value[None], size, 0), params)
    if currents is not None:
        stacked["current"] = jnp.asarray(currents, jnp.float32)
    ratio_loss = svi.loss.ratio_loss
    pool_key, key = random.split(key)
    pool = None if ratio_loss is None else {"pool": ratio_loss.draw(random.split(pool_key, size), stacked)}
    return SVIState(svi.optim.init(stacked), pool, key)


def train(
    svi: SVI,
    seed: int,
    num_steps: int,
    data: Array,
    currents: list[float] | None,
    options: argparse.Namespace,
    checkpoint: Path,
    fixed: Any = None,
) -> FitResult:
    """Train all replicates for ``num_steps`` steps of the model, and as many of the twist as belong to them.

    ``FitResult.evaluations`` holds each replicate's current and bound on the same few series. Ctrl-C ends the program;
    the checkpoint is taken up by the same call.
    """
    turns = options.inner_steps
    is_twisted = isinstance(svi.loss.loss_of_series, SIXO)
    total = num_steps // turns[0] * sum(turns) + num_steps % turns[0] if is_twisted else num_steps

    @jax.jit
    def bounds(params: dict[str, Any], key: Array) -> Array:
        few = data[: options.num_curve_series]
        return lax.map(lambda one: own_bounds(svi, one, few, key, 1, fixed).mean(), params)

    def evaluate(params: dict[str, Any], key: Array) -> dict[str, float]:
        values = {f"bound {i}": float(value) for i, value in enumerate(bounds(params, key))}
        if currents is not None:
            values |= {f"current {i}": float(value) for i, value in enumerate(params["current"])}
        return values

    result = fit(
        svi,
        random.key(seed),
        min(total, options.stop_after or total),
        data,
        fixed,
        init_state=start(svi, random.key(seed), data[0], currents, fixed),
        progress_bar=not options.no_progress,
        checkpoint=checkpoint,
        checkpoint_every=max(total // 20, 1),
        evaluate=evaluate,
        evaluate_every=max(total // options.num_curve_points, 1),
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def own_bounds(svi: SVI, params: Any, data: Array, rng_key: Array, num_keys: int, fixed: Any = None) -> Array:
    """The bound that a method trains, of one replicate: ``[num_keys, series]``."""
    loss = svi.loss.loss_of_series

    def one(key: Array) -> Array:
        keys = random.split(key, len(data))
        return -jax.vmap(lambda key, y: loss.loss(key, params, svi.model, svi.guide, y, fixed))(keys, data)

    return lax.map(one, random.split(rng_key, num_keys))


def filter_evidences(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    params: Any,
    data: Array,
    num_particles: int,
    num_keys: int,
    fixed: Any = None,
    twisted: bool = False,
) -> np.ndarray:
    """Log evidences by a particle filter, ``[num_keys, series]``: of the model alone, or with a guide."""
    loss = SIXO(num_particles) if twisted else FIVO(num_particles)
    guide = bootstrap(model) if guide is None else guide

    @jax.jit
    def all_series(params: Any, data: Array, key: Array) -> Array:
        keys = random.split(key, len(data))
        return lax.map(
            lambda pair: -loss.loss(pair[0], params, model, guide, pair[1], fixed), (keys, data), batch_size=8
        )

    keys = random.split(random.key(17), num_keys)
    return np.stack([np.asarray(all_series(params, data, key)) for key in keys])
