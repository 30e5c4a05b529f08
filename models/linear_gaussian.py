r"""The linear-Gaussian state-space model, and the exact answers that particle methods are checked against.

.. math::

    x_0 \sim \mathcal N(m_0, P_0), \qquad
    x_t \sim \mathcal N(A x_{t-1} + b, Q), \qquad
    y_t \sim \mathcal N(C x_t, R), \qquad t = 1, \dots, T.

:math:`x_0` is drawn before the scan and is not observed; row ``i`` of an array over time belongs to :math:`t = i + 1`.
All functions are differentiable in the parameters and keep the precision of their inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.contrib.control_flow import scan


class LinearGaussian(NamedTuple):
    """Parameters, for a state of size ``D`` and observations of size ``K``; covariances are positive definite."""

    initial_mean: Array  # m0 [D]
    initial_covariance: Array  # P0 [D, D]
    transition_matrix: Array  # A [D, D]
    transition_offset: Array  # b [D]
    transition_covariance: Array  # Q [D, D]
    emission_matrix: Array  # C [K, D]
    emission_covariance: Array  # R [K, K]


class Filtered(NamedTuple):
    """What :func:`kalman_filter` knows at each step."""

    log_evidence: Array  # log p(y_t | y_{1:t-1}) [T]; their sum is the log evidence
    means: Array  # of x_t given y_{1:t} [T, D]
    covariances: Array  # [T, D, D]
    predicted_means: Array  # of x_t given y_{1:t-1} [T, D]
    predicted_covariances: Array  # [T, D, D]


class Smoothed(NamedTuple):
    """Means and covariances of the states given all observations."""

    means: Array  # of x_1, ..., x_T [T, D]
    covariances: Array  # [T, D, D]
    initial_mean: Array  # of x_0 [D]
    initial_covariance: Array  # [D, D]


# The programs


def model(
    y: ArrayLike | None,
    parameters: LinearGaussian,
    num_steps: int | None = None,
    mask: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The model, with sites ``"x_0"`` before the scan and ``"x"``, ``"y"`` in it.

    :param y: observations ``[T, K]``, or ``None`` to simulate ``num_steps`` of them.
    :param mask: bool ``[T]``, false where ``y`` is missing; what ``y`` holds there is ignored, NaN included.
    :return: states ``[T, D]`` and observations ``[T, K]``.
    """
    m0, p0, a, b, q, c, r = parameters
    q_tril, r_tril = jnp.linalg.cholesky(q), jnp.linalg.cholesky(r)
    if y is not None:
        y = _fill_missing(jnp.asarray(y), mask)
        num_steps = y.shape[0]

    def step(x: Array, inputs: tuple[Array | None, Array | None]) -> tuple[Array, tuple[Array, Array]]:
        y_t, observed = inputs
        x = numpyro.sample("x", dist.MultivariateNormal(a @ x + b, scale_tril=q_tril))
        with handlers.mask(mask=True if observed is None else observed):
            y_t = numpyro.sample("y", dist.MultivariateNormal(c @ x, scale_tril=r_tril), obs=y_t)
        return x, (x, y_t)

    x_0 = numpyro.sample("x_0", dist.MultivariateNormal(m0, p0))
    _, (x, y) = scan(step, x_0, (y, None if mask is None else jnp.asarray(mask)), length=num_steps)
    return x, y


def ar1_model(
    y: ArrayLike | None = None,
    num_steps: int | None = None,
    coefficient: ArrayLike = 0.9,
    transition_scale: ArrayLike = 1.0,
    emission_scale: ArrayLike = 1.0,
    initial_scale: ArrayLike = 1.0,
) -> tuple[Array, Array]:
    r"""The scalar case: :math:`x_t \sim \mathcal N(a x_{t-1}, q^2)`, :math:`y_t \sim \mathcal N(x_t, r^2)`.

    No matrices, so it measures the particle method and not linear algebra. ``y`` is ``[T]``; scales are standard
    deviations; :math:`x_0` has mean 0.
    """

    def step(x: Array, y_t: Array | None) -> tuple[Array, tuple[Array, Array]]:
        x = numpyro.sample("x", dist.Normal(coefficient * x, transition_scale))
        y_t = numpyro.sample("y", dist.Normal(x, emission_scale), obs=y_t)
        return x, (x, y_t)

    x_0 = numpyro.sample("x_0", dist.Normal(0.0, initial_scale))
    y = None if y is None else jnp.asarray(y)
    _, (x, y) = scan(step, x_0, y, length=num_steps if y is None else y.shape[0])
    return x, y


