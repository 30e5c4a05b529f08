"""The log evidence of a sequence model by a particle filter, for evaluation with many particles."""

from functools import lru_cache
from typing import Any

import jax
from jax import Array

from numpyro_smc.filtering.filter import ParticleFilter
from numpyro_smc.programs.arguments import named
from numpyro_smc.programs.inputs import checked_call
from numpyro_smc.programs.options import keeps_options_apart
from numpyro_smc.programs.resample import Decision
from numpyro_smc.programs.resampling import Scheme
from numpyro_smc.programs.sequence import Program


@keeps_options_apart("model", "guide")
def log_evidence(
    rng_key: Array,
    model: Program,
    params: dict[str, Any],
    *args: Any,
    num_particles: int = 1000,
    guide: Program | None = None,
    batch_size: int | None = None,
    resampler: str | Scheme = "multinomial",
    resample: str | Decision = "ess",
    ess_threshold: float = 0.5,
    allow_biased: bool = False,
    **kwargs: Any,
) -> Array:
    r"""Log evidence of a sequence model at given parameters, by a particle filter without history.

    :math:`e^{\text{value}}` is an unbiased estimate of :math:`p(y \mid \theta)` unless ``allow_biased`` says otherwise.

    :param params: values of ``param`` sites and of global latents.
    :param args: arguments of the model.
    :param batch_size: move particles in chunks of this size, so that a step's memory stays bounded; must divide
        ``num_particles``.
    :param allow_biased: accept a resampling scheme that is not known to be unbiased.
    :return: scalar, or ``[*batch]`` under plates that enclose the program, without the data that stand outside of them
        (a warning names these; :attr:`FilterResult.total_log_evidence` has all). Memory O(N), independent of T.
    :raises FloatingPointError: if all weights vanish or are not a number.
    :raises ValueError: for a biased resampling scheme without ``allow_biased``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro_smc import log_evidence
        >>> def model(y):
        ...     scale = numpyro.param("scale", 1.0)
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x, scale))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> y = jnp.array([0.5, 0.1, -0.3])
        >>> value = log_evidence(random.key(0), model, {"scale": 0.7}, y, num_particles=10_000, batch_size=1000)
        >>> bool(-3.2 < value < -2.2)
        True
    """
    with named("log_evidence"):
        particle_filter = _evidence_filter(
            model, num_particles, guide, resampler, resample, ess_threshold, allow_biased, batch_size
        )
    particle_filter.check_unbiased("log_evidence")
    call = checked_call("log_evidence", rng_key, model, guide, params, args, kwargs, options=(log_evidence,))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(call)):
        return particle_filter.log_evidence(call.rng_key, *call.args, params=call.params, **call.kwargs)
    return particle_filter.filtered(call).log_evidence


@lru_cache(maxsize=32)
def _evidence_filter(
    model: Program,
    num_particles: int,
    guide: Program | None,
    resampler: Any,
    resample: Any,
    ess_threshold: float,
    allow_biased: bool,
    batch_size: int | None,
) -> ParticleFilter:
    # Kept, so that a second call finds its compiled program.
    return ParticleFilter(
        model,
        num_particles,
        guide=guide,
        resampler=resampler,
        resample=resample,
        ess_threshold=ess_threshold,
        allow_biased=allow_biased,
        history=False,
        batch_size=batch_size,
    )
