r"""The one-dimensional equation that inverts planar and Sylvester transforms.

.. math:: \alpha + a \tanh(s \alpha + c) = y, \qquad a s > -1,

has one root, because its left side increases, and that root is in :math:`[y - |a|, y + |a|]`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.custom_jvp
def root(height: Array, slope: Array, offset: Array, y: Array) -> Array:
    r"""The root :math:`\alpha`, elementwise, by bisection; its derivatives are those of the implicit function.

    :param height: :math:`a`; **slope** - :math:`s`; **offset** - :math:`c`. All broadcast against ``y``.
    """
    height, slope, offset, y = jnp.broadcast_arrays(height, slope, offset, y)

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        is_above = middle + height * jnp.tanh(slope * middle + offset) > y
        return jnp.where(is_above, low, middle), jnp.where(is_above, middle, high)

    num_halvings = jnp.finfo(y.dtype).nmant + 4
    low, high = lax.fori_loop(0, num_halvings, halve, (y - jnp.abs(height), y + jnp.abs(height)))
    return 0.5 * (low + high)


@root.defjvp
def _root_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    height, slope, offset, _ = primals
    d_height, d_slope, d_offset, d_y = tangents
    alpha = root(*primals)
    t = jnp.tanh(slope * alpha + offset)
    steepness = height * (1.0 - t) * (1.0 + t)
    change = d_y - t * d_height - steepness * (alpha * d_slope + d_offset)
    return alpha, change / (1.0 + slope * steepness)
