"""DSMCS: a differentiable annealed sampler from a guide to its model, as a bound."""

import warnings
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.infer.elbo import ELBO
from numpyro.util import find_stack_level

from numpyro_smc.elbo.annealed_runs import METHODS, compiled_draws, compiled_runs
from numpyro_smc.engines import learned_score
from numpyro_smc.engines.learned_schedule import LEARNABLE, LearnedSchedule
from numpyro_smc.engines.particles import Recursion, run, score_terms
from numpyro_smc.engines.path import AnnealedPath
from numpyro_smc.engines.transitions import KERNELS, Kernel
from numpyro_smc.programs.arguments import check_plate_names, check_positive, named
from numpyro_smc.programs.density import Pair, Params, Program
from numpyro_smc.programs.guide_target import GuideTarget
from numpyro_smc.programs.nonfinite import check_finite
from numpyro_smc.programs.options import keeps_options_apart
from numpyro_smc.programs.resample import Decision, build, replace_dead
from numpyro_smc.programs.resampling import Scheme, bernoulli, gapped_straight_through, resolve
from numpyro_smc.reports.annealing import AnnealingDiagnostics

_PUBLISHED: dict[str, Any] = {
    "cat": "multinomial",
    "gst": gapped_straight_through(temperature=0.1, gap=1.0),
    "bern-cat": bernoulli("multinomial"),
    "bern-gst": bernoulli(gapped_straight_through(temperature=0.1, gap=1.0)),
}


