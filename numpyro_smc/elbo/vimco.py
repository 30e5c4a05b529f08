"""VIMCO: leave-one-out baselines for the score-function gradient of an importance-weighted bound."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_smc.elbo.iwelbo import normalised_weights
from numpyro_smc.elbo.multi_sample import Coefficients, ScoreFunctionELBO
from numpyro_smc.programs.arguments import check_number
from numpyro_smc.programs.weights import LeaveOneOut, leave_one_out


class VIMCO(ScoreFunctionELBO):
    r"""Importance-weighted bound whose score-function gradient uses leave-one-out baselines [1].

    With log weights :math:`\ell_k = \log p(x, z_k) - \log q(z_k)` of :math:`K` particles,
    :math:`s_k = (1-\alpha)\ell_k` and :math:`\delta_k = s_k - \log\sum_{l \ne k} e^{s_l}`, the guide's score
    :math:`\nabla\log q(z_k)` is weighted by

    .. math:: \frac{\operatorname{softplus}(\delta_k) + \log(1 - 1/K)}{1 - \alpha} - \sigma(\delta_k),

    in which the geometric mean :math:`e^{\bar s_{-k}}` of the others replaces :math:`\log(1 - 1/K)` by
    :math:`-\operatorname{softplus}(\bar s_{-k} - \log\sum_{l \ne k} e^{s_l})`.

    Value: unbiased for the bound :math:`L_K^\alpha`, per plate element, summed. Gradient: unbiased for model and guide,
    discrete latents included, unless ``clip_log_odds`` is set.
    Cost: O(K) time and memory. The signal-to-noise ratio of the guide's gradient falls as :math:`K^{-1/2}`;
    :class:`OVIS` does better.

    :param num_particles: :math:`K \ge 2`.
    :param mean: ``"arithmetic"`` or ``"geometric"`` mean of the other weights in the baseline (equal at K = 2).
    :param clip_log_odds: upper limit of :math:`\delta_k`: less variance, some bias, where one particle dominates.
    :param pathwise: which sites get pathwise gradients; see :class:`~.multi_sample.ScoreFunctionELBO`. Other arguments:
        see :class:`~.multi_sample.MultiSampleELBO`.
    :raises ValueError: if ``num_particles < 2``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import VIMCO
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...         numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = numpyro.param("slope", 0.0)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), loss=VIMCO(num_particles=5))
        >>> result = svi.run(random.key(0), 10, jnp.array([1.9, 0.1]), progress_bar=False)

    **References**

    1. *Variational Inference for Monte Carlo Objectives*, A. Mnih, D. Rezende (2016)
    """

    _fewest_particles = 2

    def __init__(
        self, num_particles: int, *, mean: str = "arithmetic", clip_log_odds: float | None = None, **options: Any
    ) -> None:
        super().__init__(num_particles, **options)
        check_baseline(type(self).__name__, mean, clip_log_odds)
        self.mean, self.clip_log_odds = mean, clip_log_odds

    def coefficients(self, log_weights: Array, alpha: Any = 0.0) -> Coefficients:
        weights, value = normalised_weights(log_weights, alpha)
        odds = leave_one_out((1.0 - alpha) * log_weights)
        signal = learning_signal(odds.own, odds, self.clip_log_odds)
        constant = jnp.log1p(-1.0 / log_weights.shape[0])
        baseline = geometric_baseline(odds) if self.mean == "geometric" else -constant
        guide = signal.centred + (alpha * signal.ratio - baseline) / (1.0 - alpha)
        return Coefficients(weights, guide, value)


class Signal(NamedTuple):
    r"""What a particle adds to the bound, from log odds :math:`\delta_k` against the others.

    - **ratio** - :math:`\operatorname{softplus}(\delta_k) = \log\sum_l e^{s_l} - \log\sum_{l \ne k} e^{s_l}`.
    - **centred** - :math:`\operatorname{softplus}(\delta_k) - \sigma(\delta_k)`, to full relative precision.
    """

    ratio: Array
    centred: Array


def learning_signal(draws: Array, others: LeaveOneOut, clip_log_odds: float | None) -> Signal:
    """The signal of draws in the particles' places, without the baseline's constant.

    Where every other particle is dead there is no leave-one-out mean: one takes its place, which keeps the gradient
    unbiased; a draw that is dead too gets nothing.

    :param draws: tempered log weights relative to the peak, ``[K, ...]`` or ``[...]``.
    """
    log_odds = others.odds_of(draws)
    if clip_log_odds is not None:
        log_odds = jnp.minimum(log_odds, clip_log_odds)
    is_sole = jnp.isposinf(log_odds)
    alone = jnp.where(is_sole, draws + others.peak - jnp.log(max(others.own.shape[0] - 1, 1)), 0.0)
    log_odds = jnp.where(is_sole, 0.0, log_odds)
    return Signal(
        jnp.where(is_sole, alone, jax.nn.softplus(log_odds)),
        jnp.where(is_sole, alone - 1.0, softplus_minus_sigmoid(log_odds)),
    )


def softplus_minus_sigmoid(x: Array) -> Array:
    r""":math:`\operatorname{softplus}(x) - \sigma(x)`, by its series in :math:`e^x` where the two nearly cancel."""
    is_small = x < jnp.log(0.05)
    u = jnp.exp(jnp.where(is_small, x, -jnp.inf))
    series = jnp.zeros_like(x)
    for n in range(14, 1, -1):
        series = (series + (-1.0) ** n * (n - 1) / n) * u
    moderate = jnp.where(is_small, 0.0, x)
    return jnp.where(is_small, series * u, jax.nn.softplus(moderate) - jax.nn.sigmoid(moderate))


def geometric_baseline(odds: LeaveOneOut) -> Array:
    r""":math:`\operatorname{softplus}(\bar s_{-k} - \log\sum_{l \ne k} e^{s_l})`, the mean being of the others."""
    num = odds.own.shape[0]
    is_dead = jnp.isneginf(odds.own)
    alive = jnp.where(is_dead, 0.0, odds.own)
    mean = (jnp.sum(alive, axis=0) - alive) / max(num - 1, 1)
    has_dead_others = jnp.sum(is_dead, axis=0) - is_dead > 0
    return jnp.where(has_dead_others, 0.0, jax.nn.softplus(odds.odds_of(mean)))


def check_baseline(user: str, mean: str, clip_log_odds: float | None) -> None:
    """:raises ValueError: for an unknown mean, or a limit that is not positive."""
    if mean not in ("arithmetic", "geometric"):
        raise ValueError(f"{user}: mean must be 'arithmetic' or 'geometric', got {mean!r}.")
    if clip_log_odds is not None:
        check_number(user, "(0, inf]", "Use None for no limit.", clip_log_odds=clip_log_odds)
