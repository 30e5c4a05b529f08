r"""Particle Gibbs: the path of a sequence model by conditional SMC, its parameters by any kernel given the path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import HMC, NUTS
from numpyro.infer.gibbs import Gibbs, GibbsState, with_conditioning
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_smc.kernels.conditional_smc import ConditionalSMC
from numpyro_smc.programs.arguments import check_callable, named
from numpyro_smc.programs.inputs import check_arrays, check_program
from numpyro_smc.programs.pinned import Path, path_sites
from numpyro_smc.programs.reading import read_sequence
from numpyro_smc.programs.sequence import Program
from numpyro_smc.programs.supports import Supported, check_bijection, log_prob
from numpyro_smc.programs.tracing import TRACING
from numpyro_smc.programs.unconstrained import FreeOfImproper, is_improper


class ParticleGibbs(Gibbs):
    r"""Joint posterior of a sequence model's parameters and path: conditional SMC for the path, then a kernel for the
    parameters given the path [1, 2].

    .. math:: x' \sim K_{\text{cSMC}}(x, \cdot \mid y, \theta), \qquad \theta' \sim K(\theta, \cdot \mid x', y).

    It is NumPyro's composite ``Gibbs`` of two blocks, :class:`~numpyro_smc.ConditionalSMC` and the parameter kernel,
    and works as they do: ``MCMC`` with any ``chain_method``, warm-up adaptation, ``extra_fields`` such as
    ``"block_states.0.renewed"`` and ``"block_states.1.accept_prob"``, ArviZ. For other blocks, other orders or several
    blocks of parameters write ``Gibbs([...])`` with :class:`~numpyro_smc.ConditionalSMC` yourself.

    Exact for every number of particles N of two or more: N and the schedule decide only how fast it mixes. Parameters
    that the path determines well (small noise scales) mix slowly however good the path's update is: sample them with
    :class:`~numpyro_smc.ParticleMetropolis`, which does not condition on the path.
    Cost: one filter pass (with ancestor sampling N more transition densities a step) and one transition of the
    parameter kernel, whose every gradient runs through the T steps of the program.

    :param model: a NumPyro model with one ``scan`` and latents with priors that its steps use.
    :param num_particles: N, two or more.
    :param parameter_kernel: a NumPyro kernel built on the same model; ``NUTS(model)`` by default.
    :param options: those of :class:`~numpyro_smc.ConditionalSMC`: ``ancestor_sampling``, ``backward_sampling``,
        ``guide``, ``params``, ``resampler``, ``resample``, ``ess_threshold``.
    :raises ValueError: for options that :class:`~numpyro_smc.ConditionalSMC` refuses; when run, for a model without
        global latents, for a path in ``init_params`` that is not whole or has probability zero, and from NumPyro for
        discrete parameters that the parameter kernel cannot take.

    ``init_params`` of ``MCMC.run`` are unconstrained for parameters of Hamiltonian kernels, as ever, and the path's
    own values for its sites; a path is drawn by a filter where none is given.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import MCMC
        >>> from numpyro_smc import ParticleGibbs
        >>> def model(y):
        ...     phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(phi * x, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> mcmc = MCMC(ParticleGibbs(model, 20), num_warmup=20, num_samples=20, progress_bar=False)
        >>> mcmc.run(random.key(0), jnp.array([0.5, 0.1, -0.3]))
        >>> {name: value.shape for name, value in mcmc.get_samples().items()}
        {'phi': (20,), 'x': (20, 3)}

    **References**

    1. *Particle Markov chain Monte Carlo methods*, C. Andrieu, A. Doucet, R. Holenstein (2010)
    2. *Particle Gibbs with ancestor sampling*, F. Lindsten, M. Jordan, T. Schön (2014)
    """

    def __init__(
        self,
        model: Program,
        num_particles: int = 100,
        *,
        parameter_kernel: MCMCKernel | Callable[[Program], MCMCKernel] | None = None,
        **options: Any,
    ) -> None:
        # Enumeration is for other algorithms: the states of a path are sampled here.
        unmarked = Supported(handlers.infer_config(model, config_fn=_unmarked))
        with named("ParticleGibbs"):
            path_kernel = ConditionalSMC(unmarked, num_particles, **options)
        kernel = NUTS if parameter_kernel is None else parameter_kernel
        if not isinstance(kernel, MCMCKernel):
            check_callable("ParticleGibbs", model=model, parameter_kernel=kernel)
            kernel = kernel(model)
        if getattr(kernel, "model", None) is not model:
            raise ValueError(
                "ParticleGibbs: the parameter kernel is built on another model. Build it on the model that is given "
                "to ParticleGibbs, as in ParticleGibbs(model, parameter_kernel=NUTS(model)), or pass "
                "parameter_kernel=NUTS."
            )
        self._names: tuple[str, ...] = ()
        super().__init__([(path_kernel, self._path_names), (kernel.wrap_model(lambda _: unmarked), None)])

    @property
    def _path_kernel(self) -> ConditionalSMC:
        return self._kernels[0]  # type: ignore[return-value]

    def _path_names(self, model_trace: Any) -> tuple[str, ...]:
        return self._names

    def init(
        self,
        rng_key: Array,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> GibbsState:
        """Parameters by the parameter kernel's own initialisation, and a path by a filter at these."""
        check_arrays("ParticleGibbs", (model_args, model_kwargs))
        path_kernel = self._path_kernel
        check_program(
            "ParticleGibbs", self._model, path_kernel._guide, path_kernel.params, model_args, model_kwargs or {}
        )
        one_key = rng_key if is_prng_key(rng_key) else rng_key[0]
        self._names, parameters = self._read_names(one_key, model_args, model_kwargs or {})
        if not parameters:
            raise ValueError(
                "ParticleGibbs: the model has no global latents (with priors, used by the scan's steps), so there are "
                "no parameters for the parameter kernel. Use ConditionalSMC(model, num_particles) for the path alone."
            )
        params, path = self._split_path(init_params)

        def one(rng_key: Array, params: Any) -> GibbsState:
            # The parameter kernel looks for a start given a path, and a path of the prior may explain nothing.
            rng_key, path_key = random.split(rng_key)
            drawn = self._draw_path(path_key, params or {}, model_args, model_kwargs or {})
            return Gibbs.init(self, rng_key, num_warmup, (params or {}) | drawn, model_args, model_kwargs)

        if is_prng_key(rng_key):
            state = one(rng_key, params)
        else:
            # A single program for all chains; None has no leaves to map over.
            state = jax.vmap(one)(rng_key, params)
            self._sample_fn = self._sample_chains
        if path is not None:
            state = self._start_at(state, path, model_args, model_kwargs or {})
        else:
            _check_explained(state.block_states[0].log_mean_weights)
        return state

    def _draw_path(self, rng_key: Array, params: Any, args: Any, kwargs: Any) -> Path:
        """A path by a filter at parameters of the prior, or at those that are given."""
        read_key, path_key = random.split(rng_key)
        model, given = self._path_kernel.model, self._path_kernel.params
        free = FreeOfImproper(model)
        sequence = read_sequence(read_key, free, None, given, args, kwargs, user="ParticleGibbs", given_globals=False)
        for name in sequence.global_values.keys() - params.keys() - given.keys():
            if is_improper(sequence.model.prefix[name]):
                raise ValueError(
                    f"ParticleGibbs: the prior of site '{name}' is improper (ImproperUniform, or masked), so no value "
                    f"can be drawn from it to start from. Give it a proper prior, or a start: "
                    f"init_params={{'{name}': ...}}, unconstrained."
                )
        values = {name: value for name, value in sequence.global_values.items() if name not in given}
        for name in params.keys() & values.keys():
            is_unconstrained = isinstance(self._kernels[1], HMC)
            if is_unconstrained:
                check_bijection(sequence.model.prefix[name], "ParticleGibbs")
            support = biject_to(sequence.model.prefix[name]["fn"].support) if is_unconstrained else _identity
            values[name] = support(jnp.asarray(params[name]))
        state = self._path_kernel.init(path_key, 0, None, args, with_conditioning(kwargs, values))
        _check_explained(state.log_mean_weights)
        return state.z

    def _sample_chains(self, state: GibbsState, model_args: Any, model_kwargs: Any) -> GibbsState:
        return jax.vmap(lambda one: self._sample_one(one, model_args, model_kwargs))(state)

    def _read_names(self, rng_key: Array, args: Any, kwargs: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the path's sites, and of the parameters."""

        names: list[Any] = []

        def read(rng_key: Array) -> Array:
            model, params = self._path_kernel.model, self._path_kernel.params
            sequence = read_sequence(
                rng_key, FreeOfImproper(model), None, params, args, kwargs, user="ParticleGibbs", given_globals=False
            )
            initial, steps = path_sites(sequence)
            names.append(((*initial, *steps), tuple(n for n in sequence.global_values if n not in params)))
            return rng_key

        jax.eval_shape(read, rng_key)
        return names[0]

    def _split_path(self, init_params: Any) -> tuple[Any, Any]:
        """``init_params`` without the path, and the path if it is there."""
        given = dict(init_params or {})
        path = {name: jnp.asarray(given.pop(name)) for name in self._names if name in given}
        missing = [name for name in self._names if name not in path]
        if path and missing:
            raise ValueError(
                f"ParticleGibbs: init_params hold a part of the path, {sorted(path)}, without {missing}. Give the "
                f"whole path, or none of it: it is then drawn by a filter."
            )
        return given or None, path or None

    def _start_at(self, state: GibbsState, path: Path, args: Any, kwargs: Any) -> GibbsState:
        """The state with another path, checked."""
        block = state.block_states[0]
        for name, value in path.items():
            if value.shape != block.z[name].shape:
                raise ValueError(
                    f"ParticleGibbs: init_params give the path of '{name}' with shape {value.shape}; it must have "
                    f"shape {block.z[name].shape} (chains first where there are several, then time)."
                )
        path = {name: value.astype(block.z[name].dtype) for name, value in path.items()}
        state = state._replace(z=state.z | path, block_states=(block._replace(z=path), *state.block_states[1:]))
        if not _is_traced(state):
            self._check_support(state, args, kwargs)
        refresh = self.refresh if is_prng_key(state.rng_key) else jax.vmap(self.refresh, (0, None, None))
        return refresh(state, args, kwargs)

    def refresh(self, state: GibbsState, model_args: Any, model_kwargs: Any) -> GibbsState:
        """Both blocks at the present values of each other's and of other kernels' sites: within a sweep NumPyro's
        composite refreshes only after what moved in it."""
        values = self.get_constrain_fn(model_args, model_kwargs)(state.z)
        states = []
        for kernel, names, of_block in zip(self._kernels, self._sites, state.block_states, strict=True):
            others = {name: value for name, value in values.items() if name not in names}
            states.append(kernel.refresh(of_block, model_args, with_conditioning(model_kwargs, others)))
        return state._replace(block_states=tuple(states))

    def _check_support(self, state: GibbsState, args: Any, kwargs: Any) -> None:
        constrain = self.get_constrain_fn(args, kwargs)

        def log_densities(z: Any) -> dict[str, Array]:
            given = handlers.substitute(handlers.seed(self._model, random.key(0)), data=constrain(z))
            with TRACING:
                trace = handlers.trace(given).get_trace(*args, **kwargs)
            return {name: jnp.sum(log_prob(s["fn"], s["value"])) for name, s in trace.items() if s["type"] == "sample"}

        each = log_densities if is_prng_key(state.rng_key) else jax.vmap(log_densities)
        for name, value in each(state.z).items():
            if not jnp.isfinite(value).all():
                raise ValueError(
                    f"ParticleGibbs: the path in init_params has log density {value} at site '{name}': it lies outside "
                    f"the support, or does not fit the initial parameters. Give another path, or none."
                )


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _check_explained(log_mean_weights: Array) -> None:
    if not _is_traced(log_mean_weights) and not jnp.isfinite(log_mean_weights).all():
        raise FloatingPointError(
            "ParticleGibbs: at the initial parameters no particle explains the data, so there is no path to start "
            "from. Give better parameters in init_params, more particles, or a guide."
        )


def _identity(value: Array) -> Array:
    return value


def _unmarked(site: dict[str, Any]) -> dict[str, Any]:
    return {"enumerate": ""} if site["infer"].get("enumerate") else {}
