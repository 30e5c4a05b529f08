r"""Conditional SMC: a Markov kernel for the latent path of a sequence model, given everything else.

N particles are filtered, of which particle 0 is held on the current path :math:`x^\star`; then a new path is chosen
among their lineages. With :math:`W_t` the weights, the past of particle 0 is

.. math:: \Pr(a_t = i) \propto W_{t-1}^i\, p(x^\star_t \mid x^i_{t-1})\, p(y_t \mid x^i_{t-1}, x^\star_t)

with ancestor sampling, and itself without; its slot's ancestor being given, the others are drawn by the scheme's law
conditional on it. Every one of these leaves :math:`p(x_{0:T-1} \mid y, \theta)` invariant for any N of two or more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_smc.engines.particles import Move, ParticleState, Recursion, run
from numpyro_smc.filtering.smoothing.genealogy import draw_final, follow, take, trace_back
from numpyro_smc.filtering.smoothing.kernel import BackwardKernel, Step, steps_of
from numpyro_smc.programs.arguments import check_callable, check_positive, named
from numpyro_smc.programs.inputs import as_data, as_params, check_program
from numpyro_smc.programs.kernel_program import KernelProgram
from numpyro_smc.programs.pinned import Path, path_sites, pin
from numpyro_smc.programs.reading import read_sequence
from numpyro_smc.programs.replay import depends_on_past, transition_density
from numpyro_smc.programs.resample import Decision, build, no_conditional
from numpyro_smc.programs.resampling import Scheme, resolve
from numpyro_smc.programs.sequence import Program, Sequence
from numpyro_smc.programs.tracing import TRACING


class ConditionalSMCState(NamedTuple):
    """A path, and what the last sweep did.

    - **z** - the path by site, ``[T, ...]`` (``[...]`` for sites before the scan), in its own support.
    - **log_mean_weights** - log of the product over time of the mean weights: of the first, unconditional sweep the
      log evidence estimate; afterwards a diagnostic, biased upwards by the reference.
    - **ess** - smallest effective sample size of the steps. **renewed** - at which steps the path changed, ``[T]``.
    - **rng_key** - for the next sweep.
    """

    z: Path
    log_mean_weights: Array
    ess: Array
    renewed: Array
    rng_key: Array


def _without_twists(state: ParticleState) -> Array:
    """Log weights of the filtering distribution, up to a constant."""
    return state.log_weights - state.cloud.particles.get("log twist", 0.0)


def ancestor_pivots(sequence: Sequence) -> Callable[[Array, Array, Any, ParticleState], Array]:
    """Ancestor sampling: the reference's past is drawn anew wherever the cloud is resampled."""

    def pivots(rng_key: Array, t: Array, inputs: Any, state: ParticleState) -> Array:
        particles, shared = state.cloud

        def density(past: Any) -> Array:
            return transition_density(sequence, t, inputs["model"], past, shared, inputs["steering"])

        return draw_final(rng_key, _without_twists(state) + jax.vmap(density)(particles), 1)[0]

    return pivots


def reference_pivots(rng_key: Array, t: Array, inputs: Any, state: ParticleState) -> Array:
    """The reference descends from itself."""
    return jnp.zeros(state.log_weights.shape[1:], jnp.int32)


class _Kept(NamedTuple):
    """What a sweep keeps of its run, as smoothers read the history of a filter."""

    ancestors: Array
    initial: Any
    steps: Any


class Sweep(NamedTuple):
    """How sweeps are made: options of :class:`ConditionalSMC`, checked."""

    num_particles: int
    resample: Any
    ancestor_sampling: bool
    backward_sampling: bool

    def __call__(self, rng_key: Array, sequence: Sequence, reference: Path | None) -> tuple[Path, Recursion]:
        """A new path, drawn unconditionally where there is no reference, and the run that it was chosen from."""
        run_key, path_key = random.split(rng_key)
        pivots = None
        if reference is not None:
            pin(sequence, reference)
            pivots = ancestor_pivots(sequence) if self.ancestor_sampling else reference_pivots
        initial_names, step_names = path_sites(sequence)
        names = {*initial_names, *step_names}

        def keep(state: ParticleState, move: Move) -> Any:
            kept: dict[str, Any] = {"values": {name: move.values[name] for name in names & move.values.keys()}}
            if self.backward_sampling:
                kept |= {"cloud": state.cloud, "log_weights": _without_twists(state)}
            return kept

        recursion = run(run_key, sequence, self.num_particles, self.resample, keep=keep, pivots=pivots)
        kept = _Kept(recursion.steps.ancestors, recursion.kept, recursion.steps.history)
        if self.backward_sampling:
            indices = _backward(path_key, sequence, recursion, kept)
        else:
            indices = trace_back(kept.ancestors, draw_final(path_key, recursion.state.log_weights, 1))
        return jax.tree.map(lambda leaf: leaf[0], follow(kept, *indices)), recursion


