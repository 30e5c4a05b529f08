"""Reinforce: the plain score-function gradient of an importance-weighted bound, with optional baselines."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.primitives import mutable

from numpyro_smc.elbo.iwelbo import normalised_weights
from numpyro_smc.elbo.multi_sample import Coefficients, ScoreFunctionELBO
from numpyro_smc.programs.arguments import check_number
from numpyro_smc.programs.density import Densities, Pair, Params, Program
from numpyro_smc.programs.statements import state


class DecayingAverage(NamedTuple):
    r"""A baseline that averages past learning signals, :math:`b \leftarrow \rho b + (1 - \rho) d` (bias-corrected).

    :param decay: :math:`\rho \in [0, 1)`.
    """

    decay: float = 0.9


class Reinforce(ScoreFunctionELBO):
    r"""Score-function gradient [1] of the importance-weighted bound, with an optional baseline.

    The guide's score :math:`\nabla\log q(z_k)` is weighted by the learning signal
    :math:`L^\alpha - v_k - b`, with the bound's value :math:`L^\alpha`, the normalised weights :math:`v_k` and the
    baseline :math:`b`, a running average or a function of the data [2] that is fitted to the signal by least squares.

    Value: unbiased for :math:`L_K^\alpha`, per plate element, summed. Gradient: unbiased for model and guide, whatever
    the baseline. Its variance grows with K; :class:`VIMCO` and :class:`OVIS` need no baseline and are far better for
    :math:`K \ge 2`. Cost: O(K).

    :param num_particles: :math:`K \ge 1`.
    :param baseline: ``None``; a :class:`DecayingAverage`; or a function of the arguments of model and guide that
        returns an array broadcastable to the enclosing plates and may have parameters (``numpyro.param``, networks),
        best named so that an optimiser can tell them apart. With a baseline, pass the guide through
        :meth:`with_baseline`.
    :param pathwise: which sites get pathwise gradients; see :class:`~.multi_sample.ScoreFunctionELBO`. Other arguments:
        see :class:`~.multi_sample.MultiSampleELBO`.
    :raises ValueError: if there is a baseline and the guide does not declare it.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import Reinforce
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...         numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = numpyro.param("slope", 0.0)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> loss = Reinforce(num_particles=1, baseline=lambda x: numpyro.param("baseline_slope", 0.0) * x)
        >>> svi = SVI(model, loss.with_baseline(guide), numpyro.optim.Adam(0.01), loss)
        >>> result = svi.run(random.key(0), 10, jnp.array([1.9, 0.1]), progress_bar=False)

    **References**

    1. *Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning*, R. Williams (1992)
    2. *Neural Variational Inference and Learning in Belief Networks*, A. Mnih, K. Gregor (2014)
    """

    def __init__(
        self, num_particles: int, *, baseline: DecayingAverage | Callable[..., Any] | None = None, **options: Any
    ) -> None:
        super().__init__(num_particles, **options)
        if isinstance(baseline, DecayingAverage):
            check_number("Reinforce", "[0, 1)", "It is that of the baseline's average.", decay=baseline.decay)
        elif baseline is not None and not callable(baseline):
            raise ValueError(
                f"Reinforce: baseline must be None, a DecayingAverage or a function of the data, got {baseline!r}."
            )
        self.baseline = baseline

    def with_baseline(self, guide: Program) -> Program:
        """The same guide, which also declares the baseline's parameters or state to :class:`~numpyro.infer.SVI`."""

        def guide_with_baseline(*args: Any, **kwargs: Any) -> Any:
            result = guide(*args, **kwargs)
            if isinstance(self.baseline, DecayingAverage):
                value = _corrected(mutable(_AVERAGE, {"average": jnp.zeros(()), "total": jnp.zeros(())}))
            else:
                assert self.baseline is not None
                value = jnp.asarray(self.baseline(*args, **kwargs))
            state("baseline", _VALUE, value)
            return result

        return guide if self.baseline is None else guide_with_baseline

    def coefficients(self, log_weights: Array, alpha: Any = 0.0, baseline: Any = 0.0) -> Coefficients:
        """As :meth:`.MultiSampleELBO.coefficients`.

        :param baseline: broadcastable to ``log_weights``.
        """
        weights, value = normalised_weights(log_weights, alpha)
        signal = jnp.where(jnp.isneginf(value), 0.0, value) - weights
        return Coefficients(weights, signal - baseline, value)

    def _check(self, cloud: Densities) -> None:
        super()._check(cloud)
        if (self.baseline is not None) != (_VALUE in cloud.statements):
            raise ValueError(
                "Reinforce: the guide and the loss do not have the same baseline. Use SVI(model, "
                "loss.with_baseline(guide), optim, loss), and the plain guide if loss.baseline is None."
            )

    def _weigh(self, log_weights: Array, alpha: Any, cloud: Densities) -> Coefficients:
        return self.coefficients(log_weights, alpha, cloud.statements.get(_VALUE, 0.0))

    def _other_loss(
        self, rng_key: Array, pair: Pair, params: Params, cloud: Densities, coefficients: Coefficients
    ) -> Array:
        if self.baseline is None or isinstance(self.baseline, DecayingAverage):
            return jnp.zeros(())
        stated = cloud.statements[_VALUE]
        signal = coefficients.guide + lax.stop_gradient(stated)
        return jnp.sum(jnp.mean((stated - signal) ** 2, axis=(0, 1))) * cloud.plates.scale

    def _new_state(self, cloud: Densities, coefficients: Coefficients) -> dict[str, Any]:
        mutable = dict(cloud.mutable)
        if not isinstance(self.baseline, DecayingAverage):
            return super()._new_state(cloud, coefficients)
        past, decay = jax.tree.map(lambda x: x[0, 0], mutable.pop(_AVERAGE)), self.baseline.decay
        signal = jnp.mean(coefficients.guide) + _corrected(past)
        new = {
            "average": decay * past["average"] + (1.0 - decay) * signal,
            "total": decay * past["total"] + (1.0 - decay),
        }
        return {**super()._new_state(replace(cloud, mutable=mutable), coefficients), _AVERAGE: new}


def _corrected(past: dict[str, Array]) -> Array:
    """The decaying average, corrected for its start at zero."""
    return past["average"] / jnp.where(past["total"] > 0.0, past["total"], 1.0)


_VALUE = "baseline$value"
_AVERAGE = "baseline$average"