class DSMCS(ELBO):
    r"""Differentiable sequential Monte Carlo sampler from a guide to its model [1], as a bound on the log evidence.

    :math:`N` particles start as draws from the guide and take :math:`K` gradient-based transitions along
    :math:`\gamma_k = q^{1-\beta_k} p^{\beta_k}` in unconstrained space; incremental weights :math:`i_k` give

    .. math:: \log \hat Z = \sum_k \log \tfrac1N \sum_n W_{k-1}^n e^{i_k^n}, \qquad
       L = \mathbb E[\log \hat Z] \le \log p(x),

    and the weights :math:`W` are made equal by resampling where their effective sample size has fallen. The sampler's
    own parameters (``learn``) are declared by :meth:`wrap`, which the guide must pass through: ``SVI`` trains them
    together with guide and model. Plates that enclose every site of both are independent problems.

    Value: unbiased for :math:`L`. Gradient: pathwise through all transitions. Without resampling
    (:class:`~numpyro_smc.DAIS`) unbiased for :math:`L`. With it, ``resampling_gradient="stop_gradient"`` follows
    :math:`\nabla\log p(x)` up to O(1/N): the recommended choice; ``"score_rb"`` with a fixed schedule is unbiased and
    noisy; ``"none"`` drops a term and is biased enough to destroy learned betas (the published code's choice, for
    comparison only).
    Cost: K gradients of model and guide per particle, the gradient of the bound three to four times that; memory O(NK),
    or as ``remat`` says.

    :param num_particles: :math:`N \ge 1`.
    :param num_transitions: :math:`K \ge 0`; zero gives the importance-weighted bound.
    :param kernel: ``"uha"`` (momentum, one gradient a transition), ``"uha_kdk"`` (two), ``"ula"`` (no momentum) or
        ``"mcd"`` (the same with a network in its reversal, which is always learned [4]).
    :param resampler: scheme of resampling; see ``numpyro_smc.resampling``.
    :param resample: ``"ess"``, ``"always"``, ``"never"`` or a function ``(log_weights [N], k) -> bool``.
    :param ess_threshold: with ``"ess"``, the fraction of N at which resampling happens.
    :param resampling_gradient: ``"stop_gradient"``, ``"score"``, ``"score_rb"`` or ``"none"``.
    :param learn: which of ``"betas"``, ``"step_size"``, ``"mass"`` and ``"refreshment"`` are parameters; the others
        stay at their initial values.
    :param step_size: initial step, below ``step_size_max``; by default half of it.
    :param step_size_max: upper limit of the steps, in unconstrained units.
    :param num_mc: independent samplers that are averaged.
    :param remat: ``"step"`` stores the particles of every step, ``"sqrt"`` those of about :math:`\sqrt K` steps,
        ``None`` all intermediate values.
    :raises ValueError: for arguments out of range; while tracing: if the guide was not wrapped, and, naming the site,
        for discrete latents, or subsampled plates that do not enclose every site.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_smc import DSMCS
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.HalfNormal(2.0))
        ...     numpyro.sample("y", dist.StudentT(3.0, 0.0, scale).expand([3]).to_event(1), obs=y)
        >>> loss = DSMCS(num_particles=8, num_transitions=4)
        >>> guide = loss.wrap(AutoNormal(model, init_scale=0.5))
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), loss)
        >>> result = svi.run(random.key(0), 5, jnp.array([0.5, -1.2, 3.0]), progress_bar=False)

    **References**

    1. *Resampling Gradients Vanish in Differentiable Sequential Monte Carlo Samplers*, J. Zenn, R. Bamler (2023)
    2. *MCMC Variational Inference via Uncorrected Hamiltonian Annealing*, T. Geffner, J. Domke (2021)
    3. *Differentiable Annealed Importance Sampling and the Perils of Gradient Noise*, G. Zhang et al. (2021)
    4. *Score-Based Diffusion meets Annealed Importance Sampling*, A. Doucet et al. (2022)
    """

    def __init__(
        self,
        num_particles: int,
        num_transitions: int,
        *,
        kernel: str = "uha",
        resampler: str | Scheme = "systematic",
        resample: str | Decision = "ess",
        ess_threshold: float = 0.5,
        resampling_gradient: str = "stop_gradient",
        learn: Collection[str] = LEARNABLE,
        step_size: float | None = None,
        step_size_max: float = 0.25,
        mass: float = 1.0,
        refreshment: float = 0.7167,
        num_mc: int = 1,
        remat: str | None = "step",
        plates: str | Collection[str] | None = "auto",
    ) -> None:
        user = type(self).__name__
        check_positive(user, num_particles=num_particles, num_mc=num_mc)
        if kernel not in KERNELS:
            raise ValueError(f"{user}: unknown kernel {kernel!r}; there are {sorted(KERNELS)}.")
        check_plate_names(user, plates)
        with named(user):
            scheme = resolve(resampler)
        if resample != "never" and not scheme.unbiased:
            raise ValueError(
                f"{user}: the {scheme.name} scheme is biased, so the loss would not be a bound. Use "
                f"'systematic', or another scheme that numpyro_smc.resampling marks unbiased."
            )
        with named(user):
            resample_fn = build(resampler, resample, ess_threshold, resampling_gradient)
        if remat not in ("step", "sqrt", None):
            raise ValueError(f"{user}: remat must be 'step', 'sqrt' or None, got {remat!r}.")
        super().__init__(num_particles=int(num_particles))
        self.schedule = LearnedSchedule(user, num_transitions, learn, step_size, step_size_max, mass, refreshment)
        self.num_mc, self.plates = num_mc, plates
        self.kernel: Kernel = KERNELS[kernel]
        self.resampling = replace_dead(resample_fn)
        self.resampling_gradient = resampling_gradient
        self.remat: bool | str = "sqrt" if remat == "sqrt" else remat == "step"

    @classmethod
    def published(cls, name: str, num_particles: int, num_transitions: int, **options: Any) -> "DSMCS":
        """The sampler of the published code [1], for comparisons: it resamples at every step, with biased gradients.

        :param name: ``"cat"`` (multinomial), ``"gst"`` (gapped straight-through), ``"bern-cat"`` or ``"bern-gst"`` (the
            same by chance; the decision as described, not as coded), as its command line calls them.
        :param options: other arguments of :class:`DSMCS`.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"DSMCS.published: unknown name {name!r}; there are {sorted(_PUBLISHED)}.")
        settings = {"resampler": _PUBLISHED[name], "resample": "always", "resampling_gradient": "none"}
        return cls(num_particles, num_transitions, **settings, **options)

    def wrap(self, guide: Program) -> Program:
        """The same guide, which also declares the sampler's parameters to :class:`~numpyro.infer.SVI`."""

        if self._has_score:
            guide = learned_score.with_score(guide, self.plates, self.schedule.num_transitions)
        return partial(_annealed_guide, self.schedule, guide)

    def loss_with_mutable_state(  # type: ignore[override]
        self, rng_key: Array, param_map: Params, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        run_key, path = self.path(rng_key, param_map, model, guide, args, kwargs)

        def one(rng_key: Array) -> Array:
            return self.bound(run(rng_key, path, self.num_particles, self.resampling, remat=self.remat))

        values = jax.vmap(one)(random.split(run_key, self.num_mc))
        return {"loss": -jnp.sum(jnp.mean(values, axis=0)) * path.target.plates.scale, "mutable_state": None}

    @keeps_options_apart("model", "guide")
    def diagnostics(
        self,
        rng_key: Array,
        params: Params,
        model: Program,
        guide: Program,
        *args: Any,
        num_runs: int | None = None,
        **kwargs: Any,
    ) -> AnnealingDiagnostics:
        """What the sampler does at given parameters, per transition.

        :param params: constrained values, as :meth:`~numpyro.infer.svi.SVI.get_params` gives them.
        :param num_runs: independent runs; ``num_mc`` by default.
        :return: an :class:`~numpyro_smc.reports.annealing.AnnealingDiagnostics`; with a warning that counts them, if
            step sizes were driven to zero.
        :raises FloatingPointError: naming the sites, if no run has a finite evidence.
        """
        runs = compiled_runs(self, model, guide, num_runs or self.num_mc)
        log_evidence, ess, resampled, schedule = runs(rng_key, params, args, kwargs)
        self._warn_of_vanished_steps(schedule.step_sizes)
        self._check_finite(log_evidence, params, model, guide, args, kwargs)
        return AnnealingDiagnostics(log_evidence, ess, resampled, schedule, self.num_particles)

    @keeps_options_apart("model", "guide")
    def sample_posterior(
        self,
        rng_key: Array,
        params: Params,
        model: Program,
        guide: Program,
        *args: Any,
        num_samples: int = 1,
        method: str = "weighted",
        **kwargs: Any,
    ) -> dict[str, Array]:
        r"""Draws from the sampler's approximation of the posterior, one from each of ``num_samples`` runs.

        :param params: constrained values.
        :param method: ``"weighted"`` (a particle drawn by its final weight: the approximation that the bound is about),
            ``"final"`` (any final particle) or ``"initial"`` (a draw from the guide).
        :return: values of the guide's latent sites, ``[num_samples, ...]``.
        :raises FloatingPointError: naming the sites, if no run has a finite evidence.
        """
        if method not in METHODS:
            raise ValueError(f"{type(self).__name__}: method must be one of {METHODS}, got {method!r}.")
        draws = compiled_draws(self, model, guide, num_samples, method)
        values, log_evidence = draws(rng_key, params, args, kwargs)
        self._check_finite(log_evidence, params, model, guide, args, kwargs)
        return values

    def path(
        self, rng_key: Array, params: Params, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Array, AnnealedPath]:
        """A key for its runs, and the annealed path from guide to model at given parameters."""
        plate_key, program_key, run_key = random.split(rng_key, 3)
        pair = self._pair(plate_key, model, guide, args, kwargs)
        target = GuideTarget(pair, params, program_key)
        score = learned_score.bind(pair.user, params, target) if self._has_score else None
        return run_key, AnnealedPath(target, self.kernel, self.schedule.at(params), score)

    def bound(self, recursion: Recursion) -> Array:
        """Log evidence of a run, by problem, with the gradient that ``resampling_gradient`` says."""
        value = recursion.log_evidence
        if self.resampling_gradient.startswith("score"):
            surrogate = score_terms(recursion, future_only=self.resampling_gradient == "score_rb")
            value = value + (surrogate - lax.stop_gradient(surrogate))
        return value

    @property
    def _has_score(self) -> bool:
        return self.kernel.has_score and self.schedule.num_transitions > 0

    def _pair(self, plate_key: Array, model: Program, guide: Program, args: Any, kwargs: Any) -> Pair:
        return Pair(model, guide, args, kwargs, plate_key, self.plates, type(self).__name__, self.num_particles)

    def _check_finite(
        self, log_evidence: Array, params: Params, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> None:
        """:raises FloatingPointError: naming the sites, for problems of which no run has a finite evidence."""
        if not isinstance(log_evidence, jax.core.Tracer):
            pair = self._pair(random.key(0), model, guide, args, kwargs)
            check_finite(jnp.max(log_evidence, axis=0), pair, params)

    def _warn_of_vanished_steps(self, step_sizes: Array) -> None:
        if isinstance(step_sizes, jax.core.Tracer):
            return
        if number := self.schedule.num_vanished(step_sizes):
            warnings.warn(
                f"{type(self).__name__}: {number} of {step_sizes.size} step sizes were driven to zero, so those "
                f"transitions move nothing. Lower step_size_max or the learning rate, take fewer transitions, or leave "
                f"'step_size' out of `learn`.",
                stacklevel=find_stack_level(),
            )


def _annealed_guide(schedule: Any, guide: Program, *args: Any, **kwargs: Any) -> Any:
    schedule.declare()
    return guide(*args, **kwargs)
