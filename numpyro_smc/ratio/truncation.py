"""Truncated priors: the region that an observation leaves possible, and draws from the prior within it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

if TYPE_CHECKING:
    from numpyro_smc.ratio.estimator import RatioEstimator

_BLOCK = 16_384
_FEWEST = 1e-4
_MARGIN = 0.2
_DRAWS = 50_000


class Box(NamedTuple):
    """A product of intervals of the parameters' elements.

    - **low**, **high** - ``[D]``. **log_prior_mass** - log of the prior's probability of it.
    """

    low: Array
    high: Array
    log_prior_mass: float = 0.0

    @classmethod
    def everywhere(cls, size: int) -> Box:
        """No truncation of ``size`` parameters."""
        return cls(jnp.full(size, -jnp.inf), jnp.full(size, jnp.inf))

    def contains(self, theta: Array, chosen: Any = True) -> Array:
        """Whether vectors ``[..., D]`` lie inside.

        :param chosen: bool ``[D]``: the elements that count.
        """
        return jnp.all((theta >= self.low) & (theta <= self.high) | ~jnp.asarray(chosen), -1)


def draw_within(rng_key: Array, prior: Callable[[Array], Array], box: Box, num: int) -> tuple[Array, float]:
    """Draws from the prior that lie in the box, by rejection.

    :param prior: from a key to one draw ``[D]``.
    :return: ``[num, D]``, and the log of the share of accepted draws.
    :raises ValueError: if fewer than one draw in ten thousand is accepted.
    """
    draw = jax.jit(lambda key: jax.vmap(prior)(random.split(key, _BLOCK)))
    kept: list[np.ndarray] = []
    found, blocks = 0, 0
    while found < num:
        theta = draw(random.fold_in(rng_key, blocks))
        accepted = np.asarray(theta)[np.asarray(box.contains(theta))]
        kept.append(accepted)
        found, blocks = found + len(accepted), blocks + 1
        if found < _FEWEST * blocks * _BLOCK and blocks >= 4:
            raise ValueError(
                f"NRE: the truncated region holds less than {_FEWEST:g} of the prior ({found} of {blocks * _BLOCK} "
                f"draws), too little for rejection. Stop a round earlier, or state a narrower prior in the simulator."
            )
    return jnp.asarray(np.concatenate(kept)[:num]), float(np.log(found / (blocks * _BLOCK)))


def truncated(rng_key: Array, estimator: RatioEstimator, x_obs: Any, context: Any, epsilon: float) -> Box:
    """The box that an observation leaves possible; see :meth:`NRE.train_rounds`."""
    draw_key, mass_key, sample_key = random.split(rng_key, 3)
    inside = Box.everywhere(len(estimator.elements)) if estimator.box is None else estimator.box
    draws = draw_within(draw_key, estimator.simulator.prior, inside, _DRAWS)[0]
    if _knows_single_parameters(estimator):
        log_ratios = [
            estimator.marginal(x_obs, element, context).log_ratio(draws[:, i : i + 1])
            for i, element in enumerate(estimator.elements)
        ]
        low, high = box_around(draws, jnp.stack(log_ratios, -1), epsilon)
    else:
        samples = estimator.sample(sample_key, x_obs, context=context, num_particles=2000).samples
        particles = np.asarray(estimator.simulator.ravel(samples))
        margin = _MARGIN * (particles.max(0) - particles.min(0))
        low = np.maximum(particles.min(0) - margin, np.asarray(draws).min(0))
        high = np.minimum(particles.max(0) + margin, np.asarray(draws).max(0))
    constant = estimator.simulator.constant()
    box = Box(jnp.where(constant, -jnp.inf, low), jnp.where(constant, jnp.inf, high))
    return box._replace(log_prior_mass=draw_within(mass_key, estimator.simulator.prior, box, _DRAWS)[1])


def _knows_single_parameters(estimator: RatioEstimator) -> bool:
    if estimator.network.marginals is None:
        return estimator.network.has_masks
    return all(
        tuple(row) in estimator.network.marginals for row in np.eye(len(estimator.elements), dtype=bool).tolist()
    )


def box_around(draws: Array, log_ratios: Array, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    r"""For each element the interval of the prior's draws where :math:`\log r - \max \log r > \log \epsilon` [1].

    :param draws: from the prior, ``[n, D]``. **log_ratios** - of each element alone, ``[n, D]``.
    :return: lower and upper ends, ``[D]``.

    **References**

    1. *Truncated Marginal Neural Ratio Estimation*, B. K. Miller et al. (2021)
    """
    values, ratios = np.asarray(draws), np.asarray(log_ratios)
    inside = ratios - ratios.max(0) > np.log(epsilon)
    return np.where(inside, values, np.inf).min(0), np.where(inside, values, -np.inf).max(0)
