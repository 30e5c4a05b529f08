"""OVIS: score-function gradients of importance-weighted bounds, with asymptotically optimal control variates."""

from math import inf
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_smc.elbo.iwelbo import normalised_weights
from numpyro_smc.elbo.multi_sample import Coefficients, ScoreFunctionELBO
from numpyro_smc.elbo.vimco import check_baseline, geometric_baseline, learning_signal
from numpyro_smc.programs.arguments import check_between
from numpyro_smc.programs.weights import leave_one_out


class OVIS(ScoreFunctionELBO):
    r"""Importance-weighted bound with control variates that are optimal as K grows [1].

    With :math:`s_k = (1-\alpha)\ell_k` and :math:`\delta_k = s_k - \log\sum_{l \ne k} e^{s_l}` as in
    :class:`VIMCO`, and :math:`c = \log(1 - 1/K)`, the guide's score :math:`\nabla\log q(z_k)` is weighted by

    .. math:: \frac{\operatorname{softplus}(\delta_k) + c}{1 - \alpha} - (1 - \gamma)\,\big(\sigma(\delta_k) + c\big),

    for :math:`\alpha = 0` :math:`\operatorname{softplus}(\delta_k) - (1-\gamma)\sigma(\delta_k) + \gamma c`, whose
    variance is O(K^-3) at :math:`\gamma = 0`. With ``num_auxiliary`` draws :math:`a_s` the baseline is the Monte Carlo
    mean of the learning signal instead, with
    :math:`g(\delta) = \operatorname{softplus}(\delta) / (1 - \alpha) - \sigma(\delta)`:

    .. math:: g(\delta_k) - \tfrac1S\sum_s g\Big(a_s - \log\sum_{l \ne k} e^{s_l}\Big).

    Value: unbiased for :math:`L_K^\alpha`, per plate element, summed. Gradient: unbiased for the model. For the guide
    unbiased with :math:`\gamma = 0` or auxiliary draws and ``clip_log_odds=None``; :math:`\gamma` adds
    :math:`\gamma\,\mathbb E[\sum_k v_k \nabla\log q(z_k)]`, the wake direction, which is biased for the bound, has the
    highest signal-to-noise ratio of all and often trains best (:math:`\gamma = 1` has the mean of :class:`STL`).
    Cost: O(K) time and memory, O(SK) for the coefficients with auxiliary draws.

    :param num_particles: :math:`K \ge 2`; with ``num_auxiliary``, :math:`K \ge 1`.
    :param gamma: :math:`\gamma`, 0 (many effective particles) or 1 (few), or between.
    :param num_auxiliary: :math:`S`, draws from the guide for the baselines, instead of ``gamma``.
    :param exclusive: whether the auxiliary draws come on top of the K particles. If not, the last S of the K particles
        serve the first K - S (at least one): the bound and the model's gradient use all K, and the guide's gradient is
        that of :math:`L_{K-S}`.
    :param mean: ``"arithmetic"`` or ``"geometric"`` mean in the leave-one-out baseline that ``gamma`` corrects.
    :param renyi: ``"exact"``, or ``"tempered"`` for the published experiments' form at :math:`\alpha > 0`, without any
        :math:`1/(1-\alpha)`: then :math:`\gamma = 1` is :math:`(1-\alpha)` times the exact direction, and
        :math:`\gamma = 0` is biased.
    :param clip_log_odds: upper limit of the log odds, by default that of the published single-precision code; where it
        is active it trades bias for variance. ``None`` for the exact estimator.
    :param pathwise: which sites get pathwise gradients; see :class:`~.multi_sample.ScoreFunctionELBO`. Other arguments:
        see :class:`~.multi_sample.MultiSampleELBO`.
    :raises ValueError: if there are too few particles, or arguments exclude each other.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import OVIS
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        ...         numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     logits = numpyro.param("logits", jnp.zeros(3))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Categorical(logits=logits))
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), loss=OVIS(num_particles=5, gamma=1.0))
        >>> result = svi.run(random.key(0), 10, jnp.array([3.9, 0.1]), progress_bar=False)

    **References**

    1. *Optimal Variance Control of the Score-Function Gradient Estimator for Importance-Weighted Bounds*, V. Lievin,
       A. Dittadi, A. Christensen, O. Winther (2020)
    """

    def __init__(
        self,
        num_particles: int,
        *,
        gamma: float = 0.0,
        num_auxiliary: int = 0,
        exclusive: bool = True,
        mean: str = "arithmetic",
        renyi: str = "exact",
        clip_log_odds: float | None = 15.94,
        **options: Any,
    ) -> None:
        self._fewest_particles = 1 if num_auxiliary else 2
        super().__init__(num_particles, **options)
        check_baseline("OVIS", mean, clip_log_odds)
        if renyi not in ("exact", "tempered"):
            raise ValueError(f"OVIS: renyi must be 'exact' or 'tempered', got {renyi!r}.")
        check_between("OVIS", 0.0, inf, gamma=gamma)
        if not isinstance(num_auxiliary, int) or num_auxiliary < 0:
            raise ValueError(f"OVIS: num_auxiliary must be a whole number of draws, got {num_auxiliary!r}.")
        if num_auxiliary and (gamma != 0.0 or mean != "arithmetic" or renyi != "exact"):
            raise ValueError(
                f"OVIS: num_auxiliary={num_auxiliary} replaces gamma, mean and renyi, which must keep their defaults."
            )
        if not exclusive and not 0 < num_auxiliary < max(num_particles, 2):
            raise ValueError(
                f"OVIS: exclusive=False takes the auxiliary draws from the particles, so num_auxiliary must be between "
                f"1 and num_particles - 1, got {num_auxiliary} of {num_particles}."
            )
        self._has_one_objective = gamma == 0.0
        self.gamma, self.num_auxiliary, self.exclusive = gamma, num_auxiliary, exclusive
        self.mean, self.renyi, self.clip_log_odds = mean, renyi, clip_log_odds

    @property
    def _num_extra(self) -> int:
        return self.num_auxiliary if self.exclusive else 0

    def coefficients(self, log_weights: Array, alpha: Any = 0.0) -> Coefficients:
        """As :meth:`.MultiSampleELBO.coefficients`; exclusive auxiliary draws come last and get zeros."""
        if self.num_auxiliary:
            return self._with_auxiliary_draws(log_weights, alpha)
        weights, value = normalised_weights(log_weights, alpha)
        odds = leave_one_out((1.0 - alpha) * log_weights)
        signal = learning_signal(odds.own, odds, self.clip_log_odds)
        constant = jnp.log1p(-1.0 / log_weights.shape[0])
        baseline = geometric_baseline(odds) if self.mean == "geometric" else -constant
        guide = signal.centred + self.gamma * jax.nn.sigmoid(odds.log_odds)
        if self.renyi == "tempered":
            return Coefficients(weights, guide + self.gamma * constant - (baseline + constant), value)
        # At alpha = 0 the two constants cancel before they meet the signal, which may be far smaller.
        centred = (alpha * (signal.ratio + constant) - (baseline + constant)) / (1.0 - alpha)
        return Coefficients(weights, guide + self.gamma * constant + centred, value)

    def _with_auxiliary_draws(self, log_weights: Array, alpha: Any) -> Coefficients:
        num_main = log_weights.shape[0] - self.num_auxiliary
        main, auxiliary = log_weights[:num_main], log_weights[num_main:]
        weights, value = normalised_weights(main if self.exclusive else log_weights, alpha)
        odds = leave_one_out((1.0 - alpha) * main)
        clip_log_odds = None if num_main == 1 else self.clip_log_odds

        def signal(draws: Array) -> Array:
            ratio, centred = learning_signal(draws, odds, clip_log_odds)
            return centred + alpha / (1.0 - alpha) * ratio

        baseline = jnp.mean(jax.vmap(signal)((1.0 - alpha) * auxiliary - odds.peak), axis=0)
        guide = signal(odds.own) - baseline
        rest = jnp.zeros_like(auxiliary)
        return Coefficients(
            jnp.concatenate([weights, rest]) if self.exclusive else weights, jnp.concatenate([guide, rest]), value
        )
