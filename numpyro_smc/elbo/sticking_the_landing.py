"""STL: the importance-weighted bound without the guide's score."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax, random

from numpyro_smc.elbo.iwelbo import normalised_weights
from numpyro_smc.elbo.multi_sample import Coefficients, PathwiseELBO
from numpyro_smc.programs.density import Densities, Pair, Params
from numpyro_smc.programs.guide_target import moves


class STL(PathwiseELBO):
    r"""Sticking the landing [1]: pathwise gradients of the importance-weighted bound with the guide's score left out.

    .. math:: \nabla_\phi \approx \sum_k v_k \, \partial_z \log w_k \, \nabla_\phi z_k(\phi), \qquad
       \mathbb E[\,\cdot\,] = \nabla_\phi L_K + \mathbb E\Big[\sum_k v_k \nabla_\phi \log q(z_k)\Big] .

    The density of the guide is evaluated by running it again with fixed parameters at the same draws, so hierarchical
    guides and flows (with inverse) are covered.

    Value: unbiased for :math:`L_K`. Gradient: unbiased for the model; for the guide it adds the wake direction (biased
    for :math:`K > 1`, unbiased for the evidence lower bound, K = 1), with zero variance where the guide is exact.
    Cost: as :class:`IWELBO` plus one density of the guide.

    :param num_particles: :math:`K \ge 1`. Other arguments: see :class:`~.multi_sample.MultiSampleELBO`.
    :raises ValueError: if a latent site of the guide has no reparameterised sampler.
    :raises NotImplementedError: if a transform of the guide has no inverse.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoMultivariateNormal
        >>> from numpyro_smc import STL
        >>> def model(x):
        ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> svi = SVI(model, AutoMultivariateNormal(model), numpyro.optim.Adam(0.01), loss=STL(num_particles=4))
        >>> result = svi.run(random.key(0), 10, 0.5, progress_bar=False)

    **References**

    1. *Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference*, G. Roeder, Y. Wu,
       D. Duvenaud (2017)
    """

    def coefficients(self, log_weights: Array, alpha: Any = 0.0) -> Coefficients:
        weights, value = normalised_weights(log_weights, alpha)
        return Coefficients(weights, jnp.zeros_like(weights), value, path=weights)

    def _particle(self, pair: Pair, rng_key: Array, index: Array, params: Params) -> Densities:
        guide_key, model_key = random.split(rng_key)
        draw = self._draw(pair, guide_key, index, params)
        model = pair.run_model(model_key, index, params, draw)
        fixed = pair.densities(pair.redraw(guide_key, index, lax.stop_gradient(params), draw), model)
        # Point masses and factors have no score to leave out: what they add to the density acts like the model's.
        others = {name for name in fixed.log_q if not moves(draw.trace[name])}
        moving = pair.densities(draw, model).log_q if others else {}
        return replace(fixed, log_q={**fixed.log_q, **{name: moving[name] for name in others}})
