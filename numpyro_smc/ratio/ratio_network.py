"""The network of a log ratio: standardised parameters, a mask, and what is seen of the output."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.typing import ArrayLike

from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.ratio.masks import parse_masks
from numpyro_smc.ratio.networks import Embedding, Network, residual_mlp

__all__ = ["RatioNetwork", "RatioWeights", "Standardization", "is_constant"]

_ROUNDING = 4


class Standardization(NamedTuple):
    """Moments of the training data; constants, which no optimiser touches.

    :ivar mean: ``[*event]``.
    :ivar scale: standard deviations ``[*event]``; one where they are zero.
    """

    mean: Array
    scale: Array

    def __call__(self, values: ArrayLike) -> Array:
        return (jnp.asarray(values) - self.mean) / self.scale


class RatioWeights(NamedTuple):
    """Everything that a :class:`RatioNetwork` is evaluated with.

    :ivar trained: what an optimiser changes: the weights of trunk and embedding.
    :ivar standardization: of ``"theta"``, ``"x"`` and, with a context, ``"context"``.
    """

    trained: dict[str, Any]
    standardization: dict[str, Standardization]


@dataclass(frozen=True)
class RatioNetwork:
    r"""A network :math:`\log r(\theta_b, x)`, which learns :math:`\log p(x \mid \theta_b) - \log p(x)`.

    Here :math:`b` says which parameters are kept; the others are marginalised. With parameters standardised by the
    moments of the training data, :math:`z = (\theta - \mu) / \sigma`, the trunk sees

    * :math:`(z, e(x), c)`: the ratio of all parameters (NRE);
    * :math:`(z \odot b, 2b - 1, e(x), c)`, if ``has_masks``: of any of them, in one network (AMNRE [1]);
    * :math:`(z \odot b_m, e(x), c)` in trunk :math:`m` of ``marginals``: independent trunks, one embedding (MNRE [2]).

    There :math:`e` is the embedding of the standardised output, or the output itself, flattened, and :math:`c` the
    standardised context. Cost: the trunk's, times M for ``marginals``; what depends on the output alone is computed
    once for any number of parameters (see :meth:`features`).

    :param size: number of parameters :math:`D`.
    :param trunk: the network; three residual blocks of 128 units by default.
    :param embedding: of the outputs; none by default.
    :param has_masks: whether any subset of the parameters can be asked for.
    :param marginals: bool ``[M, D]`` or words as in :func:`~numpyro_smc.ratio.masks.parse_masks`: fixed subsets.
    :param context_size: numbers of the context, given with every output.
    :param standardize_x: whether outputs are standardised; elementwise, by the training data's moments.
    :param log_parameters: bool ``[D]``: parameters whose logarithm is standardised, for positive, heavy-tailed ones.
    :param constant: bool ``[D]``: elements that are the same in all simulations by their nature, such as the zeros of
        a triangular matrix. The trunk sees zero in their place.
    :raises ValueError: if both ``has_masks`` and ``marginals`` are given, or one does not fit the number of parameters.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_smc.ratio.ratio_network import RatioNetwork
        >>> theta = random.normal(random.key(0), (100, 3))
        >>> x = theta[:, :2] + random.normal(random.key(1), (100, 2))
        >>> network = RatioNetwork(size=3, has_masks=True)
        >>> weights = network.init(random.key(2), theta, x)
        >>> network.log_ratio(weights, theta, x[0], mask=jnp.array([True, False, True])).shape
        (100,)

    **References**

    1. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
    2. *Truncated Marginal Neural Ratio Estimation*, B. K. Miller et al. (2021)
    """

    size: int
    trunk: Network = field(default_factory=residual_mlp)
    embedding: Embedding | None = None
    has_masks: bool = False
    marginals: Any = None
    context_size: int = 0
    standardize_x: bool = True
    log_parameters: Any = None
    constant: Any = None

    def __post_init__(self) -> None:
        check_positive("RatioNetwork", size=self.size)
        if self.has_masks and self.marginals is not None:
            raise ValueError(
                "RatioNetwork: has_masks=True (any subset, one network) and marginals (fixed subsets, a network each) "
                "exclude each other; pass one of them."
            )
        if self.marginals is not None:
            masks = parse_masks(self.marginals, self.size)
            object.__setattr__(self, "marginals", tuple(map(tuple, masks.tolist())))
        for name in ("log_parameters", "constant"):
            if getattr(self, name) is None:
                continue
            chosen = tuple(map(bool, np.asarray(getattr(self, name)).reshape(-1).tolist()))
            if len(chosen) != self.size:
                raise ValueError(
                    f"RatioNetwork: {name} has {len(chosen)} entries, but there are {self.size} parameters."
                )
            object.__setattr__(self, name, chosen)

    def init(self, rng_key: Array, theta: ArrayLike, x: ArrayLike, context: ArrayLike | None = None) -> RatioWeights:
        """Weights from the network's law, standardisation from the data.

        :param rng_key: random key.
        :param theta: parameters ``[n, D]`` of the training data, or enough of them.
        :param x: outputs ``[n, *event]``.
        :param context: ``[n, C]``, if ``context_size`` is not zero.
        :raises ValueError: for shapes that do not fit, or a parameter that does not vary.
        """
        theta, x = np.asarray(theta), np.asarray(x)
        if theta.ndim != 2 or theta.shape[1] != self.size or x.shape[:1] != theta.shape[:1] or len(theta) < 2:
            raise ValueError(
                f"RatioNetwork: parameters [n, {self.size}] and outputs [n, ...] of at least two simulations are "
                f"needed, got shapes {theta.shape} and {x.shape}."
            )
        moments = {"theta": _moments(np.asarray(self._unbounded(theta))), "x": _moments(x)}
        known = np.zeros(self.size, bool) if self.constant is None else np.array(self.constant)
        (constant,) = np.nonzero(is_constant(theta) & ~known)
        if len(constant):
            raise ValueError(
                f"RatioNetwork: parameter number {constant[0]} is {theta[0, constant[0]]:g} in all simulations: there "
                f"is nothing to infer of it. Leave it out of the parameters."
            )
        if not self.standardize_x:
            moments["x"] = Standardization(jnp.zeros(x.shape[1:]), jnp.ones(x.shape[1:]))
        if self.context_size:
            moments["context"] = _moments(self._checked_context(context))
        trunk_key, embedding_key = random.split(rng_key)
        some = moments["x"](x[:2])
        embedding = {} if self.embedding is None else self.embedding.init(embedding_key, some)
        features = self._embed(embedding, some).shape[-1] + self.context_size
        in_size = self.size * (2 if self.has_masks else 1) + features
        if self.marginals is None:
            trunk = self.trunk.init(trunk_key, in_size, 1)
        else:
            keys = random.split(trunk_key, len(self.marginals))
            trunk = jax.vmap(lambda key: self.trunk.init(key, in_size, 1))(keys)
        return RatioWeights({"trunk": trunk, "embedding": embedding}, moments)

    def features(self, weights: RatioWeights, x: ArrayLike, context: ArrayLike | None = None) -> Array:
        """What the trunk sees of outputs ``[..., *event]`` and contexts ``[..., C]``: ``[..., features]``.

        :raises ValueError: if the output or the context has another shape than those of the training data.
        """
        x, standardization = jnp.asarray(x), weights.standardization["x"]
        event = standardization.mean.shape
        leading = x.shape[: x.ndim - len(event)]
        if x.shape[len(leading) :] != event:
            raise ValueError(f"RatioNetwork: the network was trained on outputs of shape {event}, but got {x.shape}.")
        embedded = self._embed(weights.trained["embedding"], standardization(x).reshape(-1, *event))
        embedded = embedded.reshape(*leading, -1)
        if not self.context_size:
            if context is not None:
                raise ValueError("RatioNetwork: the network has no context; build it with context_size.")
            return embedded
        extra = weights.standardization["context"](self._checked_context(context))
        leading = jnp.broadcast_shapes(leading, extra.shape[:-1])
        parts = [jnp.broadcast_to(part, (*leading, part.shape[-1])) for part in (embedded, extra)]
        return jnp.concatenate(parts, axis=-1)

    def log_ratio_of_features(
        self, weights: RatioWeights, theta: ArrayLike, features: Array, mask: ArrayLike | None = None
    ) -> Array:
        """:meth:`log_ratio` where the :meth:`features` of the outputs are known: cheap for many parameters."""
        theta = jnp.asarray(theta)
        if theta.shape[-1:] != (self.size,):
            raise ValueError(f"RatioNetwork: parameters must be [..., {self.size}], got shape {theta.shape}.")
        if mask is not None and not self.has_masks:
            raise ValueError("RatioNetwork: the network takes no masks; build it with has_masks=True.")
        z = weights.standardization["theta"](self._unbounded(theta))
        if self.constant is not None and any(self.constant):
            z = jnp.where(np.array(self.constant), 0.0, z)
        trunk = weights.trained["trunk"]
        if self.marginals is not None:
            kept = jnp.asarray(self.marginals)

            def marginal(trunk: Any, kept: Array) -> Array:
                return self.trunk.apply(trunk, jnp.where(kept, z, 0), features)[..., 0]

            return jax.vmap(marginal, out_axes=-1)(trunk, kept)
        if not self.has_masks:
            return self.trunk.apply(trunk, z, features)[..., 0]
        mask = jnp.ones(self.size, bool) if mask is None else jnp.asarray(mask, bool)
        if mask.shape[-1:] != (self.size,):
            raise ValueError(f"RatioNetwork: masks must be [..., {self.size}], got shape {mask.shape}.")
        if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask).any(-1).all():
            raise ValueError("RatioNetwork: a mask keeps no parameter; every mask must keep at least one.")
        return self.trunk.apply(trunk, jnp.where(mask, z, 0), jnp.where(mask, 1, -1).astype(z.dtype), features)[..., 0]

    def log_ratio(
        self,
        weights: RatioWeights,
        theta: ArrayLike,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        context: ArrayLike | None = None,
    ) -> Array:
        """The log ratio; leading axes broadcast.

        :param weights: of :meth:`init`, or trained.
        :param theta: parameters ``[..., D]``; those that the mask drops may have any value.
        :param x: outputs ``[..., *event]``.
        :param mask: bool ``[..., D]``, if ``has_masks``; all parameters by default.
        :param context: ``[..., C]``, if ``context_size`` is not zero.
        :return: ``[...]``; ``[..., M]`` for ``marginals``.
        """
        return self.log_ratio_of_features(weights, theta, self.features(weights, x, context), mask)

    def _unbounded(self, theta: Any) -> Any:
        if self.log_parameters is None or not any(self.log_parameters):
            return theta
        chosen = np.array(self.log_parameters)
        if isinstance(theta, np.ndarray):
            lowest = theta[:, chosen].min(axis=0)
            if np.any(lowest <= 0):
                number = np.nonzero(chosen)[0][np.argmax(lowest <= 0)]
                raise ValueError(
                    f"RatioNetwork: log_parameters includes number {number}, which is not always positive."
                )
        safe = jnp.where(chosen, theta, 1.0)
        return jnp.where(chosen, jnp.log(safe), theta)

    def _embed(self, weights: Any, x: Array) -> Array:
        """From standardised ``[n, *event]`` to ``[n, size]``."""
        if self.embedding is None:
            return x.reshape(len(x), math.prod(x.shape[1:]))
        embedded = self.embedding.apply(weights, x)
        if embedded.ndim != 2:
            raise ValueError(
                f"RatioNetwork: the embedding must return one vector per output, but returned shape "
                f"{embedded.shape[1:]} for outputs of shape {x.shape[1:]}. Flatten what it returns."
            )
        return embedded

    def _checked_context(self, context: ArrayLike | None) -> Array:
        if context is None or np.shape(context)[-1:] != (self.context_size,):
            found = "none" if context is None else f"shape {np.shape(context)}"
            raise ValueError(f"RatioNetwork: a context [..., {self.context_size}] is needed, got {found}.")
        return jnp.asarray(context)


def is_constant(values: Any) -> np.ndarray:
    """Whether elements are the same in all rows, to the rounding of their dtype: bool ``[*event]``."""
    values = np.asarray(values)
    exact = not np.issubdtype(values.dtype, np.floating)
    rounding = 0.0 if exact else _ROUNDING * np.finfo(values.dtype).eps * np.abs(values).max(axis=0)
    return np.ptp(values, axis=0) <= rounding


def _moments(values: Any) -> Standardization:
    constant, values = is_constant(values), np.asarray(values, np.float64)
    scale = np.where(constant, 1.0, values.std(axis=0, ddof=1))
    return Standardization(jnp.asarray(values.mean(axis=0), float), jnp.asarray(scale, float))
