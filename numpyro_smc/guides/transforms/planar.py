"""The planar transform: one hyperplane along which space is stretched or squeezed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_smc.guides.transforms.amortised import amortised
from numpyro_smc.guides.transforms.monotone import root

#: The least slope along the hyperplane's normal.
LEAST_SLOPE = 1e-3
_AT_ZERO = math.log(math.e - 1.0)  # softplus of it is one
_SHORTEST = 1e-12  # squared length of a normal that counts as one


class PlanarTransform(Transform):
    r"""Planar flow [1], :math:`y = z + \hat u \tanh(w^\top z + b)`, on vectors of :math:`D` coordinates.

    .. math:: \hat u = u + \big(m(w^\top u) - w^\top u\big) \frac{w}{\|w\|^2}, \qquad
       \log\Big|\frac{\partial y}{\partial z}\Big| = \log\big(1 + \hat u^\top w \, (1 - \tanh^2(w^\top z + b))\big) .

    With :math:`m(a) = -1 + \epsilon + (1 - \epsilon) \operatorname{softplus}(a + \log(e - 1))`, with :math:`\epsilon`
    0.001, it is invertible for all :math:`u, w, b`, and :math:`u = 0` is the identity (with [1]'s
    :math:`m(a) = -1 + \operatorname{softplus}(a)` it is not; the family is the same).

    The log-determinant is exact. The inverse is the root of a monotone equation in :math:`w^\top z`, by bisection, with
    exact derivatives of every order. Leading axes of the parameters are batch axes: one transform per datapoint.
    Cost: O(D).

    :param u: :math:`u`, ``[*batch, D]``.
    :param w: :math:`w`, ``[*batch, D]``.
    :param b: :math:`b`, ``[*batch]``.
    :raises ValueError: if these shapes do not fit together; when used, if the vectors do not have D coordinates.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_smc.guides.transforms import PlanarTransform
        >>> planar = PlanarTransform(u=jnp.array([1.0, -0.5]), w=jnp.array([0.3, 2.0]), b=jnp.array(0.1))
        >>> z = jnp.array([0.4, -1.0])
        >>> bool(jnp.allclose(planar.inv(planar(z)), z, atol=1e-5))
        True

    **References**

    1. *Variational Inference with Normalizing Flows*, D. Rezende, S. Mohamed (2015)
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, u: ArrayLike, w: ArrayLike, b: ArrayLike) -> None:
        self.u, self.w, self.b = jnp.asarray(u), jnp.asarray(w), jnp.asarray(b)
        if not self.u.ndim or not self.w.ndim or self.u.shape[-1] != self.w.shape[-1]:
            raise ValueError(
                f"PlanarTransform: u and w must be vectors of the same length (of batches of them), got shapes "
                f"{self.u.shape} and {self.w.shape}."
            )
        try:
            np.broadcast_shapes(self.u.shape[:-1], self.w.shape[:-1], self.b.shape)
        except ValueError:
            raise ValueError(
                f"PlanarTransform: u and w have batch shapes {self.u.shape[:-1]} and {self.w.shape[:-1]}, with which "
                f"b of shape {self.b.shape} does not broadcast; b has no axis of coordinates."
            ) from None

    def __call__(self, x: Array) -> Array:
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        u, slope = self._direction()
        t = jnp.tanh(jnp.sum(self.w * x, axis=-1) + self.b)
        return x + u * t[..., None], _log_det(slope, t)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Array | None = None) -> Array:
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def _inverse(self, y: Array) -> Array:
        u, slope = self._direction()
        along = root(slope - 1.0, jnp.ones_like(slope), self.b, jnp.sum(self.w * y, axis=-1))
        return y - u * jnp.tanh(along + self.b)[..., None]

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        size = self.w.shape[-1]
        if shape[-1:] != (size,):
            raise ValueError(
                f"PlanarTransform: u and w have {size} coordinates, but the vectors that it is to transform have shape "
                f"{shape}. Give u and w as many coordinates as the base distribution."
            )
        batch = lax.broadcast_shapes(shape[:-1], self.u.shape[:-1], self.w.shape[:-1], self.b.shape)
        return (*batch, size)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.forward_shape(shape)

    def tree_flatten(self) -> tuple:
        return (self.u, self.w, self.b), (("u", "w", "b"), {})

    def _direction(self) -> tuple[Array, Array]:
        r""":math:`\hat u`, and :math:`1 + \hat u^\top w`, the slope in the middle, without cancellation."""
        along, length = jnp.sum(self.w * self.u, axis=-1), jnp.sum(self.w**2, axis=-1)
        is_vector = length > _SHORTEST
        slope = LEAST_SLOPE + (1.0 - LEAST_SLOPE) * jax.nn.softplus(along + _AT_ZERO)
        correction = jnp.where(is_vector, (slope - 1.0 - along) / jnp.where(is_vector, length, 1.0), 0.0)
        return self.u + correction[..., None] * self.w, jnp.where(is_vector, slope, 1.0 + along)


def planar_flow(name: str, size: int, context: Array | None = None, num_transforms: int = 2) -> list[Transform]:
    """Planar transforms whose parameters are affine functions of the context, with parameters ``"{name}_{i}$params"``.

    :param size: number of coordinates.
    :param context: ``[*batch, C]``; without it all data share one flow.
    """
    flow: list[Transform] = []
    for i in range(num_transforms):
        numbers = amortised(
            f"{name}_{i}", 2 * size + 1, context, scales=np.repeat([0.01, size**-0.5, 0.0], (size, size, 1))
        )
        flow.append(PlanarTransform(numbers[..., :size], numbers[..., size:-1], numbers[..., -1]))
    return flow


def _log_det(slope: Array, t: Array) -> Array:
    return jnp.log(t**2 + slope * (1.0 - t) * (1.0 + t))
