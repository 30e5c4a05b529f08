"""DSMCS and DAIS: differentiable annealed samplers from a guide to its model, as bounds."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, lax, random
from numpyro.distributions import constraints
from numpyro.infer.elbo import ELBO

from numpyro_smc.engines.particles import Recursion, run, score_terms
from numpyro_smc.engines.path import AnnealedPath, Schedule
from numpyro_smc.engines.transitions import KERNELS, Kernel
from numpyro_smc.programs.arguments import check_positive
from numpyro_smc.programs.density import Pair, Params, Program
from numpyro_smc.programs.guide_target import GuideTarget
from numpyro_smc.programs.resample import Decision, build
from numpyro_smc.programs.resampling import Scheme, resolve
from numpyro_smc.reports.annealing import AnnealingDiagnostics

LEARNABLE = ("betas", "step_size", "mass", "refreshment")
PREFIX = "annealing$"


class DSMCS(ELBO):
    r"""Differentiable sequential Monte Carlo sampler from a guide to its model [1], as a bound on the log evidence.

    :math:`N` particles start as draws from the guide and take :math:`K` gradient-based transitions along
    :math:`\gamma_k = q^{1-\beta_k} p^{\beta_k}` in unconstrained space; incremental weights :math:`i_k` give

    .. math:: \log \hat Z = \sum_k \log \tfrac1N \sum_n W_{k-1}^n e^{i_k^n}, \qquad
       L = \mathbb E[\log \hat Z] \le \log p(x),

    and the weights :math:`W` are made equal by resampling where their effective sample size has fallen. The sampler's
    own parameters (``learn``) are declared by :meth:`wrap`, which the guide must pass through: ``SVI`` trains them
    together with guide and model. Plates that enclose every site of both are independent problems.

    Value: unbiased for :math:`L`. Gradient: pathwise through all transitions. Without resampling (:class:`DAIS`)
    unbiased for :math:`L`. With it, ``resampling_gradient="stop_gradient"`` follows :math:`\nabla\log p(x)` up to
    O(1/N): the recommended choice; ``"score_rb"`` with a fixed schedule is unbiased and noisy; ``"none"`` drops a term
    and is biased enough to destroy learned betas (the published code's choice, for comparison only).
    Cost: K gradients of model and guide per particle, the gradient of the bound three to four times that; memory O(NK),
    or as ``remat`` says.

    :param num_particles: :math:`N \ge 1`.
    :param num_transitions: :math:`K \ge 0`; zero gives the importance-weighted bound.
    :param kernel: ``"uha"`` (momentum, one gradient a transition), ``"uha_kdk"`` (two) or ``"ula"`` (no momentum).
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
        if num_transitions < 0:
            raise ValueError(f"{user}: num_transitions must not be negative, got {num_transitions}.")
        if kernel not in KERNELS:
            raise ValueError(f"{user}: unknown kernel {kernel!r}; there are {sorted(KERNELS)}.")
        if resample != "never" and not resolve(resampler).unbiased:
            raise ValueError(
                f"{user}: the {resolve(resampler).name} scheme is biased, so the loss would not be a bound. Use "
                f"'systematic', or another scheme that numpyro_smc.resampling marks unbiased."
            )
        if unknown := set(learn) - set(LEARNABLE):
            raise ValueError(f"{user}: learn names {sorted(unknown)}; the sampler has {list(LEARNABLE)}.")
        if remat not in ("step", "sqrt", None):
            raise ValueError(f"{user}: remat must be 'step', 'sqrt' or None, got {remat!r}.")
        step_size = step_size_max / 2.0 if step_size is None else step_size
        if not 0.0 < step_size < step_size_max:
            raise ValueError(f"{user}: step_size must be in (0, step_size_max={step_size_max}), got {step_size}.")
        if not 0.01 < refreshment < 0.99 or not mass > 0.0:
            raise ValueError(
                f"{user}: refreshment must be in (0.01, 0.99) and mass positive, got {refreshment} and {mass}."
            )
        super().__init__(num_particles=int(num_particles))
        self.num_transitions, self.num_mc, self.plates = int(num_transitions), num_mc, plates
        self.kernel: Kernel = KERNELS[kernel]
        self.learn = tuple(name for name in LEARNABLE if name in learn)
        self.step_size, self.step_size_max, self.mass, self.refreshment = step_size, step_size_max, mass, refreshment
        self.resampling = build(resampler, resample, ess_threshold, resampling_gradient)
        self.resampling_gradient = resampling_gradient
        self.remat: bool | str = "sqrt" if remat == "sqrt" else remat == "step"

    def wrap(self, guide: Program) -> Program:
        """The same guide, which also declares the sampler's parameters to :class:`~numpyro.infer.SVI`."""

        def annealed_guide(*args: Any, **kwargs: Any) -> Any:
            for name, (value, constraint) in self._declared().items():
                numpyro.param(name, value, constraint=constraint)
            return guide(*args, **kwargs)

        return annealed_guide

    def schedule(self, params: Params) -> Schedule:
        """The path's numbers at given parameters."""
        missing = [name for name in self._declared() if name not in params]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: the sampler's parameters {missing} are not declared. Wrap the guide: "
                f"SVI(model, loss.wrap(guide), optim, loss)."
            )
        values = self._initial() | {name.removeprefix(PREFIX): params[name] for name in self._declared()}
        zero, one = jnp.zeros(1), jnp.ones(1)
        inner = jnp.cumsum(jax.nn.softmax(values["betas"]))[:-1]
        betas = jnp.concatenate([zero, inner, one]) if self.num_transitions else zero
        return Schedule(betas, values["step_size"], values["mass"], values["refreshment"])

    def loss_with_mutable_state(  # type: ignore[override]
        self, rng_key: Array, param_map: Params, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        run_key, path = self._path(rng_key, param_map, model, guide, args, kwargs)

        def bound(rng_key: Array) -> Array:
            return self._bound(run(rng_key, path, self.num_particles, self.resampling, remat=self.remat))

        values = jax.vmap(bound)(random.split(run_key, self.num_mc))
        return {"loss": -jnp.sum(jnp.mean(values, axis=0)) * path.target.plates.scale, "mutable_state": None}

    def diagnostics(
        self, rng_key: Array, params: Params, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> AnnealingDiagnostics:
        """What ``num_mc`` runs of the sampler do at given parameters, per transition.

        :param params: constrained values, as :meth:`~numpyro.infer.svi.SVI.get_params` gives them.
        """
        run_key, path = self._path(rng_key, params, model, guide, args, kwargs)

        def one(rng_key: Array) -> tuple[Array, Array, Array]:
            recursion = run(rng_key, path, self.num_particles, self.resampling)
            return recursion.log_evidence, recursion.steps.ess, recursion.steps.resampled

        runs = jax.vmap(one)(random.split(run_key, self.num_mc))
        return AnnealingDiagnostics(*runs, path.schedule, self.num_particles)

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
        """
        if method not in ("weighted", "final", "initial"):
            raise ValueError(f"{type(self).__name__}: method must be 'weighted', 'final' or 'initial', got {method!r}.")
        run_key, path = self._path(rng_key, params, model, guide, args, kwargs)

        def sample(rng_key: Array) -> dict[str, Array]:
            run_key, choice_key = random.split(rng_key)
            if method == "initial":
                return path.target.values(path.target.draw(run_key, jnp.asarray(0)))
            state = run(run_key, path, self.num_particles, self.resampling).state
            log_weights = state.log_weights if method == "weighted" else jnp.zeros_like(state.log_weights)
            chosen = random.categorical(choice_key, log_weights, axis=0)
            position = state.cloud.particles[0].position
            rank = chosen.ndim

            def pick(leaf: Array) -> Array:
                index = chosen.reshape(1, *chosen.shape, *(1,) * (leaf.ndim - 1 - rank))
                return jnp.take_along_axis(leaf, index, axis=0)[0]

            return path.target.values({name: pick(leaf) for name, leaf in position.items()})

        return lax.map(sample, random.split(run_key, num_samples))

    def _path(
        self, rng_key: Array, params: Params, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Array, AnnealedPath]:
        plate_key, program_key, run_key = random.split(rng_key, 3)
        pair = Pair(model, guide, args, kwargs, plate_key, self.plates, type(self).__name__, self.num_particles)
        return run_key, AnnealedPath(GuideTarget(pair, params, program_key), self.kernel, self.schedule(params))

    def _bound(self, recursion: Recursion) -> Array:
        value = recursion.log_evidence
        if self.resampling_gradient.startswith("score"):
            surrogate = score_terms(recursion, future_only=self.resampling_gradient == "score_rb")
            value = value + (surrogate - lax.stop_gradient(surrogate))
        return value

    def _initial(self) -> dict[str, Array]:
        num = self.num_transitions
        return {
            "betas": jnp.zeros(num),
            "step_size": jnp.full(num, self.step_size),
            "mass": jnp.asarray(self.mass),
            "refreshment": jnp.asarray(self.refreshment),
        }

    def _declared(self) -> dict[str, tuple[Array, Any]]:
        support = {
            "betas": constraints.real,
            "step_size": constraints.interval(1e-5 * self.step_size_max, self.step_size_max),
            "mass": constraints.positive,
            "refreshment": constraints.interval(0.01, 0.99),
        }
        initial = self._initial()
        return {PREFIX + name: (initial[name], support[name]) for name in self.learn if self.num_transitions}


class DAIS(DSMCS):
    r"""Differentiable annealed importance sampling [1]: :class:`DSMCS` without resampling.

    .. math:: L = \mathbb E\Big[\log \tfrac1N \sum_n \exp \sum_k i_k^n\Big] \le \log p(x).

    Value and gradient: unbiased for :math:`L`. Other arguments, cost and errors: see :class:`DSMCS`.

    :param num_particles: :math:`N \ge 1`.
    :param num_transitions: :math:`K \ge 0`.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro.infer.autoguide import AutoDiagonalNormal
        >>> from numpyro_smc import DAIS
        >>> def model(y):
        ...     loc = numpyro.sample("loc", dist.Normal(0.0, 2.0))
        ...     numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> loss = DAIS(num_particles=4, num_transitions=3)
        >>> svi = SVI(model, loss.wrap(AutoDiagonalNormal(model)), numpyro.optim.Adam(0.01), loss)
        >>> result = svi.run(random.key(0), 5, 1.3, progress_bar=False)

    **References**

    1. *Differentiable Annealed Importance Sampling and the Perils of Gradient Noise*, G. Zhang et al. (2021)
    """

    def __init__(self, num_particles: int, num_transitions: int, **options: Any) -> None:
        for name in ("resample", "resampler", "ess_threshold", "resampling_gradient"):
            if name in options:
                raise ValueError(f"DAIS: it does not resample, so it has no {name}. Use DSMCS.")
        super().__init__(num_particles, num_transitions, resample="never", resampling_gradient="none", **options)
