"""IWELBO: the importance-weighted bound with pathwise gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_smc.elbo.multi_sample import Coefficients, PathwiseELBO
from numpyro_smc.programs.density import Densities, Pair, Params
from numpyro_smc.programs.weights import log_mean_exp


class IWELBO(PathwiseELBO):
    r"""Importance-weighted evidence lower bound [1], of Renyi order :math:`\alpha` [2], for reparameterised guides.

    .. math:: L_K = \mathbb E\Big[\tfrac{1}{1-\alpha} \log \tfrac1K \sum_k w_k^{1-\alpha}\Big], \qquad
       w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad
       \nabla L_K = \mathbb E\Big[\sum_k v_k \nabla \log w_k\Big], \quad v_k \propto w_k^{1-\alpha} .

    Value: unbiased for :math:`L_K \le \log p(x)`, per plate element, summed. Gradient: unbiased for model and guide.
    Cost: O(K) time and memory. The guide's gradient has variance O(1/K) around a mean of O(1/K), so its signal-to-noise
    ratio falls as :math:`K^{-1/2}`; :class:`DReG` does better.

    :param num_particles: :math:`K \ge 1`. Other arguments: see :class:`~.multi_sample.MultiSampleELBO`.
    :raises ValueError: if a latent site of the guide has no reparameterised sampler.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_smc import IWELBO
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.01), loss=IWELBO(num_particles=8))
        >>> result = svi.run(random.key(0), 10, jnp.array([0.5, -1.2]), progress_bar=False)

    **References**

    1. *Importance Weighted Autoencoders*, Y. Burda, R. Grosse, R. Salakhutdinov (2016)
    2. *Renyi Divergence Variational Inference*, Y. Li, R. Turner (2016)
    """

    def coefficients(self, log_weights: Array, alpha: Any = 0.0) -> Coefficients:
        weights, value = normalised_weights(log_weights, alpha)
        return Coefficients(weights, -weights, value, path=weights)

    def _particle(self, pair: Pair, rng_key: Array, index: Array, params: Params) -> Densities:
        guide_key, model_key = random.split(rng_key)
        draw = self._draw(pair, guide_key, index, params)
        return pair.densities(draw, pair.run_model(model_key, index, params, draw))


def normalised_weights(log_weights: Array, alpha: Any) -> tuple[Array, Array]:
    r"""Weights :math:`v_k \propto w_k^{1-\alpha}` that sum to one (zeros if all are dead), and the bound."""
    tempered = (1.0 - alpha) * log_weights
    peak = jnp.max(tempered, axis=0)
    weights = jnp.where(jnp.isneginf(peak), 0.0, jax.nn.softmax(tempered, axis=0))
    return weights, log_mean_exp(tempered) / (1.0 - alpha)
