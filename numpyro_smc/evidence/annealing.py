r"""Annealed chains with Hamiltonian moves, whose numbers a pilot run chooses and then freezes.

The bridging densities between a guide and its model are :math:`\log\gamma_k = (1 - \beta_k)\log q_0 + \beta_k\log f`.
A chain that starts as a draw from :math:`q_0` gains :math:`(\beta_k - \beta_{k-1})(\log f - \log q_0)` at its position
and then moves by a Metropolis-adjusted Hamiltonian transition, reversible for :math:`\gamma_k`, for
:math:`k = 1 \dots K`; the move at :math:`\beta_K = 1` would change no weight and is left out. The mean weight is
unbiased for :math:`Z` if every number of the path was fixed before the run. Read from its other end the path is that of
the reverse chain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.programs.guide_target import Ends, GuideTarget, State

SHORTEST = 0.05  # of the tuned step, where a transition may draw its own: no trajectory is a whole period for long
SMALLEST_STEP, LARGEST_STEP = 1e-5, 1.5  # in units of the scales
_GAIN, _WARMUP_MOVES, _LEAST_PILOT_MOVES, _MEMORY = 0.5, 30, 100, 0.7


class Chains(NamedTuple):
    """Where chains stand, ``[C, *plates, ...]``: log densities and gradients of both ends serve any temperature."""

    position: State
    ends: Ends
    base_gradient: State
    target_gradient: State


class Path(NamedTuple):
    """The numbers of an annealing run, per plate element.

    - **betas** - ``[K + 1, *plates]``, from 0 to 1 (1 to 0 for the reverse chain).
    - **step_sizes** - largest steps of the moves at the K - 1 inner temperatures, ``[K - 1, *plates]``, in units of
    - **scales** - of the coordinates, by site, ``[K - 1, *plates, ...]``.
    """

    betas: Array
    step_sizes: Array
    scales: State

    def reversed(self) -> "Path":
        """The same path from its other end."""
        return jax.tree.map(lambda x: jnp.flip(x, 0), self)


class _Pilot(NamedTuple):
    chains: Chains
    log_step: Array
    variance: State


class Annealed(NamedTuple):
    """**log_weights** ``[C, *plates]``, and **acceptance** of the moves, mean over chains, ``[K - 1, *plates]``."""

    log_weights: Array
    acceptance: Array


def start(rng_key: Array, target: GuideTarget, num_chains: int) -> Chains:
    """Draws from the guide."""
    return chains_at(target, jax.vmap(target.draw, (None, 0))(rng_key, jnp.arange(num_chains)))


def chains_at(target: GuideTarget, position: State) -> Chains:
    """Chains at given positions ``[C, *plates, ...]``, with the log densities and gradients of both ends."""

    def base(state: State) -> tuple[Array, Array]:
        value = target.ends(state).base
        return jnp.sum(value), value

    def model(state: State) -> tuple[Array, Array]:
        value = target.ends(state).target
        return jnp.sum(value), value

    # Two functions, so that the guide's gradient does not pass through the model.
    base_gradient, log_base = jax.vmap(jax.grad(base, has_aux=True))(position)
    target_gradient, log_target = jax.vmap(jax.grad(model, has_aux=True))(position)
    return Chains(position, Ends(log_base, log_target), base_gradient, target_gradient)


def increment(ends: Ends, beta_before: Array, beta: Array) -> Array:
    """What a chain gains where the temperature changes."""
    return jnp.where(beta == beta_before, 0.0, (beta - beta_before) * (ends.target - ends.base))


def anneal(rng_key: Array, target: GuideTarget, chains: Chains, path: Path, num_leapfrog: int) -> Annealed:
    """Weigh and move chains along a path."""
    betas = path.betas

    def step(carry: tuple[Chains, Array], inputs: tuple[Array, Array, Path]) -> tuple[tuple[Chains, Array], Array]:
        chains, log_weights = carry
        rng_key, beta_before, (beta, step_size, scale) = inputs
        log_weights = log_weights + increment(chains.ends, beta_before, beta)
        chains, acceptance = hmc(rng_key, target, chains, beta, step_size, scale, num_leapfrog)
        return (chains, log_weights), jnp.mean(acceptance, axis=0)

    keys = random.split(rng_key, len(betas) - 2)
    inner = Path(betas[1:-1], path.step_sizes, path.scales)
    zeros = jnp.zeros(chains.ends.base.shape, jnp.result_type(betas, *chains.ends))
    carry = (chains, zeros)
    (chains, log_weights), acceptance = lax.scan(step, carry, (keys, betas[:-2], inner))
    return Annealed(log_weights + increment(chains.ends, betas[-2], betas[-1]), acceptance)


def hmc(
    rng_key: Array, target: GuideTarget, chains: Chains, beta: Array, step_size: Array, scale: State, num_leapfrog: int
) -> tuple[Chains, Array]:
    """One Hamiltonian transition of every chain and plate element [1], accepted or rejected per element.

    Each draws its step uniformly below the given one, so that no coordinate's trajectories are all near a whole period.

    :return: the new chains and the acceptance probabilities ``[C, *plates]``.

    **References**

    1. *MCMC Using Hamiltonian Dynamics*, R. Neal (2011)
    """
    rank = chains.ends.base.ndim
    noise_key, jitter_key, accept_key = random.split(rng_key, 3)
    jitter = random.uniform(jitter_key, chains.ends.base.shape, minval=SHORTEST)
    step = step_size * jitter
    # In whitened coordinates z = scale * u the mass is one.
    moves = {name: _expand(step, x, rank).astype(x.dtype) * scale[name] for name, x in chains.position.items()}
    momentum = {
        name: random.normal(random.fold_in(noise_key, i), x.shape, x.dtype)
        for i, (name, x) in enumerate(chains.position.items())
    }

    def kick(momentum: State, at: Chains, fraction: float) -> State:
        kicked = {}
        for name, v in momentum.items():
            beta_of_each = _expand(beta, v[0], rank - 1).astype(v.dtype)
            force = _blend(at.base_gradient[name], at.target_gradient[name], beta_of_each)
            kicked[name] = v + fraction * moves[name] * force
        return kicked

    def drift(position: State, momentum: State) -> State:
        return {name: z + moves[name] * momentum[name] for name, z in position.items()}

    def leapfrog(i: Array, carry: tuple[State, State]) -> tuple[State, State]:
        # The log densities themselves are needed at the end only: here nothing but gradients is computed.
        position, momentum = carry
        momentum = kick(momentum, chains_at(target, position), 1.0)
        return drift(position, momentum), momentum

    kicked = kick(momentum, chains, 0.5)
    carry = (drift(chains.position, kicked), kicked)
    position, kicked = lax.fori_loop(0, num_leapfrog - 1, leapfrog, carry)
    end = chains_at(target, position)
    last = kick(kicked, end, 0.5)
    gain = _blend(end.ends.base, end.ends.target, beta) - _blend(chains.ends.base, chains.ends.target, beta)
    log_ratio = gain + 0.5 * (_squared_norm(momentum, rank) - _squared_norm(last, rank))
    acceptance = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
    accepted = random.uniform(accept_key, acceptance.shape) < acceptance
    return jax.tree.map(lambda new, old: jnp.where(_expand(accepted, new, rank), new, old), end, chains), acceptance


def tune(
    rng_key: Array, target: GuideTarget, betas: Array, num_chains: int, num_leapfrog: int, target_acceptance: float
) -> tuple[Path, Array]:
    """A pilot run that chooses step sizes and scales per temperature and plate element.

    Steps follow the mean acceptance over chains, scales the spread of the chains; both change along the path.

    :param betas: ``[K + 1, *plates]``.
    :return: the path, and the chains' standard deviations of :math:`\\log f - \\log q_0` at each temperature.
    """
    inner = betas[1:-1]
    num_moves = -(-_LEAST_PILOT_MOVES // len(inner))
    start_key, run_key = random.split(rng_key)
    chains = start(start_key, target, num_chains)

    def adapt(state: _Pilot, inputs: tuple[Array, Array]) -> tuple[_Pilot, tuple[Array, State, Array]]:
        chains, log_step, variance = state
        rng_key, beta = inputs
        scale = jax.tree.map(jnp.sqrt, variance)
        chains, acceptance = hmc(rng_key, target, chains, beta, jnp.exp(log_step), scale, num_leapfrog)
        log_step = log_step + _GAIN * (jnp.mean(acceptance, axis=0) - target_acceptance)
        log_step = jnp.clip(log_step, jnp.log(SMALLEST_STEP), jnp.log(LARGEST_STEP))
        variance = jax.tree.map(
            lambda old, z: _MEMORY * old + (1.0 - _MEMORY) * _variance(z), variance, chains.position
        )
        return _Pilot(chains, log_step, variance), (log_step, scale, _spread(chains.ends))

    dimension = sum(x[0].size for x in chains.position.values()) / max(chains.ends.base[0].size, 1)
    first_step = jnp.full(chains.ends.base.shape[1:], jnp.log(0.5 * dimension**-0.25))
    state = _Pilot(chains, first_step, jax.tree.map(_variance, chains.position))
    visited = jnp.concatenate(
        [jnp.broadcast_to(betas[1], (_WARMUP_MOVES, *betas.shape[1:])), jnp.repeat(inner, num_moves, axis=0)]
    )
    _, moves = lax.scan(adapt, state, (random.split(run_key, len(visited)), visited))
    log_steps, scales, spreads = jax.tree.map(lambda x: x[_WARMUP_MOVES + num_moves - 1 :: num_moves], moves)
    spreads = jnp.concatenate([_spread(chains.ends)[None], spreads, spreads[-1:]])
    return Path(betas, jnp.exp(log_steps), scales), spreads


def equal_steps(betas: Array, spreads: Array) -> Array:
    r"""Temperatures at equal distances along the path [1].

    The distance is :math:`\int \sqrt{\operatorname{Var}_\beta(\log f - \log q_0)}\,d\beta`.

    :param betas: ``[K + 1, *plates]``; **spreads** - standard deviations there. A tenth of the distance is shared out
        evenly over the given steps, so that no estimate of zero leaves a gap.
    :return: ``[K + 1, *plates]``.

    **References**

    1. *Simulating Normalizing Constants: From Importance Sampling to Bridge Sampling to Path Sampling*, A. Gelman,
       X. Meng (1998)
    """
    shape = betas.shape
    lengths = 0.5 * (spreads[1:] + spreads[:-1]) * jnp.diff(betas, axis=0)
    lengths = jnp.where(jnp.isfinite(lengths), lengths, 0.0)
    lengths = lengths + jnp.maximum(jnp.mean(lengths, axis=0), 1e-30) / 9.0
    along = jnp.concatenate([jnp.zeros_like(lengths[:1]), jnp.cumsum(lengths, axis=0)]) / jnp.sum(lengths, axis=0)
    even = jnp.linspace(0.0, 1.0, shape[0])
    columns = jax.vmap(lambda x, y: jnp.interp(even, x, y), (1, 1), 1)(
        along.reshape(shape[0], -1), betas.reshape(shape[0], -1)
    )
    return columns.reshape(shape).at[0].set(0.0).at[-1].set(1.0)


def _blend(base: Array, target: Array, beta: Array) -> Array:
    # At either end the other's density, which may be -inf, does not matter.
    return jnp.where(beta < 1.0, (1.0 - beta) * base, 0.0) + jnp.where(beta > 0.0, beta * target, 0.0)


def _expand(x: Array, like: Array, rank: int) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - rank))


def _squared_norm(tree: State, rank: int) -> Array:
    return sum((jnp.sum(x**2, axis=tuple(range(rank, x.ndim))) for x in tree.values()), start=jnp.zeros(()))


def _variance(z: Array) -> Array:
    spread = jnp.var(z, axis=0, ddof=1) if z.shape[0] > 1 else jnp.ones(z.shape[1:])
    return jnp.maximum(spread, 1e-20)


def _spread(ends: Ends) -> Array:
    difference = ends.target - ends.base
    alive = jnp.isfinite(difference)
    number = jnp.maximum(jnp.sum(alive, axis=0), 1)
    centre = jnp.sum(jnp.where(alive, difference, 0.0), axis=0) / number
    return jnp.sqrt(jnp.sum(jnp.where(alive, (difference - centre) ** 2, 0.0), axis=0) / number)
