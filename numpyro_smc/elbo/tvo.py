"""TVO: the thermodynamic variational objective."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.elbo.multi_sample import Coefficients, ScoreFunctionELBO
from numpyro_smc.programs.arguments import check_number, check_positive


class TVO(ScoreFunctionELBO):
    r"""Thermodynamic variational objective [1]: a Riemann sum of the log evidence on the path from guide to posterior.

    With :math:`\pi_\beta \propto p(x, z)^\beta q(z)^{1-\beta}`,
    :math:`\log p(x) = \int_0^1 \mathbb E_{\pi_\beta}[\log w]\, d\beta`. For
    :math:`0 = \beta_0 < \dots < \beta_P = 1` with multipliers :math:`m_j`, and weights
    :math:`\bar w^j_k \propto w_k^{\beta_j}` of the same K draws,

    .. math:: T = \sum_j m_j \mu_j, \quad \mu_j = \sum_k \bar w^j_k \ell_k, \qquad
       A_k = \sum_j m_j \bar w^j_k [1 + \kappa \beta_j (\ell_k - \mu_j)], \quad
       B_k = \sum_j m_j \bar w^j_k [\kappa (1 - \beta_j)(\ell_k - \mu_j) - 1],

    with :math:`\kappa = K / (K - 1)`. One partition is the evidence lower bound with leave-one-out baselines.

    Value: :math:`T`, per plate element, summed: a lower bound for ``rule="left"``, an upper one for ``"right"``, up to
    the O(1/K) bias of the self-normalised weights. Gradient: of T (not of :math:`L_K`), consistent in K.
    Cost: O(PK) for the coefficients.

    :param num_particles: :math:`K \ge 2`.
    :param partitions: :math:`P \ge 1`, number of intervals.
    :param beta_min: :math:`\beta_1` of ``"log"`` spacing, or all of :math:`\beta_1, \dots, \beta_P = 1`. Published for
        logarithmic spacing: 0.05 (K < 10), 0.2 (K < 30), 0.3.
    :param spacing: ``"log"`` or ``"linear"``.
    :param rule: ``"left"``, ``"right"`` or ``"trapz"``. Other arguments (but ``alpha`` and ``pathwise``, which it does
        not have): see :class:`~.multi_sample.MultiSampleELBO`.
    :raises ValueError: if ``num_particles < 2``, or the partition is not one.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import TVO
        >>> def model(x):
        ...     z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...     numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.0)))
        >>> loss = TVO(num_particles=5, partitions=5, beta_min=0.01)
        >>> result = SVI(model, guide, numpyro.optim.Adam(0.01), loss).run(random.key(0), 10, 1.0, progress_bar=False)

    **References**

    1. *The Thermodynamic Variational Objective*, V. Masrani, T. A. Le, F. Wood (2019)
    """

    _fewest_particles = 2
    _has_one_objective = False

    def __init__(
        self,
        num_particles: int,
        *,
        partitions: int = 2,
        beta_min: float | Sequence[float] = 1e-10,
        spacing: str = "log",
        rule: str = "left",
        **options: Any,
    ) -> None:
        for name in ("alpha", "pathwise"):
            if name in options:
                raise ValueError(f"TVO: it has no {name}; its path is set by partitions, beta_min, spacing and rule.")
        super().__init__(num_particles, **options)
        self.betas = partition(partitions, beta_min, spacing)
        self.multipliers = riemann_multipliers(self.betas, rule)

    def coefficients(self, log_weights: Array, alpha: Any = 0.0) -> Coefficients:
        num = log_weights.shape[0]
        correction = num / (num - 1)
        is_dead = jnp.isneginf(log_weights)
        peak = jnp.max(log_weights, axis=0)
        all_dead = jnp.isneginf(peak)
        peak = jnp.where(all_dead, 0.0, peak)
        # At beta = 0 a dead particle pulls the mean to -inf, in the value; its coefficients are the worst survivor's.
        worst = jnp.min(jnp.where(is_dead, jnp.inf, log_weights), axis=0)
        centred = jnp.where(is_dead, jnp.where(all_dead, 0.0, worst), log_weights) - peak
        model, guide, value = jnp.zeros_like(centred), jnp.zeros_like(centred), peak
        for beta, multiplier in zip(self.betas, self.multipliers, strict=True):
            if multiplier == 0.0:
                continue
            weights = jax.nn.softmax(beta * centred, axis=0, where=~is_dead | (beta == 0.0))
            weights = jnp.where(all_dead, 0.0, weights)
            mean = jnp.sum(weights * centred, axis=0)
            deviation = correction * (centred - mean)
            model = model + multiplier * weights * jnp.where(is_dead, 0.0, 1.0 + beta * deviation)
            guide = guide + multiplier * weights * ((1.0 - beta) * deviation - 1.0)
            is_lost = jnp.any(is_dead, axis=0) if beta == 0.0 else all_dead
            value = value + multiplier * jnp.where(is_lost, -jnp.inf, mean)
        return Coefficients(model, guide, value)


def partition(partitions: int, beta_min: float | Sequence[float], spacing: str) -> np.ndarray:
    r"""The points :math:`0 = \beta_0 < \dots < \beta_P = 1`.

    :raises ValueError: if they are not increasing from 0 to 1.
    """
    check_positive("TVO", partitions=partitions)
    if spacing not in ("log", "linear"):
        raise ValueError(f"TVO: spacing must be 'log' or 'linear', got {spacing!r}.")
    if np.ndim(beta_min) == 1:
        inner = np.asarray(beta_min, float)
    elif spacing == "linear" or partitions == 1:
        inner = np.linspace(0.0, 1.0, partitions + 1)[1:]
    else:
        check_number("TVO", "(0, 1)", beta_min=beta_min)
        inner = np.logspace(np.log10(beta_min), 0.0, partitions)
    betas = np.concatenate([[0.0], inner])
    if not (np.all(np.diff(betas) > 0.0) and np.isclose(betas[-1], 1.0)):
        raise ValueError(f"TVO: the points must increase from 0 to 1, got {betas.tolist()}.")
    return betas


def riemann_multipliers(betas: np.ndarray, rule: str) -> np.ndarray:
    r"""The multiplier of each point in the Riemann sum."""
    widths = np.diff(betas)
    left, right = np.append(widths, 0.0), np.append(0.0, widths)
    rules = {"left": left, "right": right, "trapz": (left + right) / 2.0}
    if rule not in rules:
        raise ValueError(f"TVO: rule must be one of {list(rules)}, got {rule!r}.")
    return rules[rule]
