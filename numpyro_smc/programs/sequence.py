"""A sequence model and its guide, read from NumPyro programs and handed out as a Feynman-Kac model for particles.

With initial latents :math:`x_{-1}`, steps :math:`t = 0..T-1`, a guide :math:`q` and log twists :math:`\\log r_t`, a particle's
log weight grows by

.. math:: \\log p(x_t \\mid x_{t-1}) + \\log p(y_t \\mid x_t) - \\log q(x_t \\mid x_{t-1}) + \\log r_t(x_t) - \\log r_{t-1}(x_{t-1}),

with :math:`r_t = 1` from the last observation on. Without a guide :math:`q = p` and the densities cancel exactly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers

from numpyro_smc.programs import path_guide
from numpyro_smc.programs.after_scan import AfterScan, read_after_scan
from numpyro_smc.programs.bootstrap import Bootstrap
from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.halves import Half, global_latents, read_half
from numpyro_smc.programs.scans import Fixed, Trace, run_prefix, run_step
from numpyro_smc.programs.sites import (
    BatchPlates,
    enclosing_plates,
    is_latent,
    is_observed,
    log_density,
    observed_elements,
    plate_indices,
    plate_scales,
    unmasked_value,
)

Program = Callable[..., Any]


class Cloud(NamedTuple):
    """The state of all particles.

    - **particles** - pytree with a leading particle axis (carries that differ between particles, their log twist).
    - **shared** - pytree of carry leaves that are the same for every particle (time counters, features of the data).
    """

    particles: Any
    shared: Any


class Move(NamedTuple):
    """What one step did.

    - **log_weights** - the increments of the log weights, ``[N, *batch]``.
    - **values** - site values of the step, each ``[N, ...]``.
    - **log_twist** - log twist of the new particles, ``[N, *batch]`` (zeros without a twist).
    - **log_score** - sum over non-reparameterised draws of their log density, ``[N, *batch]``.
    """

    log_weights: Array
    values: dict[str, Array]
    log_twist: Array
    log_score: Array


class Sequence:
    """A model with one scan, in lockstep with an optional guide. Use :func:`read_sequence` to make one."""

    def __init__(
        self,
        user: str,
        model: Half,
        guide: Half | None,
        path: Trace,
        guide_program: Callable[[], Any] | None,
        guide_prefix: Trace,
    ) -> None:
        self.user = user
        self.model = model
        self.guide = guide
        self.path = path
        self.guide_program = guide_program
        self.guide_prefix = guide_prefix
        self.length = model.scan.length
        self.after: AfterScan | None = None
        self.log_global_weight = jnp.asarray(0.0)
        self.global_values: dict[str, Array] = {}
        self.plates = BatchPlates()
        self.bound_scale = 1.0
        self.gradient_of_draws = "ignore"
        self.twisted = guide is not None and any(s["type"] == "twist" for s in guide.step_sites.values())
        self._look_ahead: Array | None = None

    # ---- facts ---------------------------------------------------------------------------------------------------

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the plates that enclose the whole program: independent problems."""
        return self.plates.shape

    @property
    def has_initial_weights(self) -> bool:
        """Whether the particles' weights can differ before the first step."""
        proposes = any(name in self.model.particle_latents for name in self.guide_prefix)
        return proposes or any(is_observed(site) for site in self.model.prefix.values())

    @property
    def proposes(self) -> bool:
        return self.guide_program is not None

    def discrete_sites(self) -> list[str]:
        """Drawn sites of the steps and the initial part that have no reparameterised sampler."""
        halves = [self.model] + ([self.guide] if self.guide is not None else [])
        names = [
            name
            for half in halves
            for name, site in half.step_sites.items()
            if is_latent(site) and not site["has_rsample"] and not site["given"]
        ]
        names += [
            name
            for trace in (self.model.prefix, self.guide_prefix)
            for name, site in trace.items()
            if is_latent(site) and not site["fn"].has_rsample and site.get("drawn", False)
        ]
        return sorted(set(names))

    @property
    def log_global_score(self) -> Array:
        """Log proposal density of the global draws that have no reparameterised sampler."""
        proposals = [self.guide_prefix[name] for name in self.global_values if name in self.guide_prefix]
        scores = [log_density(site, BatchPlates()) for site in proposals if not site["fn"].has_rsample]
        return sum(scores, start=jnp.asarray(0.0))

    def mutable_state(self) -> dict[str, Any] | None:
        """Values of ``numpyro.mutable`` sites after the program ran, or ``None`` when there are none."""
        state = {
            name: site["value"]
            for trace in (self.model.prefix, self.guide_prefix)
            for name, site in trace.items()
            if site["type"] == "mutable"
        }
        return state or None

    def bound(self, log_evidence: Array) -> Array:
        """The objective: per-problem log evidences summed, with the scales that were kept out of the weights."""
        return self.bound_scale * self.plates.scale * jnp.sum(log_evidence) + self.log_global_weight

    # ---- the particles ----------------------------------------------------------------------------------------------

    def init(self, rng_key: Array, num_particles: int) -> tuple[Cloud, Move]:
        """Draw the initial particles, with their first log weights."""
        particles, shared, move = jax.vmap(partial(self._init_one, rng_key), out_axes=(0, None, 0))(
            jnp.arange(num_particles)
        )
        return Cloud(particles, shared), move

    def step(self, rng_key: Array, t: Array, inputs: Any, cloud: Cloud, num_particles: int) -> tuple[Cloud, Move]:
        """Move every particle one step and weigh it.

        :param inputs: the step's slice of :meth:`inputs`.
        """
        particles, shared, move = jax.vmap(
            partial(self._step_one, rng_key, t, inputs), in_axes=(0, 0, None), out_axes=(0, None, 0)
        )(jnp.arange(num_particles), cloud.particles, cloud.shared)
        return Cloud(particles, shared), move

    def inputs(self) -> Any:
        """Everything a step receives besides its state, with leading time axis."""
        return {
            "model": self.model.scan.inputs(),
            "guide": None if self.guide is None else self.guide.scan.inputs(),
            "look ahead": self.look_ahead(),
        }

    def look_ahead(self) -> Array | None:
        """For each step and problem, whether any observation follows it: bool ``[T, *batch]`` (``None`` without twists)."""
        if not self.twisted:
            return None
        if self._look_ahead is None:
            observed = self._observed_per_step()
            later = jnp.flip(lax.cummax(jnp.flip(observed.astype(jnp.int32), 0), axis=0), 0)
            self._look_ahead = jnp.concatenate([later[1:], jnp.zeros_like(later[:1])]) > 0
        return self._look_ahead

    # ---- single steps, for smoothing and reports ----------------------------------------------------------------

    def step_latents(self) -> list[str]:
        """Names of the latent sites of a step."""
        return [name for name, site in self.model.step_sites.items() if is_latent(site)]

    def replay_step(
        self, t: Array, x: Any, particles: Any, shared: Any, values: dict[str, Array]
    ) -> tuple[Any, Any, Trace]:
        """One particle's model step with its latents given: the moving part of the new carry, the output, the trace."""
        plates = plate_indices(self.model.prefix)
        carry = self.model.merge(particles["model"], shared["model"])
        around = (CloudDraws(random.key(0)), Fixed(values, plates, "the path"))
        carry, output, trace = run_step(self.model.scan, t, carry, x, *around)
        return self.model.split(carry)[0], (output, carry), trace

    def transition_density(self, t: Array, x: Any, particles: Any, shared: Any, values: dict[str, Array]) -> Array:
        """Log density of a step's latents and observations given one particle of the step before, ``[*batch]``."""
        _, (output, carry), trace = self.replay_step(t, x, particles, shared, values)
        total = sum(
            (self._log_density(s) for s in trace.values() if s["type"] == "sample"), jnp.zeros(self.batch_shape)
        )
        if self.after is not None:
            total = total + self.after.log_density(t, output, carry, self.global_values, self.plates)
        return total

    def abstract_step(self, x: Any) -> Any:
        """Values of the first step's sites and carry for one particle, to ask what an input is used for."""
        zero = jnp.asarray(0)
        carry = jax.tree.unflatten(self.model.carry_tree, self.model.carry_leaves(self.model.scan.init))
        carry, _, trace = run_step(self.model.scan, zero, carry, x, CloudDraws(random.key(0)))
        return jax.tree.leaves(carry), [site["value"] for site in trace.values() if site["type"] == "sample"]

    def observed_values(self, t: int) -> dict[str, Array]:
        """Unmasked observed values of step ``t`` (for one particle's carry), masked ones replaced by zero."""
        step = jnp.asarray(t)
        carry = jax.tree.unflatten(self.model.carry_tree, self.model.carry_leaves(self.model.scan.init))
        x = jax.tree.map(lambda leaf: leaf[t], self.model.scan.inputs())
        _, _, trace = run_step(self.model.scan, step, carry, x, CloudDraws(random.key(0)))
        return {name: unmasked_value(site) for name, site in trace.items() if is_observed(site)}

    # ---- one particle -----------------------------------------------------------------------------------------------

    def _init_one(self, rng_key: Array, index: Array) -> tuple[Any, Any, Move]:
        guide_key, model_key = random.split(rng_key)
        log_weight = log_score = jnp.zeros(self.batch_shape)
        proposed = dict(self.global_values)
        guide_trace: Trace = {}
        state: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        if self.guide_program is not None:
            plates = plate_indices(self.guide_prefix)
            guide_trace, scan = run_prefix(
                self.guide_program, CloudDraws(guide_key, index), Fixed(self.global_values, plates)
            )
            guide_trace = {name: site for name, site in guide_trace.items() if name not in self.path}
            if self.guide is not None:
                assert scan is not None
                state["guide"], shared["guide"] = self.guide.split(scan.init)
        proposed |= {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
        model_trace, scan = run_prefix(
            self.model.program, CloudDraws(model_key, index), Fixed(proposed, plate_indices(self.model.prefix))
        )
        assert scan is not None
        state["model"], shared["model"] = self.model.split(scan.init)
        values = {}
        if self.proposes:
            self._check_all_proposed(model_trace, self.model.particle_latents)
        for name, site in model_trace.items():
            if name in self.global_values or site["type"] not in ("sample", "deterministic"):
                continue
            if not is_observed(site):
                values[name] = site["value"]
            if site["type"] == "sample":
                increment, score = self._log_weight_of(site, guide_trace.get(name))
                log_weight, log_score = log_weight + increment, log_score + score
        for name, site in guide_trace.items():
            if name not in model_trace and is_latent(site) and name not in self.global_values:
                log_weight = log_weight - self._log_density(site)
        self._check_carries(state)
        log_twist = jnp.zeros(self.batch_shape)
        if self.twisted:
            state["log twist"] = log_twist
        return state, shared, Move(log_weight, values, log_twist, log_score)

    def _step_one(self, rng_key: Array, t: Array, inputs: Any, index: Array, state: Any, shared: Any) -> Any:
        guide_key, model_key = random.split(rng_key) if self.proposes else (rng_key, rng_key)
        plates = plate_indices(self.model.prefix) | plate_indices(self.guide_prefix)
        guide_trace: Trace = {}
        new_state: dict[str, Any] = {}
        new_shared: dict[str, Any] = {}
        if self.guide is not None:
            carry = self.guide.merge(state["guide"], shared["guide"])
            carry, _, guide_trace = run_step(
                self.guide.scan, t, carry, inputs["guide"], CloudDraws(guide_key, index), Fixed({}, plates)
            )
            new_state["guide"], new_shared["guide"] = self.guide.split(carry)
        elif self.path:
            guide_trace = path_guide.draw_step(self.path, t, guide_key, index)
        proposed = {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
        carry = self.model.merge(state["model"], shared["model"])
        carry, output, model_trace = run_step(
            self.model.scan, t, carry, inputs["model"], CloudDraws(model_key, index), Fixed(proposed, plates)
        )
        new_state["model"], new_shared["model"] = self.model.split(carry)
        log_weight, log_score, values = self._weigh(model_trace, guide_trace)
        if self.after is not None:
            log_weight = log_weight + self.after.log_density(t, output, carry, self.global_values, self.plates)
        log_twist = jnp.zeros(self.batch_shape)
        if self.twisted:
            twists = sum(self._twist_value(site) for site in guide_trace.values() if site["type"] == "twist")
            log_twist = jnp.where(inputs["look ahead"], twists, 0.0)
            log_weight = log_weight + log_twist - state["log twist"]
            new_state["log twist"] = log_twist
        return new_state, new_shared, Move(log_weight, values, log_twist, log_score)

    def _weigh(self, model_trace: Trace, guide_trace: Trace) -> tuple[Array, Array, dict[str, Array]]:
        log_weight = log_score = jnp.zeros(self.batch_shape)
        values = {}
        if self.proposes:
            self._check_all_proposed(model_trace, frozenset(model_trace))
        for name, site in model_trace.items():
            if site["type"] == "deterministic" or (
                site["type"] == "sample" and (not site["is_observed"] or "given_until" in site)
            ):
                values[name] = site["value"]
            if site["type"] == "sample":
                increment, score = self._log_weight_of(site, guide_trace.get(name))
                log_weight, log_score = log_weight + increment, log_score + score
        for name, site in guide_trace.items():
            if is_latent(site) and name not in model_trace:
                if not site["infer"].get("is_auxiliary"):
                    raise ValueError(
                        f"{self.user}: the guide samples site '{name}' inside its scan, which the model does not. Remove it, or "
                        f"mark it infer={{'is_auxiliary': True}}."
                    )
                log_weight = log_weight - self._log_density(site)
        return log_weight, log_score, values

    def _log_weight_of(self, site: Any, proposal: Any) -> tuple[Array, Array]:
        """A model site's contribution to the log weight, and to the score of the draws."""
        nothing = jnp.zeros(self.batch_shape)
        if not site.get("drawn", False):
            log_p = self._log_density(site)
            if proposal is None or site["is_observed"]:
                return log_p, nothing
            log_q = self._log_density(proposal)
            return self._differentiable(log_p - log_q, log_q, proposal["fn"])
        if self.gradient_of_draws != "ignore" and not site["fn"].has_rsample:
            log_q = self._log_density(site)
            return self._differentiable(nothing, log_q, site["fn"], log_p=log_q)
        return nothing, nothing

    def _differentiable(
        self, increment: Array, log_q: Array, fn: Any, log_p: Array | None = None
    ) -> tuple[Array, Array]:
        if fn.has_rsample or self.gradient_of_draws == "ignore":
            return increment, jnp.zeros(self.batch_shape)
        if self.gradient_of_draws == "score":
            return increment, log_q
        # "weights": the draw is fixed, and its proposal density is a constant of the weight.
        kept = increment + (log_q - lax.stop_gradient(log_q))
        return kept, jnp.zeros(self.batch_shape)

    def _log_density(self, site: Any) -> Array:
        return log_density(site, self.plates, self.bound_scale)

    def _twist_value(self, site: Any) -> Array:
        if jnp.shape(site["value"]) != self.batch_shape:
            raise ValueError(
                f"Twist '{site['name']}' has shape {jnp.shape(site['value'])}; it must have the shape of the plates that enclose "
                f"the program, {self.batch_shape}. Sum or reshape its value."
            )
        return site["value"]

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _check_all_proposed(self, model_trace: Trace, names: frozenset[str]) -> None:
        for name in names:
            site = model_trace.get(name)
            if site is None or not is_latent(site) or not site.get("drawn", False):
                continue
            if name.endswith("_unobserved") and name.removesuffix("_unobserved") + "_observed" in model_trace:
                continue
            raise ValueError(
                f"{self.user}: the guide never samples site '{name}', which the model samples. Sample '{name}' in the guide (inside "
                f"its scan body if the model does), or use numpyro_smc.bootstrap(model) to propose from the model itself."
            )

    def _check_carries(self, state: dict[str, Any]) -> None:
        rank = len(self.batch_shape)
        for owner in ("model", "guide"):
            for leaf in state.get(owner, []):
                if rank and leaf.shape[:rank] != self.batch_shape:
                    raise ValueError(
                        f"{self.user}: plates {list(self.plates.names)} of shape {self.batch_shape} enclose the whole {owner}, so every "
                        f"carry of its scan that depends on latents must start with these axes; one has shape {leaf.shape}. Put the "
                        f"series on the leading axis of the carry."
                    )

    def _observed_per_step(self) -> Array:
        """Whether each step holds an unmasked observation, ``[T, *batch]``; conservative if masks depend on particles."""
        if not self.model.masks_are_fixed or self.after is not None:
            return jnp.ones((self.length, *self.batch_shape), bool)
        _, scan = run_prefix(self.model.program, CloudDraws(random.key(0)), Fixed(self.global_values))
        assert scan is not None
        moving, still = self.model.split(scan.init)

        def observe(still: list[Array], inputs: tuple[Array, Any]) -> tuple[list[Array], Array]:
            t, x = inputs
            carry, _, trace = run_step(
                self.model.scan, t, self.model.merge(moving, still), x, CloudDraws(random.key(0))
            )
            sites = [site for site in trace.values() if is_observed(site)]
            seen = [jnp.broadcast_to(observed_elements(site, self.plates), self.batch_shape) for site in sites]
            return self.model.split(carry)[1], jnp.any(jnp.stack(seen), axis=0) if seen else jnp.zeros(
                self.batch_shape, bool
            )

        return lax.scan(observe, still, (jnp.arange(self.length), self.model.scan.inputs()))[1]


def read_sequence(
    rng_key: Array,
    model: Program,
    guide: Program | None,
    params: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    user: str = "ParticleFilter",
    given_globals: bool = True,
) -> Sequence:
    """Read a sequence model and its guide. Global latents are drawn here, once.

    :param rng_key: key for the global latents.
    :param guide: an ordinary guide, a :class:`Bootstrap` guide, or ``None`` for the model's own transition.
    :param params: values of ``param`` sites, and of global latents that are given rather than proposed.
    :param user: name of the calling class, for error messages.
    :param given_globals: without a guide, whether global latents must be given (else they are drawn from their prior).
    :raises ValueError: naming the site, for every program that cannot be filtered.
    """
    if isinstance(guide, Bootstrap):
        guide, given_globals = None, False
    guide_key, model_key = random.split(rng_key)
    bound_model = handlers.substitute(partial(model, *args, **kwargs), data=params)
    params = jax.tree.map(jnp.asarray, params)
    guide_trace: Trace = {}
    guide_half, path, bound_guide = None, {}, None
    if guide is not None:
        bound_guide = handlers.substitute(partial(guide, *args, **kwargs), data=params)
        guide_trace, guide_scan = run_prefix(bound_guide, CloudDraws(guide_key))
        if guide_scan is not None:
            guide_half = read_half(bound_guide, guide_trace, guide_scan)
            read_after_scan(bound_guide, guide_half, args, kwargs, is_guide=True, user=user)
    proposed = {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
    prefix, scan = run_prefix(bound_model, CloudDraws(model_key), Fixed(proposed, plate_indices(guide_trace)))
    if scan is None:
        raise ValueError(
            f"{user}: the model has no numpyro.contrib.control_flow.scan (outside of plates and not hidden by a block handler), so "
            f"there is no sequence to filter. Write the steps as scan(step, init, xs); for other models use NumPyro's ELBOs."
        )
    model_half = read_half(bound_model, prefix, scan)
    if guide is not None and guide_half is None:
        path = path_guide.read_path(guide_trace, model_half.step_sites, scan.length, user)
        guide_trace = {name: site for name, site in guide_trace.items() if name not in path}
    if guide_half is not None and guide_half.scan.length != scan.length:
        raise ValueError(
            f"{user}: the guide's scan has {guide_half.scan.length} steps, the model's has {scan.length}. Make them equal."
        )
    sequence = Sequence(user, model_half, guide_half, path, bound_guide, guide_trace)
    _read_globals(sequence, guide is not None, given_globals)
    _read_plates(sequence)
    sequence.after = read_after_scan(bound_model, model_half, args, kwargs, is_guide=False, user=user)
    sequence.log_global_weight = _log_global_weight(sequence)
    return sequence


def _read_globals(sequence: Sequence, has_guide: bool, given_globals: bool) -> None:
    model, guide, user = sequence.model, sequence.guide, sequence.user
    for name in sequence.guide_prefix:
        site = sequence.guide_prefix[name]
        if is_latent(site) and name not in model.prefix and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"{user}: the guide samples site '{name}' before its scan, which the model does not. Remove it, or mark it "
                f"infer={{'is_auxiliary': True}}."
            )
    halves = [model] + ([guide] if guide is not None else [])
    names = global_latents(halves)
    for half in halves:
        half.settle(names)
    if sequence.path:
        # A path guide has no scan whose steps could use its latents; what is not an initial state of the model is global.
        names |= {n for n, site in sequence.guide_prefix.items() if is_latent(site) and n not in model.particle_latents}
    for name in names:
        in_guide = name in sequence.guide_prefix
        site = sequence.guide_prefix[name] if in_guide else model.prefix[name]
        if not in_guide and site.get("drawn", False) and (has_guide or given_globals):
            raise ValueError(
                f"{user}: site '{name}' is a global latent (the scan's steps use it directly) and nothing gives or proposes it. Give "
                f"its value in params={{'{name}': ...}}, condition the model on it, or sample '{name}' in a guide."
            )
        sequence.global_values[name] = site["value"]


def _read_plates(sequence: Sequence) -> None:
    halves = [sequence.model] + ([sequence.guide] if sequence.guide is not None else [])
    sites = [site for half in halves for site in half.step_sites.values() if site["type"] == "sample"]
    prefix_sites = [
        site
        for trace in (sequence.model.prefix, sequence.guide_prefix)
        for name, site in trace.items()
        if site["type"] == "sample" and name not in sequence.global_values
    ]
    scales: dict[str, float] = {}
    for half in halves:
        scales |= plate_scales(half.prefix) | plate_scales(half.step_sites)
    global_plates = {
        frame.name
        for name in sequence.global_values
        for frame in (sequence.model.prefix.get(name) or sequence.guide_prefix[name])["cond_indep_stack"]
    }
    used = {frame.name for site in sites + prefix_sites for frame in site["cond_indep_stack"]}
    scales = {name: scale for name, scale in scales.items() if name in used or name not in global_plates}
    sequence.plates = enclosing_plates(sites + prefix_sites, scales)
    known = {site["scale"] if isinstance(site["scale"], float) else None for site in sites}
    known |= {_concrete(site["scale"]) for site in prefix_sites}
    if len(known) == 1 and None not in known:
        sequence.bound_scale = known.pop() / sequence.plates.scale


def _concrete(scale: Any) -> float | None:
    if scale is None:
        return 1.0
    return None if isinstance(scale, jax.core.Tracer) or jnp.ndim(scale) else float(scale)


def _log_global_weight(sequence: Sequence) -> Array:
    """log p - log q of the global latents; given values and draws from the prior contribute nothing."""
    total = jnp.asarray(0.0)
    whole = BatchPlates()
    for name in sequence.global_values:
        proposal = sequence.guide_prefix.get(name)
        if proposal is not None:
            total = total - log_density(proposal, whole)
            if name in sequence.model.prefix:
                total = total + log_density(sequence.model.prefix[name], whole)
    return total
