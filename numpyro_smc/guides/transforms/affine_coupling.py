"""The affine coupling of RealNVP: some coordinates are scaled and shifted by functions of the others."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_smc.guides.transforms.amortised import network

#: Log scale of a raw number, by name.
LOG_SCALES: dict[str, Callable[[Array], Array]] = {
    "sigmoid": lambda c: -jax.nn.softplus(-c),
    "tanh": lambda c: 2.0 * jnp.tanh(0.5 * c),
    "exp": lambda c: c,
}
_LARGEST_RAW = 15.0  # so that neither the scale nor its inverse overflows
OPEN_GATE = 3.0  # where sigmoid gates start: scales of 0.95


class AffineCouplingTransform(Transform):
    r"""Affine coupling [1]: the coordinates :math:`z_B` are shifted and scaled by functions of the others, :math:`z_A`.

    .. math:: y_A = z_A, \qquad y_B = z_B \odot s(c) + a, \qquad (a, c) = \mathrm{net}(z_A, \mathrm{context}), \qquad
       \log\Big|\det \frac{\partial y}{\partial z}\Big| = \sum \log s(c) .

    The scale is :math:`\sigma(c)` (``"sigmoid"``, the gate of [2]), :math:`e^{2 \tanh(c / 2)}` (``"tanh"``, bounded) or
    :math:`e^c` (``"exp"``), with :math:`c` clipped to :math:`\pm 15`, so that value, inverse and gradients stay finite.
    Log-determinant and inverse are exact and cost one evaluation of the network.

    :param conditioner: ``conditioner(z_A)``, or with a context ``conditioner(z_A, context)``: a function or pytree
        module over the last axis that returns :math:`a` and :math:`c` side by side, ``[..., 2 * number of moved]``.
    :param kept: which coordinates are :math:`z_A`: the ``"first"`` or ``"second"`` half, or D booleans.
    :param scale: ``"sigmoid"``, ``"tanh"``, ``"exp"``, or a function from :math:`c` to :math:`\log s`.
    :param context: ``[*batch, C]``, what else the network sees; gradients reach it.
    :raises ValueError: for an unknown scale or ``kept``; when used, for an odd number of coordinates and ``kept`` a
        half, and for shapes that do not fit.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smc.guides.transforms import AffineCouplingTransform
        >>> weight = jnp.array([[0.5, -1.0, 0.2, 0.3], [1.0, 0.4, 0.0, -0.6]])
        >>> coupling = AffineCouplingTransform(lambda kept: jnp.tanh(kept @ weight), kept="first", scale="tanh")
        >>> flow = dist.TransformedDistribution(dist.Normal(0.0, 1.0).expand([4]).to_event(1), [coupling])
        >>> z = flow.sample(random.key(0), (3,))
        >>> flow.log_prob(z).shape
        (3,)

    **References**

    1. *Density Estimation Using Real NVP*, L. Dinh, J. Sohl-Dickstein, S. Bengio (2017)
    2. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self,
        conditioner: Callable[..., Array],
        kept: str | Sequence[bool] | np.ndarray = "first",
        scale: str | Callable[[Array], Array] = "sigmoid",
        context: ArrayLike | None = None,
    ) -> None:
        if not callable(scale) and scale not in LOG_SCALES:
            raise ValueError(
                f"AffineCouplingTransform: scale must be one of {list(LOG_SCALES)} or a function, got {scale!r}."
            )
        if isinstance(kept, str):
            if kept not in ("first", "second"):
                raise ValueError(f"AffineCouplingTransform: kept must be 'first', 'second' or booleans, got {kept!r}.")
            self.kept: str | tuple[bool, ...] = kept
        else:
            self.kept = tuple(map(bool, kept))
            if all(self.kept) or not any(self.kept):
                raise ValueError(
                    f"AffineCouplingTransform: kept must keep some coordinates and move others, got {self.kept}."
                )
        self.conditioner, self.scale = conditioner, scale
        self.context = None if context is None else jnp.asarray(context)

    def __call__(self, x: Array) -> Array:
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        kept, moved = self._split(x)
        shift, log_scale = self._shift_and_log_scale(kept, moved.shape[-1])
        return self._join(kept, moved * jnp.exp(log_scale) + shift), jnp.sum(log_scale, axis=-1)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Array | None = None) -> Array:
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def _inverse(self, y: Array) -> Array:
        kept, moved = self._split(y)
        shift, log_scale = self._shift_and_log_scale(kept, moved.shape[-1])
        return self._join(kept, (moved - shift) * jnp.exp(-log_scale))

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        self._mask(shape[-1])
        return (
            shape if self.context is None else (*lax.broadcast_shapes(shape[:-1], self.context.shape[:-1]), shape[-1])
        )

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.forward_shape(shape)

    def tree_flatten(self) -> tuple:
        # The functions in a module are part of its structure.
        leaves, structure = jax.tree.flatten(self.conditioner, is_leaf=lambda leaf: leaf is None)
        arrays = [None if callable(leaf) else leaf for leaf in leaves]
        functions = tuple(leaf if callable(leaf) else None for leaf in leaves)
        return (arrays, self.context), (structure, functions, self.kept, self.scale)

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> "AffineCouplingTransform":
        transform = cls.__new__(cls)
        structure, functions, transform.kept, transform.scale = aux_data
        arrays, transform.context = params
        leaves = [array if function is None else function for array, function in zip(arrays, functions, strict=True)]
        transform.conditioner = jax.tree.unflatten(structure, leaves)
        return transform

    def _mask(self, size: int) -> np.ndarray:
        if isinstance(self.kept, str):
            if size % 2:
                raise ValueError(
                    f"AffineCouplingTransform: kept='{self.kept}' splits vectors in halves, but they have {size} "
                    f"coordinates. Pass {size} booleans instead, True for those that are kept."
                )
            return (np.arange(size) < size // 2) == (self.kept == "first")
        if len(self.kept) != size:
            raise ValueError(
                f"AffineCouplingTransform: kept has {len(self.kept)} entries, but the vectors have {size} coordinates."
            )
        return np.array(self.kept)

    def _split(self, x: Array) -> tuple[Array, Array]:
        mask = self._mask(x.shape[-1])
        x = jnp.broadcast_to(x, self.forward_shape(x.shape))
        return x[..., np.flatnonzero(mask)], x[..., np.flatnonzero(~mask)]

    def _join(self, kept: Array, moved: Array) -> Array:
        mask = self._mask(kept.shape[-1] + moved.shape[-1])
        order = np.argsort(np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)]))
        return jnp.concatenate([kept, moved], axis=-1)[..., order]

    def _shift_and_log_scale(self, kept: Array, num_moved: int) -> tuple[Array, Array]:
        if self.context is None:
            numbers = self.conditioner(kept)
        else:
            numbers = self.conditioner(kept, jnp.broadcast_to(self.context, (*kept.shape[:-1], self.context.shape[-1])))
        if numbers.shape != (*kept.shape[:-1], 2 * num_moved):
            raise ValueError(
                f"AffineCouplingTransform: the conditioner returned shape {numbers.shape} for {num_moved} coordinates "
                f"to move; shifts and raw scales side by side have shape {(*kept.shape[:-1], 2 * num_moved)}."
            )
        shift, raw = numbers[..., :num_moved], numbers[..., num_moved:]
        if callable(self.scale):
            return shift, self.scale(raw)
        return shift, LOG_SCALES[self.scale](jnp.clip(raw, -_LARGEST_RAW, _LARGEST_RAW))


