"""Sequence models written as NumPyro's documentation and its users write them, with the exact answer for each.

:data:`PROGRAMS` is the catalogue, by name. The answers come from a Kalman filter, the forward algorithm, sums over all
discrete paths, or quadrature on a fine grid, in double precision and without JAX; one program (a recurrent network) has
a Monte Carlo answer with a standard error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints, transforms
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from scipy import stats
from scipy.special import logsumexp

from models import vrnn

# Exact answers


class Exact(NamedTuple):
    """A program's log evidence ``[*batch]``, its filtering means by site, and the answer's own standard error."""

    log_evidence: Any
    means: dict[str, np.ndarray] = {}  # noqa: RUF012
    standard_error: Any = 0.0


def kalman(y, m0, p0, a, q, c, r, *, b=0.0, d=0.0, mask=None) -> tuple[float, np.ndarray]:
    """Log evidence, and filtering means ``[T, D]``, of ``x_t ~ N(a x_{t-1} + b, q)``, ``y_t ~ N(c x_t + d, r)``.

    Scalars stand for 1 x 1 matrices; what is callable is a function of ``t``.
    """

    def at(value, t):
        return np.asarray(value(t) if callable(value) else value, float)

    mean, covariance = np.atleast_1d(np.asarray(m0, float)), np.atleast_2d(np.asarray(p0, float))
    total, means = 0.0, []
    for t, y_t in enumerate(np.asarray(y, float)):
        a_t, q_t, c_t, r_t = (np.atleast_2d(at(value, t)) for value in (a, q, c, r))
        mean = a_t @ mean + at(b, t)
        covariance = a_t @ covariance @ a_t.T + q_t
        if mask is None or mask[t]:
            innovation = np.atleast_1d(y_t) - (c_t @ mean + at(d, t))
            spread = c_t @ covariance @ c_t.T + r_t
            gain = np.linalg.solve(spread, c_t @ covariance).T
            total += stats.multivariate_normal(np.zeros(len(innovation)), spread).logpdf(innovation)
            mean, covariance = mean + gain @ innovation, covariance - gain @ spread @ gain.T
        means.append(mean)
    return total, np.array(means)


def on_grid(grid, log_initial, log_transition, log_likelihood, num_steps: int) -> tuple[float, np.ndarray]:
    """Log evidence, and filtering means ``[T]``, of a scalar state by quadrature on an equally spaced grid.

    :param log_initial: log density (or log density times likelihood) before the first step, at the grid's points.
    :param log_transition: function ``(t, new [G, 1], old [1, G])``. **log_likelihood** - function ``(t, x [G])``.
    """
    log_width = np.log(grid[1] - grid[0])
    log_alpha, means = log_initial, []
    for t in range(num_steps):
        log_alpha = logsumexp(log_transition(t, grid[:, None], grid[None]) + log_alpha, axis=1) + log_width
        log_alpha = log_alpha + log_likelihood(t, grid)
        means.append(np.exp(log_alpha - logsumexp(log_alpha)) @ grid)
    return logsumexp(log_alpha) + log_width, np.array(means)


def forward(initial, transition, log_likelihood, num_steps: int) -> float:
    """Log evidence of a hidden Markov model whose state before the first step has probabilities ``initial``.

    :param log_likelihood: function of ``t`` to ``[K]``.
    """
    log_alpha = np.log(initial)
    for t in range(num_steps):
        log_alpha = logsumexp(log_alpha[:, None] + np.log(transition), axis=0) + log_likelihood(t)
    return logsumexp(log_alpha)


# The catalogue


@dataclass(frozen=True)
class UserProgram:
    """A program with its arguments, and what is known about it.

    - **params** - values of ``param`` sites and of latents that must be given.
    - **exact** - function to the exact answer.
    - **guide** - a guide that goes with the model, or ``None``.
    - **num_observed** - by site, the number of steps that have data where the scan runs on beyond them.
    - **discrete** - whether a latent has no reparameterised sampler.
    - **scale** - what handlers and plates multiply the log evidence with.
    """

    model: Callable[..., Any]
    exact: Callable[[], Exact]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    num_particles: int = 64
    guide: Callable[..., Any] | None = None
    num_observed: dict[str, int] = field(default_factory=dict)
    discrete: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", jax.tree.map(jnp.asarray, self.params))


PROGRAMS: dict[str, UserProgram] = {}


def simulate_walk(seed: int, *shape: int, step: float = 0.5, noise: float = 0.5) -> np.ndarray:
    """A noisy random walk along the leading axis, as data."""
    rng = np.random.default_rng(seed)
    return (np.cumsum(step * rng.normal(size=shape), axis=0) + noise * rng.normal(size=shape)).astype(np.float32)


# ---- local level, with the guides people write for it


def local_level(y=None, T=10):
    drift = numpyro.param("drift", 0.4, constraint=constraints.positive)
    noise = numpyro.param("noise", 0.6, constraint=constraints.positive)

    def transition(level, y_t):
        level = numpyro.sample("level", dist.Normal(level, drift))
        y_t = numpyro.sample("y", dist.Normal(level, noise), obs=y_t)
        return level, (level, y_t)

    level_0 = numpyro.sample("level_0", dist.Normal(0.0, 1.0))
    _, (level, y) = scan(transition, level_0, y, length=T)
    return level, y


def local_level_guide(y=None, T=10):
    gain = numpyro.param("gain", 0.4, constraint=constraints.unit_interval)
    width = numpyro.param("width", 0.4, constraint=constraints.positive)

    def transition(level, y_t):
        level = numpyro.sample("level", dist.Normal(level + gain * (y_t - level), width))
        return level, None

    scan(transition, numpyro.sample("level_0", dist.Normal(0.3 * y[0], 0.9)), y)


LEVEL_DATA = simulate_walk(0, 10)
LEVEL_PARAMS = {"drift": 0.4, "noise": 0.6}


def exact_local_level(y=LEVEL_DATA):
    log_evidence, means = kalman(y, 0, 1, 1, 0.4**2, 1, 0.6**2)
    return Exact(log_evidence, {"level": means[:, 0]})


PROGRAMS["local level"] = UserProgram(local_level, exact_local_level, (LEVEL_DATA,), params=LEVEL_PARAMS)
PROGRAMS["local level, guided"] = UserProgram(
    local_level,
    exact_local_level,
    (LEVEL_DATA,),
    params=LEVEL_PARAMS | {"gain": 0.4, "width": 0.5},
    guide=local_level_guide,
)


# ---- autoregressions, conditioned inside and around the program


def ar2(y):
    alpha_1 = numpyro.sample("alpha_1", dist.Normal(0, 1))
    alpha_2 = numpyro.sample("alpha_2", dist.Normal(0, 1))
    const = numpyro.sample("const", dist.Normal(0, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))

    def transition(carry, _):
        y_prev, y_prev_prev = carry
        m_t = const + alpha_1 * y_prev + alpha_2 * y_prev_prev
        y_t = numpyro.sample("y", dist.Normal(m_t, sigma))
        return (y_t, y_prev), m_t

    timesteps = jnp.arange(y.shape[0] - 2)
    with handlers.condition(data={"y": y[2:]}):
        _, mu = scan(transition, (y[1], y[0]), timesteps)
    numpyro.deterministic("mu", mu)


AR_DATA = simulate_walk(1, 12)


def exact_ar2():
    loc = 0.1 + 0.6 * AR_DATA[1:-1] + 0.3 * AR_DATA[:-2]
    return Exact(stats.norm(loc, 0.7).logpdf(AR_DATA[2:]).sum())


PROGRAMS["AR(2) of observations"] = UserProgram(
    ar2,
    exact_ar2,
    (jnp.asarray(AR_DATA),),
    params={"alpha_1": 0.6, "alpha_2": 0.3, "const": 0.1, "sigma": 0.7},
    num_particles=4,
)


def ar2_with_noise(num_steps):
    phi_1, phi_2 = numpyro.param("phi_1", 0.5), numpyro.param("phi_2", 0.3)

    def transition(carry, t):
        x_prev, x_prev_prev = carry
        x = numpyro.sample("x", dist.Normal(phi_1 * x_prev + phi_2 * x_prev_prev, 0.5))
        y = numpyro.sample("y", dist.Normal(x, 0.6))
        return (x, x_prev), y

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    x_1 = numpyro.sample("x_1", dist.Normal(0.5 * x_0, 1.0))
    _, ys = scan(transition, (x_1, x_0), jnp.arange(num_steps))
    return ys


def exact_ar2_with_noise():
    y = LEVEL_DATA
    p0 = [[1.25, 0.5], [0.5, 1.0]]
    log_evidence, means = kalman(y, [0, 0], p0, [[0.5, 0.3], [1, 0]], np.diag([0.25, 1e-12]), [1, 0], 0.36)
    return Exact(log_evidence, {"x": means[:, 0]})


PROGRAMS["AR(2) with noise, conditioned"] = UserProgram(
    handlers.condition(ar2_with_noise, data={"y": jnp.asarray(LEVEL_DATA)}),
    exact_ar2_with_noise,
    (len(LEVEL_DATA),),
    params={"phi_1": 0.5, "phi_2": 0.3},
)


def arma(y):
    """An ARMA(1, 1) with its errors in the carry: nothing is latent but the level, and y is closed over."""
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    phi = numpyro.sample("phi", dist.Uniform(-1, 1))
    theta = numpyro.sample("theta", dist.Uniform(-1, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))

    def transition_fn(carry, t):
        y_prev, error_prev = carry
        pred = mu + phi * y_prev + theta * error_prev
        error = y[t] - pred
        numpyro.sample("error", dist.Normal(0.0, sigma), obs=error)
        return (y[t], error), pred

    error_0 = y[0] - (mu + phi * mu)
    _, preds = scan(transition_fn, (y[0], error_0), jnp.arange(1, y.shape[0]))
    numpyro.deterministic("preds", preds)


ARMA_PARAMS = {"mu": 0.2, "phi": 0.7, "theta": 0.3, "sigma": 0.8}


def exact_arma():
    y_prev, error = AR_DATA[0], AR_DATA[0] - 0.2 - 0.7 * 0.2
    total = 0.0
    for y_t in AR_DATA[1:]:
        error = y_t - (0.2 + 0.7 * y_prev + 0.3 * error)
        y_prev = y_t
        total += stats.norm(0, 0.8).logpdf(error)
    return Exact(total)


PROGRAMS["ARMA with errors in the carry"] = UserProgram(
    arma, exact_arma, (jnp.asarray(AR_DATA),), params=ARMA_PARAMS, num_particles=4
)


# ---- exponential smoothing and structural series with a horizon


def exponential_smoothing(y, num_seasons, future=0):
    """Additive Holt-Winters: random initial level, trend and seasons, data conditioned around the scan."""
    T = y.shape[0]
    level_smoothing = numpyro.sample("level_smoothing", dist.Beta(1, 1))
    trend_smoothing = numpyro.sample("trend_smoothing", dist.Beta(1, 1))
    season_smoothing = numpyro.sample("season_smoothing", dist.Beta(1, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    level_init = numpyro.sample("level_init", dist.Normal(0, 1))
    trend_init = numpyro.sample("trend_init", dist.Normal(0, 0.3))
    with numpyro.plate("num_seasons", num_seasons):
        season_init = numpyro.sample("season_init", dist.Normal(0, 0.5))

    def transition_fn(carry, t):
        level, trend, season = carry
        known = t < T
        mu = level + trend + season[0]
        new_level = jnp.where(
            known, level_smoothing * (y[t] - season[0]) + (1 - level_smoothing) * (level + trend), level
        )
        new_trend = jnp.where(known, trend_smoothing * (new_level - level) + (1 - trend_smoothing) * trend, trend)
        new_season = jnp.where(
            known, season_smoothing * (y[t] - level - trend) + (1 - season_smoothing) * season[0], season[0]
        )
        pred = numpyro.sample("pred", dist.Normal(mu, noise))
        return (new_level, new_trend, jnp.concatenate([season[1:], new_season[None]])), pred

    with handlers.condition(data={"pred": y}):
        _, preds = scan(transition_fn, (level_init, trend_init, season_init), jnp.arange(T + future))
    if future > 0:
        numpyro.deterministic("forecast", preds[-future:])


SMOOTHING_PARAMS = {"level_smoothing": 0.4, "trend_smoothing": 0.2, "season_smoothing": 0.3, "noise": 0.9}


def exact_exponential_smoothing(y=LEVEL_DATA):
    def predictions(start):
        (level, trend), season, found = start[:2], list(start[2:]), []
        for y_t in y:
            found.append(level + trend + season[0])
            new_level = 0.4 * (y_t - season[0]) + 0.6 * (level + trend)
            new_trend = 0.2 * (new_level - level) + 0.8 * trend
            season = [*season[1:], 0.3 * (y_t - level - trend) + 0.7 * season[0]]
            level, trend = new_level, new_trend
        return np.array(found)

    base = predictions(np.zeros(5))
    slopes = np.stack([predictions(unit) - base for unit in np.eye(5)], axis=1)
    prior = np.diag([1, 0.3**2, 0.25, 0.25, 0.25])
    covariance = slopes @ prior @ slopes.T + 0.9**2 * np.eye(len(y))
    return Exact(stats.multivariate_normal(base, covariance).logpdf(y))


PROGRAMS["Holt-Winters with a horizon"] = UserProgram(
    exponential_smoothing,
    exact_exponential_smoothing,
    (jnp.asarray(LEVEL_DATA), 3),
    {"future": 4},
    params=SMOOTHING_PARAMS,
    num_particles=256,
    num_observed={"pred": 10},
)


def structural(num_steps, horizon=0):
    """Local level plus dummy seasonality of period 4 in a rolled carry; the data come by a handler around it."""
    spread = numpyro.param("spread", 0.3, constraint=constraints.positive)

    def step(carry, _):
        level, effects = carry
        level = numpyro.sample("level", dist.Normal(level, spread))
        effect = numpyro.sample("effect", dist.Normal(-effects.sum(), 0.2))
        y = numpyro.sample("y", dist.Normal(level + effect, 0.5))
        effects = jnp.roll(effects, 1).at[0].set(effect)
        return (level, effects), y

    effects_0 = numpyro.sample("effects_0", dist.Normal(jnp.array([0.5, -0.2, 0.1]), 0.3).to_event(1))
    scan(step, (0.0, effects_0), None, length=num_steps + horizon)


def filter_structural(y=LEVEL_DATA):
    a = np.array([[1, 0, 0, 0], [0, -1, -1, -1], [0, 1, 0, 0], [0, 0, 1, 0]])
    q = np.diag([0.09, 0.04, 1e-12, 1e-12])
    p0 = np.diag([1e-12, 0.09, 0.09, 0.09])
    return (*kalman(y, [0, 0.5, -0.2, 0.1], p0, a, q, [1, 1, 0, 0], 0.25), a)


def exact_structural():
    log_evidence, means, _ = filter_structural()
    return Exact(log_evidence, {"level": means[:, 0], "effect": means[:, 1]})


def forecast_of_effects(horizon=3):
    _, means, a = filter_structural()
    return np.array([(np.linalg.matrix_power(a, k + 1) @ means[-1])[1] for k in range(horizon)])


PROGRAMS["structural series with a horizon"] = UserProgram(
    handlers.condition(structural, data={"y": jnp.asarray(LEVEL_DATA)}),
    exact_structural,
    (len(LEVEL_DATA),),
    {"horizon": 3},
    params={"spread": 0.3},
    num_observed={"y": 10},
)


# ---- counts with an exposure, inputs in a dict


def counts(data):
    phi = numpyro.param("phi", 0.9)

    def step(log_rate, inputs):
        log_rate = numpyro.sample("log_rate", dist.Normal(phi * log_rate, 0.3))
        numpyro.sample("count", dist.Poisson(inputs["exposure"] * jnp.exp(log_rate)), obs=inputs["count"])
        return log_rate, log_rate

    start = numpyro.sample("start", dist.Normal(0.5, 0.5))
    scan(step, start, data)


COUNT_DATA = {
    "count": np.array([3, 1, 4, 0, 2, 6, 5, 3, 8, 2]),
    "exposure": np.array([1.0, 1.0, 2.0, 0.5, 1.0, 2.0, 2.0, 1.0, 3.0, 1.0], np.float32),
}


def exact_counts():
    grid = np.linspace(-5, 6, 600)
    log_evidence, means = on_grid(
        grid,
        stats.norm(0.5, 0.5).logpdf(grid),
        lambda t, new, old: stats.norm.logpdf(new, 0.9 * old, 0.3),
        lambda t, x: stats.poisson(COUNT_DATA["exposure"][t] * np.exp(x)).logpmf(COUNT_DATA["count"][t]),
        10,
    )
    return Exact(log_evidence, {"log_rate": means})


PROGRAMS["Poisson counts with exposure"] = UserProgram(counts, exact_counts, (COUNT_DATA,), params={"phi": 0.9})


# ---- hidden Markov models with enumeration hints, lengths, and plates of sequences and tones


def hmm(sequences, lengths, hidden_dim=3):
    num_sequences, _, data_dim = sequences.shape
    probs_x = numpyro.sample("probs_x", dist.Dirichlet(0.9 * jnp.eye(hidden_dim) + 0.1).to_event(1))
    probs_y = numpyro.sample("probs_y", dist.Beta(0.5, 0.5).expand([hidden_dim, data_dim]).to_event(2))

    def transition_fn(carry, y):
        x_prev, t = carry
        with numpyro.plate("sequences", num_sequences, dim=-2), handlers.mask(mask=(t < lengths)[..., None]):
            x = numpyro.sample("x", dist.Categorical(probs_x[x_prev]), infer={"enumerate": "parallel"})
            with numpyro.plate("tones", data_dim, dim=-1):
                numpyro.sample("y", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=y)
        return (x, t + 1), None

    x_init = jnp.zeros((num_sequences, 1), dtype=jnp.int32)
    scan(transition_fn, (x_init, 0), jnp.swapaxes(sequences, 0, 1))


def hmm_of_tones(sequences, lengths, hidden_dim=3):
    """Each tone also depends on itself at the step before."""
    num_sequences, _, data_dim = sequences.shape
    probs_x = numpyro.sample("probs_x", dist.Dirichlet(0.9 * jnp.eye(hidden_dim) + 0.1).to_event(1))
    probs_y = numpyro.sample("probs_y", dist.Beta(0.5, 0.5).expand([hidden_dim, 2, data_dim]).to_event(3))

    def transition_fn(carry, y):
        x_prev, y_prev, t = carry
        with numpyro.plate("sequences", num_sequences, dim=-2), handlers.mask(mask=(t < lengths)[..., None]):
            x = numpyro.sample("x", dist.Categorical(probs_x[x_prev]), infer={"enumerate": "parallel"})
            with numpyro.plate("tones", data_dim, dim=-1) as tones:
                y = numpyro.sample("y", dist.Bernoulli(probs_y[x, y_prev, tones]), obs=y)
        return (x, y, t + 1), None

    x_init = jnp.zeros((num_sequences, 1), dtype=jnp.int32)
    y_init = jnp.zeros((num_sequences, data_dim), dtype=jnp.int32)
    scan(transition_fn, (x_init, y_init, 0), jnp.swapaxes(sequences, 0, 1))


SEQUENCES = np.random.default_rng(2).integers(0, 2, size=(2, 8, 2))
LENGTHS = np.array([8, 5])
PROBS_X = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]], np.float32)
PROBS_Y = np.array([[0.8, 0.3], [0.2, 0.6], [0.5, 0.9]], np.float32)
PROBS_Y_BY_TONE = np.stack([PROBS_Y, 0.9 - 0.5 * PROBS_Y], axis=1)


def exact_hmm(probs_y):
    def log_likelihood(sequence, t):
        before = sequence[t - 1] if t > 0 else np.zeros(2, int)
        probs = probs_y if probs_y.ndim == 2 else probs_y[:, before, np.arange(2)]
        return stats.bernoulli(probs).logpmf(sequence[t]).sum(-1)

    found = [
        forward(np.array([1.0, 1e-300, 1e-300]), PROBS_X, partial(log_likelihood, sequence), length)
        for sequence, length in zip(SEQUENCES, LENGTHS, strict=True)
    ]
    return Exact(np.array(found))


PROGRAMS["HMM with lengths"] = UserProgram(
    hmm,
    partial(exact_hmm, PROBS_Y),
    (SEQUENCES, LENGTHS),
    params={"probs_x": PROBS_X, "probs_y": PROBS_Y},
    discrete=True,
)
PROGRAMS["HMM of tones with lengths"] = UserProgram(
    hmm_of_tones,
    partial(exact_hmm, PROBS_Y_BY_TONE),
    (SEQUENCES, LENGTHS),
    params={"probs_x": PROBS_X, "probs_y": PROBS_Y_BY_TONE},
    discrete=True,
)


def hmm_guide(sequences, lengths, hidden_dim=3):
    """Proposes states from the tones of the step, under the model's plates and masks."""
    num_sequences, _, data_dim = sequences.shape
    weights = numpyro.param("weights", 0.5 * jnp.ones((data_dim, hidden_dim)))

    def transition_fn(t, y):
        with numpyro.plate("sequences", num_sequences, dim=-2), handlers.mask(mask=(t < lengths)[..., None]):
            numpyro.sample("x", dist.Categorical(logits=(y @ weights)[:, None]))
        return t + 1, None

    scan(transition_fn, 0, jnp.swapaxes(sequences, 0, 1))


