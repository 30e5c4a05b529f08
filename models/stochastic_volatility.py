r"""Stochastic volatility of many series: log variances that revert to their means, with independent or joint noise.

With :math:`x_{-1} = \mu`, so that :math:`x_0 \sim \mathcal N(\mu, Q)`, and componentwise products,

.. math::

    x_t \sim \mathcal N(\mu + \phi (x_{t-1} - \mu), Q), \qquad
    y_t \sim \mathcal N(0, \operatorname{diag}(\beta e^{x_t / 2})^2), \qquad t = 0, \dots, T - 1.

The parameters are unconstrained: ``"mu"``, ``"raw_phi"`` (:math:`\phi = \tanh`), ``"log_beta"``, ``"raw_q"``
(:math:`q = \max(\exp, \texttt{min\_scale})`), each ``[D]``. Diagonal: :math:`Q = \operatorname{diag}(q^2)`. Full:
:math:`Q = L L^\top`, where :math:`L` has :math:`q` on its diagonal and ``"raw_scale_tril"``, ``[D, D]``, below it.

:func:`make_model` and :func:`make_guide` return programs called as ``program(y, params)``; ``params`` fixes any of the
parameters above by name, and those it does not name are learned. A univariate series is the case ``dim=1``, with ``y``
``[T, 1]``.

**References**

1. *Variational Sequential Monte Carlo*, C. Naesseth, S. Linderman, R. Ranganath, D. Blei (2018)
2. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventós, A. Warrington, S. Linderman (2022)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module

import numpyro_smc
from models.networks import lookahead_features, lstm_cell, mlp

Covariance = Literal["diagonal", "full"]
Params = Mapping[str, ArrayLike]


class Dynamics(NamedTuple):
    """The constrained parameters."""

    mu: Array
    phi: Array
    beta: Array
    scale: Array  # q [D], or L [D, D]

    def predict(self, x: Array) -> Array:
        """Mean of the next state."""
        return self.mu + self.phi * (x - self.mu)

    def transition(self, x: Array) -> dist.Distribution:
        """Distribution of the next state."""
        return gaussian(self.predict(x), self.scale)

    def emission(self, x: Array) -> dist.Normal:
        """Distribution of the observations, one per component."""
        return dist.Normal(0.0, self.beta * jnp.exp(x / 2))

    def marginal_scale(self) -> Array:
        """Standard deviation of each component's noise, ``[D]``."""
        return self.scale if self.scale.ndim == 1 else jnp.sqrt(jnp.sum(self.scale**2, -1))


def gaussian(loc: Array, scale: Array) -> dist.Distribution:
    """A Gaussian over ``[D]`` with standard deviations ``[D]`` or a Cholesky factor ``[D, D]``."""
    if scale.ndim == 1:
        return dist.Normal(loc, scale).to_event(1)
    return dist.MultivariateNormal(loc, scale_tril=scale)


# The model


def make_model(
    num_steps: int = 119,
    dim: int = 22,
    covariance: Covariance = "diagonal",
    min_scale: float = 1e-12,
    init_scale: float = 0.01,
) -> Callable[..., tuple[Array, Array]]:
    """The model as a program ``model(y=None, params=None)``.

    :param num_steps: length of a simulated series; given ``y``, its own length counts.
    :param init_scale: standard deviation of the random initial parameters.
    """
    declare = make_dynamics(dim, covariance, min_scale, init_scale)

    def model(y: ArrayLike | None = None, params: Params | None = None) -> tuple[Array, Array]:
        dynamics = declare(params)
        y = None if y is None else jnp.asarray(y)

        def step(x: Array, y_t: Array | None) -> tuple[Array, tuple[Array, Array]]:
            x = numpyro.sample("x", dynamics.transition(x))
            y_t = numpyro.sample("y", dynamics.emission(x).to_event(1), obs=y_t)
            return x, (x, y_t)

        _, (x, y) = scan(step, dynamics.mu, y, length=num_steps if y is None else y.shape[0])
        return x, y

    return model


