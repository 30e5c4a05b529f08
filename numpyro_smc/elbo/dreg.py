"""DReG: doubly reparameterised gradients of the importance-weighted bound."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.elbo.iwelbo import normalised_weights
from numpyro_smc.elbo.multi_sample import Coefficients, PathwiseELBO, weighted_sum
from numpyro_smc.programs.arguments import check_number
from numpyro_smc.programs.density import Densities, Pair, Params
from numpyro_smc.programs.guide_target import moves


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _TwoPaths(Densities):
    """Densities as functions of the draws, and (``of_model``) of the model's parameters at fixed draws."""

    of_model: Densities | None = None


class DReG(PathwiseELBO):
    r"""Doubly reparameterised gradient of the importance-weighted bound [1], also of Renyi order :math:`\alpha`.

    The guide's score in :math:`\nabla L_K` is reparameterised a second time, which leaves only paths:

    .. math:: \nabla_\phi L_K = \mathbb E\Big[\sum_k \big(\alpha v_k + (1 - \alpha) v_k^2\big)\,
       \partial_z \log w_k \, \nabla_\phi z_k(\phi)\Big], \qquad v_k \propto w_k^{1-\alpha} .

    The wake direction of reweighted wake-sleep has the coefficients :math:`(1 - \alpha)(v_k - v_k^2)`; ``tradeoff``
    :math:`a` mixes the two, :math:`(1 - a) \cdot` bound :math:`+\, a \cdot` wake.

    Value: unbiased for :math:`L_K`. Gradient: unbiased for model and guide (with ``tradeoff=0``); its signal-to-noise
    ratio for the guide does not fall with K. Hierarchical guides and flows (with inverse) are covered: their densities
    are evaluated by running the guide again. Cost: as :class:`IWELBO`, plus one density of the guide and a second
    backward pass through the model.

    :param num_particles: :math:`K \ge 1`.
    :param tradeoff: :math:`a \in [0, 1]`: 0 for the bound, 1 for the wake direction, 1/2 for half of :class:`STL`.
        Other arguments: see :class:`~.multi_sample.MultiSampleELBO`.
    :raises ValueError: if a latent site of the guide has no reparameterised sampler, or ``tradeoff`` is outside [0, 1].
    :raises NotImplementedError: if a transform of the guide has no inverse.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_smc import DReG
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.01), loss=DReG(num_particles=8))
        >>> result = svi.run(random.key(0), 10, jnp.array([0.5, -1.2]), progress_bar=False)

    **References**

    1. *Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives*, G. Tucker, D. Lawson, S. Gu, C. Maddison
       (2019)
    """

    def __init__(self, num_particles: int, *, tradeoff: float = 0.0, **options: Any) -> None:
        super().__init__(num_particles, **options)
        check_number("DReG", "[0, 1]", tradeoff=tradeoff)
        self.tradeoff = tradeoff

    def coefficients(self, log_weights: Array, alpha: Any = 0.0) -> Coefficients:
        weights, value = normalised_weights(log_weights, alpha)
        bound = alpha * weights + (1.0 - alpha) * weights**2
        wake = (1.0 - alpha) * (weights - weights**2)
        path = (1.0 - self.tradeoff) * bound + self.tradeoff * wake
        return Coefficients(weights, jnp.zeros_like(weights), value, path)

    def _particle(self, pair: Pair, rng_key: Array, index: Array, params: Params) -> _TwoPaths:
        guide_key, model_key = random.split(rng_key)
        fixed = lax.stop_gradient(params)
        draw = self._draw(pair, guide_key, index, params)
        fixed = {name: {**site, "value": lax.stop_gradient(site["value"])} for name, site in draw.trace.items()}
        # Point masses and factors have no score to reparameterise: their parameters act like the model's.
        still = pair.redraw(guide_key, index, params, draw._replace(trace=fixed))
        of_model = pair.densities(still, pair.run_model(model_key, index, params, still))
        drawn = [name for name, site in still.trace.items() if moves(site)]
        moving = pair.redraw(guide_key, index, lax.stop_gradient(params), draw)
        of_draws = pair.densities(moving, pair.run_model(model_key, index, lax.stop_gradient(params), moving))
        return _TwoPaths(**vars(of_draws), of_model=of_model.with_fixed_guide(drawn))

    def _surrogate(self, cloud: Densities, coefficients: Coefficients, kl_weight: Any) -> Array:
        assert isinstance(cloud, _TwoPaths) and cloud.of_model is not None and coefficients.path is not None
        options = (kl_weight, self.free_bits)
        of_model = weighted_sum(coefficients.model, cloud.of_model.log_weights(*options))
        return of_model + weighted_sum(coefficients.path, cloud.log_weights(*options))