PROGRAMS["HMM with lengths, guided"] = UserProgram(
    hmm,
    partial(exact_hmm, PROBS_Y),
    (SEQUENCES, LENGTHS),
    params={"probs_x": PROBS_X, "probs_y": PROBS_Y, "weights": np.array([[0.3, 0, 0], [0, 0.2, 0.4]], np.float32)},
    guide=hmm_guide,
    discrete=True,
    num_particles=128,
)


def second_order(y):
    """The state depends on the last two; `history` is for enumeration."""

    def step(carry, y_t):
        older, old = carry
        z = numpyro.sample("z", dist.Categorical(jnp.asarray(PAIRS)[older, old]), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(jnp.array([-0.7, 0.8])[z], 0.8), obs=y_t)
        return (old, z), z

    scan(step, (0, 0), y, history=2)


PAIRS = np.array([[[0.8, 0.2], [0.4, 0.6]], [[0.3, 0.7], [0.5, 0.5]]], np.float32)


def exact_second_order(known=()):
    """Forward algorithm over pairs of states, the first of which may be known."""
    transition = np.full((4, 4), 1e-300)
    for older, old, new in itertools.product([0, 1], repeat=3):
        transition[2 * older + old, 2 * old + new] = PAIRS[older, old, new]

    def log_likelihood(t):
        new = np.array([0, 1, 0, 1])
        found = stats.norm(np.array([-0.7, 0.8])[new], 0.8).logpdf(LEVEL_DATA[t])
        return np.where((t >= len(known)) | (new == [*known, 0][min(t, len(known))]), found, -700.0)

    return Exact(forward(np.array([1.0, 1e-300, 1e-300, 1e-300]), transition, log_likelihood, 10))


