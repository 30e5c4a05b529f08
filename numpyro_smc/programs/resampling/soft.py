"""Soft resampling: ancestors from a mixture of the weights and equal weights, corrected by importance weights."""

import math
from functools import partial

import jax.numpy as jnp
from jax import Array

from numpyro_smc.programs.arguments import check_number
from numpyro_smc.programs.resampling.mixing import log_probabilities
from numpyro_smc.programs.resampling.multinomial import log_prob, multinomial
from numpyro_smc.programs.resampling.registry import Scheme


def soft(alpha: float = 0.5) -> Scheme:
    r"""Independent ancestors from :math:`q_i = \alpha W_i + (1 - \alpha) / M`, weighted by :math:`W_i / q_i` [1].

    :math:`W` are the normalised weights and :math:`M` the number of living particles. The new weights are not
    normalised again: their mean is one only on average, which keeps evidence estimates unbiased. (The paper normalises
    them, which makes them biased.)

    Gradient: through the new weights relative to their mean, as in the paper. The score of the choice of ancestors is
    dropped, so it is biased; with ``alpha`` one it is that of :func:`multinomial`. ``resampling_gradient="score"`` is
    unbiased, and ``"stop_gradient"`` gives the new weights the gradient of :math:`\log W_i`.
    Cost: O(N log N). More variance than :func:`multinomial`, the more so the smaller ``alpha``: particles of little
    weight are copied, and weights stay unequal.

    :param alpha: share of the weights in the mixture, in (0, 1].
    :raises ValueError: if it is not in there.

    **References**

    1. *Particle Filter Networks with Application to Visual Localization*, P. Karkus, D. Hsu, W. S. Lee (2018)
    """
    check_number("soft", "(0, 1]", "It is the share of the weights in the mixture.", alpha=alpha)
    selection = partial(log_selection, alpha=float(alpha))

    def ancestors(rng_key: Array, log_weights: Array, num_samples: int) -> Array:
        return multinomial(rng_key, selection(log_weights), num_samples)

    return Scheme(
        "soft",
        ancestors,
        unbiased=True,
        log_prob=lambda ancestors, log_weights: log_prob(ancestors, selection(log_weights)),
        selection=selection,
        differentiable="weights",
        cost="O(N log N); more variance than multinomial",
    )


def log_selection(log_weights: Array, alpha: float) -> Array:
    r"""Log probabilities :math:`\log q_i` of being chosen, ``-inf`` for a dead particle; shape ``[N]``."""
    living = ~jnp.isneginf(log_weights)
    log_q = jnp.where(living, log_probabilities(log_weights), 0.0)
    if alpha < 1.0:
        num_living = jnp.maximum(jnp.sum(living), 1)
        log_q = jnp.logaddexp(math.log(alpha) + log_q, math.log1p(-alpha) - jnp.log(num_living).astype(log_q.dtype))
    return jnp.where(living, log_q, -jnp.inf)
