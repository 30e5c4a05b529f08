r"""Markov moves of a cloud of particles: BlackJAX kernels, scaled by the cloud, with step sizes from acceptance.

Every kernel moves :math:`y = S^{-1} u`, where :math:`S` holds the cloud's standard deviations (or is the Cholesky
factor of its covariance). For Hamiltonian kernels this is the inverse mass matrix :math:`S S^\top`; Langevin and
random-walk proposals get the covariance :math:`\epsilon^2 S S^\top`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc import hmc, integrators, mala, metrics, nuts, random_walk
from jax import Array, lax, random

LogDensity = Callable[[Array], Array]

_GAIN = 0.5
_MIN_SPREAD = 1e-10


class Move(NamedTuple):
    """A Markov kernel of one particle, leaving the density it is given invariant.

    - **init** - ``(position, log_density) -> state``, whose field ``position`` is read after the moves.
    - **step** - ``(draws, state, log_density, step_size) -> (state, acceptance probability)``.
    - **target_acceptance** - what the step size is tuned to. **step_size** - where it starts, by the dimension.
    - **num_moves** - how often it is applied at each temperature, if the user does not say.
    - **draws** - ``(rng_key, positions) -> `` what is random in one step of every particle; a key each by default.
    """

    init: Callable[[Array, LogDensity], Any]
    step: Callable[[Any, Any, LogDensity, Array], tuple[Any, Array]]
    target_acceptance: float
    step_size: Callable[[int], float]
    num_moves: int
    draws: Callable[[Array, Array], Any] = lambda rng_key, positions: random.split(rng_key, positions.shape[0])


class _At(NamedTuple):
    position: Array


class _Hamiltonian(NamedTuple):
    """What is random in one Hamiltonian move; **stretch** multiplies the step size."""

    momentum: Array
    stretch: Array
    rng_key: Array


def hamiltonian(num_integration_steps: int = 8) -> Move:
    """Hamiltonian Monte Carlo; each move's step size is jittered by a fifth, against trajectories that close."""
    kernel = hmc.build_kernel(integrator=partial(_trajectory, num_integration_steps=num_integration_steps))

    def draws(rng_key: Array, positions: Array) -> _Hamiltonian:
        momentum_key, stretch_key, rng_key = random.split(rng_key, 3)
        num_particles, dtype = positions.shape[0], positions.dtype
        return _Hamiltonian(
            random.normal(momentum_key, positions.shape, dtype),
            random.uniform(stretch_key, (num_particles,), dtype, 0.8, 1.2),
            random.split(rng_key, num_particles),
        )

    def step(draws: _Hamiltonian, state: Any, log_density: LogDensity, step_size: Array) -> tuple[Any, Array]:
        def kinetic_energy(momentum: Array, position: Any = None) -> Array:
            return 0.5 * jnp.sum(momentum**2)

        # Only the no-U-turn sampler asks a metric for more.
        metric: Any = metrics.Metric(lambda rng_key, position: draws.momentum, kinetic_energy, None, None)  # type: ignore[arg-type]
        state, info = kernel(draws.rng_key, state, log_density, step_size * draws.stretch, metric, 1)
        return state, info.acceptance_rate

    return Move(hmc.init, step, 0.8, lambda dimension: dimension**-0.25, 5, draws)


def _trajectory(log_density: LogDensity, kinetic_energy: Any, num_integration_steps: int) -> Callable[..., Any]:
    """A BlackJAX integrator whose one step is a whole leapfrog trajectory with unit mass.

    Only its end needs the log density; BlackJAX's own loop evaluates it with every gradient, for twice the time.
    """
    gradient, value_and_gradient = jax.grad(log_density), jax.value_and_grad(log_density)

    def trajectory(state: integrators.IntegratorState, step_size: Array) -> integrators.IntegratorState:
        momentum = state.momentum + 0.5 * step_size * state.logdensity_grad
        position = state.position + step_size * momentum

        def leap(_: int, at: tuple[Array, Array]) -> tuple[Array, Array]:
            position, momentum = at
            momentum = momentum + step_size * gradient(position)
            return position + step_size * momentum, momentum

        position, momentum = lax.fori_loop(0, num_integration_steps - 1, leap, (position, momentum))
        value, last = value_and_gradient(position)
        return integrators.IntegratorState(position, momentum + 0.5 * step_size * last, value, last)

    return trajectory


def no_u_turn(max_num_doublings: int = 8) -> Move:
    """The no-U-turn sampler. All particles wait for the longest trajectory."""
    kernel = nuts.build_kernel()

    def step(rng_key: Array, state: Any, log_density: LogDensity, step_size: Array) -> tuple[Any, Array]:
        identity = jnp.ones_like(state.position)
        state, info = kernel(rng_key, state, log_density, step_size, identity, max_num_doublings)
        return state, info.acceptance_rate

    return Move(hmc.init, step, 0.8, lambda dimension: dimension**-0.25, 2)


def langevin() -> Move:
    """The Metropolis-adjusted Langevin algorithm; the step size is the proposal's standard deviation."""
    kernel = mala.build_kernel()

    def step(rng_key: Array, state: Any, log_density: LogDensity, step_size: Array) -> tuple[Any, Array]:
        state, info = kernel(rng_key, state, log_density, 0.5 * step_size**2)
        return state, info.acceptance_rate

    return Move(mala.init, step, 0.574, lambda dimension: 1.65 * dimension ** (-1 / 6), 10)


def random_walk_metropolis() -> Move:
    """Random-walk Metropolis; the step size is the proposal's standard deviation."""
    kernel = random_walk.build_additive_step()

    def step(rng_key: Array, state: Any, log_density: LogDensity, step_size: Array) -> tuple[Any, Array]:
        propose = random_walk.normal(step_size * jnp.ones_like(state.position))
        state, info = kernel(rng_key, state, log_density, propose)
        return state, info.acceptance_rate

    return Move(random_walk.init, step, 0.234, lambda dimension: 2.38 * dimension**-0.5, 20)


