r"""Tempered sequential Monte Carlo, one temperature at a time.

The cloud at temperature :math:`\beta` targets :math:`\gamma_\beta = \pi_0 L^\beta`, with log weights :math:`W` of mean
one. A stage to :math:`\beta' > \beta` weighs, resamples when told to, and moves under the **new** temperature:

.. math:: \ell = \log \tfrac1N \sum_i e^{W^i + (\beta' - \beta) \log L(u^i)}, \qquad
   W^i \leftarrow W^i + (\beta' - \beta) \log L(u^i) - \ell, \qquad \log \hat Z = \sum \ell .

Waste-free, M ancestors start chains of P states, and all N = MP states are the new cloud.

This is not :func:`~numpyro_smc.engines.particles.run`, where increments may not depend on the weights: here the next
temperature is chosen from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.programs.resampling import Scheme
from numpyro_smc.programs.unconstrained import Split, UnconstrainedModel
from numpyro_smc.programs.weights import normalise
from numpyro_smc.samplers.moves import Move, Tuning, cloud_scale, move_cloud, over_particles

_PRECISION = 1e-4
_MAX_BISECTIONS = 128


@dataclass(frozen=True)
class Settings:
    """What a stage is told.

    - **target_ess** - fraction of N that decides the next temperature; ``None`` if temperatures are given.
    - **chain_length** - P, the states kept of each chain (waste-free); ``None`` to keep the last.
    """

    num_particles: int
    move: Move
    num_moves: int
    scheme: Scheme
    target_ess: float | None = 0.5
    ess_threshold: float = 0.5
    chain_length: int | None = None
    step_size: float | None = None
    tune_step_size: bool = True
    tune_scale: bool = True
    dense: bool = False
    batch_size: int | None = None

    @property
    def num_chains(self) -> int:
        """M, the number of resampled ancestors."""
        return self.num_particles // (self.chain_length or 1)

    def initial_log_step_size(self, dimension: int) -> Array:
        return jnp.log(jnp.asarray(self.step_size or self.move.step_size(dimension), jnp.result_type(float)))


class Cloud(NamedTuple):
    """Where a run stands.

    - **position** ``[N, D]``, **log_likelihood** ``[N]``, **log_weights** ``[N]`` of mean one.
    - **families** - which of the M initial groups each particle descends from, ``[N]``.
    - **temperature**, **num_stages**, **num_resampled**, **log_step_size** - scalars.
    """

    position: Array
    log_likelihood: Array
    log_weights: Array
    families: Array
    temperature: Array
    num_stages: Array
    num_resampled: Array
    log_step_size: Array
    rng_key: Array

    @property
    def positions_and_weights(self) -> tuple[Array, Array]:
        return self.position, self.log_weights


class StageReport(NamedTuple):
    """What one stage did, each a float.

    - **temperature** - the new one. **increment** - of the log evidence. **ess** - after weighing, between 1 and N.
    - **relative_variance** - estimate of the variance of the evidence so far, divided by its square.
    - **acceptance**, **step_size** - of the moves. **resampled** - whether. **log_likelihood** - mean after the moves.
    """

    temperature: Array
    increment: Array
    ess: Array
    relative_variance: Array
    acceptance: Array
    step_size: Array
    resampled: Array
    log_likelihood: Array


def start(rng_key: Array, model: UnconstrainedModel, settings: Settings) -> tuple[Cloud, Split]:
    """The cloud at temperature zero, and the log densities of its particles."""
    draw_key, run_key = random.split(rng_key)
    num_particles = settings.num_particles
    position = model.draw(draw_key, num_particles)
    split = over_particles(model.split, position, settings.batch_size)
    dtype = split.likelihood.dtype
    cloud = Cloud(
        position,
        split.likelihood,
        jnp.zeros(num_particles, dtype),
        jnp.arange(num_particles, dtype=jnp.int32) % settings.num_chains,
        jnp.zeros((), dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        settings.initial_log_step_size(model.dimension),
        run_key,
    )
    return cloud, split


def advance(
    cloud: Cloud, given_temperature: Array, model: UnconstrainedModel, settings: Settings
) -> tuple[Cloud, Array]:
    """One stage.

    :param given_temperature: the next temperature, unless it is chosen by the effective sample size.
    :return: the new cloud, and the :class:`StageReport` as one vector.
    """
    resample_key, move_key = random.split(random.fold_in(cloud.rng_key, cloud.num_stages))
    num_particles, num_chains = settings.num_particles, settings.num_chains

    def log_weights_at(temperature: Array) -> Array:
        return cloud.log_weights + tempered(temperature - cloud.temperature, cloud.log_likelihood)

    if settings.target_ess is None:
        temperature = given_temperature
        must_resample = jnp.asarray(settings.chain_length is not None)
    else:
        temperature = next_temperature(log_weights_at, cloud.temperature, settings.target_ess, num_particles)
        # A cloud at its target would have to stay there: only the last one may keep its weights.
        must_resample = (temperature < 1.0) | (settings.chain_length is not None)
    log_weights, increment, ess = normalise(log_weights_at(temperature))
    weights = jnp.exp(log_weights) / num_particles
    multinomial = settings.scheme.name == "multinomial"
    exponent = 1 + (cloud.num_resampled if multinomial else 0)
    relative_variance = genealogical_variance(weights, cloud.families, num_chains, exponent)

    scale = jnp.ones_like(cloud.position[0])
    if settings.tune_scale:
        scale = cloud_scale(cloud.position, weights, settings.dense)
    resampled = must_resample | (ess <= settings.ess_threshold * num_particles)
    assert settings.scheme.ancestors is not None
    if num_chains == num_particles:
        ancestors = lax.cond(
            resampled,
            lambda: settings.scheme.ancestors(resample_key, log_weights, num_particles),  # type: ignore[misc]
            lambda: jnp.arange(num_particles, dtype=jnp.int32),
        )
        log_weights = jnp.where(resampled, 0.0, log_weights)
    else:
        ancestors = settings.scheme.ancestors(resample_key, log_weights, num_chains)
        log_weights = jnp.zeros_like(log_weights)

    position, families = cloud.position[ancestors], cloud.families[ancestors]
    moved = move_cloud(
        move_key,
        settings.move,
        position,
        lambda u: tempered_density(model.split(u), temperature),
        Tuning(cloud.log_step_size, scale),
        settings.num_moves,
        tune_step_size=settings.tune_step_size,
        keep_path=settings.chain_length is not None,
        batch_size=settings.batch_size,
    )
    path = moved.path if settings.chain_length is None else jnp.concatenate([position[None], moved.path])
    position = path.reshape(num_particles, -1)
    log_likelihood = over_particles(lambda u: model.split(u).likelihood, position, settings.batch_size)
    report = StageReport(
        temperature,
        increment,
        ess,
        relative_variance,
        moved.acceptance,
        jnp.exp(moved.log_step_size),
        resampled,
        mean_of(log_likelihood, log_weights),
    )
    new = Cloud(
        position,
        log_likelihood,
        log_weights,
        jnp.tile(families, num_particles // num_chains),
        temperature,
        cloud.num_stages + 1,
        cloud.num_resampled + resampled,
        moved.log_step_size,
        cloud.rng_key,
    )
    return new, as_vector(report)


def tempered(temperature: Array, log_likelihood: Array) -> Array:
    r""":math:`\beta \log L`, with dead particles dead at every temperature and ``0 * -inf`` never formed."""
    dead = jnp.isneginf(log_likelihood)
    return jnp.where(dead, -jnp.inf, temperature * jnp.where(dead, 0.0, log_likelihood))


def tempered_density(split: Split, temperature: Array) -> Array:
    return split.base + temperature * split.likelihood


def next_temperature(
    log_weights_at: Callable[[Array], Array], temperature: Array, target_ess: float, num_particles: int
) -> Array:
    """The temperature, at most 1, at which the effective sample size falls to its target, by bisection.

    :param log_weights_at: log weights as a function of the new temperature.
    :param target_ess: fraction of ``num_particles``, or of the effective sample size without the particles whose
        likelihood is zero, if that is smaller.
    """
    goal = target_ess * jnp.minimum(num_particles, normalise(log_weights_at(temperature))[2])

    def is_coarse(bounds: tuple[Array, Array, Array]) -> Array:
        low, high, steps = bounds
        return (high - low > _PRECISION * low) & (steps < _MAX_BISECTIONS)

    def halve(bounds: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, steps = bounds
        middle = 0.5 * (low + high)
        enough = normalise(log_weights_at(temperature + middle))[2] >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), steps + 1

    bounds = (jnp.zeros_like(temperature), 1.0 - temperature, jnp.zeros((), jnp.int32))
    low = lax.while_loop(is_coarse, halve, bounds)[0]
    enough = normalise(log_weights_at(jnp.ones_like(temperature)))[2] >= goal
    return jnp.where(enough, 1.0, temperature + low).astype(temperature.dtype)


def genealogical_variance(weights: Array, families: Array, num_families: int, exponent: Array | int) -> Array:
    r"""Estimate of :math:`\operatorname{Var}(\hat Z) / Z^2` from one run, by its genealogy [1, 2].

    With :math:`S_e` the weight of family :math:`e` of M, :math:`1 - (M / (M - 1))^k (1 - \sum_e S_e^2)`. Under
    multinomial resampling :math:`k` is one more than the number of resamplings, and the estimate consistent; schemes
    with less noise lose fewer families to chance, and :math:`k = 1` errs on the large side.

    :param weights: ``[N]``, sum to one, before any resampling. **families** - ``[N]``, in ``0..num_families - 1``.

    **References**

    1. *Variance estimation in the particle filter*, A. Lee, N. Whiteley (2018)
    2. *A general theory of particle filters in hidden Markov models and some applications*, H. Chan, T. Lai (2013)
    """
    shares = jax.ops.segment_sum(weights, families, num_families)
    factor = (num_families / max(num_families - 1, 1)) ** exponent
    return 1.0 - factor * (1.0 - jnp.sum(shares**2))


def mean_of(values: Array, log_weights: Array) -> Array:
    """Weighted mean; what has no weight does not count, whatever its value."""
    weights = jnp.exp(log_weights) / jnp.sum(jnp.exp(log_weights))
    return jnp.sum(jnp.where(weights > 0.0, weights * values, 0.0))


def as_vector(report: StageReport) -> Array:
    """One transfer from the device instead of eight."""
    return jnp.stack([jnp.asarray(value, report.ess.dtype) for value in report])