PROGRAMS["second-order HMM"] = UserProgram(second_order, exact_second_order, (LEVEL_DATA,), discrete=True)
PROGRAMS["semi-supervised HMM"] = UserProgram(
    handlers.condition(second_order, data={"z": jnp.array([1, 1, 0])}),
    partial(exact_second_order, (1, 1, 0)),
    (LEVEL_DATA,),
    discrete=True,
    num_observed={"z": 3},
)


# ---- switching linear dynamics, with Python numbers as the first state


def switching(y):
    slopes = numpyro.param("slopes", jnp.array([0.95, 0.3]))
    scales = numpyro.param("scales", jnp.array([0.3, 1.0]), constraint=constraints.positive)
    transition = jnp.array([[0.8, 0.2], [0.3, 0.7]])

    def step(carry, y_t):
        regime, x = carry
        regime = numpyro.sample("regime", dist.Categorical(transition[regime]), infer={"enumerate": "parallel"})
        x = numpyro.sample("x", dist.Normal(slopes[regime] * x, scales[regime]))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return (regime, x), regime

    scan(step, (0, 0.0), y)


SWITCHING_DATA = LEVEL_DATA[:8]


def exact_switching():
    slopes, scales, transition = np.array([0.95, 0.3]), np.array([0.3, 1.0]), np.array([[0.8, 0.2], [0.3, 0.7]])
    terms = []
    for path in itertools.product([0, 1], repeat=8):
        prior = sum(np.log(transition[a, b]) for a, b in itertools.pairwise((0, *path)))
        path = np.array(path)
        terms.append(
            prior
            + kalman(
                SWITCHING_DATA, 0, 0, lambda t, p=path: slopes[p[t]], lambda t, p=path: scales[p[t]] ** 2, 1, 0.25
            )[0]
        )
    return Exact(logsumexp(terms))


PROGRAMS["switching linear dynamics"] = UserProgram(
    switching,
    exact_switching,
    (SWITCHING_DATA,),
    params={"slopes": np.array([0.95, 0.3], np.float32), "scales": np.array([0.3, 1.0], np.float32)},
    num_particles=128,
    discrete=True,
)