def _backward(rng_key: Array, sequence: Sequence, recursion: Recursion, kept: _Kept) -> Any:
    """Choose parents anew, going backwards, at the steps that began by resampling: at others a particle's parent is not
    random."""
    kernel = BackwardKernel(sequence, steps_of(sequence, kept), recursion.state.log_weights)

    def back(carry: tuple[Array, Array], inputs: tuple[Step, Array]) -> tuple[tuple[Array, Array], Array]:
        rng_key, index = carry
        step, resampled = inputs
        rng_key, key = random.split(rng_key)
        future = jax.tree.map(lambda leaf: leaf[0], kernel.future(step, index))
        drawn = draw_final(key, kernel.log_probabilities(step, future), 1)
        return (rng_key, jnp.where(resampled, drawn, take(step.ancestors, index, kernel.rank))), index

    final_key, rng_key = random.split(rng_key)
    last = draw_final(final_key, kernel.final_log_weights, 1)
    inputs = kernel.steps, recursion.steps.resampled
    (_, first), path = lax.scan(back, (rng_key, last), inputs, reverse=True)
    return first, path


class ConditionalSMC(MCMCKernel):
    r"""Conditional SMC as an MCMC kernel for the path of a sequence model, its parameters being given [1, 2, 3].

    Alone it samples :math:`p(x_{0:T-1} \mid y, \theta)` of a model without global latents, or with these in
    ``params``. As a block of NumPyro's ``Gibbs`` it updates the path beside any other blocks: all of them must be built
    on the same model, and the path's sites named, ``Gibbs([(ConditionalSMC(model, 50), ["x"]), (NUTS(model), None)])``;
    :class:`~numpyro_smc.ParticleGibbs` does this for you.

    The first state is drawn by an unconditional filter. Each sweep leaves the posterior of the path invariant for
    every N of two or more, scheme with a conditional version, schedule, guide and twist. Without ancestor or backward
    sampling the lineages of long series coalesce on the reference, so its early part hardly ever changes
    (``renewed``); N must then grow with T. **Adaptive resampling** (``"ess"``): weights of particles that were not
    resampled go on multiplying, the reference's like all others'; ancestor and backward sampling act only at steps that
    resample, because at others the parent of a particle is not random. So ``"always"`` renews paths most.

    Cost: O(NT) a sweep: a filter's; with ancestor or backward sampling N more transition densities a step.
    Memory O(NT).

    :param model: a NumPyro model with one ``scan``.
    :param num_particles: N, two or more.
    :param ancestor_sampling: draw the reference's ancestors anew.
    :param backward_sampling: choose the new path backwards among all particles instead; turns ancestor sampling off.
    :param guide, resampler, ess_threshold: as for :class:`~numpyro_smc.ParticleFilter`. **resample** - ``"always"``,
        ``"ess"``, or a function; ``"never"`` gives importance sampling with the reference among the draws.
    :param params: values of ``param`` sites (a guide's trained ones), and of latents to condition on.
    :raises ValueError: for fewer than two particles, and schemes without a conditional version; when run, with ancestor
        or backward sampling, for a carry that the step's own latents do not determine.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import MCMC
        >>> from numpyro_smc import ConditionalSMC
        >>> def model(y):
        ...     def step(x, y_t):
        ...         x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        ...         return x, None
        ...     scan(step, 0.0, y)
        >>> mcmc = MCMC(ConditionalSMC(model, 20), num_warmup=10, num_samples=100, progress_bar=False)
        >>> mcmc.run(random.key(0), jnp.array([0.5, 0.1, -0.3]))
        >>> mcmc.get_samples()["x"].shape
        (100, 3)

    **References**

    1. *Particle Markov chain Monte Carlo methods*, C. Andrieu, A. Doucet, R. Holenstein (2010)
    2. *Particle Gibbs with ancestor sampling*, F. Lindsten, M. Jordan, T. Schön (2014)
    3. *On particle Gibbs sampling*, N. Chopin, S. Singh (2015)
    """

    sample_field = "z"  # type: ignore[assignment]

    def __init__(
        self,
        model: Program,
        num_particles: int = 100,
        *,
        ancestor_sampling: bool = True,
        backward_sampling: bool = False,
        guide: Program | None = None,
        params: dict[str, Any] | None = None,
        resampler: str | Scheme = "systematic",
        resample: str | Decision = "always",
        ess_threshold: float = 0.5,
    ) -> None:
        user = type(self).__name__
        check_callable(user, model=model, **({} if guide is None else {"guide": guide}))
        check_positive(user, num_particles=num_particles)
        if num_particles < 2:
            raise ValueError(
                f"{user}: num_particles is {num_particles}. One particle is held on the current path, "
                f"so there must be at least one more: use num_particles of two or more."
            )
        with named(user):
            scheme = resolve(resampler)
            resample_fn = build(scheme, resample, ess_threshold)
        if scheme.conditional is None:
            raise ValueError(f"{user}: {no_conditional(scheme)}")
        self._model, self._guide = model, guide
        self.params = as_params(user, params)
        self._sweep = Sweep(
            int(num_particles),
            resample_fn,
            ancestor_sampling and not backward_sampling,
            backward_sampling,
        )
        # MCMC initialises again, although it is given a state, unless there is something of this name.
        self._sample_fn = self.sample

    @property
    def model(self) -> Program:
        return KernelProgram(self._model, self.params) if self.params else self._model

    def read(self, rng_key: Array, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Sequence:
        """The program as the recursion sees it, checked for what conditional SMC needs."""
        user = type(self).__name__
        args, kwargs = as_data(user, (args, kwargs or {}))
        sequence = read_sequence(rng_key, self._model, self._guide, self.params, args, kwargs, user=user)
        if not path_sites(sequence)[1]:
            raise ValueError(f"{user}: the scan's steps have no latent sites, so there is no path to sample.")
        if (self._sweep.ancestor_sampling or self._sweep.backward_sampling) and depends_on_past(sequence):
            raise ValueError(
                f"{user}: ancestor and backward sampling need a carry that the step's own latents determine, but this "
                f"model's new carry also depends on the old one (lags, recurrent networks, reparameterised "
                f"innovations). Use ancestor_sampling=False, and more particles."
            )
        return sequence

    def init(
        self,
        rng_key: Array,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> ConditionalSMCState:
        """A path drawn by an unconditional filter. ``init_params``, which ``Gibbs`` fills with prior draws, are not
        used."""
        del num_warmup, init_params
        model_args, model_kwargs = as_data(type(self).__name__, (model_args, model_kwargs or {}))
        check_program(type(self).__name__, self._model, self._guide, self.params, model_args, model_kwargs)
        if not is_prng_key(rng_key):
            return jax.vmap(lambda key: self.init(key, 0, None, model_args, model_kwargs))(rng_key)
        rng_key, read_key, key = random.split(rng_key, 3)
        path, recursion = self._sweep(key, self.read(read_key, model_args, model_kwargs), None)
        renewed = jnp.ones_like(recursion.steps.resampled)
        return self._state(path, recursion, renewed, rng_key)

    def sample(
        self, state: ConditionalSMCState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> ConditionalSMCState:
        """One sweep."""
        if not is_prng_key(state.rng_key):
            return jax.vmap(lambda one: self.sample(one, model_args, model_kwargs))(state)
        rng_key, read_key, key = random.split(state.rng_key, 3)
        path, recursion = self._sweep(key, self.read(read_key, model_args, model_kwargs), state.z)
        shape = recursion.steps.resampled.shape
        changed = [
            jnp.any((path[name] != old).reshape(*shape, -1), axis=-1)
            for name, old in state.z.items()
            if name in recursion.steps.history["values"]
        ]
        return self._state(path, recursion, jnp.stack(changed).any(0), rng_key)

    def _state(self, path: Path, recursion: Recursion, renewed: Array, rng_key: Array) -> ConditionalSMCState:
        return ConditionalSMCState(path, recursion.log_evidence, recursion.steps.ess.min(0), renewed, rng_key)

    def refresh(self, state: ConditionalSMCState, model_args: Any, model_kwargs: Any) -> ConditionalSMCState:
        """The state itself: nothing in it depends on the values of other sites."""
        return state

    def wrap_model(self, wrapper: Callable) -> ConditionalSMC:
        """The same kernel for wrapped programs: the guide is conditioned on other sites as the model is."""
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        kernel._guide = None if self._guide is None else wrapper(self._guide)
        kernel._sample_fn = kernel.sample
        return kernel

    def get_constrain_fn(self, model_args: Any, model_kwargs: Any) -> Callable[[Path], Path]:
        return lambda z: z

    def postprocess_fn(self, model_args: Any, model_kwargs: Any) -> Callable[[Path], Path]:
        """The path with the deterministic sites of the model."""

        def with_deterministic(z: Path) -> Path:
            given = handlers.substitute(handlers.seed(self._model, random.key(0)), data=self.params | z)
            with TRACING:
                trace = handlers.trace(given).get_trace(*model_args, **(model_kwargs or {}))
            return z | {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}

        return with_deterministic

    def get_diagnostics_str(self, state: ConditionalSMCState) -> str:
        return f"path renewed at {float(jnp.mean(state.renewed)):.0%} of steps, lowest ESS {float(state.ess.min()):.1f}"
