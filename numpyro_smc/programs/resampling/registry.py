"""What a resampling scheme is, and how one is found by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array

Ancestors = Callable[[Array, Array, int], Array]
ConditionalAncestors = Callable[[Array, Array, int, Array, Array], Array]
LogProb = Callable[[Array, Array], Array]
Transport = Callable[[Array, Array, Any], tuple[Any, Array]]


@dataclass(frozen=True)
class Scheme:
    r"""A resampling scheme and what may be relied on.

    :param name: by which :func:`resolve` finds it once it is registered.
    :param ancestors: ``(rng_key, log_weights, num_samples) -> int32[num_samples]``. The log weights, float ``[N]``, are
        unnormalised; ``-inf`` marks a dead particle, which must never be an ancestor. Indices are in ``[0, N)``; if
        every particle is dead they are ``arange(num_samples) % N``. No gradient flows.
    :param conditional: ``(rng_key, log_weights, num_samples, pivot_in, pivot_out) -> int32[num_samples]``, for particle
        Gibbs: the law of the ancestors, after a uniform cyclic shift of the slots, given
        ``result[pivot_out] == pivot_in``. ``None`` if there is none.
    :param unbiased: whether particle :math:`i` has :math:`n W_i` offspring on average, without which evidence estimates
        are biased; ``False`` also when that is not known.
    :param log_prob: ``(ancestors, log_weights) -> scalar``, the differentiable log probability that score-function
        gradients of resampling need. ``None`` if it has no usable form.
    :param cost: a few words on time and hardware.
    :param transport: ``(rng_key, log_weights, particles) -> (particles, log_weights)``, for schemes that mix particles
        (a pytree with leading axis ``N``) rather than index them, and through which gradients flow. Used in place of
        ``ancestors`` where it is given.
    """

    name: str
    ancestors: Ancestors
    conditional: ConditionalAncestors | None = None
    unbiased: bool = False
    log_prob: LogProb | None = None
    cost: str = ""
    transport: Transport | None = None


_SCHEMES: dict[str, Scheme] = {}


def register(scheme: Scheme) -> Scheme:
    """Makes a scheme known by its name.

    :return: the scheme.
    :raises ValueError: if another scheme has that name.
    """
    if _SCHEMES.setdefault(scheme.name, scheme) != scheme:
        raise ValueError(f"Resampler '{scheme.name}' is already registered, as another scheme. Choose another name.")
    return scheme


def available() -> tuple[str, ...]:
    """The registered names, in alphabetical order."""
    return tuple(sorted(_SCHEMES))


def resolve(resampler: str | Scheme | Ancestors) -> Scheme:
    """The scheme that a caller means.

    :param resampler: a registered name; a :class:`Scheme`; or a function ``(rng_key, log_weights, num_samples) ->
        ancestors`` with the contract of :class:`Scheme`. A function that no registered scheme has becomes a scheme of
        its own name of which nothing more is known, so it counts as biased and has no conditional version.
    :raises ValueError: if no scheme has that name.
    :raises TypeError: if it is none of the three.
    """
    if isinstance(resampler, Scheme):
        return resampler
    if isinstance(resampler, str):
        if resampler not in _SCHEMES:
            raise ValueError(
                f"Unknown resampler '{resampler}'. Known: {', '.join(available())}; register your own with "
                "numpyro_smc.resampling.register."
            )
        return _SCHEMES[resampler]
    if callable(resampler):
        for scheme in _SCHEMES.values():
            if scheme.ancestors is resampler:
                return scheme
        return Scheme(getattr(resampler, "__name__", type(resampler).__name__), resampler)
    raise TypeError(
        f"The resampler is a {type(resampler).__name__}; expected a name ({', '.join(available())}), a Scheme, or a "
        "function (rng_key, log_weights, num_samples) -> ancestors."
    )
