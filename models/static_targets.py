r"""Targets for annealing: densities with log evidence 0 and exact moments, and a toy whose evidence is known.

A target is a NumPyro distribution over vectors (:func:`gaussian_mixture`, :func:`bimodal`, :class:`Funnel`,
:class:`Banana`): it can be evaluated, drawn from, and has a ``mean`` and a ``variance``. :func:`model` turns it into a
program whose only latent site, ``"z"``, is improper, so that a sampler sees the density alone and has to start from a
guide: :func:`guide`, or a fitted one. Both programs are called as ``program(target, num_replicates)``; replicates are
elements of the plate ``"replicates"``, independent problems that only reduce variance.

The Student-t toy, :func:`student_t_model`, has two latents and an evidence by quadrature.

**References**

1. *Resampling Gradients Vanish in Differentiable Sequential Monte Carlo Samplers*, J. Zenn, R. Bamler (2023)
2. *Differentiable Annealed Importance Sampling Minimizes The Symmetrized Kullback-Leibler Divergence Between Initial
   and Target Distribution*, J. Zenn, R. Bamler (2024)
3. *Slice Sampling*, R. Neal (2003): the funnel
4. *Adaptive Proposal Distribution for Random Walk Metropolis Algorithm*, H. Haario, E. Saksman, J. Tamminen (1999): the
   banana
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions import constraints

# The programs


def model(target: dist.Distribution, num_replicates: int | None = None) -> None:
    """The density of ``target``: site ``"z"``, and the factor ``"log_density"``."""
    with _replicates(num_replicates):
        z = numpyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), target.event_shape))
        numpyro.factor("log_density", target.log_prob(z))


def guide(target: dist.Distribution, num_replicates: int | None = None, scale: float = 3.0) -> None:
    r"""The fixed start :math:`\mathcal N(0, \text{scale}^2 I)` of [1]."""
    with _replicates(num_replicates):
        numpyro.sample("z", dist.Normal(0.0, scale).expand(target.event_shape).to_event(1))


def _replicates(num_replicates: int | None) -> AbstractContextManager:
    return nullcontext() if num_replicates is None else numpyro.plate("replicates", num_replicates)


# The targets


def gaussian_mixture(
    means: ArrayLike, scale: ArrayLike = 1.0, weights: ArrayLike | None = None
) -> dist.MixtureSameFamily:
    r""":math:`\sum_c w_c\, \mathcal N(\mu_c, \text{scale}^2 I)`.

    :param means: ``[C, D]``; the experiments of [1] draw them with :func:`draw_means`.
    :param weights: ``[C]``, adding up to 1; equal by default.
    """
    means = jnp.asarray(means, float)
    weights = jnp.full(len(means), 1 / len(means)) if weights is None else jnp.asarray(weights, float)
    return dist.MixtureSameFamily(dist.Categorical(probs=weights), dist.Normal(means, scale).to_event(1))


def draw_means(rng_key: Array, dim: int, num_components: int = 8) -> Array:
    """Means of the mixture in [1], each coordinate from N(3, 1): ``[num_components, dim]``."""
    return 3.0 + jax.random.normal(rng_key, (num_components, dim))


def bimodal(dim: int, weight: float = 0.5, scale: float = 0.25) -> dist.MixtureSameFamily:
    r""":math:`w\,\mathcal N(0, \text{scale}^2 I) + (1 - w)\,\mathcal N(1, \text{scale}^2 I)`; [2] has :math:`w = 1/2`.

    At ``weight=0.9`` in 10 dimensions the modes are 12.6 scales apart: a Markov chain stays in the one it starts in.
    """
    return gaussian_mixture(jnp.stack([jnp.zeros(dim), jnp.ones(dim)]), scale, (weight, 1 - weight))


def mode_weights(target: dist.MixtureSameFamily, z: ArrayLike, log_weights: ArrayLike | None = None) -> Array:
    r"""The share of each component in draws ``[S, D]``, the mean responsibility: ``[C]``.

    Under the target its expectation is exactly the component's weight, ``target.mixing_distribution.probs``, however
    much the components overlap.

    :param log_weights: of the draws, unnormalised, ``[S]``; equal by default.
    """
    responsibilities = jax.nn.softmax(target.component_log_probs(jnp.asarray(z)))
    return jax.nn.softmax(jnp.zeros(len(responsibilities)) if log_weights is None else log_weights) @ responsibilities


class Funnel(dist.Distribution):
    r"""Neal's funnel [3]: :math:`z_1 \sim \mathcal N(0, \text{scale}^2)`, the others :math:`\mathcal N(0, e^{z_1})`."""

    arg_constraints = {"scale": constraints.positive}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, dim: int = 10, scale: ArrayLike = 3.0, *, validate_args: bool | None = None) -> None:
        self.scale = scale
        super().__init__(event_shape=(dim,), validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        z = jax.random.normal(key, self.shape(sample_shape))
        return z.at[..., 0].multiply(self.scale).at[..., 1:].multiply(jnp.exp(self.scale * z[..., :1] / 2))

    def log_prob(self, value: ArrayLike) -> Array:
        neck, others = value[..., :1], value[..., 1:]
        log_probs = dist.Normal(0.0, self.scale).log_prob(neck), dist.Normal(0.0, jnp.exp(neck / 2)).log_prob(others)
        return jnp.concatenate(log_probs, -1).sum(-1)

    @property
    def mean(self) -> Array:
        return jnp.zeros(self.event_shape)

    @property
    def variance(self) -> Array:
        return jnp.full(self.event_shape, jnp.exp(self.scale**2 / 2)).at[0].set(self.scale**2)


class Banana(dist.Distribution):
    r"""A bent Gaussian [4]: :math:`z_1 \sim \mathcal N(0, s^2)`, :math:`z_2 \sim \mathcal N(b (z_1^2 - s^2), 1)`."""

    arg_constraints = {"scale": constraints.positive, "curvature": constraints.real}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(
        self, scale: ArrayLike = 2.0, curvature: ArrayLike = 0.5, *, validate_args: bool | None = None
    ) -> None:
        self.scale, self.curvature = scale, curvature
        super().__init__(event_shape=(2,), validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        z = jax.random.normal(key, self.shape(sample_shape)).at[..., 0].multiply(self.scale)
        return z.at[..., 1].add(self._centre(z[..., 0]))

    def log_prob(self, value: ArrayLike) -> Array:
        first, second = value[..., 0], value[..., 1]
        return dist.Normal(0.0, self.scale).log_prob(first) + dist.Normal(self._centre(first), 1.0).log_prob(second)

    def _centre(self, first: Array) -> Array:
        return self.curvature * (first**2 - self.scale**2)

    @property
    def mean(self) -> Array:
        return jnp.zeros(2)

    @property
    def variance(self) -> Array:
        return jnp.array([self.scale**2, 1 + 2 * self.curvature**2 * self.scale**4])


# The Student-t toy


class Integrals(NamedTuple):
    """What quadrature knows of the Student-t toy."""

    log_evidence: float
    mean: dict[str, float]  # of the posterior of "m" and of "s"
    variance: dict[str, float]


def student_t_model(y: ArrayLike) -> None:
    r""":math:`s \sim \mathrm{HalfNormal}(2)`, :math:`m \sim \mathcal N(0, 2^2)`, :math:`y_i \sim m + s\,t_3`."""
    y = jnp.asarray(y)
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.StudentT(3.0, m, s), obs=y)


def student_t_data() -> np.ndarray:
    """The eight observations of the toy, drawn around 1 with scale 0.7. Log evidence -13.98709."""
    return np.random.RandomState(0).standard_t(3, 8) * 0.7 + 1


def student_t_integrals(y: ArrayLike, num_points: int = 400) -> Integrals:
    r"""Evidence and posterior moments by the trapezoidal rule in :math:`(m, \log s)`, in double precision.

    The grid is :math:`|m| \le 20`, ten prior standard deviations, and :math:`e^{-9} \le s \le e^3`. On smooth
    integrands that vanish at the ends the rule converges geometrically: on the toy's data, 400 points a side leave an
    error of 1e-11. For a handful of observations on the scale of the prior, not all equal.
    """
    m, log_s = np.linspace(-20, 20, num_points), np.linspace(-9, 3, num_points)
    s = np.exp(log_s)
    standardised = (np.asarray(y, np.float64)[:, None, None] - m[:, None]) / s
    log_t = math.lgamma(2) - math.lgamma(1.5) - 0.5 * math.log(3 * math.pi) - 2 * np.log1p(standardised**2 / 3) - log_s
    # Twice N(m; 0, 4) N(s; 0, 4), and the Jacobian of exp(log s).
    log_prior = math.log(2 / (8 * math.pi)) - (m[:, None] ** 2 + s**2) / 8 + log_s
    log_joint = log_t.sum(0) + log_prior
    peak = log_joint.max()
    weights = np.exp(log_joint - peak)
    log_evidence = float(peak + np.log(weights.sum() * (m[1] - m[0]) * (log_s[1] - log_s[0])))
    weights /= weights.sum()
    marginals = {"m": (m, weights.sum(1)), "s": (s, weights.sum(0))}
    mean = {name: float(w @ x) for name, (x, w) in marginals.items()}
    variance = {name: float(w @ (x - mean[name]) ** 2) for name, (x, w) in marginals.items()}
    return Integrals(log_evidence, mean, variance)
