"""The small networks behind built-in flows, whose weights are NumPyro parameters."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, random
from jax.typing import ArrayLike

Layers = list[dict[str, Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Network:
    """A fully connected network over the last axis of its inputs, which are set side by side.

    **layers** - ``[{"weight": [in, out], "bias": [out]}, ...]``; **activation** - between the layers.
    """

    layers: Layers
    activation: Callable[[Array], Array] = field(metadata={"static": True})

    def __call__(self, *inputs: Array) -> Array:
        batch = jnp.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        hidden = jnp.concatenate([jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in inputs], axis=-1)
        for layer in self.layers[:-1]:
            hidden = self.activation(hidden @ layer["weight"] + layer["bias"])
        return hidden @ self.layers[-1]["weight"] + self.layers[-1]["bias"]


def network(
    name: str,
    sizes: Sequence[int],
    activation: Callable[[Array], Array] = jax.nn.elu,
    last_scale: float = 1.0,
    last_bias: ArrayLike = 0.0,
) -> Network:
    r"""State the parameter ``"{name}$params"`` and return the network.

    Weights and biases start uniform on :math:`\pm 1 / \sqrt{\text{fan-in}}`; in the last layer the weights are times
    ``last_scale``, and the biases ``last_bias``.

    :param sizes: of the input, the hidden layers and the output.
    """

    def init(rng_key: Array) -> Layers:
        layers = []
        for shape in itertools.pairwise(sizes):
            rng_key, weight_key, bias_key = random.split(rng_key, 3)
            limit = shape[0] ** -0.5
            weight = random.uniform(weight_key, shape, minval=-limit, maxval=limit)
            bias = random.uniform(bias_key, shape[1:], minval=-limit, maxval=limit)
            layers.append({"weight": weight, "bias": bias})
        layers[-1]["weight"] = last_scale * layers[-1]["weight"]
        layers[-1]["bias"] = jnp.zeros(sizes[-1]) + last_bias
        return layers

    return Network(numpyro.param(f"{name}$params", init), activation)


def amortised(name: str, size: int, context: Array | None, scales: ArrayLike) -> Array:
    """Numbers ``[*batch, size]`` that are an affine function of the context, or without one free, ``[size]``.

    They start as normal draws of the given standard deviations, and hardly depend on the context.
    """

    def init(rng_key: Array) -> dict[str, Array]:
        bias_key, weight_key = random.split(rng_key)
        bias = jnp.asarray(scales) * random.normal(bias_key, (size,))
        if context is None:
            return {"bias": bias}
        num = context.shape[-1]
        return {"bias": bias, "weight": 0.01 / num**0.5 * random.normal(weight_key, (num, size))}

    params = numpyro.param(f"{name}$params", init)
    return params["bias"] if context is None else params["bias"] + context @ params["weight"]
