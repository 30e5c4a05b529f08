r"""Gaussian drift diffusion: a random walk seen once, at its end, whose best proposal and twist have closed forms.

With drift :math:`b` and :math:`x_{-1} = 0`,

.. math::

    x_t \sim \mathcal N(x_{t-1} + b, 1), \quad t = 0, \dots, T - 1, \qquad y \sim \mathcal N(x_{T-1} + b, 1).

Every program here is called as ``program(y, num_steps, num_series, drift)``, so one set of arguments serves a model
and its guide. ``y`` is one number per series; ``num_series=None`` is a single series, a number puts all sites in the
plate ``"series"``. ``drift=None`` learns the parameter ``"drift"``, which starts at 0.

Symbols: :math:`n = T - t` is the number of unit-variance increments between :math:`x_t` and :math:`y`.

**References**

1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventós, A. Warrington, S. Linderman (2022)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module

import numpyro_smc
from models.networks import mlp

#: From ``(t, previous x)`` to the distribution that proposes ``x``.
Propose = Callable[[Array, Array], dist.Distribution]
#: From ``(t, x)`` to the log twist.
LogTwist = Callable[[Array, Array], Array]
#: Declares its parameters and returns the function of one step; called as ``(y, num_steps, drift)``.
Proposal = Callable[[Array, int, ArrayLike | None], Propose]
Twist = Callable[[Array, int, ArrayLike | None], LogTwist]


# Closed forms


def log_evidence(y: ArrayLike, drift: ArrayLike, num_steps: int = 10) -> Array:
    r""":math:`\log p(y) = \log\mathcal N(y; (T + 1) b, T + 1)`, elementwise."""
    return dist.Normal((num_steps + 1) * jnp.asarray(drift), jnp.sqrt(num_steps + 1.0)).log_prob(y)


def lookahead_log_density(y: ArrayLike, x: ArrayLike, t: ArrayLike, drift: ArrayLike, num_steps: int = 10) -> Array:
    r"""The optimal twist :math:`\log p(y \mid x_t) = \log\mathcal N(y; x_t + n b, n)`, elementwise."""
    n = num_steps - jnp.asarray(t)
    return dist.Normal(x + n * jnp.asarray(drift), jnp.sqrt(n)).log_prob(y)


def log_density_ratio(y: ArrayLike, x: ArrayLike, t: ArrayLike, drift: ArrayLike, num_steps: int = 10) -> Array:
    r"""What a density-ratio classifier converges to: :math:`\log p(y \mid x_t) - \log p(y)`, elementwise."""
    return lookahead_log_density(y, x, t, drift, num_steps) - log_evidence(y, drift, num_steps)


def smoothing_transition(y: ArrayLike, previous: ArrayLike, t: ArrayLike, num_steps: int = 10) -> dist.Normal:
    r"""The optimal proposal, free of the drift.

    .. math::

        p(x_t \mid x_{t-1}, y) = \mathcal N\left(\frac{n x_{t-1} + y}{n + 1}, \frac{n}{n + 1}\right)
    """
    n = num_steps - jnp.asarray(t)
    return dist.Normal((n * jnp.asarray(previous) + y) / (n + 1), jnp.sqrt(n / (n + 1)))


def maximum_likelihood_drift(y: ArrayLike, num_steps: int = 10) -> Array:
    r""":math:`\hat b = \bar y / (T + 1)`, over all series."""
    return jnp.mean(jnp.asarray(y)) / (num_steps + 1)


# The model


def model(
    y: ArrayLike | None = None,
    num_steps: int = 10,
    num_series: int | None = None,
    drift: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The drift diffusion. Site ``"y"`` stands in every step and counts in the last one only.

    :return: the path ``[num_steps, ...]`` and the observation ``[...]``.
    """
    drift = drift_parameter(drift)
    observation = None if y is None else as_observation(y, num_series)

    def step(x: Array, t: Array) -> tuple[Array, tuple[Array, Array]]:
        with series_plate(num_series):
            x = numpyro.sample("x", dist.Normal(x + drift, 1.0))
            with handlers.mask(mask=t == num_steps - 1):
                y_t = numpyro.sample("y", dist.Normal(x + drift, 1.0), obs=observation)
        return x, (x, y_t)

    _, (x, y) = scan(step, jnp.zeros(batch_shape(num_series)), jnp.arange(num_steps))
    return x, y[-1]


def simulate_data(rng_key: Array, num_series: int, num_steps: int = 10, drift: ArrayLike = 0.0) -> Array:
    """Observations of ``num_series`` independent series drawn from the model, shape ``[num_series]``."""
    with handlers.block():
        return handlers.seed(model, rng_key)(None, num_steps, num_series, drift)[1]


# The guides: a proposal, and perhaps a twist


def make_guide(proposal: Proposal, twist: Twist | None = None) -> Callable[..., None]:
    """A guide that proposes with ``proposal`` and, in its scan body, states ``twist`` as ``"r"``.

    With ``make_guide(optimal_proposal, analytic_twist)`` the log evidence estimate is exact for any number of
    particles; with :func:`prior_proposal`, or without the twist under resampling, it is not.
    """

    def guide(
        y: ArrayLike,
        num_steps: int = 10,
        num_series: int | None = None,
        drift: ArrayLike | None = None,
    ) -> None:
        observation = as_observation(y, num_series)
        propose = proposal(observation, num_steps, drift)
        log_twist = None if twist is None else twist(observation, num_steps, drift)

        def step(x: Array, t: Array) -> tuple[Array, None]:
            with series_plate(num_series):
                x = numpyro.sample("x", propose(t, x))
                if log_twist is not None:
                    numpyro_smc.twist("r", log_twist(t, x))
            return x, None

        scan(step, jnp.zeros(batch_shape(num_series)), jnp.arange(num_steps))

    return guide


