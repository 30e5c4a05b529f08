"""What a guide loses against the log evidence, datum by datum: by its family, and by amortisation."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.engines.identity import identity
from numpyro_smc.evidence.ais import AIS
from numpyro_smc.evidence.bidirectional import BoundsFromBothSides, bidirectional
from numpyro_smc.evidence.estimate import log_mean_and_error
from numpyro_smc.evidence.marginal_likelihood import log_marginal_likelihood
from numpyro_smc.guides.data_rows import DataRows, check_rows, data_rows, inspector
from numpyro_smc.guides.gap_result import InferenceGap
from numpyro_smc.guides.local import LocalOptimizer
from numpyro_smc.guides.resumable import over_rows
from numpyro_smc.programs.arguments import check_not_negative, check_positive, named
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.density import Params, Program, log_weights
from numpyro_smc.programs.inputs import checked_call
from numpyro_smc.programs.pareto import pareto_k

EVIDENCE = {"best": ("ais", "iwae"), "ais": ("ais",), "iwae": ("iwae",), "smc": ("smc",)}
_USER = "inference_gap"
_OF_OPTIMUM = ("elbo", "elbo_error", "iwae", "iwae_error", "num_steps", "converged")


def inference_gap(
    rng_key: Array,
    model: Program,
    guide: Program,
    params: Params,
    *args: Any,
    families: Sequence[str | Callable[..., Program] | LocalOptimizer] = ("ffg",),
    evidence: str = "best",
    evidence_options: Mapping[str, Any] | None = None,
    num_samples: int = 5000,
    draws_at_once: int = 100,
    batch_size: int = 100,
    num_simulated: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> InferenceGap:
    r"""The gap between log evidence and ELBO of an amortised guide, and its two parts, for every datum [1]:

    .. math:: \underbrace{\log p(x) - L[q]}_{\text{inference}}
       = \underbrace{\log p(x) - L[q^*]}_{\text{approximation}} + \underbrace{L[q^*] - L[q]}_{\text{amortisation}},

    where :math:`q^*` is the best distribution of a family for that datum, found by :class:`LocalOptimizer`. The gaps
    are paired: means and standard errors are over data, of differences of the same datum; the parts sum exactly.

    The log evidence is estimated by AIS from the guide and by importance sampling (IWAE); ``"best"`` takes the larger
    for each datum. Both are lower bounds on average; the larger of two noisy ones is selected upwards, by at most 0.4
    standard errors of their difference (``log_p_error`` is that of the one taken).

    Trust: the approximation gap, and the inference gap, are too small by what the evidence falls short, which
    ``num_simulated`` bounds on simulated data. The amortisation gap is too small where the local optimum is missed. For
    guides with auxiliary latents, :math:`L[q]` is a bound on the extended space: the inference gap then also holds
    :math:`\mathbb E_q[\mathrm{KL}(q(v \mid z, x) \,\|\, r(v \mid z, x))]`. A negative approximation gap means that the
    evidence is underestimated.
    Cost: that of AIS (200 temperatures by default), ``num_samples`` weights, and of a local optimisation per family,
    all in programs that are compiled once. Memory: of ``batch_size`` data at a time.

    :param guide: the amortised guide; it must be the same function of each datum.
    :param params: constrained values of the ``param`` sites of both, which stay as they are.
    :param args: arguments of model and guide; also ``kwargs``.
    :param families: families as :class:`LocalOptimizer` takes them, or such optimizers with settings of their own.
    :param evidence: ``"best"``, ``"ais"``, ``"iwae"``, or ``"smc"`` (:class:`~numpyro_smc.SMCSampler` from the guide,
        datum by datum).
    :param evidence_options: of :class:`~numpyro_smc.AIS`, or of :class:`~numpyro_smc.SMCSampler`.
    :param num_samples: draws from the guide for :math:`L[q]` and IWAE; ``draws_at_once`` of them at a time.
    :param batch_size: data at a time, in place of the optimizers' own.
    :param num_simulated: number of data sets of ``batch_size`` that are simulated to certify the settings of AIS
        (:func:`~numpyro_smc.bidirectional`); not for guides with auxiliary latents.
    :param checkpoint: file that is written after each batch, and that the same call continues from. After Ctrl-C, the
        result is that of the data done.
    :raises ValueError: naming the site, if the guide does not cover the model, if no plate encloses all sites, for
        discrete latents, for parameters without a value, and for data outside their support; for subsampled plates;
        for a checkpoint of another configuration.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.guides.inference_gap import inference_gap
        >>> from numpyro_smc.guides.local import LocalOptimizer
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the best mean is x / 2: the family is right, the encoder is not
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Normal(0.3 * x, 0.8))
        >>> x = jnp.array([0.3, -1.2, 2.0, 1.1])
        >>> gap = inference_gap(random.key(0), model, guide, {}, x, evidence="iwae",
        ...                     families=[LocalOptimizer("ffg", patience=3)])
        >>> amortisation, approximation = gap.amortisation["ffg"].mean(), gap.approximation["ffg"].mean()
        >>> bool(amortisation > 0.03), bool(abs(approximation) < 0.02)
        (True, True)

    **References**

    1. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
    """
    if evidence not in EVIDENCE:
        raise ValueError(f"{_USER}: evidence must be one of {list(EVIDENCE)}, got {evidence!r}.")
    check_positive(_USER, num_samples=num_samples, batch_size=batch_size, draws_at_once=draws_at_once)
    if num_simulated and evidence not in ("best", "ais"):
        raise ValueError(f"{_USER}: num_simulated certifies the settings of AIS; use evidence='best' or 'ais'.")
    check_not_negative(_USER, num_simulated=num_simulated)
    with named("inference_gap: families"):
        optimizers = _optimizers(families, batch_size)
    rng_key, params, args, kwargs = checked_call(
        _USER, rng_key, model, guide, params, args, kwargs, options=(inference_gap,), may_lack="none"
    )
    rows, plate = data_rows(model, guide, params, args, kwargs, _USER)
    check_rows(_inspector(model), params, rows, batch_size, _USER)
    size = min(batch_size, rows.num)
    defaults: dict[str, Any] = {} if evidence == "smc" else {"plates": (plate,), "num_temperatures": 200}
    options = defaults | dict(evidence_options or {})
    weigh = _weigher(model, guide, num_samples, min(draws_at_once, num_samples), plate)
    keys = random.split(rng_key, 4)

    def work(first: int) -> dict[str, Any]:
        part = rows.part(first, size)
        found = _from_guide(weigh(random.fold_in(keys[0], first), params, part))
        if "ais" in EVIDENCE[evidence]:
            found |= _by_ais(random.fold_in(keys[1], first), model, guide, params, part, options)
        if "smc" in EVIDENCE[evidence]:
            found |= _by_smc(keys[1], model, guide, params, part, first, options)
        for name, optimizer in optimizers.items():
            optimum = optimizer.batch(keys[2], model, guide, params, rows, first)
            found |= {f"{name}/{quantity}": np.asarray(optimum[quantity]) for quantity in _OF_OPTIMUM}
        return found

    def like() -> dict[str, Any]:
        names = [*_FROM_GUIDE, *(f"{m}{end}" for m in EVIDENCE[evidence] if m != "iwae" for end in ("", "_error"))]
        found: dict[str, Any] = {name: np.zeros(size) for name in names}
        for name, optimizer in optimizers.items():
            shapes = optimizer.shapes(model, guide, params, rows)
            found |= {f"{name}/{quantity}": shapes[quantity] for quantity in _OF_OPTIMUM}
        return found

    description = f"{evidence} {options} {num_samples} {draws_at_once} {batch_size}"
    description += "".join(f" {name}: {optimizer.description}" for name, optimizer in optimizers.items())
    found, interrupted = over_rows(
        work,
        rows.num,
        size,
        like=like,
        checkpoint=checkpoint,
        of=identity(
            _USER,
            _inspector(model).ignored,
            model=model,
            guide=guide,
            families=[optimizer.family for optimizer in optimizers.values()],
            configuration=description,
            random_key=(rng_key,),
            params=params,
            data=(args, kwargs),
        ),
        user=_USER,
        progress_bar=progress_bar,
    )
    result = _result(found, evidence, list(optimizers), interrupted)
    if not num_simulated or interrupted:
        return result
    return replace(
        result, certificate=_certificate(keys[3], model, guide, params, rows.part(0, size), options, num_simulated)
    )


_FROM_GUIDE = ("elbo", "elbo_error", "iwae", "iwae_error", "pareto_k")


def _optimizers(families: Sequence[Any], batch_size: int) -> dict[str, LocalOptimizer]:
    if isinstance(families, str) or not families:
        raise ValueError(f"{_USER}: families must be a sequence of at least one family, got {families!r}.")
    made = [family if isinstance(family, LocalOptimizer) else LocalOptimizer(family) for family in families]
    names = [optimizer.name for optimizer in made]
    if len(set(names)) < len(names):
        raise ValueError(f"{_USER}: families have names of their own, got {names}. Name the functions differently.")
    return {optimizer.name: replace(optimizer, batch_size=batch_size) for optimizer in made}


@lru_cache(maxsize=32)
def _weigher(model: Program, guide: Program, num_samples: int, at_once: int, plate: str) -> Compiled:
    # Kept, so that a second call finds its compiled program.
    def weigh(rng_key: Array, params: Params, part: DataRows) -> dict[str, Array]:
        args, kwargs = part.arguments()
        sizes = {"num_particles": num_samples, "batch_size": at_once}
        weights = log_weights(rng_key, model, guide, params, args, kwargs, **sizes, plates=(plate,), user=_USER).values
        iwae, iwae_error, _ = log_mean_and_error(weights)
        error = jnp.std(weights, axis=0, ddof=min(1, num_samples - 1)) / jnp.sqrt(num_samples)
        of_elbo = {"elbo": jnp.mean(weights, axis=0), "elbo_error": error}
        return of_elbo | {"iwae": iwae, "iwae_error": iwae_error, "weights": weights}

    return Compiled(weigh)


@lru_cache(maxsize=32)
def _inspector(model: Program) -> Compiled:
    return inspector(model, _USER)


@lru_cache(maxsize=32)
def _annealer(model: Program, guide: Program, options: tuple[tuple[str, Any], ...]) -> AIS:
    return AIS(model, guide, **dict(options))


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in sorted(options.items())}
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in plain.items())


def _from_guide(found: dict[str, Array]) -> dict[str, np.ndarray]:
    weights = found.pop("weights")
    return {name: np.asarray(value, np.float64) for name, value in found.items()} | {"pareto_k": pareto_k(weights)}


def _by_ais(
    rng_key: Array, model: Program, guide: Program, params: Params, part: DataRows, options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    args, kwargs = part.arguments()
    found = _annealer(model, guide, _frozen(options)).run(rng_key, *args, params=params, **kwargs)
    return {
        "ais": np.asarray(found.per_datapoint, np.float64),
        "ais_error": np.asarray(found.per_datapoint_error, np.float64),
    }


def _by_smc(
    rng_key: Array,
    model: Program,
    guide: Program,
    params: Params,
    part: DataRows,
    first: int,
    options: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    values, errors = [], []
    for number in range(part.num):
        args, kwargs = part.one([leaf[number] for leaf in part.rows])
        key = random.fold_in(rng_key, first + number)
        found = log_marginal_likelihood(
            key, model, *args, method="smc", guide=guide, params=params, **options, **kwargs
        )
        values.append(found.value)
        errors.append(found.standard_error)
    return {"smc": np.asarray(values), "smc_error": np.asarray(errors)}


def _certificate(
    rng_key: Array,
    model: Program,
    guide: Program,
    params: Params,
    part: DataRows,
    options: Mapping[str, Any],
    num_simulated: int,
) -> BoundsFromBothSides:
    args, kwargs = part.arguments()
    ais = _annealer(model, guide, _frozen(options))
    return bidirectional(rng_key, ais, *args, params=params, num_simulated=num_simulated, **kwargs)


def _result(found: dict[str, np.ndarray], evidence: str, families: list[str], interrupted: bool) -> InferenceGap:
    estimates = {method: found[method] for method in EVIDENCE[evidence]} | {"iwae": found["iwae"]}
    used = np.stack([found[method] for method in EVIDENCE[evidence]])
    errors = np.stack([found[f"{method}_error"] for method in EVIDENCE[evidence]])
    choice = np.argmax(used, axis=0)[None]
    optima = {name: {quantity: found[f"{name}/{quantity}"] for quantity in _OF_OPTIMUM} for name in families}

    def of(quantity: str) -> dict[str, np.ndarray]:
        return {name: np.asarray(optimum[quantity]) for name, optimum in optima.items()}

    return InferenceGap(
        evidence=evidence,
        log_p=np.take_along_axis(used, choice, 0)[0],
        log_p_error=np.take_along_axis(errors, choice, 0)[0],
        elbo=found["elbo"],
        elbo_error=found["elbo_error"],
        elbo_star={name: values.astype(np.float64) for name, values in of("elbo").items()},
        elbo_star_error=of("elbo_error"),
        iwae_star=of("iwae"),
        num_steps=of("num_steps"),
        converged=of("converged"),
        estimates=estimates,
        pareto_k=found["pareto_k"],
        interrupted=interrupted,
    )