# ---- stochastic volatility with leverage, an observation before the scan, and y_{t-1} in the carry


def volatility_with_leverage(y):
    mu, phi = numpyro.param("mu", -0.5), numpyro.param("phi", 0.9)
    sigma = numpyro.param("sigma", 0.4, constraint=constraints.positive)
    rho = numpyro.param("rho", -0.5, constraint=constraints.interval(-1, 1))

    def step(carry, y_t):
        h, y_prev = carry
        shock = y_prev * jnp.exp(-0.5 * h)
        loc = mu + phi * (h - mu) + rho * sigma * shock
        h = numpyro.sample("h", dist.Normal(loc, sigma * jnp.sqrt(1 - rho**2)))
        y_t = numpyro.sample("y", dist.Normal(0.0, jnp.exp(0.5 * h)), obs=y_t)
        return (h, y_t), h

    h_0 = numpyro.sample("h_0", dist.Normal(mu, sigma / jnp.sqrt(1 - phi**2)))
    y_0 = numpyro.sample("y_0", dist.Normal(0.0, jnp.exp(0.5 * h_0)), obs=None if y is None else y[0])
    scan(step, (h_0, y_0), y[1:])


RETURNS = np.array([0.4, -1.1, 0.2, 0.9, -1.6, -0.3, 0.1, 1.2, -0.6, 0.5], np.float32)


def exact_volatility():
    mu, phi, sigma, rho = -0.5, 0.9, 0.4, -0.5
    grid = np.linspace(-9, 8, 800)

    def log_transition(t, new, old):
        loc = mu + phi * (old - mu) + rho * sigma * RETURNS[t] * np.exp(-0.5 * old)
        return stats.norm.logpdf(new, loc, sigma * np.sqrt(1 - rho**2))

    start = stats.norm(mu, sigma / np.sqrt(1 - phi**2)).logpdf(grid) + stats.norm(0, np.exp(0.5 * grid)).logpdf(
        RETURNS[0]
    )
    log_evidence, means = on_grid(
        grid, start, log_transition, lambda t, h: stats.norm(0, np.exp(0.5 * h)).logpdf(RETURNS[t + 1]), 9
    )
    return Exact(log_evidence, {"h": means})


PROGRAMS["stochastic volatility with leverage"] = UserProgram(
    volatility_with_leverage, exact_volatility, (RETURNS,), params={"mu": -0.5, "phi": 0.9, "sigma": 0.4, "rho": -0.5}
)


# ---- a recurrent network: the whole past is in the carry

VRNN_STEPS, VRNN_SERIES = 8, 2
VRNN_MODEL, VRNN_GUIDE = vrnn.make_programs(
    jax.random.key(3), 2, latent_size=1, hidden_size=3, emission="normal", num_steps=VRNN_STEPS, num_series=VRNN_SERIES
)
VRNN_DATA = np.random.default_rng(3).normal(size=(VRNN_STEPS, VRNN_SERIES, 2)).astype(np.float32)
VRNN_LENGTHS = np.array([8, 5])


def vrnn_params() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for program in (VRNN_MODEL, VRNN_GUIDE):
        trace = handlers.trace(handlers.seed(program, 0)).get_trace(VRNN_DATA, VRNN_LENGTHS)
        found |= {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    return found


@lru_cache
def exact_vrnn(num_draws: int = 10_000, num_runs: int = 20) -> Exact:
    """Importance sampling from the prior, in numpy; the error is that of the mean over independent runs."""
    params = jax.tree.map(lambda x: np.asarray(x, float), vrnn_params())
    cell, prior, emit = (params[f"{name}$params"] for name in ("transition_rnn", "prior_net", "emission_net"))
    rng = np.random.default_rng(0)

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    def network(net, inputs):
        hidden = np.maximum(inputs @ net.layers[0].weight.T + net.layers[0].bias, 0)
        return hidden @ net.layers[1].weight.T + net.layers[1].bias

    def run(b):
        h, total = np.zeros((num_draws, 3)), np.zeros(num_draws)
        for t in range(VRNN_LENGTHS[b]):
            loc, raw = network(prior, h).T
            z = (loc + np.log1p(np.exp(raw + 0.5)) * rng.normal(size=num_draws))[:, None]
            out = network(emit, np.concatenate([h, z], -1))
            total += stats.norm(out, np.exp(params["log_noise_scale"])).logpdf(VRNN_DATA[t, b]).sum(-1)
            inputs = np.concatenate([np.broadcast_to(VRNN_DATA[t, b], (num_draws, 2)), z], -1)
            reset, update, new = np.split(inputs @ cell.weight_ih.T + cell.bias, 3, -1)
            reset_h, update_h, new_h = np.split(h @ cell.weight_hh.T, 3, -1)
            reset, update = sigmoid(reset + reset_h), sigmoid(update + update_h)
            new = np.tanh(new + reset * (new_h + cell.bias_n))
            h = new + update * (h - new)
        return logsumexp(total) - np.log(num_draws)

    runs = np.array([[run(b) for b in range(VRNN_SERIES)] for _ in range(num_runs)])
    log_evidence = logsumexp(runs, axis=0) - np.log(num_runs)
    return Exact(log_evidence, {}, np.exp(runs - log_evidence).std(0, ddof=1) / np.sqrt(num_runs))


VRNN_PARAMS = vrnn_params()
# An untrained proposal, widened so that its weights have a variance.
VRNN_PARAMS["proposal_net$params"] = eqx.tree_at(
    lambda net: net.layers[-1].bias,
    VRNN_PARAMS["proposal_net$params"],
    replace_fn=lambda bias: bias + jnp.array([0.0, 1.5]),
)
PROGRAMS["variational recurrent network"] = UserProgram(
    VRNN_MODEL,
    exact_vrnn,
    (VRNN_DATA, VRNN_LENGTHS),
    params={name: value for name, value in VRNN_PARAMS.items() if not name.startswith("proposal")},
)
PROGRAMS["variational recurrent network, guided"] = UserProgram(
    VRNN_MODEL, exact_vrnn, (VRNN_DATA, VRNN_LENGTHS), params=VRNN_PARAMS, guide=VRNN_GUIDE
)


# ---- hierarchies: global latents, parameters of each series, a plate of series


def hierarchical(y):
    num_series = y.shape[1]
    mu = numpyro.sample("mu", dist.Normal(0.0, 0.5))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("series", num_series):
        offset = numpyro.sample("offset", dist.Normal(mu, tau))
        x_0 = numpyro.sample("x_0", dist.Normal(2.0 * mu, 1.0))

    def step(x, y_t):
        with numpyro.plate("series", num_series):
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            numpyro.sample("y", dist.Normal(offset + x, 0.6), obs=y_t)
        return x, x

    scan(step, x_0, y)


def hierarchical_guide(y):
    """Proposes the global latents before its scan, and the series' states in it."""
    num_series = y.shape[1]
    mu_loc = numpyro.param("mu_loc", 0.1)
    mu = numpyro.sample("mu", dist.Normal(mu_loc, 0.4))
    numpyro.sample("tau", dist.LogNormal(-0.7, 0.5))
    with numpyro.plate("series", num_series):
        offset = numpyro.sample("offset", dist.Normal(0.5 * mu + 0.3 * y.mean(0), 0.4))
        x_0 = numpyro.sample("x_0", dist.Normal(2.0 * mu, 1.0))

    def step(x, y_t):
        with numpyro.plate("series", num_series):
            x = numpyro.sample("x", dist.Normal(0.5 * x + 0.4 * (y_t - offset), 0.5))
        return x, None

    scan(step, x_0, y)


def with_autoguide(kind):
    """The global latents by one of NumPyro's autoguides, the states by hand."""
    automatic = kind(handlers.block(hierarchical, expose=["mu", "tau", "offset", "series"]))

    def guide(y):
        offset = automatic(y)["offset"]
        x_0 = _initial_states(y.shape[1])

        def step(x, y_t):
            with numpyro.plate("series", y.shape[1]):
                x = numpyro.sample("x", dist.Normal(0.5 * x + 0.4 * (y_t - offset), 0.5))
            return x, None

        scan(step, x_0, y)

    return guide


def hierarchical_path_guide(y):
    """No scan: the paths are one site, built on the initial states and on the offsets."""
    numpyro.sample("mu", dist.Normal(0.1, 0.4))
    numpyro.sample("tau", dist.LogNormal(-0.7, 0.5))
    num_steps, num_series = y.shape
    with numpyro.plate("series", num_series):
        offset = numpyro.sample("offset", dist.Normal(0.3 * y.mean(0), 0.4))
    x_0 = _initial_states(num_series)
    with numpyro.plate("time", num_steps, dim=-2), numpyro.plate("series", num_series, dim=-1):
        numpyro.sample("x", dist.Normal(0.2 * x_0 + 0.5 * (y - offset), 0.7))


def _initial_states(num_series):
    with numpyro.plate("series", num_series):
        return numpyro.sample("x_0", dist.Normal(0.1, 1.0))


SERIES_DATA = 0.7 * simulate_walk(4, 8, 3)
OFFSETS = np.array([0.5, -0.4, 0.1], np.float32)


def exact_hierarchical():
    """Given the parameters: one problem per series."""
    found = [kalman(SERIES_DATA[:, b], 0.4, 1, 0.8, 0.25, 1, 0.36, d=OFFSETS[b]) for b in range(3)]
    return Exact(np.array([f[0] for f in found]), {"x": np.stack([f[1][:, 0] for f in found], 1)})


def exact_hierarchy(y) -> float:
    """Log evidence with every latent integrated out: one Gaussian state of offsets and x given tau, then quadrature."""
    ones, eye, none = np.ones((3, 1)), np.eye(3), np.zeros((3, 3))
    a, q = np.block([[eye, none], [none, 0.8 * eye]]), np.diag([0.0] * 3 + [0.25] * 3)

    def given(tau):
        start = np.block([[ones, tau * eye, none], [2 * ones, none, eye]]) @ np.diag([0.5] + [1.0] * 6)
        return kalman(y, np.zeros(6), start @ start.T, a, q, np.hstack([eye, eye]), 0.36 * eye)[0]

    taus = np.linspace(0, 5, 201)[1:] - 0.0125
    return logsumexp([given(tau) + stats.halfnorm.logpdf(tau) for tau in taus]) + np.log(0.025)


PROGRAMS["hierarchy over series"] = UserProgram(
    hierarchical, exact_hierarchical, (SERIES_DATA,), params={"mu": 0.2, "tau": 0.7, "offset": OFFSETS}
)


PROGRAMS["hierarchy reparameterised around the program"] = UserProgram(
    handlers.reparam(hierarchical, config={"offset": LocScaleReparam(0)}),
    exact_hierarchical,
    (SERIES_DATA,),
    params={"mu": 0.2, "tau": 0.7, "offset_decentered": (OFFSETS - 0.2) / 0.7},
)


def subsampled(y, batch_size):
    """A plate of series of which each evaluation sees a few; the plate object is made once and entered twice."""
    noise = numpyro.param("noise", 0.5, constraint=constraints.positive)
    series = numpyro.plate("series", y.shape[1], subsample_size=batch_size)
    with series as rows:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    numpyro.deterministic("rows", rows)

    def step(x, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, noise), obs=y_t)
        return x, x

    scan(step, x_0, y[:, rows])


