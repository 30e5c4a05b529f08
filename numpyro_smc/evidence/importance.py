"""Importance sampling from a guide: the log evidence, with the tail shape that says whether to believe it."""

import warnings
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.util import find_stack_level

from numpyro_smc.evidence.estimate import Evidence, log_mean_and_error
from numpyro_smc.programs.arguments import check_if_given, check_positive
from numpyro_smc.programs.bootstrap import bootstrap
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.density import LogWeights, Pair, Params, Program, log_weights
from numpyro_smc.programs.nonfinite import as_arrays, check_finite
from numpyro_smc.programs.pareto import LARGE_PARETO_K, pareto_k


def importance(
    rng_key: Array,
    model: Program,
    *args: Any,
    guide: Program | None = None,
    params: Params | None = None,
    num_samples: int = 5000,
    batch_size: int | None = None,
    plates: str | Collection[str] | None = "auto",
    **kwargs: Any,
) -> Evidence:
    r"""Log evidence by importance sampling from a guide, or the prior.

    .. math:: \hat Z = \frac1S \sum_s \frac{p(x, z_s)}{q(z_s)}, \qquad z_s \sim q,

    for each element of the plates that enclose every site of model and guide; discrete latents are welcome.

    Trust: :math:`\hat Z` is unbiased, its logarithm a lower bound on average. The Pareto shape :math:`k` of each
    element's largest weights [1] says how heavy their tail is: above 0.5 the variance is infinite and the standard
    error an understatement; above 0.7 the value is not to be believed, which is warned of.
    Cost: :math:`S` runs of guide and model per call, compiled once for data of one shape; the fit of the tails, some
    0.2 milliseconds per element. Memory: of ``batch_size`` runs, and of :math:`S` weights per element.

    :param guide: its draws are weighed; the prior if ``None``.
    :param params: constrained values of the ``param`` sites.
    :param args: arguments of model and guide; also ``kwargs``.
    :param num_samples: :math:`S`; the tail needs a hundred at the least.
    :param batch_size: draws at a time; all if ``None``.
    :param plates: ``"auto"``: the plates that enclose every site and whose elements the programs prove independent;
        names of plates that must be so; or ``None`` for whole-model weights.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.evidence.importance import importance
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Normal(0.5 * x, 0.8))
        >>> x = jnp.array([0.3, -1.2, 2.0])
        >>> result = importance(random.key(0), model, x, guide=guide)
        >>> bool(jnp.all(jnp.abs(result.per_datapoint - dist.Normal(0.0, 2.0**0.5).log_prob(x)) < 0.05))
        True

    **References**

    1. *Pareto Smoothed Importance Sampling*, A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024)
    """
    check_positive("importance", num_samples=num_samples)
    check_if_given("importance", batch_size=batch_size)
    params = as_arrays(params)
    chosen = plates if plates is None or isinstance(plates, str) else tuple(plates)
    found = _compiled(model, guide, num_samples, batch_size, chosen)(rng_key, params, args, kwargs)
    value, error, ess = log_mean_and_error(found.values)
    proposal = bootstrap(model) if guide is None else guide
    check_finite(value, Pair(model, proposal, args, kwargs, random.split(rng_key)[0], plates, "importance"), params)
    k = pareto_k(found.values)
    mean = jnp.mean(found.values, axis=0)
    heavy = int(np.sum(k > LARGE_PARETO_K))
    if heavy:
        warnings.warn(
            f"importance: the weights of {heavy} of {k.size} elements have tails with Pareto k above {LARGE_PARETO_K} "
            f"(largest {np.max(k):.2g}), so the value hangs on draws that are too rare, and is likely too low. Use a "
            f"wider or better fitted guide, or AIS.",
            stacklevel=find_stack_level(),
        )
    return Evidence("importance", num_samples, value, error, ess, found.plates, mean, pareto_k=jnp.asarray(k))


@lru_cache(maxsize=32)
def _compiled(
    model: Program,
    guide: Program | None,
    num_samples: int,
    batch_size: int | None,
    plates: str | tuple[str, ...] | None,
) -> Compiled:
    # Kept, so that a second call finds its compiled program.
    proposal = bootstrap(model) if guide is None else guide

    def weigh(rng_key: Array, params: Params, args: Any, kwargs: Any) -> LogWeights:
        return log_weights(
            rng_key,
            model,
            proposal,
            params,
            args,
            kwargs,
            num_particles=num_samples,
            batch_size=batch_size,
            plates=plates,
            user="importance",
        )

    return Compiled(weigh)
