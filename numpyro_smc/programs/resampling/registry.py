"""What a resampling scheme is, and how one is found by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array

Ancestors = Callable[[Array, Array, int], Array]
ConditionalAncestors = Callable[[Array, Array, int, Array, Array], Array]
LogProb = Callable[[Array, Array], Array]
Transport = Callable[[Array, Array, Any], tuple[Any, Array]]
OfWeights = Callable[[Array], Array]

DIFFERENTIABLE = ("none", "weights", "path")


@dataclass(frozen=True)
class Scheme:
    r"""A resampling scheme and what may be relied on.

    :param name: by which :func:`resolve` finds it once it is registered.
    :param ancestors: ``(rng_key, log_weights, num_samples) -> int32[num_samples]``. The log weights, float ``[N]``, are
        unnormalised; ``-inf`` marks a dead particle, which must never be an ancestor. Indices are in ``[0, N)``; if
        every particle is dead they are ``arange(num_samples) % N``. No gradient flows. ``None`` for a scheme that mixes
        particles, after which nobody has one ancestor.
    :param conditional: ``(rng_key, log_weights, num_samples, pivot_in, pivot_out) -> int32[num_samples]``, for particle
        Gibbs: the law of the ancestors, after a uniform cyclic shift of the slots, given
        ``result[pivot_out] == pivot_in``. ``None`` if there is none.
    :param unbiased: whether the new cloud has the old one's weighted mean of every function on average, as when
        particle :math:`i` has :math:`n W_i` offspring, without which evidence estimates are biased; ``False`` also when
        that is not known.
    :param log_prob: ``(ancestors, log_weights) -> scalar``, the differentiable log probability that score-function
        gradients of resampling need. ``None`` if it has no usable form.
    :param cost: a few words on time and hardware.
    :param transport: ``(rng_key, log_weights, particles) -> (particles, log_weights)`` (a pytree with leading axis
        ``N``; new log weights ``[N]``), for schemes through which gradients flow. Used in place of copying by
        ``ancestors``; where both are given, ``ancestors`` must tell with the same key whom ``transport`` copied.
    :param selection: ``log_weights -> float[N]``, the differentiable log probabilities :math:`\log q_i` with which a
        scheme chooses ancestors, if not the weights; each copy then weighs :math:`W_i / q_i`.
    :param keep: ``log_weights -> scalar``, the probability of leaving particles and weights as they are, instead of
        resampling when told to. ``None`` for never.
    :param differentiable: what gradients of its own flow through: ``"none"``, ``"weights"`` (the new weights) or
        ``"path"`` (the new particles, as functions of all old ones and their weights). Copied particles always pass on
        the gradients of their own state, which is not counted here.
    """

    name: str
    ancestors: Ancestors | None
    conditional: ConditionalAncestors | None = None
    unbiased: bool = False
    log_prob: LogProb | None = None
    cost: str = ""
    transport: Transport | None = None
    selection: OfWeights | None = None
    keep: OfWeights | None = None
    differentiable: str = "none"

    def __post_init__(self) -> None:
        if self.differentiable not in DIFFERENTIABLE:
            raise ValueError(
                f"Scheme '{self.name}': differentiable={self.differentiable!r}. Known: {', '.join(DIFFERENTIABLE)}."
            )
        if self.ancestors is None and self.transport is None:
            raise ValueError(f"Scheme '{self.name}' has neither ancestors nor a transport. Give it one of them.")

    @property
    def mixes(self) -> bool:
        """Whether new particles are mixtures of old ones, so that genealogies and discrete states are lost."""
        return self.ancestors is None


_SCHEMES: dict[str, Scheme] = {}


def register(scheme: Scheme) -> Scheme:
    """Makes a scheme known by its name.

    :return: the scheme.
    :raises ValueError: if another scheme has that name.
    """
    if not isinstance(scheme, Scheme):
        raise TypeError(f"register: scheme must be a Scheme, got {scheme!r}. Make one: Scheme(name, ancestors).")
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
            if scheme.ancestors is resampler and scheme.transport is None and scheme.keep is None:
                return scheme
        return Scheme(getattr(resampler, "__name__", type(resampler).__name__), resampler)
    raise TypeError(
        f"The resampler is a {type(resampler).__name__}; expected a name ({', '.join(available())}), a Scheme, or a "
        "function (rng_key, log_weights, num_samples) -> ancestors."
    )