SUBSAMPLED_DATA = simulate_walk(5, 8, 5) + 0.4 * np.arange(5, dtype=np.float32)


def exact_subsampled(rows):
    return np.array([kalman(SUBSAMPLED_DATA[:, row], 0, 1, 0.8, 0.25, 1, 0.25)[0] for row in rows])


def panel(y):
    """Two plates around everything: products in regions."""
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)

    def step(x, y_t):
        with numpyro.plate_stack("panel", y.shape[1:]):
            x = numpyro.sample("x", dist.Normal(0.8 * x, scale))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, x

    scan(step, jnp.zeros(y.shape[1:]), y)


def panel_guide(y):
    """The whole panel of paths as one plated site."""
    loc = numpyro.param("loc", jnp.zeros(y.shape))
    with numpyro.plate("time", y.shape[0], dim=-3), numpyro.plate_stack("panel", y.shape[1:]):
        numpyro.sample("x", dist.Normal(loc, 0.7))


def without_plate(y):
    """Series side by side with neither plate nor to_event: NumPyro sums them, so they are one problem."""
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.8 * x, scale))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, x

    scan(step, jnp.zeros(y.shape[1]), y)


PANEL_DATA = 0.6 * simulate_walk(10, 6, 2, 3)


def exact_panel(y):
    flat = y.reshape(len(y), -1)
    found = [kalman(flat[:, b], 0, 0, 0.8, 0.25, 1, 0.25) for b in range(flat.shape[1])]
    means = np.stack([f[1][:, 0] for f in found], 1).reshape(y.shape)
    return Exact(np.array([f[0] for f in found]).reshape(y.shape[1:]), {"x": means})


def exact_without_plate():
    log_evidence, means, _ = exact_panel(PANEL_DATA[:, 0, :2])
    return Exact(log_evidence.sum(), means)


PROGRAMS["panel of two plates"] = UserProgram(
    panel, partial(exact_panel, PANEL_DATA), (PANEL_DATA,), params={"scale": 0.5}
)
PROGRAMS["panel of two plates, path guide"] = UserProgram(
    panel,
    partial(exact_panel, PANEL_DATA),
    (PANEL_DATA,),
    params={"scale": 0.5, "loc": 0.5 * PANEL_DATA},
    guide=panel_guide,
    num_particles=256,
)
PROGRAMS["series without a plate"] = UserProgram(
    without_plate, exact_without_plate, (PANEL_DATA[:, 0, :2],), params={"scale": 0.5}
)


# ---- missing data


def gaps_by_obs_mask(y, observed):
    def step(x, inputs):
        y_t, observed_t = inputs
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t, obs_mask=observed_t)
        return x, None

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, (y, observed))


def gaps_by_obs_mask_guide(y, observed):
    """Leaves the missing observations to the model."""
    width = numpyro.param("width", 0.6, constraint=constraints.positive)

    def step(x, inputs):
        y_t, observed_t = inputs
        x = numpyro.sample("x", dist.Normal(jnp.where(observed_t, 0.5 * (x + y_t), 0.9 * x), width))
        return x, None

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, (y, observed))


def gaps_as_nan(y):
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, scale))
        with handlers.mask(mask=~jnp.isnan(y_t)):
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y)


def gaps_as_nan_guide(y):
    def step(x, y_t):
        seen = ~jnp.isnan(y_t)
        loc = jnp.where(seen, 0.5 * x + 0.5 * jnp.where(seen, y_t, 0.0), 0.9 * x)
        x = numpyro.sample("x", dist.Normal(loc, 0.5))
        return x, None

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y)


OBSERVED = np.array([True, True, False, True, False, False, True, True, True, False])
HOLED_DATA = np.where(OBSERVED, LEVEL_DATA, np.nan).astype(np.float32)


def exact_gaps():
    log_evidence, means = kalman(LEVEL_DATA, 0, 1, 0.9, 0.25, 1, 0.25, mask=OBSERVED)
    return Exact(log_evidence, {"x": means[:, 0]})


PROGRAMS["missing data by obs_mask"] = UserProgram(gaps_by_obs_mask, exact_gaps, (LEVEL_DATA, OBSERVED))
PROGRAMS["missing data by obs_mask, guided"] = UserProgram(
    gaps_by_obs_mask,
    exact_gaps,
    (LEVEL_DATA, OBSERVED),
    params={"width": 0.6},
    guide=gaps_by_obs_mask_guide,
)
PROGRAMS["missing data as NaN under a mask"] = UserProgram(
    gaps_as_nan, exact_gaps, (HOLED_DATA,), params={"scale": 0.5}
)
PROGRAMS["missing data as NaN, guided"] = UserProgram(
    gaps_as_nan, exact_gaps, (HOLED_DATA,), params={"scale": 0.5}, guide=gaps_as_nan_guide
)


# ---- observations and covariates that the step closes over


def regression_over_time(X, y):
    """Time-varying coefficients; everything is indexed by the step's number."""
    drift = numpyro.param("drift", 0.2, constraint=constraints.positive)

    def step(beta, t):
        beta = numpyro.sample("beta", dist.Normal(beta, drift).to_event(1))
        numpyro.sample("y", dist.Normal(X[t] @ beta, 0.5), obs=y[t])
        return beta, beta

    beta_0 = numpyro.sample("beta_0", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    scan(step, beta_0, jnp.arange(len(y)))


def counter_in_carry(y):
    """Python numbers as the first carry, a counter among them, and no inputs at all."""
    slope = numpyro.param("slope", 0.8)

    def step(carry, _):
        z, t = carry
        z = numpyro.sample("z", dist.Normal(slope * z + 0.3 * jnp.sin(t), 0.4))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y[t])
        return (z, t + 1), z

    scan(step, (1, 0), None, length=len(y))


