"""SIXO: FIVO with twists, so that intermediate targets know the observations to come."""

from typing import Any

from jax import Array, lax, random

from numpyro_smc.elbo.density_ratio import twist_loss
from numpyro_smc.elbo.fivo import FIVO
from numpyro_smc.engines.alternation import current_phase
from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.programs.resample import Decision
from numpyro_smc.programs.resampling import Scheme
from numpyro_smc.programs.sequence import Program, Sequence


class SIXO(FIVO):
    r"""Smoothing inference with twisted objectives: a FIVO bound whose targets are tilted by learned twists [1].

    The guide's scan body states :math:`\log r_t(x_t)` with :func:`~numpyro_smc.twist`; the particles target
    :math:`p(x_{0:t}, y_{0:t})\, r_t(x_t)` and their weights are

    .. math:: w_t = \frac{p(x_t \mid x_{t-1})\, p(y_t \mid x_t)}{q(x_t \mid x_{t-1}, y)} \,
       \frac{r_t(x_t)}{r_{t-1}(x_{t-1})},

    with :math:`r_t = 1` from the last observation of each series on. With the smoothing proposal and the lookahead
    twist :math:`r_t = p(y_{t+1:T-1} \mid x_t)` the bound is the log evidence itself, for every N and every draw. With a
    zero twist it is FIVO, bit for bit.

    Twists are trained by ``twist_training``:

    - ``"bound"``: by ascending the bound, jointly with everything else (SIXO-u with a score gradient, SIXO-b without).
      Also right for twists without own parameters: analytic ones, or :func:`~numpyro_smc.gauss_hermite` quadrature.
    - ``"dre"``: by density-ratio estimation. A classifier with logit :math:`\log r_t(x_t, y)` tells latents that belong
      to an observation series from latents that do not, both simulated from the current model with its parameters held:

      .. math:: \min_r \; \tfrac{1}{M (T-1)} \sum_{m, t} \big[-\log\sigma(\log r_t(x_t^{+}, y))
         - \log(1 - \sigma(\log r_t(x_t^{-}, y)))\big].

      Parameters whose name starts with ``twist_prefix`` get the gradient of this loss only; all others get the gradient
      of the bound, in which the twist is a constant. The first argument of model and guide must be the observations (an
      array with leading time axis, or a dict of arrays by site name): the guide is run on simulated ones.

    Under plain optimisers both groups move at every step. With :func:`~numpyro_smc.alternating` they take turns with
    their own optimisers and numbers of steps, and each step computes only its own group's gradient.

    Parameters that model and proposal share, learned on long or chaotic series: hold them in the proposal
    (``jax.lax.stop_gradient`` of its location and scale). The gradient is then of transition densities along given
    paths, not through chains of reparameterised draws, and under the lookahead twist it tends to
    :math:`\nabla \log p(y)` as N grows. Without a twist it does not.

    Value: minus an unbiased estimate of the bound, in every mode. Gradient: as :class:`FIVO` for the bound; unbiased
    for the density-ratio loss. Cost: as FIVO, and with ``"dre"`` O(MT) for ``twist_batch_size`` M.

    :param num_particles: number of particles :math:`N \ge 1`.
    :param twist_training: ``"bound"`` or ``"dre"``.
    :param twist_prefix: parameters of the twist are those whose site name starts with it.
    :param twist_batch_size: number of simulated series M per density-ratio gradient.
    :param resampler, resample, ess_threshold, resampling_gradient, remat: see :class:`FIVO`.
    :raises ValueError: as :class:`FIVO`; if the guide has no twist statement; with ``"dre"`` if no parameter has the
        prefix.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import SIXO, twist
        >>> def model(y):
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(x, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> def guide(y):
        ...     weight = numpyro.param("twist_weight", jnp.zeros(len(y)))
        ...     def step(x, inputs):
        ...         weight_t, next_y = inputs
        ...         x = numpyro.sample("x", dist.Normal(x, 1.0))
        ...         twist("r", weight_t * x * next_y)
        ...         return x, None
        ...     scan(step, 0.0, (weight, jnp.append(y[1:], 0.0)))
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), loss=SIXO(num_particles=4, twist_training="dre"))
        >>> result = svi.run(random.key(0), 2, jnp.array([0.5, 0.1, -0.3]), progress_bar=False)

    **References**

    1. *SIXO: Smoothing Inference with Twisted Objectives*, D. Lawson, A. Raventos, A. Warrington, S. Linderman (2022)
    """

    _uses_twists = True

    def __init__(
        self,
        num_particles: int = 4,
        *,
        twist_training: str = "bound",
        twist_prefix: str = "twist",
        twist_batch_size: int = 64,
        resampler: str | Scheme = "multinomial",
        resample: str | Decision = "ess",
        ess_threshold: float = 0.5,
        resampling_gradient: str = "none",
        remat: bool = False,
    ) -> None:
        super().__init__(
            num_particles,
            resampler=resampler,
            resample=resample,
            ess_threshold=ess_threshold,
            resampling_gradient=resampling_gradient,
            remat=remat,
        )
        if twist_training not in ("bound", "dre"):
            raise ValueError(f"SIXO: unknown twist_training={twist_training!r}. Use 'bound' or 'dre'.")
        check_positive("SIXO", twist_batch_size=twist_batch_size)
        if not isinstance(twist_prefix, str):
            raise ValueError(f"SIXO: twist_prefix must be the start of parameters' names, got {twist_prefix!r}.")
        self.twist_training = twist_training
        self.twist_prefix = twist_prefix
        self.twist_batch_size = twist_batch_size

    def _read(
        self, rng_key: Array, params: dict[str, Any], model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Array, Sequence]:
        run_key, sequence = super()._read(rng_key, params, model, guide, args, kwargs)
        if not sequence.twisted:
            raise ValueError(
                "SIXO: the guide's scan body has no twist statement. "
                "State numpyro_smc.twist('r', log_r) there, or use FIVO."
            )
        return run_key, sequence

    def loss_with_mutable_state(  # type: ignore[override]
        self, rng_key: Array, param_map: dict[str, Any], model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if self.twist_training == "bound":
            return super().loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)
        of_twist = {name: name.startswith(self.twist_prefix) for name in param_map}
        if not any(of_twist.values()):
            raise ValueError(
                f"SIXO: twist_training='dre' trains the parameters whose name starts with "
                f"twist_prefix={self.twist_prefix!r}, and there are none among {sorted(param_map)}. Rename the twist's "
                f"parameters or give their prefix."
            )

        def hold(params: dict[str, Any], twist: bool) -> dict[str, Any]:
            return {
                name: lax.stop_gradient(value) if of_twist[name] == twist else value for name, value in params.items()
            }

        def model_step(params: dict[str, Any]) -> tuple[Array, Any]:
            result = super(SIXO, self).loss_with_mutable_state(
                rng_key, hold(params, twist=True), model, guide, *args, **kwargs
            )
            return result["loss"], result["mutable_state"]

        def twist_step(params: dict[str, Any]) -> Array:
            key, sequence_key = random.split(random.fold_in(rng_key, 1))
            params = hold(params, twist=False)
            _, sequence = self._read(sequence_key, params, model, guide, args, kwargs)
            loss = twist_loss(key, sequence, params, model, guide, args, kwargs, self.twist_batch_size)
            return loss - lax.stop_gradient(loss)

        is_twist_phase = current_phase()
        if is_twist_phase is None:
            loss, mutable_state = model_step(param_map)
            return {"loss": loss + twist_step(param_map), "mutable_state": mutable_state}

        def only_twist(params: dict[str, Any]) -> tuple[Array, Any]:
            loss, mutable_state = model_step(lax.stop_gradient(params))
            return loss + twist_step(params), mutable_state

        loss, mutable_state = lax.cond(is_twist_phase, only_twist, model_step, param_map)
        return {"loss": loss, "mutable_state": mutable_state}

    def twist_loss(
        self, rng_key: Array, params: dict[str, Any], model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Array:
        """The density-ratio loss of the guide's twist under the current model, for monitoring.

        :param params: constrained parameters, as ``svi.get_params(state)`` returns them.
        :return: scalar, mean over simulated series and steps; ``2 log 2`` for a zero twist.
        """
        read_key, key = random.split(rng_key)
        _, sequence = self._read(read_key, params, model, guide, args, kwargs)
        return twist_loss(key, sequence, params, model, guide, args, kwargs, self.twist_batch_size)