def of_function(fn: Callable[[Array, Array, LogDensity, Array], tuple[Array, Array]]) -> Move:
    """The user's kernel: ``(rng_key, position, log_density, step_size) -> (position, acceptance probability)``."""

    def step(rng_key: Array, state: _At, log_density: LogDensity, step_size: Array) -> tuple[_At, Array]:
        position, acceptance = fn(rng_key, state.position, log_density, step_size)
        return _At(jnp.asarray(position, state.position.dtype)), jnp.asarray(acceptance, state.position.dtype)

    return Move(lambda position, _: _At(position), step, 0.5, lambda dimension: dimension**-0.5, 10)


MOVES: dict[str, Callable[..., Move]] = {
    "hmc": hamiltonian,
    "nuts": no_u_turn,
    "mala": langevin,
    "rwmh": random_walk_metropolis,
}


class Tuning(NamedTuple):
    """What is learned from the cloud: **log_step_size**, and **scale**, ``[D]`` or lower triangular ``[D, D]``."""

    log_step_size: Array
    scale: Array


class Moved(NamedTuple):
    """Outcome of a stage's moves.

    - **path** - positions after each sweep, ``[num_moves, N, D]`` (only the last, ``[1, N, D]``, unless all are kept).
    - **acceptance** - mean over particles and sweeps. **log_step_size** - after the last sweep.
    """

    path: Array
    acceptance: Array
    log_step_size: Array


def cloud_scale(positions: Array, weights: Array, dense: bool) -> Array:
    """Standard deviations ``[D]``, or the Cholesky factor ``[D, D]`` of the covariance, of a weighted cloud.

    :param positions: ``[N, D]``. **weights** - ``[N]``, sum to one; a position of weight zero counts for nothing.
    """
    alive = weights > 0.0
    positions = jnp.where(alive[:, None], positions, 0.0)
    centred = jnp.where(alive[:, None], positions - weights @ positions, 0.0)
    variance = jnp.maximum(weights @ centred**2, _MIN_SPREAD)
    if not dense:
        return jnp.sqrt(variance)
    # Shrunk towards its diagonal: with N not far above D the sample covariance is nearly singular.
    num_particles, dimension = positions.shape
    kept = num_particles / (num_particles + dimension)
    covariance = kept * (centred.T * weights) @ centred + (1.0 - kept) * jnp.diag(variance)
    factor = jnp.linalg.cholesky(covariance + 1e-6 * jnp.diag(variance))
    return jnp.where(jnp.all(jnp.isfinite(factor)), factor, jnp.diag(jnp.sqrt(variance)))


def move_cloud(
    rng_key: Array,
    move: Move,
    positions: Array,
    log_density: LogDensity,
    tuning: Tuning,
    num_moves: int,
    *,
    tune_step_size: bool,
    keep_path: bool = False,
    batch_size: int | None = None,
) -> Moved:
    r"""Apply a move ``num_moves`` times to every particle.

    After each sweep of the cloud, with :math:`a` its mean acceptance and :math:`a^*` the target,
    :math:`\log\epsilon \leftarrow \log\epsilon + \tfrac12 (a - a^*) / (a^* (1 - a^*))`.

    :param positions: ``[N, D]``. **log_density** - of one position ``[D]``.
    :param batch_size: particles moved at a time.
    """
    scale = tuning.scale
    if scale.ndim == 1:
        to_scaled, from_scaled = (lambda u: u / scale), (lambda y: y * scale)
    else:
        to_scaled = partial(jax.scipy.linalg.solve_triangular, scale, lower=True)
        from_scaled = partial(jnp.matmul, scale)

    def scaled_log_density(y: Array) -> Array:
        return _no_density_if_nan(log_density(from_scaled(y)))

    def mapped(fn: Callable[..., Any], *operands: Any) -> Any:
        return over_particles(lambda operand: fn(*operand), operands, batch_size)

    states = mapped(lambda u: move.init(to_scaled(u), scaled_log_density), positions)
    target = move.target_acceptance
    gain = _GAIN / (target * (1.0 - target))

    def sweep(carry: tuple[Any, Array], sweep_key: Array) -> tuple[tuple[Any, Array], Any]:
        states, log_step_size = carry
        step_size = jnp.exp(log_step_size)
        draws = move.draws(sweep_key, positions)
        states, acceptance = mapped(lambda d, s: move.step(d, s, scaled_log_density, step_size), draws, states)
        mean = jnp.mean(jnp.where(jnp.isfinite(acceptance), acceptance, 0.0))
        if tune_step_size:
            log_step_size = log_step_size + gain * (mean - target)
        return (states, log_step_size), (mean, states.position if keep_path else None)

    (states, log_step_size), (acceptance, path) = lax.scan(
        sweep, (states, tuning.log_step_size), random.split(rng_key, num_moves)
    )
    path = path if keep_path else states.position[None]
    return Moved(jax.vmap(jax.vmap(from_scaled))(path), jnp.mean(acceptance), log_step_size)


@jax.custom_jvp
def _no_density_if_nan(value: Array) -> Array:
    """A gradient through the comparison would need the value, which half of the evaluations can do without."""
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


@_no_density_if_nan.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _no_density_if_nan(*primals), tangents[0]


def over_particles(fn: Callable[[Any], Any], operands: Any, batch_size: int | None) -> Any:
    """``fn`` of every particle, ``batch_size`` at a time."""
    return jax.vmap(fn)(operands) if batch_size is None else lax.map(fn, operands, batch_size=batch_size)