COVARIATES = np.random.default_rng(6).normal(size=(10, 2)).astype(np.float32)


def exact_regression():
    log_evidence, means = kalman(
        LEVEL_DATA, [0, 0], np.eye(2), np.eye(2), 0.04 * np.eye(2), lambda t: COVARIATES[t], 0.25
    )
    return Exact(log_evidence, {"beta": means})


def exact_counter():
    log_evidence, means = kalman(LEVEL_DATA, 1, 0, 0.8, 0.16, 1, 0.25, b=lambda t: 0.3 * np.sin(t))
    return Exact(log_evidence, {"z": means[:, 0]})


PROGRAMS["regression indexed by time"] = UserProgram(
    regression_over_time,
    exact_regression,
    (jnp.asarray(COVARIATES), jnp.asarray(LEVEL_DATA)),
    params={"drift": 0.2},
    num_particles=128,
)
PROGRAMS["counter in the carry"] = UserProgram(
    counter_in_carry, exact_counter, (jnp.asarray(LEVEL_DATA),), params={"slope": 0.8}
)


# ---- the likelihood stands after the scan


def walk(scale, T):
    def step(z, _):
        z = numpyro.sample("z", dist.Normal(0.5 * z, scale).to_event(1))
        return z, z

    return scan(step, jnp.zeros(2), None, length=T)


def likelihood_after(y):
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
    _, z = walk(scale, len(y))
    numpyro.sample("y", dist.Normal(z @ jnp.array([1.0, -0.5]), 0.6), obs=y)


def likelihood_after_in_plate(X, y=None):
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
    T = X.shape[0]
    _, z = walk(scale, T)
    mu = numpyro.deterministic("mu", intercept + (X * z).sum(-1))
    with numpyro.plate("time", T):
        numpyro.sample("y", dist.Normal(mu, 0.6), obs=y)


def likelihood_of_last(y, T):
    scale = numpyro.param("scale", 0.5, constraint=constraints.positive)
    last, _ = walk(scale, T)
    numpyro.sample("y", dist.Normal(last, 0.6).to_event(1), obs=y)


def walk_guide(y, T=None):
    """The path of z as one factorised site."""
    T = len(y) if T is None else T
    loc = numpyro.param("loc", 0.2 * jnp.ones((T, 2)))
    numpyro.sample("z", dist.Normal(loc, 0.9).to_event(2))


def exact_likelihood_after():
    log_evidence, means = kalman(LEVEL_DATA, [0, 0], 0 * np.eye(2), 0.5 * np.eye(2), 0.25 * np.eye(2), [1, -0.5], 0.36)
    return Exact(log_evidence, {"z": means})


def exact_likelihood_after_in_plate():
    log_evidence, means = kalman(
        LEVEL_DATA, [0, 0], 0 * np.eye(2), 0.5 * np.eye(2), 0.25 * np.eye(2), lambda t: COVARIATES[t], 0.36, d=0.3
    )
    return Exact(log_evidence, {"z": means})


LAST_DATA = np.array([0.7, -0.9], np.float32)


def exact_likelihood_of_last():
    variance = 0.25 * sum(0.25**k for k in range(6)) + 0.36
    return Exact(stats.norm(0, np.sqrt(variance)).logpdf(LAST_DATA).sum())


PROGRAMS["likelihood after the scan"] = UserProgram(
    likelihood_after, exact_likelihood_after, (LEVEL_DATA,), params={"scale": 0.5}
)
PROGRAMS["likelihood after the scan, path guide"] = UserProgram(
    likelihood_after,
    exact_likelihood_after,
    (LEVEL_DATA,),
    params={"scale": 0.5, "loc": np.stack([0.3 * LEVEL_DATA, -0.15 * LEVEL_DATA], -1)},
    guide=walk_guide,
    num_particles=256,
)
PROGRAMS["likelihood after the scan in a plate"] = UserProgram(
    likelihood_after_in_plate,
    exact_likelihood_after_in_plate,
    (COVARIATES, LEVEL_DATA),
    params={"scale": 0.5, "intercept": 0.3},
    num_particles=128,
)
PROGRAMS["likelihood of the last state"] = UserProgram(
    likelihood_of_last, exact_likelihood_of_last, (LAST_DATA, 6), params={"scale": 0.5}
)


def plated_walk(T=6):
    def step(z, _):
        with numpyro.plate("series", 2):
            z = numpyro.sample("z", dist.Normal(0.9 * z, 0.5))
        return z, z

    return scan(step, jnp.zeros(2), None, length=T)


def after_in_plates_of_time_and_series(y):
    _, z = plated_walk()
    with numpyro.plate("time", 6, dim=-2), numpyro.plate("series", 2, dim=-1):
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def after_in_plate_of_series(y):
    _, z = plated_walk()
    with numpyro.plate("series", 2):
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def after_as_events(y):
    _, z = walk(0.5, 6)
    numpyro.sample("y", dist.Normal(z, 0.5).to_event(2), obs=y)


def after_multivariate(y):
    _, z = walk(0.5, 6)
    numpyro.sample("y", dist.MultivariateNormal(z, 0.3 * jnp.eye(2)), obs=y)


def after_with_noise_scale(y):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    _, z = walk(0.5, 6)
    numpyro.sample("y", dist.Normal(z[:, 0], noise), obs=y[:, 0])


def after_under_mask(y):
    _, z = walk(0.5, 6)
    with handlers.mask(mask=y[:, 0] > 0):
        numpyro.sample("y", dist.Normal(z[:, 0], 0.5), obs=y[:, 0])


def after_twice(y):
    last, z = walk(0.5, 6)
    numpyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)
    numpyro.sample("end", dist.Normal(last.sum(), 0.3), obs=1.0)


def after_and_in_the_step(y):
    def step(z, y_t):
        z = numpyro.sample("z", dist.Normal(0.9 * z, 0.5))
        numpyro.sample("first", dist.Normal(z, 0.5), obs=y_t[0])
        return z, (z, 0.5 * z)

    _, (z, half) = scan(step, 0.0, y)
    numpyro.sample("second", dist.Normal(z + half, 0.5), obs=y[:, 1])


def after_as_factor(y):
    _, z = walk(0.5, 6)
    numpyro.factor("seen", dist.Normal(z[:, 1], 0.5).log_prob(y[:, 1]))


def after_on_bounded_support(y):
    _, z = walk(0.5, 6)
    numpyro.sample("y", dist.Uniform(z[:, 0] + 10.0, 40.0), obs=20.0 + y[:, 0])


def after_one_step(y):
    _, z = walk(0.5, 1)
    numpyro.sample("y", dist.Normal(z, 0.5), obs=y[:1])


AFTER_DATA = 0.6 * simulate_walk(11, 6, 2)

#: More ways of stating the likelihood after the scan; their weights are compared with NumPyro's own densities.
LIKELIHOODS_AFTER = {
    program.__name__: UserProgram(program, Exact, (jnp.asarray(AFTER_DATA),), params=params)
    for program, params in [
        (after_in_plates_of_time_and_series, {}),
        (after_in_plate_of_series, {}),
        (after_as_events, {}),
        (after_multivariate, {}),
        (after_with_noise_scale, {"noise": 0.7}),
        (after_under_mask, {}),
        (after_twice, {}),
        (after_and_in_the_step, {}),
        (after_as_factor, {}),
        (after_on_bounded_support, {}),
        (after_one_step, {}),
    ]
}


# ---- continuous time, observed at irregular times


def ornstein_uhlenbeck(times, y):
    theta = numpyro.param("theta", 0.7, constraint=constraints.positive)
    sigma = numpyro.param("sigma", 0.9, constraint=constraints.positive)
    stationary = sigma / jnp.sqrt(2 * theta)

    def step(x, inputs):
        dt, y_t = inputs
        decay = jnp.exp(-theta * dt)
        x = numpyro.sample("x", dist.Normal(decay * x, stationary * jnp.sqrt(1 - decay**2)))
        numpyro.sample("y", dist.Normal(x, 0.4), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, stationary))
    scan(step, x_0, (jnp.diff(times, prepend=0.0), y))


TIMES = np.array([0.1, 0.5, 0.6, 1.9, 2.0, 3.1, 5.0, 5.2, 5.3, 7.7], np.float32)


def exact_ornstein_uhlenbeck():
    dt, variance = np.diff(TIMES, prepend=0), 0.81 / 1.4
    decay = np.exp(-0.7 * dt)
    found = kalman(LEVEL_DATA, 0, variance, lambda t: decay[t], lambda t: variance * (1 - decay[t] ** 2), 1, 0.16)
    return Exact(found[0], {"x": found[1][:, 0]})


