"""DAIS: differentiable annealed importance sampling, as a bound."""

from typing import Any

from numpyro_smc.elbo.dsmcs import DSMCS


class DAIS(DSMCS):
    r"""Differentiable annealed importance sampling [1]: :class:`~numpyro_smc.DSMCS` without resampling.

    .. math:: L = \mathbb E\Big[\log \tfrac1N \sum_n \exp \sum_k i_k^n\Big] \le \log p(x).

    Value and gradient: unbiased for :math:`L`. Other arguments, cost and errors: see :class:`~numpyro_smc.DSMCS`.

    :param num_particles: :math:`N \ge 1`.
    :param num_transitions: :math:`K \ge 0`.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoDiagonalNormal
        >>> from numpyro_smc import DAIS
        >>> def model(y):
        ...     loc = numpyro.sample("loc", dist.Normal(0.0, 2.0))
        ...     numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> loss = DAIS(num_particles=4, num_transitions=3)
        >>> svi = SVI(model, loss.wrap(AutoDiagonalNormal(model)), numpyro.optim.Adam(0.01), loss)
        >>> result = svi.run(random.key(0), 5, 1.3, progress_bar=False)

    **References**

    1. *Differentiable Annealed Importance Sampling and the Perils of Gradient Noise*, G. Zhang et al. (2021)
    """

    def __init__(self, num_particles: int, num_transitions: int, **options: Any) -> None:
        for name in ("resample", "resampler", "ess_threshold", "resampling_gradient"):
            if name in options:
                raise ValueError(f"DAIS: it does not resample, so it has no {name}. Use DSMCS.")
        super().__init__(num_particles, num_transitions, resample="never", resampling_gradient="none", **options)