def ar1_parameters(
    coefficient: ArrayLike = 0.9,
    transition_scale: ArrayLike = 1.0,
    emission_scale: ArrayLike = 1.0,
    initial_scale: ArrayLike = 1.0,
) -> LinearGaussian:
    """:func:`ar1_model` as a :class:`LinearGaussian`; its observations are then ``y[:, None]``."""
    a, q, r, p = (
        jnp.reshape(jnp.asarray(value, jnp.result_type(float, value)), (1, 1))
        for value in (coefficient, transition_scale, emission_scale, initial_scale)
    )
    return LinearGaussian(jnp.zeros_like(a[0]), p**2, a, jnp.zeros_like(a[0]), q**2, jnp.ones_like(a), r**2)


def simulate(rng_key: Array, parameters: LinearGaussian, num_steps: int) -> tuple[Array, Array]:
    """States ``[num_steps, D]`` and observations ``[num_steps, K]`` drawn from :func:`model`."""
    with handlers.block():
        return handlers.seed(model, rng_key)(None, parameters, num_steps)


# The exact answers


def kalman_filter(parameters: LinearGaussian, y: ArrayLike, mask: ArrayLike | None = None) -> Filtered:
    """The Kalman filter, its covariance update in Joseph's form.

    :param y: observations ``[T, K]``.
    :param mask: bool ``[T]``, false where ``y`` is missing; such a step predicts only and adds 0 to the log evidence.
    """
    m0, p0, a, b, q, c, r = parameters
    y = _fill_missing(jnp.asarray(y), mask)
    mask = jnp.ones(y.shape[0], bool) if mask is None else jnp.asarray(mask)

    def step(state: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Filtered]:
        mean, covariance = state
        y_t, observed = inputs
        mean, covariance = a @ mean + b, a @ covariance @ a.T + q
        innovation = y_t - c @ mean
        tril = jnp.linalg.cholesky(c @ covariance @ c.T + r)
        gain = cho_solve((tril, True), c @ covariance).T
        whitened = solve_triangular(tril, innovation, lower=True)
        log_evidence = -0.5 * jnp.sum(whitened**2 + jnp.log(2 * jnp.pi)) - jnp.sum(jnp.log(jnp.diag(tril)))
        rest = jnp.eye(mean.size, dtype=mean.dtype) - gain @ c
        new_mean = jnp.where(observed, mean + gain @ innovation, mean)
        new_covariance = jnp.where(observed, rest @ covariance @ rest.T + gain @ r @ gain.T, covariance)
        filtered = Filtered(jnp.where(observed, log_evidence, 0.0), new_mean, new_covariance, mean, covariance)
        return (new_mean, new_covariance), filtered

    return jax.lax.scan(step, (m0, p0), (y, mask))[1]


def log_evidence(parameters: LinearGaussian, y: ArrayLike, mask: ArrayLike | None = None) -> Array:
    r""":math:`\log p(y_{1:T})` of what is observed."""
    return kalman_filter(parameters, y, mask).log_evidence.sum()


#: ``score(parameters, y, mask=None)``: the gradient of :func:`log_evidence`, a :class:`LinearGaussian`. Entries of a
#: covariance count as independent numbers; differentiate through your own parametrisation for the score of that.
score = jax.grad(log_evidence)


def rts_smoother(parameters: LinearGaussian, filtered: Filtered) -> Smoothed:
    """The Rauch-Tung-Striebel smoother, from what :func:`kalman_filter` returns."""
    a = parameters.transition_matrix
    means = jnp.concatenate([parameters.initial_mean[None], filtered.means])
    covariances = jnp.concatenate([parameters.initial_covariance[None], filtered.covariances])

    def step(later: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        later_mean, later_covariance = later
        mean, covariance, predicted_mean, predicted_covariance = inputs
        gain = cho_solve((jnp.linalg.cholesky(predicted_covariance), True), a @ covariance).T
        mean = mean + gain @ (later_mean - predicted_mean)
        covariance = covariance + gain @ (later_covariance - predicted_covariance) @ gain.T
        return (mean, covariance), (mean, covariance)

    inputs = (means[:-1], covariances[:-1], filtered.predicted_means, filtered.predicted_covariances)
    last = (means[-1], covariances[-1])
    _, (smoothed_means, smoothed_covariances) = jax.lax.scan(step, last, inputs, reverse=True)
    return Smoothed(
        jnp.concatenate([smoothed_means[1:], means[-1:]]),
        jnp.concatenate([smoothed_covariances[1:], covariances[-1:]]),
        smoothed_means[0],
        smoothed_covariances[0],
    )


def _fill_missing(y: Array, mask: ArrayLike | None) -> Array:
    """Zeros where ``mask`` is false: a masked NaN would still reach the gradient."""
    return y if mask is None else jnp.where(jnp.asarray(mask)[:, None], y, 0.0)
