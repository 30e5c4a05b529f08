"""Inverse autoregressive flow with a context, from NumPyro's transform and a masked network."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.distributions.transforms import PermuteTransform, Transform

from numpyro_smc.guides.transforms.amortised import Network, network


def iaf_flow(
    name: str, size: int, context: Array | None = None, num_transforms: int = 2, hidden: int = 50
) -> list[Transform]:
    """Inverse autoregressive transforms [1], with the coordinates reversed in between, ``"{name}_{i}$params"``.

    The networks have one hidden layer and start near zero, so that the flow starts near the identity. Cost: a draw with
    its density takes one evaluation of each network, the density of a given value ``size`` of them.

    :param size: number of coordinates.
    :param context: ``[*batch, C]``, seen by all units; without it all data share one flow.
    :param hidden: units, at least ``size``.
    :raises ValueError: if there are fewer hidden units than coordinates.

    **References**

    1. *Improving Variational Inference with Inverse Autoregressive Flow*, D. Kingma, T. Salimans, R. Jozefowicz, X.
       Chen, I. Sutskever, M. Welling (2016)
    """
    if hidden < size:
        raise ValueError(
            f"iaf_flow: {size} coordinates need at least as many hidden units, got hidden={hidden}: with fewer, some "
            f"coordinates would not see those before them."
        )
    num_context = 0 if context is None else context.shape[-1]
    flow: list[Transform] = []
    for i in range(num_transforms):
        free = network(f"{name}_{i}", (size + num_context, hidden, 2 * size), jnp.tanh, last_scale=0.01)
        flow.append(InverseAutoregressiveTransform(_conditioner(free, size, context)))
        if i < num_transforms - 1:
            flow.append(PermuteTransform(jnp.arange(size)[::-1]))
    return flow


def _conditioner(free: Network, size: int, context: Array | None) -> Callable[[Array], tuple[Array, Array]]:
    """Mean and log scale of each coordinate, from the coordinates before it and the context."""
    inner, outer = free.layers
    place = np.arange(size)
    # A hidden unit of degree d sees the context and the first d coordinates.
    degrees = np.arange(inner["weight"].shape[1]) % size
    sees = np.concatenate([place[:, None] < degrees, np.full((inner["weight"].shape[0] - size, len(degrees)), True)])
    serves = np.tile(degrees[:, None] <= place, (1, 2))
    layers = [{**inner, "weight": inner["weight"] * sees}, {**outer, "weight": outer["weight"] * serves}]
    masked = Network(layers, free.activation)

    def conditioner(x: Array) -> tuple[Array, Array]:
        numbers = masked(x) if context is None else masked(x, context)
        return numbers[..., :size], numbers[..., size:]

    return conditioner
