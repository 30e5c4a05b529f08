"""Gumbel-softmax resampling: every new particle is a random convex mixture, near one particle at low temperature."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_smc.programs.arguments import check_number
from numpyro_smc.programs.resampling.mixing import as_matrix, log_probabilities
from numpyro_smc.programs.resampling.registry import Scheme


def gumbel_softmax(temperature: float = 0.3) -> Scheme:
    r"""New particles :math:`\tilde x_i = \sum_j S_{ij} x_j` that are random mixtures of old ones, mainly of one [1].

    :math:`S_i = \mathrm{softmax}((\log W + g_i) / \tau)` with independent standard Gumbel variables :math:`g_{ij}` and
    temperature :math:`\tau`; the new weights are equal. As :math:`\tau \to 0` this becomes :func:`multinomial`, and the
    variance of its gradient grows without bound.

    Biased: mixtures lie inside the cloud, whose spread shrinks, and nothing guarantees a correct evidence, however
    many particles. Gradient: exact for this randomised map, through weights and states. Real states only; no
    genealogies. Cost: O(N^2 d) time, O(N^2) memory.

    :param temperature: :math:`\tau > 0`.
    :raises ValueError: if the temperature is not positive.

    **References**

    1. *Categorical Reparameterization with Gumbel-Softmax*, E. Jang, S. Gu, B. Poole (2017)
    """
    check_number("gumbel_softmax", "(0, inf)", temperature=temperature)

    def transport(rng_key: Array, log_weights: Array, particles: Any) -> tuple[Any, Array]:
        states, rebuild = as_matrix("gumbel_softmax", log_weights, particles)
        size = log_weights.shape[0]
        noise = jax.random.gumbel(rng_key, (size, size), log_weights.dtype)
        mixture = jax.nn.softmax((log_probabilities(log_weights) + noise) / temperature, axis=1)
        return rebuild(mixture.astype(states.dtype) @ states), jnp.zeros_like(log_weights)

    return Scheme(
        "gumbel_softmax",
        None,
        transport=transport,
        differentiable="path",
        cost="O(N^2 d) time, O(N^2) memory",
    )
