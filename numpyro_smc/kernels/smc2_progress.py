"""A run of SMC2 so far, what is recorded of each step, and its file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

from numpyro_smc.engines.checkpoint import AnyLength, as_text, load_run, save_run
from numpyro_smc.engines.identity import Identity
from numpyro_smc.kernels.smc2_stages import SMC2State

#: Levels of the quantiles of parameters that are recorded at every step.
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


class StepReport(NamedTuple):
    """What a step did: numbers only.

    - **increment** - of the log evidence. **ess** - of the parameters, after weighing.
    - **acceptance** - mean acceptance probability of the moves; not a number if there were none.
    - **num_state_particles** - after the step.
    """

    increment: float
    ess: float
    acceptance: float
    num_state_particles: int


class Summary(NamedTuple):
    """The posterior after a step: of the parameters, and of the last step's sites, over both layers of weights.

    - **mean**, **deviation** - by site. **quantiles** - of the parameters, at :data:`LEVELS`: ``[levels, ...]``.
    """

    mean: dict[str, Array]
    deviation: dict[str, Array]
    quantiles: dict[str, Array]


@dataclass(frozen=True)
class Progress:
    """Everything a restart needs. Immutable, so that Ctrl-C finds all or nothing of a step.

    :ivar rng_key: of the whole run; what a step draws depends on it and on the step's number alone.
    :ivar state: the particles.
    :ivar history: a :class:`StepReport` and a :class:`Summary` a step, raveled: ``[steps, entries]``.
    """

    rng_key: Array
    state: SMC2State
    history: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.history)

    @property
    def num_state_particles(self) -> int:
        return self.state.particles.filtered.particles.log_weights.shape[1]

    @property
    def log_evidence(self) -> float:
        return float(np.sum(self.column("increment")))

    def column(self, name: str) -> np.ndarray:
        return self.history[:, StepReport._fields.index(name)]

    def summaries(self) -> Summary:
        """The summaries of all steps, with a leading time axis."""
        unravel = ravel_pytree(_blank(jax.eval_shape(summarise, self.state)))[1]
        rows = jnp.asarray(self.history[:, len(StepReport._fields) :], self.state.log_weights.dtype)
        return jax.vmap(unravel)(rows)

    def extended(self, state: SMC2State, report: StepReport) -> Progress:
        """One step further."""
        row = np.concatenate([np.asarray(report, np.float64), np.asarray(_raveled(state), np.float64)])
        return Progress(self.rng_key, state, np.concatenate([self.history.reshape(-1, len(row)), row[None]]))

    def save(self, path: str | os.PathLike, settings: str, of: Identity) -> None:
        contents = {
            "key kind": as_text(str(random.key_impl(self.rng_key))),
            "key": random.key_data(self.rng_key).ravel(),
            "num_state_particles": self.num_state_particles,
            "num_steps": self.num_steps,
            "history": np.ravel(self.history),
            "state": [np.ravel(leaf) for leaf in jax.tree.leaves(self.state)],
        }
        save_run(path, settings, contents, of)


def load_progress(path: str | os.PathLike, settings: str, outline: Any, of: Any, user: str) -> Progress:
    """The run saved in ``path``, by the same sampler.

    :param outline: number of state particles to the shapes of a state of the program at hand.
    :param of: number of steps taken in to what the run must be of.
    :raises ValueError: if the file is of another program or sampler.
    """
    advice = "Pass the sampler and the model's arguments that wrote it, or another file."
    like = {
        "key kind": AnyLength("uint8"),
        "key": AnyLength("uint32"),
        "num_state_particles": 0,
        "num_steps": 0,
        "history": AnyLength("float64"),
        "state": [AnyLength(leaf.dtype) for leaf in jax.tree.leaves(outline(1))],
    }
    contents = load_run(path, settings, like, lambda contents: of(contents["num_steps"]), user, advice)
    leaves, treedef = jax.tree.flatten(outline(contents["num_state_particles"]))
    for value, leaf in zip(contents["state"], leaves, strict=True):
        if value.size != leaf.size:
            raise ValueError(f"{user}: checkpoint '{os.fspath(path)}' is of another model. {advice}")
    state = [jnp.asarray(value.reshape(leaf.shape)) for value, leaf in zip(contents["state"], leaves, strict=True)]
    kind = contents["key kind"].tobytes().decode()
    rng_key = random.wrap_key_data(jnp.asarray(contents["key"]), impl=kind)
    history = contents["history"].reshape(contents["num_steps"], -1 if contents["num_steps"] else 0)
    return Progress(rng_key, jax.tree.unflatten(treedef, state), history)


@jax.jit
def summarise(state: SMC2State) -> Summary:
    """The posterior of parameters and of the last step's sites."""
    particles, log_weights = state
    weights = jax.nn.softmax(log_weights)
    parameters = particles.parameters
    deep = jnp.exp(particles.filtered.particles.log_weights)
    shares = weights.reshape((-1,) + (1,) * (deep.ndim - 1)) * deep / deep.shape[1]
    mean, deviation = {}, {}
    for name, values in parameters.items():
        mean[name], deviation[name] = _moments(values, weights, (0,))
    for name, values in last_states(particles.filtered.values, deep).items():
        mean[name], deviation[name] = _moments(values, shares, (0, 1))
    return Summary(mean, deviation, {name: _quantiles(values, weights) for name, values in parameters.items()})


def last_states(values: dict[str, Array], log_weights: Array) -> dict[str, Array]:
    """Those sites of a step that belong to its independent problems, as its weights do.

    :param log_weights: of the state particles, ``[N, M, *batch]``.
    """
    batch = log_weights.shape[2:]
    return {name: value for name, value in values.items() if value.shape[2 : 2 + len(batch)] == batch}


def show(bar: tqdm, progress: Progress) -> None:
    """Move a bar over the steps to where the run is."""
    bar.n = progress.num_steps
    if progress.num_steps:
        moved = progress.column("acceptance")
        moved = moved[np.isfinite(moved)]
        shown = {
            "log evidence": f"{progress.log_evidence:.5g}",
            "ess": f"{progress.column('ess')[-1] / len(progress.state.log_weights):.2f} N",
            "acceptance": f"{moved[-1]:.2f}" if len(moved) else "-",
            "state particles": progress.num_state_particles,
        }
        bar.set_postfix(shown, refresh=False)
    bar.refresh()


def _moments(values: Array, weights: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    values = jnp.where(weights > 0.0, values, 0.0)
    mean = jnp.sum(weights * values, axes)
    return mean, jnp.sqrt(jnp.sum(weights * (values - jnp.expand_dims(mean, axes)) ** 2, axes))


def _quantiles(values: Array, weights: Array) -> Array:
    """Quantiles of every element of ``[N, ...]`` at :data:`LEVELS`, by inversion of the weighted distribution."""
    flat = values.reshape(len(values), -1).astype(weights.dtype)
    flat = jnp.where(weights[:, None] > 0.0, flat, flat[jnp.argmax(weights)])
    order = jnp.argsort(flat, axis=0)
    cumulative = jnp.cumsum(weights[order], axis=0)
    levels = jnp.asarray(LEVELS, weights.dtype)[:, None, None] * cumulative[-1]
    below = jnp.minimum(jnp.sum(cumulative[None] < levels, axis=1), len(flat) - 1)
    return jnp.take_along_axis(jnp.take_along_axis(flat, order, 0), below, 0).reshape(len(LEVELS), *values.shape[1:])


@jax.jit
def _raveled(state: SMC2State) -> Array:
    return ravel_pytree(summarise(state))[0]


def _blank(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
