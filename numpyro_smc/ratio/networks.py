"""Networks as pairs of functions over a pytree of weights, and other libraries' modules as embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.programs.arguments import check_positive

__all__ = ["Embedding", "Network", "embedding_of", "from_equinox", "from_flax", "mlp", "residual_mlp"]


@jax.custom_jvp
def elu(units: Array) -> Array:
    """ELU whose derivative is a function of its value: on CPUs, gradients are faster than those of JAX's own."""
    return jnp.where(units > 0, units, jnp.expm1(jnp.minimum(units, 0)))


@elu.defjvp
def _elu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value = elu(*primals)
    return value, tangents[0] * jnp.where(value > 0, 1, value + 1)


#: Activation functions by name.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "celu": jax.nn.celu,
    "elu": elu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Apply(Protocol):
    """``(weights, *parts) -> [..., out]``; see :class:`Network`."""

    def __call__(self, weights: Any, *parts: Array) -> Array: ...


class Network(NamedTuple):
    """A network of vectors.

    ``init(rng_key, in_size, out_size)`` draws the weights, any pytree of arrays. ``apply(weights, *parts)`` maps the
    inputs to ``[..., out_size]``: parts ``[..., in_1]``, ``[..., in_2]``, ..., whose sizes sum to ``in_size`` and whose
    leading axes broadcast, stand for their concatenation along the last axis. What is shared by many rows is thus
    given once, and what the first layer makes of it is computed once.

    :ivar init: the weights' law.
    :ivar apply: the function.
    """

    init: Callable[[Array, int, int], Any]
    apply: Apply


class Embedding(NamedTuple):
    """What a ratio network sees of an output instead of all its numbers.

    :ivar init: ``init(rng_key, x) -> weights`` from outputs ``[n, *event]``.
    :ivar apply: ``apply(weights, x) -> [n, size]``.
    """

    init: Callable[[Array, Array], Any]
    apply: Callable[[Any, Array], Array]


@functools.lru_cache
def mlp(width: int = 256, num_layers: int = 7, activation: str = "elu") -> Network:
    r"""Multilayer perceptron: ``num_layers`` linear maps between ``num_layers + 1`` hidden layers, one in, one out [1].

    Weights and biases start uniform on :math:`\pm 1/\sqrt{\text{inputs of the layer}}`.

    :param width: units of a hidden layer.
    :param num_layers: linear maps between hidden layers.
    :param activation: ``"celu"``, ``"elu"``, ``"gelu"``, ``"relu"``, ``"selu"``, ``"silu"`` or ``"tanh"``.
    :raises ValueError: for an unknown activation, or a number that makes no sense.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_smc.ratio.networks import mlp
        >>> network = mlp(width=32, num_layers=2)
        >>> weights = network.init(random.key(0), 3, 1)
        >>> network.apply(weights, jnp.ones((10, 3))).shape
        (10, 1)

    **References**

    1. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
    """
    check_positive("mlp", width=width, num_hidden=num_layers + 1)
    act = _activation("mlp", activation)

    def init(rng_key: Array, in_size: int, out_size: int) -> list[dict[str, Array]]:
        sizes = [in_size, *[width] * (num_layers + 1), out_size]
        keys = random.split(rng_key, len(sizes) - 1)
        return [_linear_init(*sizes_and_key) for sizes_and_key in zip(keys, sizes[:-1], sizes[1:], strict=True)]

    def apply(weights: list[dict[str, Array]], *parts: Array) -> Array:
        first, *hidden, last = weights
        units, leading = _first_linear(first, *parts)
        for layer in hidden:
            units = _linear(layer, act(units))
        return _linear(last, act(units)).reshape(*leading, -1)

    return Network(init, apply)


@functools.lru_cache
def residual_mlp(width: int = 128, num_blocks: int = 3, activation: str = "elu", layer_norm: bool = False) -> Network:
    """Residual perceptron with pre-activation: each block adds activation, linear, activation, linear to its input.

    A linear map leads in, another out, with no activation before it.

    :param width: units of the blocks.
    :param num_blocks: number of blocks.
    :param activation: as for :func:`mlp`.
    :param layer_norm: whether a layer norm, with scale and shift, stands before every activation.
    :raises ValueError: for an unknown activation, or a number that makes no sense.
    """
    check_positive("residual_mlp", width=width, num_blocks=num_blocks)
    act = _activation("residual_mlp", activation)

    def half_init(rng_key: Array) -> dict[str, Any]:
        norm = {"scale": jnp.ones(width), "shift": jnp.zeros(width)} if layer_norm else {}
        return {"norm": norm, "linear": _linear_init(rng_key, width, width)}

    def half(weights: dict[str, Any], units: Array) -> Array:
        if layer_norm:
            units = _standardized(units) * weights["norm"]["scale"] + weights["norm"]["shift"]
        return _linear(weights["linear"], act(units))

    def init(rng_key: Array, in_size: int, out_size: int) -> dict[str, Any]:
        first_key, last_key, *keys = random.split(rng_key, 2 + 2 * num_blocks)
        halves = [half_init(key) for key in keys]
        return {
            "first": _linear_init(first_key, in_size, width),
            "blocks": list(zip(halves[::2], halves[1::2], strict=True)),
            "last": _linear_init(last_key, width, out_size),
        }

    def apply(weights: dict[str, Any], *parts: Array) -> Array:
        units, leading = _first_linear(weights["first"], *parts)
        for one, other in weights["blocks"]:
            units = units + half(other, half(one, units))
        return _linear(weights["last"], units).reshape(*leading, -1)

    return Network(init, apply)