def make_dynamics(
    dim: int,
    covariance: Covariance = "diagonal",
    min_scale: float = 1e-12,
    init_scale: float = 0.01,
) -> Callable[[Params | None], Dynamics]:
    """A function that declares the parameters which ``params`` does not fix, and constrains them all.

    Initial values are Gaussian with standard deviation ``init_scale`` around 0; ``"raw_phi"`` around ``arctanh(0.1)``.
    """
    if covariance not in ("diagonal", "full"):
        raise ValueError(f"stochastic_volatility: covariance={covariance!r}; expected 'diagonal' or 'full'.")
    shapes = {name: (dim,) for name in ("mu", "raw_phi", "log_beta", "raw_q")}
    if covariance == "full":
        shapes["raw_scale_tril"] = (dim, dim)

    def declare(params: Params | None) -> Dynamics:
        raw = {}
        for name, shape in shapes.items():
            if params is not None and name in params:
                raw[name] = jnp.broadcast_to(jnp.asarray(params[name]), shape)
            else:
                loc = jnp.arctanh(0.1) if name == "raw_phi" else 0.0
                raw[name] = numpyro.param(name, normal_init(shape, init_scale, loc))
        q = jnp.maximum(jnp.exp(raw["raw_q"]), min_scale)
        scale = q if covariance == "diagonal" else jnp.tril(raw["raw_scale_tril"], -1) + jnp.diag(q)
        return Dynamics(raw["mu"], jnp.tanh(raw["raw_phi"]), jnp.exp(raw["log_beta"]), scale)

    return declare


def normal_init(shape: tuple[int, ...], scale: float, loc: ArrayLike = 0.0) -> Callable[[Array], Array]:
    """An initial value for :func:`numpyro.param`: Gaussian, drawn with the key that NumPyro hands it."""
    return lambda rng_key: loc + scale * jax.random.normal(rng_key, shape)


# The guides


def make_guide(
    num_steps: int = 119,
    dim: int = 22,
    twist: Literal["none", "quadrature", "learned"] = "none",
    rng_key: Array | None = None,
    covariance: Covariance = "diagonal",
    min_scale: float = 1e-12,
    init_scale: float = 0.01,
    hidden_size: int = 64,
    width: int = 128,
    degree: int = 5,
) -> Callable[..., None]:
    r"""A guide ``guide(y, params=None)`` that proposes with one Gaussian potential per time and component.

    .. math::

        q(x_t \mid x_{t-1}) \propto \mathcal N(x_t; m_t, \operatorname{diag}(s_t)^2)\, p(x_t \mid x_{t-1})

    :math:`m` and :math:`\log s` are ``"proposal_loc"`` and ``"proposal_log_scale"``, ``[T, D]``: they belong to one
    series. The model's parameters are shared with :func:`make_model` by name.

    :param twist: ``"none"`` (FIVO, IWAE); ``"quadrature"`` (SIXO-q, :func:`quadrature_twist`); ``"learned"`` (SIXO with
        density-ratio estimation, :func:`learned_twist`), which needs ``rng_key``.
    :param covariance, min_scale, init_scale: as for :func:`make_model`.
    """
    declare = make_dynamics(dim, covariance, min_scale, init_scale)
    if twist == "none":
        build_twist = no_twist
    elif twist == "quadrature":
        build_twist = quadrature_twist(degree)
    elif twist == "learned":
        if rng_key is None:
            raise ValueError("stochastic_volatility: twist='learned' builds its networks here; pass rng_key.")
        build_twist = learned_twist(rng_key, dim, hidden_size, width)
    else:
        raise ValueError(f"stochastic_volatility: twist={twist!r}; expected 'none', 'quadrature' or 'learned'.")

    def guide(y: ArrayLike, params: Params | None = None) -> None:
        y = jnp.asarray(y)
        if y.shape != (num_steps, dim):
            raise ValueError(
                f"stochastic_volatility: y has shape {y.shape}, the guide's parameters have {(num_steps, dim)}. They "
                "belong to one series: make another guide, or propose from the model's own transition."
            )
        dynamics = declare(params)
        loc = numpyro.param("proposal_loc", normal_init((num_steps, dim), init_scale))
        log_scale = numpyro.param("proposal_log_scale", normal_init((num_steps, dim), init_scale))
        gain, scale = combine_with_prior(dynamics.scale, jnp.exp(log_scale))
        twist_inputs, log_twist = build_twist(dynamics, y)

        def step(x: Array, inputs: tuple[Any, ...]) -> tuple[Array, None]:
            loc_t, gain_t, scale_t, twist_t = inputs
            prior = dynamics.predict(x)
            x = numpyro.sample("x", gaussian(prior + apply_gain(gain_t, loc_t - prior), scale_t))
            if log_twist is not None:
                numpyro_smc.twist("r", log_twist(x, twist_t))
            return x, None

        scan(step, dynamics.mu, (loc, gain, scale, twist_inputs))

    return guide


