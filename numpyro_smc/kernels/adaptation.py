r"""Adaptive Metropolis with a global scale: a random walk that learns covariance and scale while warming up [1, 2].

Proposals are :math:`z' = z + S\xi` with :math:`\xi \sim \mathcal N(0, I_D)` and
:math:`S S^\top = e^{2\lambda} C`. After iteration :math:`i`, with :math:`\alpha_i` its acceptance probability,

.. math:: \mu \leftarrow \mu + \gamma_n (z_i - \mu), \qquad
   C \leftarrow C + \gamma_n \bigl((z_i - \mu)(z_i - \mu)^\top - C\bigr), \qquad
   \lambda \leftarrow \lambda + \eta_i (\alpha_i - \alpha_\star).

The moments are of the places that the chain moves to, :math:`\gamma_n = 2 / (n + 2)` after n moves, so that they forget
the start as :math:`n^{-2}`: a chain that a lucky estimate of the likelihood holds says nothing about the covariance.
:math:`\eta_i = 2\, i^{-0.6}`, at most one. Noise of the estimate can keep the acceptance of any step, however short,
below the one that is wanted, while the best scale hardly depends on noise [4]: so :math:`\lambda` stays within a factor
of 20 of :math:`2.38 / \sqrt D`, which falls to 2 over the first half of the warm-up. (Adapting the covariance by
acceptance alone [3] takes many times longer where scales differ.)

**References**

1. *An adaptive Metropolis algorithm*, H. Haario, E. Saksman, J. Tamminen (2001)
2. *A tutorial on adaptive MCMC*, C. Andrieu, J. Thoms (2008), algorithm 4
3. *Robust adaptive Metropolis algorithm with coerced acceptance rate*, M. Vihola (2012)
4. *On the efficiency of pseudo-marginal random walk Metropolis algorithms*, C. Sherlock, A. Thiery, G. Roberts,
   J. Rosenthal (2015)
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Adaptation(NamedTuple):
    """The proposal, what it is made of, and when it stops changing.

    - **scale_tril** - :math:`S`, lower triangular, ``[D, D]``. **mean**, **covariance**, **log_scale** - :math:`\\mu`,
      :math:`C`, :math:`\\lambda`. **num_moves** - n. **num_warmup** - number of iterations that adapt them.
    """

    scale_tril: Array
    mean: Array
    covariance: Array
    log_scale: Array
    num_moves: Array
    num_warmup: Array

    @property
    def step_size(self) -> Array:
        """The geometric mean of the diagonal of :math:`S`."""
        return jnp.exp(jnp.mean(jnp.log(jnp.diagonal(self.scale_tril, axis1=-2, axis2=-1)), axis=-1))


def start(z: Array, step_size: float, num_warmup: Array) -> Adaptation:
    """Proposals with standard deviation ``step_size`` in every direction from ``z``, ``[D]``."""
    identity = jnp.eye(z.shape[0], dtype=z.dtype)
    log_scale = _usual_log_scale(z)
    covariance = (step_size / math.exp(log_scale)) ** 2 * identity
    nothing = jnp.zeros((), num_warmup.dtype)
    return Adaptation(step_size * identity, z, covariance, jnp.asarray(log_scale, z.dtype), nothing, num_warmup)


def adapt(
    adaptation: Adaptation,
    i: Array,
    z: Array,
    accepted: Array,
    accept_prob: Array,
    target: float,
    learn_covariance: bool,
) -> Adaptation:
    """The proposal after iteration ``i`` (from zero), unchanged after the warm-up.

    :param z: where the iteration ended, ``[D]``. **accepted** - whether it moved there. **accept_prob** - of its
        proposal. **target** - what is wanted.
    :param learn_covariance: whether to learn :math:`C`, or the scale alone.
    """
    mean, covariance, num_moves = adaptation.mean, adaptation.covariance, adaptation.num_moves
    if learn_covariance:
        rate = jnp.where(accepted, jnp.minimum(0.5, 2.0 / (num_moves + 2.0)), 0.0).astype(z.dtype)
        deviation = z - mean
        mean = mean + rate * deviation
        covariance = covariance + rate * (jnp.outer(deviation, deviation) - covariance)
        num_moves = num_moves + accepted
    rate = jnp.minimum(1.0, 2.0 * (i + 1.0) ** -0.6).astype(z.dtype)
    log_scale = adaptation.log_scale + rate * (accept_prob - target)
    if learn_covariance:
        remaining = jnp.maximum(1.0 - 2.0 * i / jnp.maximum(adaptation.num_warmup, 1), 0.0)
        reach = (math.log(2.0) + math.log(10.0) * remaining).astype(z.dtype)
        log_scale = jnp.clip(log_scale, _usual_log_scale(z) - reach, _usual_log_scale(z) + reach)
    ridge = 1e-6 * jnp.mean(jnp.diagonal(covariance))
    scale_tril = jnp.exp(log_scale) * jnp.linalg.cholesky(covariance + ridge * jnp.eye(z.shape[0], dtype=z.dtype))
    new = Adaptation(scale_tril, mean, covariance, log_scale, num_moves, adaptation.num_warmup)
    return Adaptation(*(jnp.where(i < adaptation.num_warmup, *both) for both in zip(new, adaptation, strict=True)))


def _usual_log_scale(z: Array) -> float:
    """What is best without noise, where :math:`C` is the target's covariance."""
    return math.log(2.38 / math.sqrt(z.shape[0]))
