"""FIVO: the expected log evidence estimate of a particle filter, as an objective for model and proposal."""

from typing import Any

from jax import Array, lax, random
from numpyro.infer.elbo import ELBO

from numpyro_smc.engines.particles import run, score_terms
from numpyro_smc.programs.arguments import check_positive, named
from numpyro_smc.programs.reading import read_sequence
from numpyro_smc.programs.resample import Decision, build
from numpyro_smc.programs.resampling import Scheme
from numpyro_smc.programs.sequence import Program, Sequence


class FIVO(ELBO):
    r"""Filtering variational objective of a sequence model: the log evidence estimated by a particle filter [1, 2, 3].

    For a model with one ``scan`` and a guide that proposes the step's latents in its own ``scan`` (or as one factorised
    site over time), with :math:`N` particles,

    .. math:: L_N = \mathbb E\Big[\sum_t \log \tfrac1N \sum_i w_t^i\Big] \le \log p(y), \qquad
       w_t = \frac{p(x_t \mid x_{t-1})\, p(y_t \mid x_t)}{q(x_t \mid x_{t-1}, y)} .

    ``resample="never"`` gives the importance-weighted bound, and with ``num_particles=1`` the evidence lower bound.
    Plates that enclose the whole program are independent problems: weights, resampling and bounds are per element, and
    subsampling scales the sum. Global latents are drawn once per evaluation; their :math:`\log p - \log q` is added.
    ``twist`` statements of the guide are ignored; see :class:`SIXO`.

    Value: minus an unbiased estimate of :math:`L_N`. Gradient: unbiased for :math:`L_N` with ``resample="never"``, or
    with ``resampling_gradient`` ``"score"`` or ``"score_rb"`` (large variance). With ``"none"`` the score of the
    ancestors is dropped: biased for :math:`L_N`, low variance, and what the literature trains with. With
    ``"stop_gradient"`` the gradient targets :math:`\nabla \log p(y)` (consistent in N) and must not be used to train
    proposals.
    Cost: O(NT) time; O(NT) memory in reverse mode, O(N) with ``remat=True`` plus one recomputation of each step.

    :param num_particles: number of particles :math:`N \ge 1`.
    :param resampler: name of a scheme (see ``numpyro_smc.resampling.available()``) or a scheme.
    :param resample: ``"ess"``, ``"always"``, ``"never"``, or a function ``(log_weights [N], t) -> bool``.
    :param ess_threshold: with ``"ess"``, resample when the effective sample size is at most this fraction of N.
    :param resampling_gradient: ``"none"``, ``"score"``, ``"score_rb"`` or ``"stop_gradient"``.
    :param remat: recompute each step in the backward pass to save memory.
    :raises ValueError: for a non-positive number of particles, an unknown scheme or schedule, score terms with a scheme
        or schedule they are wrong for, and (naming the site) for programs that cannot be filtered.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import FIVO
        >>> def model(y):
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> def guide(y):
        ...     gain = numpyro.param("gain", 0.5)
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x + gain * (y_t - 0.9 * x), 0.5))
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), loss=FIVO(num_particles=4))
        >>> result = svi.run(random.key(0), 10, jnp.array([0.5, 0.1, -0.3]), progress_bar=False)

    **References**

    1. *Filtering Variational Objectives*, C. Maddison et al. (2017)
    2. *Auto-Encoding Sequential Monte Carlo*, T. A. Le et al. (2018)
    3. *Variational Sequential Monte Carlo*, C. Naesseth et al. (2018)
    """

    _uses_twists = False

    def __init__(
        self,
        num_particles: int = 4,
        *,
        resampler: str | Scheme = "multinomial",
        resample: str | Decision = "ess",
        ess_threshold: float = 0.5,
        resampling_gradient: str = "none",
        remat: bool = False,
    ) -> None:
        check_positive(type(self).__name__, num_particles=num_particles)
        super().__init__(num_particles=int(num_particles))
        with named(type(self).__name__):
            self.resampling = build(resampler, resample, ess_threshold, resampling_gradient)
        self.resampling_gradient = resampling_gradient
        self.remat = remat
        self.can_infer_discrete = resampling_gradient != "none"

    def loss_with_mutable_state(  # type: ignore[override]
        self, rng_key: Array, param_map: dict[str, Any], model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        key, sequence = self._read(rng_key, param_map, model, guide, args, kwargs)
        return {"loss": -self._bound(key, sequence), "mutable_state": sequence.mutable_state()}

    def _read(
        self, rng_key: Array, params: dict[str, Any], model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Array, Sequence]:
        # The same split with and without twists: with a zero twist SIXO equals FIVO bit for bit.
        global_key, run_key = random.split(rng_key)
        sequence = read_sequence(global_key, model, guide, params, args, kwargs, user=type(self).__name__)
        sequence.twisted = sequence.twisted and self._uses_twists
        discrete = sequence.discrete_sites()
        if discrete and self.resampling_gradient == "none":
            raise ValueError(
                f"{type(self).__name__}: site '{discrete[0]}' has no reparameterised sampler, and "
                f"resampling_gradient='none' would drop its part of the gradient. Use resampling_gradient='score_rb' "
                f"(unbiased; multinomial and a fixed schedule) or 'stop_gradient' (gradient of the log evidence)."
            )
        sequence.gradient_of_draws = {"none": "ignore", "stop_gradient": "weights"}.get(
            self.resampling_gradient, "score"
        )
        return run_key, sequence

    def _bound(self, rng_key: Array, sequence: Sequence) -> Array:
        recursion = run(rng_key, sequence, self.num_particles, self.resampling, remat=self.remat)
        value = sequence.bound(recursion.log_evidence)
        if self.resampling_gradient.startswith("score"):
            terms = score_terms(recursion, future_only=self.resampling_gradient == "score_rb")
            surrogate = sequence.over_problems(terms)
            surrogate = surrogate + sequence.log_global_score * lax.stop_gradient(value)
            value = value + (surrogate - lax.stop_gradient(surrogate))
        return value
