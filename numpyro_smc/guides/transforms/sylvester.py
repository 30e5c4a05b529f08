"""The Sylvester transform: many planar transforms at once, in orthogonal directions."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_smc.guides.transforms.amortised import amortised
from numpyro_smc.guides.transforms.monotone import root

#: Largest size of a diagonal entry, so that no product of two of them reaches -1.
LARGEST_DIAGONAL = 1.0 - 1e-3
_SHORTEST = 1e-12  # squared length of a reflection's vector that counts as one


class SylvesterTransform(Transform):
    r"""Sylvester flow [1] with Householder reflections, on vectors of :math:`D` coordinates.

    .. math:: y = z + Q R_1 \tanh(R_2 Q^\top z + b), \qquad
       \log\Big|\frac{\partial y}{\partial z}\Big| = \sum_{i=1}^M \log\big(1 + (R_1)_{ii} (R_2)_{ii}\, (1 - t_i^2)\big),

    with :math:`t = \tanh(R_2 Q^\top z + b)`. The orthonormal columns :math:`Q` are the first :math:`M \le D` columns of
    :math:`H_1 \cdots H_n`, reflections :math:`H = I - 2 v v^\top / \|v\|^2`, and :math:`R_1, R_2` are upper triangular,
    with diagonals :math:`0.999 \tanh(\cdot)` of what is given: any numbers make an invertible transform. A vector
    :math:`v = 0` reflects nothing; :math:`R_1 = 0` is the identity.

    The log-determinant is exact. The inverse solves :math:`M` monotone equations, the last coordinate first, by
    bisection, with exact derivatives of every order. Leading axes of the parameters are batch axes.
    Cost: O(nD + M^2); the inverse takes M steps in sequence.

    :param reflections: :math:`v_1 \dots v_n`, ``[*batch, n, D]``.
    :param first: upper triangle of :math:`R_1`, its diagonal before the tanh, ``[*batch, M, M]``.
    :param second: the same of :math:`R_2`.
    :param bias: :math:`b`, ``[*batch, M]``.
    :raises ValueError: if these shapes do not fit together, or M > D; when used, if the vectors do not have D
        coordinates.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_smc.guides.transforms import SylvesterTransform
        >>> triangle = jnp.array([[0.5, -1.0], [0.0, 2.0]])
        >>> reflections, bias = jnp.array([[1.0, 2.0, -1.0]]), jnp.array([0.1, 0.0])
        >>> sylvester = SylvesterTransform(reflections, triangle, -triangle, bias)
        >>> z = jnp.array([0.4, -1.0, 0.7])
        >>> bool(jnp.allclose(sylvester.inv(sylvester(z)), z, atol=1e-5))
        True

    **References**

    1. *Sylvester Normalizing Flows for Variational Inference*, R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling
       (2018)
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, reflections: ArrayLike, first: ArrayLike, second: ArrayLike, bias: ArrayLike) -> None:
        self.reflections, self.first = jnp.asarray(reflections), jnp.asarray(first)
        self.second, self.bias = jnp.asarray(second), jnp.asarray(bias)
        shapes = self.reflections.shape, self.first.shape, self.second.shape, self.bias.shape
        rank = self.bias.shape[-1] if self.bias.ndim else 0
        if self.reflections.ndim < 2 or any(shape[-2:] != (rank, rank) for shape in shapes[1:3]) or not rank:
            raise ValueError(
                f"SylvesterTransform: expected reflections [*batch, n, D], first and second [*batch, M, M] and bias "
                f"[*batch, M], got shapes {', '.join(map(str, shapes))}."
            )
        if rank > self.reflections.shape[-1]:
            raise ValueError(
                f"SylvesterTransform: M = {rank} directions do not fit in the D = {self.reflections.shape[-1]} "
                f"coordinates of the reflections. Use M <= D."
            )

    def __call__(self, x: Array) -> Array:
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        first, second = _triangle(self.first), _triangle(self.second)
        t = jnp.tanh(_product(second, self._to_directions(x)) + self.bias)
        return x + self._from_directions(_product(first, t)), _log_det(first, second, t)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Array | None = None) -> Array:
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def _inverse(self, y: Array) -> Array:
        first, second = _triangle(self.first), _triangle(self.second)
        along = self._to_directions(y)
        batch = lax.broadcast_shapes(along.shape[:-1], first.shape[:-2], second.shape[:-2], self.bias.shape[:-1])
        start = jnp.zeros((*batch, along.shape[-1]), along.dtype)

        def solve(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            solved, t = carry  # zero where not known yet: coordinates up to i
            height, slope = first[..., i, i], second[..., i, i]
            offset = jnp.sum(second[..., i, :] * solved, axis=-1) + self.bias[..., i]
            one = root(height, slope, offset, along[..., i] - jnp.sum(first[..., i, :] * t, axis=-1))
            return (solved.at[..., i].set(one), t.at[..., i].set(jnp.tanh(slope * one + offset))), None

        (_, t), _ = lax.scan(solve, (start, start), jnp.arange(along.shape[-1]), reverse=True)
        return y - self._from_directions(_product(first, t))

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        size = self.reflections.shape[-1]
        if shape[-1:] != (size,):
            raise ValueError(
                f"SylvesterTransform: the reflections have {size} coordinates, but the vectors that it is to transform "
                f"have shape {shape}. Give the reflections as many coordinates as the base distribution."
            )
        batches = (self.reflections.shape[:-2], self.first.shape[:-2], self.second.shape[:-2], self.bias.shape[:-1])
        return (*lax.broadcast_shapes(shape[:-1], *batches), size)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.forward_shape(shape)

    def tree_flatten(self) -> tuple:
        names = ("reflections", "first", "second", "bias")
        return tuple(getattr(self, name) for name in names), (names, {})

    def _to_directions(self, z: Array) -> Array:
        r""":math:`Q^\top z`."""
        return self._reflect(z, reverse=False)[..., : self.bias.shape[-1]]

    def _from_directions(self, along: Array) -> Array:
        """:math:`Q` times a vector of M coordinates."""
        missing = self.reflections.shape[-1] - along.shape[-1]
        return self._reflect(jnp.pad(along, [(0, 0)] * (along.ndim - 1) + [(0, missing)]), reverse=True)

    def _reflect(self, z: Array, reverse: bool) -> Array:
        batch = lax.broadcast_shapes(z.shape[:-1], self.reflections.shape[:-2])
        lengths = jnp.sum(self.reflections**2, axis=-1, keepdims=True)
        is_vector = lengths > _SHORTEST
        units = jnp.where(is_vector, self.reflections, 0.0) / jnp.sqrt(jnp.where(is_vector, lengths, 1.0))

        def reflect(z: Array, unit: Array) -> tuple[Array, None]:
            return z - 2.0 * unit * jnp.sum(unit * z, axis=-1, keepdims=True), None

        start = jnp.broadcast_to(z, (*batch, z.shape[-1]))
        return lax.scan(reflect, start, jnp.moveaxis(units, -2, 0), reverse=reverse)[0]


def sylvester_flow(
    name: str, size: int, context: Array | None = None, num_transforms: int = 2, rank: int | None = None
) -> list[Transform]:
    """Sylvester transforms whose triangles and biases are affine functions of the context, ``"{name}_{i}$params"``.

    The directions, ``"{name}_{i}_directions$params"``, are shared by all data: with directions of their own for every
    datum, training goes much more slowly.

    :param size: number of coordinates.
    :param context: ``[*batch, C]``; without it all data share one flow.
    :param rank: directions of each transform, by default ``min(size, 8)``; as many reflections.
    """
    rank = min(size, 8) if rank is None else rank
    lengths = np.array([rank * rank, rank * rank, rank])
    scales = np.repeat([0.01, rank**-0.5, 0.0], lengths)
    flow: list[Transform] = []
    for i in range(num_transforms):
        reflections = amortised(f"{name}_{i}_directions", rank * size, None, 1.0).reshape(rank, size)
        numbers = amortised(f"{name}_{i}", int(lengths.sum()), context, scales)
        first, second, bias = jnp.split(numbers, np.cumsum(lengths)[:-1], axis=-1)
        square = (*numbers.shape[:-1], rank, rank)
        flow.append(SylvesterTransform(reflections, first.reshape(square), second.reshape(square), bias))
    return flow


def _triangle(matrix: Array) -> Array:
    """Upper triangular, with a bounded diagonal."""
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    return jnp.triu(matrix, 1) + LARGEST_DIAGONAL * jnp.tanh(matrix) * identity


def _product(matrix: Array, vector: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", matrix, vector)


def _log_det(first: Array, second: Array, t: Array) -> Array:
    diagonals = jnp.diagonal(first, axis1=-2, axis2=-1) * jnp.diagonal(second, axis1=-2, axis2=-1)
    return jnp.sum(jnp.log1p(diagonals * (1.0 - t) * (1.0 + t)), axis=-1)
