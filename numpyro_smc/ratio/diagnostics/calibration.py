"""Are the posteriors as wide as they should be? Simulation-based calibration, expected coverage, and TARP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.programs.simulator import Simulations
from numpyro_smc.ratio.diagnostics.simulated_posteriors import (
    check_whole_prior,
    log_posteriors,
    simulated_posteriors,
)
from numpyro_smc.reports.uniformity import Uniformity, levels_of_ranks

if TYPE_CHECKING:
    from numpyro_smc.ratio.estimator import RatioEstimator

_PAIRS = 100


def sbc(
    estimator: RatioEstimator,
    rng_key: Array,
    num_pairs: int = 200,
    num_samples: int = 200,
    params: Sequence[str] | None = None,
    **options: Any,
) -> Uniformity:
    r"""Simulation-based calibration [1]: the rank of each true parameter among its posterior's draws is uniform.

    :param num_pairs: simulations P. **num_samples** - draws N of each posterior.
    :param params: elements or sites; their marginal ratio is taken where it was learned.
    :param options: of :class:`~numpyro_smc.SMCSampler`, ``batch_size`` and ``progress_bar``.
    :return: ranks in :math:`[0, 1]` of every element. A curve with a low start and a high end means posteriors too
        wide, the converse too narrow.

    **References**

    1. *Validating Bayesian Inference Algorithms with Simulation-Based Calibration*, S. Talts et al. (2018)
    """
    run_key, rank_key = random.split(rng_key)
    found = simulated_posteriors(run_key, estimator, num_pairs, num_samples, _learned(estimator, params), **options)
    chosen = estimator.simulator.mask(params) & ~estimator.simulator.constant()
    below = np.asarray(found.samples < found.theta[:, None]).sum(1)[:, chosen]
    levels = levels_of_ranks(random.uniform(rank_key, below.shape), below, 0, num_samples)
    names = tuple(np.asarray(estimator.elements)[chosen].tolist())
    meaning = ("estimates too large", "estimates too small")
    return Uniformity("Simulation-based calibration", levels, names, meaning)


def coverage(
    estimator: RatioEstimator, rng_key: Array, num_pairs: int = 200, num_samples: int = 200, **options: Any
) -> Uniformity:
    r"""Expected coverage [1]: the posterior probability of all densities higher than the true parameter's is uniform.

    The curve is the share of simulations whose highest-density region of a credible level holds the truth: above the
    diagonal the estimator is conservative, below it overconfident.

    :param num_pairs: simulations P. **num_samples** - draws N of each posterior.

    **References**

    1. *A Trust Crisis In Simulation-Based Inference? Your Posterior Approximations Can Be Unfaithful*, J. Hermans et
       al. (2022)
    """
    run_key, rank_key = random.split(rng_key)
    found = simulated_posteriors(run_key, estimator, num_pairs, num_samples, **options)
    true, sampled = log_posteriors(estimator, found)
    above = (sampled > true[:, None]).sum(1)
    levels = (above + np.asarray(random.uniform(rank_key, above.shape))) / (num_samples + 1)
    return Uniformity("Expected coverage", levels[:, None], ("all parameters",), ("conservative", "overconfident"))


def marginal_coverage(
    estimator: RatioEstimator,
    rng_key: Array,
    num_pairs: int = 1000,
    params: Sequence[str] | None = None,
    num: int = 500,
) -> Uniformity:
    r"""Expected coverage of the marginals of one element each, on grids: no sampling, so that many pairs are cheap [1].

    For each element the posterior probability of all values of a higher density than the truth's, as in
    :func:`coverage`.

    :param num_pairs: simulations. **params** - names of sites or elements; all by default.
    :param num: cells of the grids; a posterior narrower than a cell counts as certain, and its truth as at its peak.
    :raises ValueError: for marginals that were not learned, or whose prior has no density in closed form.

    **References**

    1. *Arbitrary Marginal Neural Ratio Estimation for Simulation-based Inference*, F. Rozet, G. Louppe (2021)
    """
    check_positive("marginal_coverage", num_pairs=num_pairs, num=num)
    check_whole_prior(estimator)
    pairs = estimator.simulate(rng_key, num_pairs)
    names = np.asarray(estimator.elements)[estimator.simulator.mask(params)].tolist()
    estimator.simulator.check_axes(estimator.simulator.mask(params), "marginal_coverage")
    levels = [_levels_on_a_grid(estimator, pairs, name, num) for name in names]
    meaning = ("conservative", "overconfident")
    return Uniformity("Expected coverage of marginals", np.stack(levels, -1), tuple(names), meaning)


def _levels_on_a_grid(estimator: RatioEstimator, pairs: Simulations, name: str, num: int) -> np.ndarray:
    """Of one element, the probability of all cells with a higher density than the truth's, ``[P]``."""
    chosen = estimator.simulator.mask([name])
    log_prior = estimator.simulator.prior_of_elements(chosen)
    first = jax.tree.map(lambda leaf: leaf[0], pairs)
    (axis,) = estimator.marginal(first.x, name, first.context).axes(num)

    def level(pair: Simulations) -> Array:
        values = jnp.concatenate([pair.theta[chosen], jnp.asarray(axis, pair.theta.dtype)])
        full = jnp.where(chosen, values[:, None], 0.0)
        log_density = estimator.log_ratio(full, pair.x, [name], pair.context) + jax.vmap(log_prior)(values[:, None])
        cells = jax.nn.softmax(log_density[1:])
        return jnp.sum(jnp.where(log_density[1:] > log_density[0], cells, 0.0))

    batch_size = min(_PAIRS, len(pairs.theta))
    return np.clip(np.asarray(jax.jit(lambda pairs: lax.map(level, pairs, batch_size=batch_size))(pairs)), 0.0, 1.0)


def tarp(
    estimator: RatioEstimator, rng_key: Array, num_pairs: int = 200, num_samples: int = 200, **options: Any
) -> Uniformity:
    r"""Tests of accuracy with random points [1]: coverage of balls around a reference.

    For each simulation a reference point is drawn from the prior; the share of the posterior's draws nearer to it than
    the truth is uniform. Parameters and references are standardised by the prior's draws. Unlike :func:`coverage` it
    needs no density; with references that do not depend on the output it is necessary for a right posterior, not
    sufficient.

    **References**

    1. *Sampling-Based Accuracy Testing of Posterior Estimators for General Inference*, P. Lemos et al. (2023)
    """
    run_key, reference_key, rank_key = random.split(rng_key, 3)
    found = simulated_posteriors(run_key, estimator, num_pairs, num_samples, **options)
    references = np.asarray(estimator.prior(reference_key, num_pairs))
    scale = np.where(estimator.simulator.constant(), np.inf, references.std(0))
    true = np.linalg.norm((np.asarray(found.theta) - references) / scale, axis=-1)
    sampled = np.linalg.norm((np.asarray(found.samples) - references[:, None]) / scale, axis=-1)
    nearer = (sampled < true[:, None]).sum(1)
    shares = (nearer + np.asarray(random.uniform(rank_key, nearer.shape))) / (num_samples + 1)
    meaning = ("draws farther from the reference than the truth", "draws nearer to the reference than the truth")
    return Uniformity("TARP", shares[:, None], ("all parameters",), meaning)


def _learned(estimator: RatioEstimator, params: Sequence[str] | None) -> Sequence[str] | None:
    knows_subsets = estimator.network.has_masks or estimator.network.marginals is not None
    return params if knows_subsets else None