PROGRAMS["Ornstein-Uhlenbeck at irregular times"] = UserProgram(
    ornstein_uhlenbeck, exact_ornstein_uhlenbeck, (TIMES, LEVEL_DATA), params={"theta": 0.7, "sigma": 0.9}
)


# ---- states that are not Gaussian


def positive_states(y):
    shape = numpyro.param("shape", 3.0, constraint=constraints.positive)

    def step(rate, y_t):
        rate = numpyro.sample("rate", dist.LogNormal(0.8 * jnp.log(rate), 0.3))
        numpyro.sample("y", dist.Gamma(shape, shape / rate), obs=y_t)
        return rate, rate

    rate_0 = numpyro.sample("rate_0", dist.Gamma(4.0, 3.0))
    scan(step, rate_0, y)


def heavy_tails(y):
    df = numpyro.param("df", 4.0, constraint=constraints.positive)

    def step(x, y_t):
        x = numpyro.sample("x", dist.StudentT(df, 0.8 * x, 0.4))
        numpyro.sample("y", dist.Laplace(x, 0.5), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.StudentT(3.0, 0.2, 0.7))
    scan(step, x_0, y)


POSITIVE_DATA = np.array([0.8, 1.9, 0.5, 1.1, 2.7, 1.4, 0.6, 0.9, 1.6, 0.7], np.float32)


def exact_positive_states():
    grid = np.linspace(-6, 4, 600)  # of the logarithm
    log_evidence, _ = on_grid(
        grid,
        stats.gamma(4, scale=1 / 3).logpdf(np.exp(grid)) + grid,
        lambda t, new, old: stats.norm.logpdf(new, 0.8 * old, 0.3),
        lambda t, x: stats.gamma(3, scale=np.exp(x) / 3).logpdf(POSITIVE_DATA[t]),
        10,
    )
    return Exact(log_evidence)


def exact_heavy_tails():
    grid = np.linspace(-25, 25, 1251)
    log_evidence, means = on_grid(
        grid,
        stats.t(3, 0.2, 0.7).logpdf(grid),
        lambda t, new, old: stats.t.logpdf(new, 4, 0.8 * old, 0.4),
        lambda t, x: stats.laplace(x, 0.5).logpdf(LEVEL_DATA[t]),
        6,
    )
    return Exact(log_evidence, {"x": means})


PROGRAMS["positive states, Gamma start"] = UserProgram(
    positive_states, exact_positive_states, (POSITIVE_DATA,), params={"shape": 3.0}
)
PROGRAMS["heavy tails"] = UserProgram(heavy_tails, exact_heavy_tails, (LEVEL_DATA[:6],), params={"df": 4.0})


def mixed_transitions(y):
    """Jumps or stays, the two marginalised in a mixture distribution; the likelihood is a factor statement."""
    jump = numpyro.param("jump", 0.2, constraint=constraints.unit_interval)

    def step(x, y_t):
        parts = dist.Normal(jnp.stack([x, 0.0 * x]), jnp.array([0.2, 1.0]))
        x = numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.stack([1 - jump, jump])), parts))
        numpyro.factor("seen", dist.Normal(x, 0.6).log_prob(y_t))
        return x, x

    scan(step, 0.0, y)


def truncated_states(y):
    floor = numpyro.param("floor", 0.1)

    def step(x, y_t):
        x = numpyro.sample("x", dist.TruncatedNormal(0.8 * x, 0.6, low=floor))
        numpyro.sample("y", dist.Normal(x, 0.6).mask(y_t > -1.0), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.HalfNormal(1.0))
    scan(step, x_0, y)


def exact_mixed_transitions():
    grid = np.linspace(-7, 7, 701)

    def log_transition(t, new, old):
        if t == 0:  # from zero
            old = 0.0 * old
        return np.logaddexp(np.log(0.8) + stats.norm.logpdf(new, old, 0.2), np.log(0.2) + stats.norm.logpdf(new, 0, 1))

    start = stats.norm(0, 1).logpdf(grid)
    log_evidence, means = on_grid(
        grid, start, log_transition, lambda t, x: stats.norm(x, 0.6).logpdf(LEVEL_DATA[t]), 10
    )
    return Exact(log_evidence, {"x": means})


def exact_truncated_states():
    # The grid's points are midpoints, so that both the start on x > 0 and the states on x > floor are covered.
    width = 0.01
    start = np.arange(0.5 * width, 7, width)
    grid = np.arange(0.1 + 0.5 * width, 7.1, width)

    def log_transition(new, old):
        return stats.norm.logpdf(new, 0.8 * old, 0.6) - stats.norm.logsf(0.1, 0.8 * old, 0.6)

    def log_likelihood(t):
        return stats.norm(grid, 0.6).logpdf(LEVEL_DATA[t]) * (LEVEL_DATA[t] > -1.0)

    first = log_transition(grid[:, None], start[None]) + stats.halfnorm.logpdf(start)
    log_alpha = logsumexp(first, axis=1) + np.log(width) + log_likelihood(0)
    between = log_transition(grid[:, None], grid[None])
    for t in range(1, 6):
        log_alpha = logsumexp(between + log_alpha, axis=1) + np.log(width) + log_likelihood(t)
    return Exact(logsumexp(log_alpha) + np.log(width))


PROGRAMS["mixture as transition, factor as likelihood"] = UserProgram(
    mixed_transitions, exact_mixed_transitions, (LEVEL_DATA,), params={"jump": 0.2}, discrete=True
)
PROGRAMS["truncated states, masked distribution"] = UserProgram(
    truncated_states, exact_truncated_states, (LEVEL_DATA[:6],), params={"floor": 0.1}
)


# ---- reparameterised steps


def innovations(y):
    """Only the standardised innovations are sampled; the state is deterministic."""
    scale = numpyro.param("scale", 0.4, constraint=constraints.positive)

    def step(x, y_t):
        eps = numpyro.sample("eps", dist.Normal(0.0, 1.0))
        x = numpyro.deterministic("x", 0.9 * x + scale * eps)
        numpyro.sample("y", dist.Normal(x, 0.6), obs=y_t)
        return x, x

    eps_0 = numpyro.sample("eps_0", dist.Normal(0.0, 1.0))
    scan(step, numpyro.deterministic("x_0", 0.8 * eps_0), y)


def innovations_guide(y):
    """The innovations proposed as one plated site over time."""
    loc = numpyro.param("loc", jnp.zeros(len(y)))
    width = numpyro.param("width", jnp.ones(len(y)), constraint=constraints.positive)
    numpyro.sample("eps_0", dist.Normal(0.0, 1.0))
    with numpyro.plate("time", len(y)):
        numpyro.sample("eps", dist.Normal(loc, width))


def decentred(y):
    scale = numpyro.param("scale", 0.4, constraint=constraints.positive)

    def step(x, y_t):
        with handlers.reparam(config={"x": LocScaleReparam(0)}):
            x = numpyro.sample("x", dist.Normal(0.9 * x, scale))
        numpyro.sample("y", dist.Normal(x, 0.6), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 0.8))
    scan(step, x_0, y)


def transformed(y):
    """Log-normal volatility by TransformReparam, the reparameterised step function handed to scan."""
    scale = numpyro.param("scale", 0.3, constraint=constraints.positive)

    def step(volatility, y_t):
        law = dist.TransformedDistribution(
            dist.Normal(0.0, 1.0),
            [transforms.AffineTransform(0.9 * jnp.log(volatility), scale), transforms.ExpTransform()],
        )
        volatility = numpyro.sample("volatility", law)
        numpyro.sample("y", dist.Normal(0.0, volatility), obs=y_t)
        return volatility, volatility

    volatility_0 = numpyro.sample("volatility_0", dist.LogNormal(0.0, 0.5))
    scan(handlers.reparam(step, config={"volatility": TransformReparam()}), volatility_0, y)


def exact_innovations():
    log_evidence, means = kalman(LEVEL_DATA, 0, 0.64, 0.9, 0.16, 1, 0.36)
    return Exact(log_evidence, {"x": means[:, 0]})


def exact_transformed():
    grid = np.linspace(-6, 6, 600)
    log_evidence, _ = on_grid(
        grid,
        stats.norm(0, 0.5).logpdf(grid),
        lambda t, new, old: stats.norm.logpdf(new, 0.9 * old, 0.3),
        lambda t, x: stats.norm(0, np.exp(x)).logpdf(RETURNS[t]),
        10,
    )
    return Exact(log_evidence)


