"""Moving a cloud chunk by chunk, so that the memory of a step does not grow with the number of particles."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.engines.particles import FeynmanKac
from numpyro_smc.programs.arguments import check_if_given
from numpyro_smc.programs.sequence import Cloud, Move


class _InChunks:
    def __init__(self, model: Any, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.length = model.length
        self.has_initial_weights = model.has_initial_weights
        self.inputs = model.inputs
        self.init = model.init

    def step(self, rng_key: Array, t: Array, inputs: Any, cloud: Cloud, num_particles: int) -> tuple[Cloud, Move]:
        num_chunks = num_particles // self.batch_size

        def chunk(operand: tuple[Array, Any]) -> tuple[Cloud, Move]:
            number, particles = operand
            key = random.fold_in(rng_key, number)
            return self.model.step(key, t, inputs, Cloud(particles, cloud.shared), self.batch_size)

        split = jax.tree.map(lambda x: x.reshape(num_chunks, self.batch_size, *x.shape[1:]), cloud.particles)
        moved, move = lax.map(chunk, (jnp.arange(num_chunks), split))

        def join(tree: Any) -> Any:
            return jax.tree.map(lambda x: x.reshape(num_particles, *x.shape[2:]), tree)

        return Cloud(join(moved.particles), jax.tree.map(lambda x: x[0], moved.shared)), join(move)


def in_chunks(model: Any, num_particles: int, batch_size: int | None) -> FeynmanKac:
    """The same Feynman-Kac model, moved ``batch_size`` particles at a time.

    :raises ValueError: unless ``batch_size`` divides ``num_particles``.
    """
    check_if_given("chunks of particles", batch_size=batch_size)
    if batch_size is not None and num_particles % batch_size:
        raise ValueError(f"batch_size={batch_size} must be positive and divide num_particles={num_particles}.")
    if batch_size is None or model is None or batch_size == num_particles:
        return model
    return _InChunks(model, batch_size)
