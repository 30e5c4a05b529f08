"""Made-up arguments and parameters, to try a program out while its own are only traced."""

import zlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.primitives import Messenger


def made_up(arguments: Any, length: int, as_probabilities: bool = False) -> Any:
    """The same arguments, with numbers in the place of tracers.

    Whatever an array means, the numbers should do: its rows are probabilities, and a square matrix is a covariance,
    too. Vectors as long as the series are positive numbers, unless ``as_probabilities``.
    """
    generator = np.random.default_rng(0)

    def one(x: Any) -> Any:
        if not isinstance(x, jax.core.Tracer):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.ones(x.shape, x.dtype)
        numbers = generator.uniform(0.2, 0.8, x.shape)
        if x.ndim > 1 and x.shape[-2] == x.shape[-1]:
            numbers = _symmetric_with_rows_of_one(numbers)
        elif x.ndim > 1 or x.shape not in ((), (1,), (length,)) or (as_probabilities and x.ndim):
            numbers = numbers / numbers.sum(-1, keepdims=True)
        return jnp.asarray(numbers, x.dtype)

    return jax.tree.map(one, arguments)


def _symmetric_with_rows_of_one(matrices: np.ndarray) -> np.ndarray:
    """Positive definite, because the diagonal is more than the rest of each row."""
    found = matrices + matrices.swapaxes(-1, -2)
    for _ in range(50):
        found = found / found.sum(-1, keepdims=True)
        found = (found + found.swapaxes(-1, -2)) / 2
    return 0.4 * found + 0.6 * np.eye(found.shape[-1])


class NearInitial(Messenger):
    """Move parameters away from their initial values, at which something may vanish that does not elsewhere.

    :param known: names of the parameters whose values are given.
    """

    def __init__(self, fn: Callable[..., Any], known: Collection[str]) -> None:
        super().__init__(fn)
        self.known = known

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "param" or msg["name"] in self.known:
            return
        transform = biject_to(msg["kwargs"].get("constraint", constraints.real))
        generator = np.random.default_rng(zlib.crc32(msg["name"].encode()))

        def moved(leaf: Any) -> Any:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                return leaf
            free = jnp.asarray(transform.inv(leaf))
            step = jnp.asarray(generator.uniform(0.05, 0.1, free.shape), free.dtype)
            return transform(jnp.where(free == 0, step, free * (1 + step)))

        msg["value"] = jax.tree.map(moved, msg["value"])