@functools.lru_cache
def embedding_of(network: Network, size: int) -> Embedding:
    """A network of the flattened output as an embedding.

    :param network: such as :func:`mlp`.
    :param size: numbers that the ratio network sees.
    """
    check_positive("embedding_of", size=size)

    def flat(x: Array) -> Array:
        return x.reshape(len(x), -1)

    def init(rng_key: Array, x: Array) -> Any:
        return network.init(rng_key, flat(x).shape[-1], size)

    return Embedding(init, lambda weights, x: network.apply(weights, flat(x)))


def from_equinox(module: Any) -> Embedding:
    """An Equinox module as an embedding: a function of one output ``[*event]`` that returns a vector.

    Its floating-point arrays are trained; everything else is fixed.

    :param module: the module, or a function from a random key to it, so that every training starts from other weights.
    :raises ValueError: if it is no Equinox module, or has a state (batch norm), which no training here updates.

    **Example**

    .. doctest::

        >>> import equinox, jax, jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_smc.ratio.networks import from_equinox
        >>> embedding = from_equinox(lambda key: equinox.nn.MLP(8, 3, width_size=16, depth=1, key=key))
        >>> x = jnp.ones((5, 8))
        >>> embedding.apply(embedding.init(random.key(0), x), x).shape
        (5, 3)
    """
    import equinox

    make = (lambda rng_key: module) if isinstance(module, equinox.Module) else module
    if not callable(make):
        raise ValueError(f"from_equinox: module must be an equinox.Module or make one of a key, got {module!r}.")

    def trained(rng_key: Array) -> Any:
        return equinox.partition(make(rng_key), equinox.is_inexact_array)[0]

    example = make(random.key(0))
    if not isinstance(example, equinox.Module):
        raise ValueError(f"from_equinox: module must be an equinox.Module, got {type(example).__name__}.")
    is_stateful = lambda leaf: isinstance(leaf, equinox.nn.StatefulLayer | equinox.nn.StateIndex)  # noqa: E731
    if any(map(is_stateful, jax.tree.leaves(example, is_leaf=is_stateful))):
        raise _stateful("from_equinox", type(example).__name__, "equinox.nn.State")
    fixed = equinox.partition(example, equinox.is_inexact_array)[1]

    def apply(weights: Any, x: Array) -> Array:
        return jax.vmap(equinox.combine(weights, fixed))(x)

    return Embedding(lambda rng_key, x: trained(rng_key), apply)


def from_flax(module: Any) -> Embedding:
    """A Flax module, ``linen`` or ``nnx``, as an embedding: a function of outputs ``[n, *event]``.

    :param module: of ``linen``: its weights are drawn at the start of every training; of ``nnx``: with its own.
    :raises ValueError: if it is no such module, or has state besides its parameters (batch norm, dropout), which no
        training here updates; of ``linen``, when its weights are drawn.
    """
    from flax import linen, nnx

    name = type(module).__name__
    if isinstance(module, linen.Module):

        def init(rng_key: Array, x: Array) -> Any:
            variables = dict(module.init(rng_key, x[:1]))
            weights = variables.pop("params", {})
            if variables:
                raise _stateful("from_flax", name, ", ".join(map(repr, variables)))
            return weights

        def apply(weights: Any, x: Array) -> Array:
            return jnp.asarray(module.apply({"params": weights}, x))

        return Embedding(init, apply)
    if not isinstance(module, nnx.Module):
        raise ValueError(f"from_flax: module must be a flax linen.Module or nnx.Module, got {name}.")
    graph, *states = nnx.split(module, nnx.Param, ...)
    parameters, rest = states
    others = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(rest)]
    if others:
        raise _stateful("from_flax", name, ", ".join(others))
    return Embedding(lambda rng_key, x: parameters, lambda weights, x: nnx.merge(graph, weights)(x))


def _stateful(user: str, module: str, state: str) -> ValueError:
    return ValueError(
        f"{user}: {module} has a state besides its weights ({state}), as batch norm and dropout have; nothing here "
        f"would update it, and ratios of a row would depend on other rows. Use a layer or group norm instead."
    )


def _activation(user: str, name: str) -> Callable[[Array], Array]:
    if name not in ACTIVATIONS:
        raise ValueError(f"{user}: activation must be one of {list(ACTIVATIONS)}, got {name!r}.")
    return ACTIVATIONS[name]


def _linear_init(rng_key: Array, in_size: int, out_size: int) -> dict[str, Array]:
    weight_key, bias_key = random.split(rng_key)
    bound = in_size**-0.5
    return {
        "weight": random.uniform(weight_key, (in_size, out_size), minval=-bound, maxval=bound),
        "bias": random.uniform(bias_key, (out_size,), minval=-bound, maxval=bound),
    }


def _linear(weights: dict[str, Array], units: Array) -> Array:
    return units @ weights["weight"] + weights["bias"]


def _first_linear(weights: dict[str, Array], *parts: Array) -> tuple[Array, tuple[int, ...]]:
    """The linear map of the concatenation of ``parts``, each of which meets its own rows of the matrix.

    :return: ``[n, units]`` and the leading axes that were made one: gradients of products with several leading axes
        take twice the time on CPUs.
    """
    leading = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    total, first = weights["bias"], 0
    for part in parts:
        size = part.shape[-1]
        product = part.reshape(-1, size) @ weights["weight"][first : first + size]
        total = total + product.reshape(*part.shape[:-1], -1)
        first += size
    return jnp.broadcast_to(total, (*leading, total.shape[-1])).reshape(-1, total.shape[-1]), leading


def _standardized(units: Array) -> Array:
    centred = units - units.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