PROGRAMS["innovations"] = UserProgram(innovations, exact_innovations, (LEVEL_DATA,), params={"scale": 0.4})
PROGRAMS["innovations, path guide"] = UserProgram(
    innovations,
    exact_innovations,
    (LEVEL_DATA,),
    params={"scale": 0.4, "loc": 0.3 * np.diff(LEVEL_DATA, prepend=0.0), "width": np.ones(10, np.float32)},
    guide=innovations_guide,
    num_particles=128,
)
PROGRAMS["LocScaleReparam in the step"] = UserProgram(
    decentred, exact_innovations, (LEVEL_DATA,), params={"scale": 0.4}
)
PROGRAMS["TransformReparam of the step"] = UserProgram(
    transformed, exact_transformed, (RETURNS,), params={"scale": 0.3}
)


# ---- carries that are dicts and tuples with names


def trend_in_dict(y):
    damping = numpyro.param("damping", 0.8)

    def step(state, y_t):
        slope = numpyro.sample("slope", dist.Normal(damping * state["slope"], 0.2))
        level = numpyro.sample("level", dist.Normal(state["level"] + slope, 0.3))
        numpyro.sample("y", dist.Normal(level, 0.5), obs=y_t)
        return {"level": level, "slope": slope}, level

    scan(step, {"level": 0.0, "slope": 0.0}, y)


def exact_trend():
    a = np.array([[0.8, 0.0], [0.8, 1.0]])
    noise = np.array([[0.2, 0.0], [0.2, 0.3]])
    log_evidence, means = kalman(LEVEL_DATA, [0, 0], np.zeros((2, 2)), a, noise @ noise.T, [0, 1], 0.25)
    return Exact(log_evidence, {"slope": means[:, 0], "level": means[:, 1]})


PROGRAMS["trend in a dict"] = UserProgram(trend_in_dict, exact_trend, (LEVEL_DATA,), params={"damping": 0.8})


class Epidemic(NamedTuple):
    susceptible: Any
    infected: Any
    recovered: Any


def epidemic(cases, population):
    """Chain-binomial SIR: several discrete latents per step, a named tuple as carry."""
    contact = numpyro.param("contact", 1.2, constraint=constraints.positive)
    recovery = numpyro.param("recovery", 0.4, constraint=constraints.unit_interval)

    def step(state, y_t):
        risk = 1 - jnp.exp(-contact * state.infected / population)
        infections = numpyro.sample("infections", dist.Binomial(state.susceptible, risk))
        recoveries = numpyro.sample("recoveries", dist.Binomial(state.infected, recovery))
        state = Epidemic(
            state.susceptible - infections, state.infected + infections - recoveries, state.recovered + recoveries
        )
        numpyro.deterministic("prevalence", state.infected / population)
        numpyro.sample("cases", dist.Poisson(0.7 * infections + 0.2), obs=y_t)
        return state, state

    start = Epidemic(jnp.asarray(population - 3), jnp.asarray(3), jnp.asarray(0))
    scan(step, start, cases)


CASES = np.array([1, 2, 0, 1, 3, 0])
POPULATION = 9


def exact_epidemic():
    alpha = {(POPULATION - 3, 3): 1.0}
    for y_t in CASES:
        new: dict[tuple[int, int], float] = {}
        for (s, i), mass in alpha.items():
            infected = stats.binom(s, 1 - np.exp(-1.2 * i / POPULATION)).pmf(np.arange(s + 1))
            infected = infected * stats.poisson(0.7 * np.arange(s + 1) + 0.2).pmf(y_t)
            recovered = stats.binom(i, 0.4).pmf(np.arange(i + 1))
            for a, p in enumerate(infected):
                for b, q in enumerate(recovered):
                    key = (s - a, i + a - b)
                    new[key] = new.get(key, 0.0) + mass * p * q
        alpha = new
    return Exact(np.log(sum(alpha.values())))


PROGRAMS["epidemic in a named tuple"] = UserProgram(
    epidemic,
    exact_epidemic,
    (CASES, POPULATION),
    params={"contact": 1.2, "recovery": 0.4},
    discrete=True,
    num_particles=128,
)


# ---- scaled programs


def tempered_likelihood(y, power=0.5):
    drift = numpyro.param("drift", 0.4, constraint=constraints.positive)

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, drift))
        with handlers.scale(scale=power):
            numpyro.sample("y", dist.Normal(x, 0.6), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y)


def exact_tempered():
    # N(y; x, r)^p is N(y; x, r / p) times a constant.
    log_evidence, means = kalman(LEVEL_DATA, 0, 1, 1, 0.16, 1, 0.36 / 0.5)
    constant = -0.5 * 0.5 * np.log(2 * np.pi * 0.36) + 0.5 * np.log(2 * np.pi * 0.36 / 0.5)
    return Exact(log_evidence + 10 * constant, {"x": means[:, 0]})


PROGRAMS["tempered likelihood"] = UserProgram(tempered_likelihood, exact_tempered, (LEVEL_DATA,), params={"drift": 0.4})
PROGRAMS["whole program scaled"] = UserProgram(
    handlers.scale(local_level, scale=0.1), exact_local_level, (LEVEL_DATA,), params=LEVEL_PARAMS, scale=0.1
)


# ---- multivariate states, several sites per step, plates inside the step


def multivariate(y):
    tril = numpyro.param("tril", jnp.array([[0.5, 0.0], [0.2, 0.4]]))
    A = jnp.array([[0.9, 0.2], [-0.1, 0.8]])

    def step(x, y_t):
        x = numpyro.sample("x", dist.MultivariateNormal(A @ x, scale_tril=tril))
        numpyro.sample("y", dist.MultivariateNormal(x, covariance_matrix=0.3 * jnp.eye(2)), obs=y_t)
        return x, x

    x_0 = numpyro.sample("x_0", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
    scan(step, x_0, y)


PLANE_DATA = simulate_walk(7, 8, 2)


def exact_multivariate():
    tril = np.array([[0.5, 0.0], [0.2, 0.4]])
    a = np.array([[0.9, 0.2], [-0.1, 0.8]])
    log_evidence, means = kalman(PLANE_DATA, [0, 0], np.eye(2), a, tril @ tril.T, np.eye(2), 0.3 * np.eye(2))
    return Exact(log_evidence, {"x": means})


PROGRAMS["multivariate states"] = UserProgram(
    multivariate,
    exact_multivariate,
    (PLANE_DATA,),
    params={"tril": np.array([[0.5, 0.0], [0.2, 0.4]], np.float32)},
    num_particles=128,
)


class FactorModel:
    """One common factor behind a plate of assets; the program is a method, and its settings are attributes."""

    def __init__(self, loadings):
        self.loadings = jnp.asarray(loadings)

    def model(self, prices, volumes=None):
        persistence = numpyro.param("persistence", 0.8)

        def step(factor, inputs):
            price, volume = inputs
            factor = numpyro.sample("factor", dist.Normal(persistence * factor, 0.6))
            shock = numpyro.sample("shock", dist.Normal(0.2 * factor, 0.3))
            with numpyro.plate("assets", 3):
                numpyro.sample("price", dist.Normal(self.loadings * (factor + shock), 0.7), obs=price)
            numpyro.sample("volume", dist.Normal(shock, 0.5), obs=volume)
            return factor, factor

        scan(step, numpyro.sample("factor_0", dist.Normal(0, 1)), (prices, volumes))


FACTORS = FactorModel([1.0, 0.5, -0.4])
PRICES, VOLUMES = 0.7 * simulate_walk(8, 8, 3), 0.5 * simulate_walk(9, 8)


def exact_factors():
    a = np.array([[0.8, 0.0], [0.16, 0.0]])
    noise = np.array([[0.6, 0.0], [0.12, 0.3]])
    c = np.array([[1.0, 1.0], [0.5, 0.5], [-0.4, -0.4], [0.0, 1.0]])
    y = np.concatenate([PRICES, VOLUMES[:, None]], 1)
    log_evidence, means = kalman(y, [0, 0], np.diag([1.0, 0]), a, noise @ noise.T, c, np.diag([0.49] * 3 + [0.25]))
    return Exact(log_evidence, {"factor": means[:, 0], "shock": means[:, 1]})


PROGRAMS["factor behind a plate of assets"] = UserProgram(
    FACTORS.model, exact_factors, (PRICES, VOLUMES), params={"persistence": 0.8}, num_particles=128
)