def coupling_flow(
    name: str,
    size: int,
    context: Array | None = None,
    num_transforms: int = 2,
    hidden: int = 50,
    num_first: int | None = None,
    activation: Callable[[Array], Array] = jnp.tanh,
) -> list[Transform]:
    """Couplings with sigmoid gates that move the second part of the vectors, then the first, so many times.

    Every network has one hidden layer; parameters ``"{name}_{i}_first$params"`` and ``"{name}_{i}_second$params"``, by
    the part that moves. The flow starts near the identity.

    :param size: number of coordinates.
    :param context: ``[*batch, C]``; without it all data share one flow.
    :param num_first: coordinates of the first part, by default half of them.
    :raises ValueError: if ``size`` is 1.
    """
    if size < 2:
        raise ValueError(
            "coupling_flow: a coupling needs two coordinates at the least, one to keep and one to move; the base has "
            "1. Use family='planar'."
        )
    is_first = np.arange(size) < (size // 2 if num_first is None else num_first)
    num_context = 0 if context is None else context.shape[-1]
    flow: list[Transform] = []
    for i in range(num_transforms):
        for part, kept in (("second", is_first), ("first", ~is_first)):
            moved = int(size - kept.sum())
            sizes = (size - moved + num_context, hidden, 2 * moved)
            start = np.repeat([0.0, OPEN_GATE], moved)
            conditioner = network(f"{name}_{i}_{part}", sizes, activation, last_scale=0.01, last_bias=start)
            flow.append(AffineCouplingTransform(conditioner, kept, "sigmoid", context))
    return flow
