"""The posterior of some of the parameters, whatever the others are: on a grid, or as draws."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.programs.inputs import one_key
from numpyro_smc.programs.resampling import systematic
from numpyro_smc.programs.weights import normalise
from numpyro_smc.ratio.grid import Grid

if TYPE_CHECKING:
    from numpyro_smc.ratio.estimator import RatioEstimator

_MOST_CELLS = 10_000_000
_DRAWS = 20_000
_FEW = 100


class Marginal:
    r"""The posterior :math:`p(\theta_b \mid x) = p(\theta_b)\, r(\theta_b, x)`; see :meth:`RatioEstimator.marginal`.

    :ivar elements: names of the parameters' elements :math:`\theta_b`, k of them.
    """

    def __init__(self, estimator: RatioEstimator, x_obs: Array, params: Any, context: Any) -> None:
        self.estimator, self.x_obs, self.context = estimator, x_obs, context
        self.chosen = estimator.simulator.mask(params)
        self.elements = tuple(np.asarray(estimator.simulator.elements)[self.chosen].tolist())
        estimator.log_ratio_given(x_obs, self.chosen, context)  # bad input is found here

    def __repr__(self) -> str:
        return f"Marginal({', '.join(self.elements)})"

    def log_ratio(self, values: Array) -> Array:
        r""":math:`\log r(\theta_b, x)`.

        :param values: ``[..., k]``.
        """
        return self.estimator.log_ratio_given(self.x_obs, self.chosen, self.context)(self._full(jnp.asarray(values)))

    def _full(self, values: Array) -> Array:
        """Vectors of all elements, those left out zero."""
        full = jnp.zeros((*values.shape[:-1], len(self.chosen)), values.dtype)
        return full.at[..., np.flatnonzero(self.chosen)].set(values)

    def _log_ratios(self, theta: Array) -> Array:
        return self.estimator.log_ratios_of(theta, self.x_obs, self.chosen, self.context)

    def grid(self, num: int = 100, bounds: Sequence[tuple[float, float]] | None = None) -> Grid:
        """The density at the centres of a grid's cells; of three parameters at most.

        :param num: cells a parameter.
        :param bounds: of each parameter; by default its support where that is bounded, else the range of 20,000 draws
            from the prior.
        :return: a :class:`~numpyro_smc.ratio.grid.Grid`, which unpacks into points and density.
        :raises ValueError: for too many cells; where the prior of these parameters has no density in closed form (see
            :meth:`Simulator.prior_of_elements`).
        """
        check_positive("Marginal.grid", num=num)
        size = len(self.elements)
        if num**size > _MOST_CELLS:
            raise ValueError(
                f"Marginal.grid: {num} cells for each of {size} parameters are more than {_MOST_CELLS:,}. Ask for "
                f"fewer parameters or cells, or use sample."
            )
        simulator = self.estimator.simulator
        simulator.check_axes(self.chosen, "Marginal.grid")
        log_prior = simulator.prior_of_elements(self.chosen)
        log_mass = self._log_prior_mass()
        axes = self.axes(num, bounds)
        points = jnp.asarray(np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], -1))
        points = points.astype(jnp.result_type(float))
        log_density = self._log_ratios(self._full(points)) + jax.vmap(log_prior)(points) - log_mass
        return Grid.of(axes, np.asarray(log_density, float).reshape((num,) * size), self.elements, self._is_calibrated)

    def axes(self, num: int, bounds: Sequence[tuple[float, float]] | None = None) -> list[np.ndarray]:
        """Centres of :meth:`grid`'s cells, ``[num]`` for each element."""
        ends = self._bounds() if bounds is None else np.asarray(bounds, float).reshape(len(self.elements), 2)
        if not (ends[:, 0] < ends[:, 1]).all():
            raise ValueError(f"Marginal.grid: bounds must be pairs (lower, upper), got {ends.tolist()}.")
        width = (ends[:, 1] - ends[:, 0]) / num
        return [low + step * (np.arange(num) + 0.5) for low, step in zip(ends[:, 0], width, strict=True)]

    def sir(self, rng_key: Array, num_samples: int, num_draws: int | None = None) -> Array:
        """Draws from the prior, resampled by their ratios: needs no density of the prior.

        :param num_samples: draws wanted.
        :param num_draws: prior draws that are weighed; by default ten for each draw wanted, and 10,000 at least.
        :return: ``[num_samples, k]``, with repetitions. A warning says if fewer than a hundred draws carry the weight.
        """
        rng_key = one_key("Marginal.sir", rng_key)
        check_positive("Marginal.sir", num_samples=num_samples)
        draw_key, resample_key, order_key = random.split(rng_key, 3)
        theta = self.estimator.prior(draw_key, num_draws or max(10 * num_samples, 10_000))
        log_weights, _, ess = normalise(self._log_ratios(theta))
        if ess < _FEW:
            warnings.warn(
                f"Marginal.sir: only {float(ess):.0f} of {len(theta)} prior draws carry the weight, so that most of "
                f"the {num_samples} samples are copies. Raise num_draws, or use sample.",
                stacklevel=2,
            )
        chosen = systematic(resample_key, log_weights, num_samples)
        return theta[random.permutation(order_key, chosen)][:, self.chosen]

    def model(self) -> None:
        """The marginal as a NumPyro program, with every parameter's site: those left out follow their prior."""
        self.estimator.program(self.chosen)(self.x_obs, self.context)

    def sample(self, rng_key: Array, num_samples: int = 1000, **options: Any) -> Array:
        """Equally weighted draws by tempered sequential Monte Carlo, ``[num_samples, k]``.

        :param num_samples: also the number of particles.
        :param options: of :class:`~numpyro_smc.SMCSampler`.
        """
        result = self.estimator.sample(
            rng_key, self.x_obs, params=self.elements, context=self.context, num_particles=num_samples, **options
        )
        draws = result.get_samples()
        simulator = self.estimator.simulator
        return simulator.ravel({name: draws[name] for name in simulator.params})[:, self.chosen]

    def _log_prior_mass(self) -> float:
        """Log of the prior's probability of a truncated region, as far as it bounds these elements."""
        box, simulator = self.estimator.box, self.estimator.simulator
        if box is None:
            return 0.0
        if self.chosen.all():
            return box.log_prior_mass
        if not simulator.are_independent_of_others(self.chosen):
            raise ValueError(
                f"Marginal.grid: {', '.join(self.elements)} depend on other parameters under the prior, whose "
                f"truncation bounds these too, so the density of their marginal is not known. Use sir or sample."
            )
        draws = jax.vmap(simulator.prior)(random.split(random.key(0), _DRAWS))
        return float(jnp.log(box.contains(draws, self.chosen).mean()))

    @property
    def _is_calibrated(self) -> bool:
        return self.estimator.loss.calibrated

    def _bounds(self) -> np.ndarray:
        known = self.estimator.simulator.support()[self.chosen]
        box = self.estimator.box
        if box is not None:
            known = np.stack(
                [np.maximum(known[:, 0], box.low[self.chosen]), np.minimum(known[:, 1], box.high[self.chosen])], -1
            )
        if np.isfinite(known).all():
            return known
        draws = np.asarray(self.estimator.prior(random.key(0), _DRAWS))[:, self.chosen]
        return np.where(np.isfinite(known), known, np.stack([draws.min(0), draws.max(0)], -1))