def combine_with_prior(prior_scale: Array, scale: Array) -> tuple[Array, Array]:
    r"""The product of the transition :math:`\mathcal N(\cdot, Q)` and potentials :math:`\mathcal N(m_t, S_t)`.

    :param prior_scale: of the transition, ``[D]`` or ``[D, D]``.
    :param scale: of the potentials, ``[T, D]``.
    :return: gain :math:`G_t = Q (Q + S_t)^{-1}`, by which the mean moves from the prior's towards :math:`m_t`, and the
        scale of :math:`(I - G_t) Q`, both ``[T, D]`` or ``[T, D, D]``.
    """
    if prior_scale.ndim == 1:
        total = jnp.hypot(prior_scale, scale)
        return (prior_scale / total) ** 2, prior_scale * scale / total
    q = prior_scale @ prior_scale.T

    def combine(s: Array) -> tuple[Array, Array]:
        gain = jnp.linalg.solve(q + jnp.diag(s**2), q).T
        rest = jnp.eye(s.size, dtype=s.dtype) - gain
        return gain, jnp.linalg.cholesky(rest @ q @ rest.T + (gain * s**2) @ gain.T)

    return jax.vmap(combine)(scale)


def apply_gain(gain: Array, difference: Array) -> Array:
    """The gain's product with a vector: componentwise for ``[D]``, as a matrix for ``[D, D]``."""
    return gain * difference if gain.ndim == 1 else gain @ difference


# A twist builder takes (dynamics, y) and returns inputs with a leading time axis, and log r(x, inputs of the step).


def no_twist(dynamics: Dynamics, y: Array) -> tuple[None, None]:
    """No statement at all."""
    return None, None


def quadrature_twist(degree: int = 5) -> Callable[[Dynamics, Array], tuple[Array, Callable[[Array, Array], Array]]]:
    r"""Look one step ahead, by Gauss-Hermite quadrature.

    .. math::

        \log r_t = \sum_d \log \mathrm E[p(y_{t+1,d} \mid x_{t+1,d}) \mid x_t]

    The model's parameters receive gradient through it. Under a full covariance it ignores the correlation of the noise:
    no longer the one-step predictive density, and still a valid twist.
    """

    def build(dynamics: Dynamics, y: Array) -> tuple[Array, Callable[[Array, Array], Array]]:
        scale = dynamics.marginal_scale()

        def log_twist(x: Array, y_next: Array) -> Array:
            def log_likelihood(z: Array) -> Array:
                return dynamics.emission(z).log_prob(y_next)

            return numpyro_smc.gauss_hermite(log_likelihood, dynamics.predict(x), scale, degree=degree).sum(-1)

        return shift_left(y), log_twist

    return build


def learned_twist(
    rng_key: Array, dim: int, hidden_size: int = 64, width: int = 128
) -> Callable[[Dynamics, Array], tuple[Array, Callable[[Array, Array], Array]]]:
    """A network of the state and of the future: ``"twist_rnn"`` reads ``y`` backwards, ``"twist_mlp"`` scores.

    The twist starts at 1.
    """
    rnn_key, mlp_key = jax.random.split(rng_key)
    rnn = lstm_cell(rnn_key, dim, hidden_size)
    head = mlp(mlp_key, hidden_size + dim, width, 1, zero_last=True)

    def build(dynamics: Dynamics, y: Array) -> tuple[Array, Callable[[Array, Array], Array]]:
        features = lookahead_features(eqx_module("twist_rnn", rnn), y)
        network = eqx_module("twist_mlp", head)
        return features, lambda x, feature: network(jnp.concatenate([feature, x]))[0]

    return build


def shift_left(y: Array) -> Array:
    """Row ``t`` is ``y[t + 1]``; the last row is 0, which keeps the last step's twist finite."""
    return jnp.concatenate([y[1:], jnp.zeros_like(y[:1])])


# Reference points


def reference_params(y: ArrayLike, phi: float = 0.9, q: float = 0.3, beta: float = 1.0) -> dict[str, Array]:
    r"""Fixed parameters with :math:`\mu_d = 2 \log \mathrm{rms}(y_{\cdot d})`: the stationary scale matches the data's.

    :param y: ``[T, D]``; no column may be all zero.
    """
    y = jnp.asarray(y)
    mu = jnp.log(jnp.mean(y**2, 0))
    constants = {"raw_phi": jnp.arctanh(phi), "log_beta": jnp.log(beta), "raw_q": jnp.log(q)}
    return {"mu": mu} | {name: jnp.full_like(mu, value) for name, value in constants.items()}


def iid_log_evidence(y: ArrayLike, params: Params) -> Array:
    r"""The log evidence in the limit :math:`q \to 0`: independent :math:`\mathcal N(0, (\beta e^{\mu / 2})^2)`."""
    scale = jnp.exp(jnp.asarray(params["log_beta"]) + jnp.asarray(params["mu"]) / 2)
    return dist.Normal(0.0, scale).log_prob(jnp.asarray(y)).sum()
