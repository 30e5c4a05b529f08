r"""The probability that a simulation is finite, which simulations that were left out take from the likelihood.

Trained on finite simulations alone, a ratio is that of the parameters given a finite output, :math:`p(\theta \mid f)`
in place of :math:`p(\theta)`. A finite observation says that its own simulation did not fail [1]:

.. math:: \frac{p(\theta_b \mid x)}{p(\theta_b)} = \frac{P(f \mid \theta_b)}{P(f)}\, r(\theta_b, x),

with a context too, whose law training pairs with parameters of other rows.

1. *Truncated proposals for scalable and hassle-free simulation-based inference*, M. Deistler et al. (2022)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_smc.ratio.datasets import RatioData, SimulationData
from numpyro_smc.ratio.losses import LogRatio, RatioLoss
from numpyro_smc.ratio.masks import MaskLaw
from numpyro_smc.ratio.networks import mlp
from numpyro_smc.ratio.ratio_network import RatioNetwork, RatioWeights
from numpyro_smc.ratio.training import fit

_MOST_ROWS = 2**18
_FEWEST = 20


class FinitenessWeights(NamedTuple):
    """What a :class:`Finiteness` is evaluated with.

    - **weights** - of its network. **log_share** - log of the share of finite simulations: zero if none failed.
    """

    weights: RatioWeights
    log_share: Array


@dataclass(frozen=True)
class Finiteness:
    r""":math:`\log P(f \mid \theta_b) - \log P(f)`, learned from parameters that failed and that did not.

    :param network: of parameters and masks, as the ratio's; it sees nothing of the output.
    """

    network: RatioNetwork

    @classmethod
    def beside(cls, network: RatioNetwork) -> Finiteness:
        """One for the subsets of the parameters that a ratio's network knows."""
        return cls(
            RatioNetwork(
                network.size,
                mlp(64, 1),
                has_masks=network.has_masks,
                marginals=network.marginals,
                standardize_x=False,
                log_parameters=network.log_parameters,
                constant=network.constant,
            )
        )

    def init(self, rng_key: Array, theta: Any) -> FinitenessWeights:
        """Weights that say that nothing fails."""
        weights = self.network.init(rng_key, theta, np.ones((len(theta), 1)))
        return FinitenessWeights(weights, jnp.zeros(()))

    def train(self, rng_key: Array, data: SimulationData, masks: MaskLaw | None) -> FinitenessWeights:
        """Learn it from simulations.

        :param data: whose failed parameters are known.
        :param masks: law of the subsets, as of the ratio.
        """
        some = data.first(_MOST_ROWS)
        assert some.failed is not None
        if not len(some.failed):
            return self.init(rng_key, some.theta)
        theta = np.concatenate([some.theta, some.failed])
        is_finite = np.arange(len(theta)) < len(some.theta)
        found = fit(
            rng_key,
            self.network,
            FinitenessLoss(),
            RatioData(theta, is_finite[:, None].astype(theta.dtype)),
            masks=masks,
            validation=0.2 if len(theta) >= _FEWEST else None,
            batch_size=max(1, min(256, len(theta) // 4)),
            learning_rate=1e-2,
            max_epochs=40,
            patience=10,
            progress_bar=False,
        )
        return FinitenessWeights(found.weights, jnp.log(is_finite.mean()).astype(float))

    def log_factor(self, weights: FinitenessWeights, theta: Array, mask: Any = None) -> Array:
        r""":math:`\log P(f \mid \theta_b) - \log P(f)`; leading axes broadcast.

        :param mask: bool ``[..., D]``, if the network has masks.
        :return: ``[...]``; ``[..., M]`` for fixed marginals.
        """
        log_odds = self.network.log_ratio_of_features(weights.weights, theta, jnp.zeros(1), mask)
        factor = jax.nn.log_sigmoid(log_odds) - weights.log_share
        return jnp.where(weights.log_share < 0, factor, 0.0)


@dataclass(frozen=True)
class FinitenessLoss(RatioLoss):
    """Cross-entropy of a network that tells finite from failed simulations by their parameters.

    The "output" of a row is one if it is finite and zero if not; the network does not see it.
    """

    @property
    def num_contrasts(self) -> tuple[int, int]:
        return 0, 0

    def __call__(
        self,
        rng_key: Array,
        log_ratio: LogRatio,
        theta: Array,
        features: Array,
        mask: Array | None = None,
        progress: Any = 1.0,
        log_weight: Any = None,
    ) -> Array:
        log_odds = log_ratio(theta, jnp.zeros_like(features), mask)
        sign = (2 * features[:, 0] - 1).reshape(-1, *[1] * (log_odds.ndim - 1))
        return jnp.sum(jax.nn.softplus(-sign * log_odds).mean(0))