def prior_proposal(y: Array, num_steps: int, drift: ArrayLike | None) -> Propose:
    """Propose from the model's own transition."""
    b = drift_parameter(drift)
    return lambda t, x: dist.Normal(x + b, 1.0)


def optimal_proposal(y: Array, num_steps: int, drift: ArrayLike | None) -> Propose:
    """Propose from :func:`smoothing_transition`."""
    return lambda t, x: smoothing_transition(y, x, t, num_steps)


def learned_proposal(y: Array, num_steps: int, drift: ArrayLike | None) -> Propose:
    r"""Propose from :math:`\mathcal N(w_t x_{t-1} + u_t y + c_t, e^{s_t})`; the :math:`4T` parameters start at 0."""
    w, u, c, s = (numpyro.param(name, jnp.zeros(num_steps)) for name in LEARNED_PROPOSAL_PARAMS)
    return lambda t, x: dist.Normal(w[t] * x + u[t] * y + c[t], jnp.exp(s[t] / 2))


#: The parameters :math:`w, u, c, s` of :func:`learned_proposal`, each of shape ``[num_steps]``.
LEARNED_PROPOSAL_PARAMS = (
    "proposal_state_weight",
    "proposal_observation_weight",
    "proposal_bias",
    "proposal_log_variance",
)


def optimal_learned_proposal_params(num_steps: int = 10) -> dict[str, Array]:
    """The parameters at which :func:`learned_proposal` is :func:`optimal_proposal`."""
    n = num_steps - jnp.arange(num_steps)
    values = (n / (n + 1), 1 / (n + 1), jnp.zeros(num_steps), jnp.log(n / (n + 1)))
    return dict(zip(LEARNED_PROPOSAL_PARAMS, values, strict=True))


def analytic_twist(y: Array, num_steps: int, drift: ArrayLike | None) -> LogTwist:
    """Twist by :func:`lookahead_log_density` at the current drift, which receives gradient through it."""
    b = drift_parameter(drift)
    return lambda t, x: lookahead_log_density(y, x, t, b, num_steps)


def standard_tilt(y: Array, num_steps: int, drift: ArrayLike | None) -> LogTwist:
    r"""Twist by :math:`\log\mathcal N(y; x_t + c_t, e^{s_t})`, per-step ``"twist_bias"`` and ``"twist_log_variance"``.

    Both start at 0. The entries of the last step are unused: the twist there is 1 by definition.
    """
    c = numpyro.param("twist_bias", jnp.zeros(num_steps))
    s = numpyro.param("twist_log_variance", jnp.zeros(num_steps))
    return lambda t, x: dist.Normal(x + c[t], jnp.exp(s[t] / 2)).log_prob(y)


def mlp_tilt(rng_key: Array, hidden_size: int = 32) -> Twist:
    """Twist by a quadratic in the state whose three coefficients are a network of the observation and the time.

    ``log r = a x**2 + b x + c``; the module is ``"twist_mlp"``, its last layer starts at 0, so the twist starts at 1.
    """
    module = mlp(rng_key, 2, hidden_size, 3, zero_last=True)

    def twist(y: Array, num_steps: int, drift: ArrayLike | None) -> LogTwist:
        network = eqx_module("twist_mlp", module)
        times = jnp.arange(num_steps, dtype=y.dtype).reshape((-1,) + (1,) * y.ndim)
        inputs = jnp.stack(jnp.broadcast_arrays(y, times), -1)  # [num_steps, *batch, 2]
        coefficients = jax.vmap(network)(inputs.reshape(-1, 2)).reshape(*inputs.shape[:-1], 3)

        def log_twist(t: Array, x: Array) -> Array:
            a, b, c = jnp.moveaxis(coefficients[t], -1, 0)
            return a * x**2 + b * x + c

        return log_twist

    return twist


# What the programs share


def drift_parameter(drift: ArrayLike | None) -> Array:
    """The drift as given, or the parameter ``"drift"``, which starts at 0."""
    return numpyro.param("drift", jnp.zeros(())) if drift is None else jnp.asarray(drift)


def batch_shape(num_series: int | None) -> tuple[int, ...]:
    """Shape of the state and of the observation."""
    return () if num_series is None else (num_series,)


def series_plate(num_series: int | None) -> contextlib.AbstractContextManager:
    """The plate ``"series"``, or nothing for a single series."""
    return contextlib.nullcontext() if num_series is None else numpyro.plate("series", num_series)


def as_observation(y: ArrayLike, num_series: int | None) -> Array:
    """``y`` as a floating-point array.

    :raises ValueError: if it is not one number per series.
    """
    y = jnp.asarray(y, dtype=jnp.result_type(float))
    if y.shape != batch_shape(num_series):
        raise ValueError(
            f"drift_diffusion: y has shape {y.shape}; with num_series={num_series} expected {batch_shape(num_series)}, "
            "one observation per series. Pass num_series=len(y) for a batch of series."
        )
    return y
