r"""Sequential Monte Carlo along a path of densities, one stage at a time.

The cloud at temperature :math:`t` targets :math:`\gamma_t`, such as :math:`\pi_0 L^t`, with log weights :math:`W` of
mean one. A stage to :math:`t' > t` weighs, resamples when told to, and moves under the **new** temperature:

.. math:: g^i = \log\gamma_{t'}(u^i) - \log\gamma_t(u^i), \qquad \ell = \log \tfrac1N \sum_i e^{W^i + g^i}, \qquad
   W^i \leftarrow W^i + g^i - \ell, \qquad \log \hat Z = \sum \ell .

Waste-free, M ancestors start chains of P states, and all N = MP states are the new cloud.

This is not :func:`~numpyro_smc.engines.particles.run`, where increments may not depend on the weights: here the next
temperature is chosen from them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.programs.resampling import Scheme
from numpyro_smc.programs.unconstrained import Split
from numpyro_smc.programs.weights import normalise
from numpyro_smc.samplers.genealogy import genealogical_variance, moments, quadrature_error
from numpyro_smc.samplers.moves import Move, Tuning, cloud_scale, move_cloud, over_particles
from numpyro_smc.samplers.paths import Path


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

    - **position** ``[N, D]``, **log_weights** ``[N]`` of mean one.
    - **log_likelihood** - what the path keeps: ``[N]``, or ``[N, rows]`` of the data.
    - **families** - which of the M initial groups each particle descends from, ``[N]``.
    - **quadrature_errors** - what each group adds to the noise of :meth:`SMCResult.path_sampling`, ``[M]``.
    - **temperature**, **num_stages**, **num_resampled**, **log_step_size** - scalars.
    """

    position: Array
    log_likelihood: Array
    log_weights: Array
    families: Array
    quadrature_errors: Array
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
    - **acceptance**, **step_size** - of the moves. **resampled** - whether.
    - **log_likelihood**, **log_likelihood_variance** - over the cloud after the moves, of the data that count by then;
      **previous_mean**, **previous_variance** - before the stage.
    - **quadrature_variance** - of the integral of :meth:`SMCResult.path_sampling` up to here.
    """

    temperature: Array
    increment: Array
    ess: Array
    relative_variance: Array
    acceptance: Array
    step_size: Array
    resampled: Array
    log_likelihood: Array
    log_likelihood_variance: Array
    previous_mean: Array
    previous_variance: Array
    quadrature_variance: Array


def start(rng_key: Array, path: Path, settings: Settings) -> tuple[Cloud, Split]:
    """The cloud at temperature zero, and the log densities of its particles."""
    draw_key, run_key = random.split(rng_key)
    num_particles = settings.num_particles
    position = path.model.draw(draw_key, num_particles)
    kept, split = over_particles(path.start, position, settings.batch_size)
    dtype = split.likelihood.dtype
    cloud = Cloud(
        position,
        kept,
        jnp.zeros(num_particles, dtype),
        jnp.arange(num_particles, dtype=jnp.int32) % settings.num_chains,
        jnp.zeros(settings.num_chains, dtype),
        jnp.zeros((), dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        settings.initial_log_step_size(path.model.dimension),
        run_key,
    )
    return cloud, split


def advance(cloud: Cloud, scheduled: Array, path: Path, settings: Settings) -> tuple[Cloud, Array]:
    """One stage.

    :param scheduled: the next entry of the given schedule, unless there is none.
    :return: the new cloud, and the :class:`StageReport` as one vector.
    """
    resample_key, move_key = random.split(random.fold_in(cloud.rng_key, cloud.num_stages))
    num_particles, num_chains = settings.num_particles, settings.num_chains

    before = moments(path.log_likelihood(cloud.log_likelihood, cloud.temperature), cloud.log_weights)
    if settings.target_ess is None:
        temperature = path.at(scheduled)
        must_resample = jnp.asarray(settings.chain_length is not None)
    else:
        temperature = path.next(cloud.log_likelihood, cloud.log_weights, cloud.temperature, settings.target_ess)
        # A cloud at its target would have to stay there: only the last one may keep its weights.
        must_resample = (temperature < 1.0) | (settings.chain_length is not None)
    step = temperature - cloud.temperature
    ratio = path.log_ratio(cloud.log_likelihood, cloud.temperature, temperature)
    log_weights, increment, ess = normalise(cloud.log_weights + ratio)
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
        lambda u: path.log_density(u, temperature),
        Tuning(cloud.log_step_size, scale),
        settings.num_moves,
        tune_step_size=settings.tune_step_size,
        keep_path=settings.chain_length is not None,
        batch_size=settings.batch_size,
    )
    states = moved.path if settings.chain_length is None else jnp.concatenate([position[None], moved.path])
    position = states.reshape(num_particles, -1)
    families = jnp.tile(families, num_particles // num_chains)
    kept = over_particles(path.kept, position, settings.batch_size)
    after = moments(path.log_likelihood(kept, temperature), log_weights)
    quadrature_errors = (
        cloud.quadrature_errors
        + quadrature_error(before, cloud.families, num_chains, step, upper=False)
        + quadrature_error(after, families, num_chains, step, upper=True)
    )
    report = StageReport(
        temperature,
        increment,
        ess,
        relative_variance,
        moved.acceptance,
        jnp.exp(moved.log_step_size),
        resampled,
        after.mean,
        after.variance,
        before.mean,
        before.variance,
        jnp.sum(quadrature_errors**2) * num_chains / max(num_chains - 1, 1),
    )
    new = Cloud(
        position,
        kept,
        log_weights,
        families,
        quadrature_errors,
        temperature,
        cloud.num_stages + 1,
        cloud.num_resampled + resampled,
        moved.log_step_size,
        cloud.rng_key,
    )
    return new, as_vector(report)


def as_vector(report: StageReport) -> Array:
    """One transfer from the device instead of many."""
    return jnp.stack([jnp.asarray(value, report.ess.dtype) for value in report])
