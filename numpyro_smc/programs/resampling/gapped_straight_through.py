"""Gapped straight-through resampling: copies going forward, a softmax going backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_smc.programs.arguments import check_number
from numpyro_smc.programs.resampling.multinomial import multinomial
from numpyro_smc.programs.resampling.registry import Scheme


def gapped_straight_through(temperature: float = 0.1, gap: float = 1.0) -> Scheme:
    r"""Multinomial resampling whose copies pass gradients to the weights as if they were softmax mixtures [1].

    Slot :math:`i` copies its ancestor :math:`a`, and :math:`\tilde x_i` has the derivative of
    :math:`\sum_j S_{ij} x_j` in the log weights :math:`\ell`, with :math:`S_i = \mathrm{softmax}(l_i / \tau)`,

    .. math:: l_{ia} = \ell_a + (\max_k \ell_k - \ell_a), \qquad
       l_{ij} = \ell_j - \max(0,\, \ell_j - \max_k \ell_k + \gamma) \quad (j \ne a),

    all terms in brackets and both maxima being constants: the chosen one leads by the gap :math:`\gamma`. States pass
    on the gradients of their ancestors; integer states are copied. The new weights are equal.

    Value: that of :func:`multinomial`, so evidence estimates are unbiased. Gradient: biased. With the defaults, which
    are the published ones, other particles get a share of at most :math:`(N - 1) e^{-\gamma / \tau}`, 5e-5 each, and
    the gradient equals that of :func:`multinomial` to three digits: no more than a comparison. A temperature of one or
    more passes a signal. Prefer :func:`soft`, or ``resampling_gradient="stop_gradient"`` with a scheme that copies.
    Cost: O(N^2 d) time and O(N^2) memory, for the gradient alone.

    :param temperature: :math:`\tau > 0`.
    :param gap: :math:`\gamma \ge 0`.
    :raises ValueError: if they are not.

    **References**

    1. *Training Discrete Deep Generative Models via Gapped Straight-Through Estimator*, T.-H. Fan et al. (2022)
    """
    check_number("gapped_straight_through", "(0, inf)", temperature=temperature)
    check_number("gapped_straight_through", "[0, inf)", gap=gap)

    def transport(rng_key: Array, log_weights: Array, particles: Any) -> tuple[Any, Array]:
        size = log_weights.shape[0]
        ancestors = multinomial(rng_key, log_weights, size)
        mixture = straight_through_mixture(log_weights, ancestors, temperature, gap)
        slope = mixture - lax.stop_gradient(mixture)  # zero, with the derivative of the mixture

        def move(leaf: Array) -> Array:
            copies = leaf[ancestors]
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return copies
            states = lax.stop_gradient(leaf).reshape(size, -1)
            states = jnp.where(jnp.isfinite(states), states, 0.0)
            return copies + (slope @ states).reshape(leaf.shape).astype(leaf.dtype)

        return jax.tree.map(move, particles), jnp.zeros_like(log_weights)

    return Scheme(
        "gapped_straight_through",
        multinomial,
        unbiased=True,
        transport=transport,
        differentiable="path",
        cost="O(N^2 d) time, O(N^2) memory",
    )


def straight_through_mixture(log_weights: Array, ancestors: Array, temperature: float, gap: float) -> Array:
    """The rows :math:`S_i` that stand for the copies in the backward pass.

    :param log_weights: unnormalised, shape ``[N]``.
    :param ancestors: int, shape ``[n]``.
    :return: ``[n, N]``; rows sum to one.
    """
    log_weights = jnp.where(jnp.all(jnp.isneginf(log_weights)), 0.0, log_weights)
    fixed = lax.stop_gradient(log_weights)
    largest = jnp.max(fixed)
    chosen = ancestors[:, None] == jnp.arange(log_weights.shape[0])
    lift = largest - fixed[ancestors]
    lowering = jnp.maximum(0.0, fixed - largest + gap)
    return jax.nn.softmax((log_weights + jnp.where(chosen, lift[:, None], -lowering)) / temperature, axis=1)
