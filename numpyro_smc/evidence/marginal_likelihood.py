"""One face of all estimators of log evidence."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.evidence.ais import AIS
from numpyro_smc.evidence.bidirectional import bidirectional
from numpyro_smc.evidence.estimate import Evidence
from numpyro_smc.evidence.importance import importance
from numpyro_smc.programs.density import Params, Program
from numpyro_smc.programs.options import keeps_options_apart, takes
from numpyro_smc.programs.sites import BatchPlates

METHODS = ("importance", "ais", "bidirectional", "smc")
_RUN_OPTIONS = ("progress_bar", "checkpoint", "checkpoint_every", "resume")


@keeps_options_apart("model", "guide")
def log_marginal_likelihood(
    rng_key: Array,
    model: Program,
    *args: Any,
    method: str = "importance",
    guide: Program | None = None,
    params: Params | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Evidence:
    r"""Log evidence :math:`\log p(x) = \log \int p(x, z)\,dz` of a model at given parameters.

    ========================= ============================================================= =========================
    method                    is                                                            needs
    ========================= ============================================================= =========================
    ``"importance"``          :func:`~numpyro_smc.importance` sampling                      a well fitted guide
    ``"ais"``                 :class:`~numpyro_smc.AIS`, per element of enclosing plates    continuous latents
    ``"bidirectional"``       AIS, and on simulated data the gap of its settings between    a model that can be
                              bounds from both sides (:func:`~numpyro_smc.bidirectional`)   simulated
    ``"smc"``                 :class:`~numpyro_smc.SMCSampler`, one weight for the model    continuous latents
    ========================= ============================================================= =========================

    Trust: read ``verdict``. All are lower bounds on average, by about half the squared standard error. Where an element
    is hard, prefer annealing from a guide; where the posterior has modes apart, SMC.
    Cost: of the method. A second call with the same programs, options and shapes compiles nothing.

    :param args: arguments of model and guide; also ``kwargs``.
    :param guide: fitted guide to start from; the prior if ``None``.
    :param params: constrained values of the ``param`` sites.
    :param options: of the method, by their names there: ``{"num_samples": 10_000}``.
    :return: value, standard error, what it bounds, values per element, and a verdict.
    :raises ValueError: for unknown methods, and as the method does. **TypeError** - for an option the method does not
        have, and for one that is given as an argument of the model.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.evidence.marginal_likelihood import log_marginal_likelihood
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = jnp.array([0.3, -1.2, 2.0])
        >>> result = log_marginal_likelihood(random.key(0), model, x, options={"num_samples": 10_000})
        >>> abs(result.value - dist.Normal(0.0, 2.0**0.5).log_prob(x).sum()) < 4 * result.standard_error
        Array(True, dtype=bool)
        >>> result.verdict[:11], result.bound
        ('Trustworthy', 'lower')
    """
    if method not in METHODS:
        raise ValueError(f"log_marginal_likelihood: unknown method {method!r}; there are {list(METHODS)}.")
    known = _option_names(method)
    if unknown := sorted((options or {}).keys() - set(known)):
        raise TypeError(
            f"log_marginal_likelihood: method={method!r} has no option {', '.join(map(repr, unknown))}. Its options "
            f"are {', '.join(known)}."
        )
    options = dict(options or {})
    model, guide, kwargs = _bound(model, guide, kwargs, method, known)
    if method == "importance":
        return importance(rng_key, model, *args, guide=guide, params=params, **options, **kwargs)
    if method == "smc":
        return _by_smc(rng_key, model, args, kwargs, guide, params, options)
    judged = {name: options.pop(name) for name in _keywords(bidirectional) if name in options}
    ais = _built(AIS, model, guide, options)
    run_key, judge_key = random.split(rng_key)
    found = ais.run(run_key, *args, params=params, **kwargs)
    if method == "ais":
        return found
    gap = bidirectional(judge_key, ais, *args, params=params, **judged, **kwargs)
    return replace(found, method=method, certificate=gap)


def _by_smc(
    rng_key: Array, model: Program, args: Any, kwargs: Any, guide: Program | None, params: Params | None, options: Any
) -> Evidence:
    run = {name: options.pop(name) for name in _RUN_OPTIONS if name in options}
    sampler = _built(_sampler, model, guide, options)
    result = sampler.run(rng_key, *args, params=params, **({"progress_bar": False} | run), **kwargs)
    value, error, ess = (jnp.asarray(x) for x in (result.log_evidence, result.log_evidence_se, result.ess[-1]))
    return Evidence(
        "smc", result.num_particles, value, error, ess, BatchPlates(), acceptance=jnp.asarray(result.acceptance)
    )


def _bound(
    model: Program, guide: Program | None, kwargs: dict[str, Any], method: str, options: list[str]
) -> tuple[Program, Program | None, dict[str, Any]]:
    """The programs, with those of their arguments bound that have the name of an option, and all other arguments.

    :raises TypeError: for an option that is given as an argument of a model that does not take it.
    """
    shared = {name: value for name, value in kwargs.items() if name in options}
    for name in shared:
        if not takes(model, name):
            raise TypeError(
                f"log_marginal_likelihood: '{name}' is an option of method={method!r} and no argument of the model. "
                f"Pass it as options={{'{name}': ...}}."
            )
    if shared:
        rest = {name: value for name, value in kwargs.items() if name not in shared}
        return partial(model, **shared), None if guide is None else partial(guide, **shared), rest
    return model, guide, kwargs


def _sampler(model: Program, guide: Program | None, **options: Any) -> Any:
    from numpyro_smc.samplers.smc_sampler import SMCSampler

    return SMCSampler(model, init_guide=None if guide is None else (guide, {}), **options)


def _built(make: Callable[..., Any], model: Program, guide: Program | None, options: dict[str, Any]) -> Any:
    fixed = tuple((name, _hashable(value)) for name, value in options.items())
    try:
        hash((model, guide, fixed))
    except TypeError:
        return make(model, guide, **options)
    return _kept(make, model, guide, fixed)


@lru_cache(maxsize=32)
def _kept(make: Callable[..., Any], model: Program, guide: Program | None, options: tuple[tuple[str, Any], ...]) -> Any:
    # Kept, so that a second call finds its compiled programs.
    return make(model, guide, **dict(options))


def _hashable(value: Any) -> Any:
    """Options as the cache can keep them: sequences as tuples."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, list | set) else value


def _option_names(method: str) -> list[str]:
    if method == "smc":
        from numpyro_smc.samplers.smc_sampler import SMCSampler

        return ["num_particles", *_keywords(SMCSampler), *_RUN_OPTIONS]
    if method == "importance":
        return _keywords(importance)
    return _keywords(AIS) + (_keywords(bidirectional) if method == "bidirectional" else [])


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("guide", "params", "init_guide")]
