r"""Conjugate linear regression: random problems of any size whose evidence and posterior are known.

.. math:: w \sim \mathcal N(0, I_D), \qquad y_n \mid w \sim \mathcal N(x_n^\top w, \sigma^2), \qquad n = 1, \dots, N.

The exact answers are computed with NumPy in double precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike


class Problem(NamedTuple):
    """The arguments of :func:`model`, :func:`posterior` and :func:`log_evidence`: ``model(*problem)``."""

    x: np.ndarray  # [N, D]
    y: np.ndarray  # [N]
    noise_scale: float


def model(x: ArrayLike, y: ArrayLike | None, noise_scale: ArrayLike) -> None:
    """The model, with sites ``"w"`` ``[D]`` and ``"y"`` in the plate ``"data"``."""
    x = jnp.asarray(x)
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand(x.shape[1:]).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, noise_scale), obs=y)


def posterior(x: ArrayLike, y: ArrayLike, noise_scale: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Mean ``[D]`` and covariance ``[D, D]`` of ``w``: :math:`\Sigma = (I + X^\top X / \sigma^2)^{-1}`."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    covariance = np.linalg.inv(np.eye(x.shape[1]) + x.T @ x / noise_scale**2)
    return covariance @ x.T @ y / noise_scale**2, covariance


def log_evidence(x: ArrayLike, y: ArrayLike, noise_scale: float) -> float:
    r""":math:`\log\mathcal N(y; 0, X X^\top + \sigma^2 I)`."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    covariance = x @ x.T + noise_scale**2 * np.eye(len(y))
    log_determinant = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return float(-0.5 * (y @ np.linalg.solve(covariance, y) + log_determinant))


def random_problem(rng: np.random.Generator, num_data: int, dim: int) -> Problem:
    """A draw from the model at a random correlated design, with a noise scale between 0.3 and 2."""
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    x = rng.normal(size=(num_data, dim)) @ mixing
    noise_scale = float(np.exp(rng.uniform(np.log(0.3), np.log(2.0))))
    return Problem(x, x @ rng.normal(size=dim) + noise_scale * rng.normal(size=num_data), noise_scale)


def random_problems(
    seed: int, count: int, sizes: Sequence[tuple[int, int]] = ((5, 1), (10, 3), (20, 5), (50, 10))
) -> Iterator[Problem]:
    """Independent :func:`random_problem` whose sizes ``(num_data, dim)`` take turns, so that only so many compile."""
    rng = np.random.default_rng(seed)
    return (random_problem(rng, *size) for size in islice(cycle(sizes), count))
