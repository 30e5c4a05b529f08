"""Tempered sequential Monte Carlo as a kernel of NumPyro's MCMC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, random
from jax.flatten_util import ravel_pytree
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.resampling import systematic
from numpyro_smc.programs.unconstrained import Program
from numpyro_smc.samplers.genealogy import log_scale_error
from numpyro_smc.samplers.moves import Tuning, cloud_scale, move_cloud
from numpyro_smc.samplers.progress import Progress
from numpyro_smc.samplers.result import SMCResult
from numpyro_smc.samplers.smc_sampler import SMCSampler


class SMCKernelState(NamedTuple):
    """Every particle, and what tempering found; all but the key and the tuning have the leading axis of particles.

    - **z** - unconstrained values by site.
    - **acceptance** - mean acceptance probability of the last move of the cloud.
    - **log_evidence**, **log_evidence_se**, **num_temperatures** - of the tempering, the same for every particle.
    - **tuning** - step size and scale of the moves, frozen. **rng_key** - one key.
    """

    z: dict[str, Array]
    acceptance: Array
    log_evidence: Array
    log_evidence_se: Array
    num_temperatures: Array
    tuning: Tuning
    rng_key: Array


class SMCKernel(MCMCKernel):
    r""":class:`~numpyro_smc.SMCSampler` as a kernel of ``numpyro.infer.MCMC``: its chains are the particles.

    ``MCMC(SMCKernel(model), num_warmup=0, num_samples=4, num_chains=500, chain_method="vectorized")``: initialising
    carries 500 particles from the prior to the posterior; each sample is one further move of every particle, with the
    step size and the scale of the last temperature. The moves leave the posterior invariant. Everything that MCMC does
    with samples works: ``group_by_chain``, summaries, ``thinning``, continuing from ``last_state`` (without tempering
    again), and ``arviz.from_numpyro`` (which remarks on more chains than draws). R-hat of a few draws is above 1 even
    where all is well.

    The evidence is in ``extra_fields=("log_evidence", "log_evidence_se", "num_temperatures")``, repeated for each chain
    and sample, and whole in :attr:`result`. MCMC shows no progress while the particles are tempered.

    Trust and cost: as :class:`~numpyro_smc.SMCSampler`, and one move of every particle for each sample. Samples of one
    chain are as correlated as the moves leave them; chains share ancestors. Two keys tell more than long chains.

    :param model: a NumPyro model whose latent sites are continuous.
    :param progress_bar: show the temperatures.
    :param options: those of :class:`~numpyro_smc.SMCSampler`: ``moves``, ``target_ess``, ``init_guide``,
        ``tempering="data"``, ... ``num_particles`` is ``num_chains``.
    :ivar result: the :class:`~numpyro_smc.SMCResult` of the last tempering, before the first sample.
    :raises ValueError: for options that :class:`~numpyro_smc.SMCSampler` refuses; when run, for a single chain, another
        ``chain_method`` than ``"vectorized"``, warm-up steps, and ``init_params``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> from numpyro_smc.samplers.smc_kernel import SMCKernel
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> kernel = SMCKernel(model, moves="rwmh")
        >>> sizes = dict(num_warmup=0, num_samples=2, num_chains=500)
        >>> mcmc = MCMC(kernel, **sizes, chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(random.key(0), jnp.array([1.1, 0.3, 2.2, 1.4]), extra_fields=("log_evidence",))
        >>> mcmc.get_samples()["mean"].shape
        (1000,)
        >>> bool(abs(mcmc.get_extra_fields()["log_evidence"][0] + 6.50) < 0.4)
        True

    **References**

    1. *Sequential Monte Carlo samplers*, P. Del Moral, A. Doucet, A. Jasra (2006)
    """

    def __init__(self, model: Program, *, progress_bar: bool = False, **options: Any) -> None:
        if "num_particles" in options:
            raise ValueError("SMCKernel: num_particles is the num_chains of MCMC; give it there.")
        self._model, self._options, self._progress_bar = model, options, progress_bar
        # Checks the options at once. The number of particles is not known yet; it must fit waste_free.
        self._sampler = SMCSampler(model, 2 * (options.get("waste_free") or 1), **options)
        self._stand = Compiled(self._standing)
        self._last: tuple[Progress, tuple] | None = None
        # MCMC initialises again, although it is given a state, unless there is something of this name.
        self._sample_fn = self.sample

    def __fingerprint__(self) -> tuple[Any, ...]:
        return (self._sampler,)

    @property
    def model(self) -> Program:
        return self._model

    @property
    def sample_field(self) -> str:
        return "z"

    @property
    def is_ensemble_kernel(self) -> bool:
        return True

    @property
    def result(self) -> SMCResult:
        if self._last is None:
            raise ValueError("SMCKernel: no result before MCMC.run.")
        return self._sampler._result(*self._last)

    def init(
        self,
        rng_key: Array,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> SMCKernelState:
        """Temper the particles, as many as there are keys."""
        if is_prng_key(rng_key) or isinstance(rng_key, jax.core.Tracer):
            raise ValueError(
                "SMCKernel: the particles are the chains of one MCMC run, which must not be mapped or compiled as a "
                "whole. Use MCMC(kernel, num_chains=number of particles, at least 2, chain_method='vectorized')."
            )
        if num_warmup:
            raise ValueError(
                f"SMCKernel: num_warmup={num_warmup} would do nothing: the moves are tuned while tempering. Use "
                f"num_warmup=0."
            )
        if init_params is not None:
            raise ValueError("SMCKernel: init_params are not used: particles start from the prior, or from init_guide.")
        num_particles = rng_key.shape[0]
        if self._sampler.num_particles != num_particles:
            self._sampler = SMCSampler(self._model, num_particles, **self._options)
        temper_key, stand_key, run_key = random.split(rng_key[0], 3)
        program = self._program(model_args, model_kwargs)
        progress, interrupted = self._sampler._carry(temper_key, program, self._progress_bar)
        if interrupted:
            raise KeyboardInterrupt
        self._last = progress, program
        log_evidence_se = log_scale_error(float(progress.column("relative_variance")[-1]))
        z, scale = self._stand(stand_key, progress.state, *program)

        def each(value: Any) -> Array:
            return jnp.full(num_particles, value)

        return SMCKernelState(
            z,
            each(progress.column("acceptance")[-1]),
            each(progress.log_evidence),
            each(log_evidence_se),
            each(progress.num_stages),
            Tuning(progress.state.log_step_size, scale),
            run_key,
        )

    def sample(self, state: SMCKernelState, model_args: tuple[Any, ...], model_kwargs: Any) -> SMCKernelState:
        """One move of every particle under the posterior."""
        rng_key, move_key = random.split(state.rng_key)
        model = self._sampler._read(*self._program(model_args, model_kwargs))
        settings = self._sampler.settings

        def log_density(position: Array) -> Array:
            split = model.split(position)
            return split.base + split.likelihood

        moved = move_cloud(
            move_key,
            settings.move,
            jax.vmap(lambda z: ravel_pytree(z)[0])(state.z),
            log_density,
            state.tuning,
            1,
            tune_step_size=False,
            batch_size=settings.batch_size,
        )
        acceptance = jnp.full_like(state.acceptance, moved.acceptance)
        return state._replace(z=jax.vmap(model.unravel)(moved.path[0]), acceptance=acceptance, rng_key=rng_key)

    def postprocess_fn(self, args: tuple[Any, ...], kwargs: Any) -> Callable[[dict[str, Array]], dict[str, Array]]:
        """From unconstrained values of one particle to its sites in their supports and its deterministic sites."""
        model = self._sampler._read(*self._program(args, kwargs))
        return lambda z: model.values(ravel_pytree(z)[0])

    def get_diagnostics_str(self, state: SMCKernelState) -> str:
        return (
            f"log evidence {float(state.log_evidence[0]):.5g} ± {float(state.log_evidence_se[0]):.2g}, "
            f"{int(state.num_temperatures[0])} temperatures, acc. prob={float(state.acceptance[0]):.2f}"
        )

    def _program(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[Any, ...]:
        return jax.tree.map(jnp.asarray, dict(self._sampler.guide_params)), args, kwargs or {}

    def _standing(self, rng_key: Array, state: Any, *program: Any) -> tuple[dict[str, Array], Array]:
        """Equally weighted particles by site, and their scale."""
        positions, log_weights = state.positions_and_weights
        settings, num_particles = self._sampler.settings, self._sampler.num_particles
        weights = jnp.exp(log_weights) / jnp.sum(jnp.exp(log_weights))
        scale = jnp.ones_like(positions[0])
        if settings.tune_scale:
            scale = cloud_scale(positions, weights, settings.dense)
        # Systematic resampling keeps each particle once where all weigh the same.
        ancestors = systematic(rng_key, log_weights, num_particles)
        return jax.vmap(self._sampler._read(*program).unravel)(positions[ancestors]), scale
