"""A sequence model and its guide, read from NumPyro programs and handed out as a Feynman-Kac model for particles.

With initial latents :math:`x_{-1}`, steps :math:`t = 0..T-1`, a guide :math:`q` and log twists :math:`\\log r_t`, a
particle's log weight grows by

.. math:: \\log p(x_t \\mid x_{t-1}) + \\log p(y_t \\mid x_t) - \\log q(x_t \\mid x_{t-1}) + \\log r_t(x_t)
   - \\log r_{t-1}(x_{t-1}),

with :math:`r_t = 1` from the last observation on. Without a guide :math:`q = p` and the densities cancel exactly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.primitives import Messenger

from numpyro_smc.programs import path_guide
from numpyro_smc.programs.after_scan import AfterScan
from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.halves import Half
from numpyro_smc.programs.masked_latents import is_masked, skipped_then_used, unmasked
from numpyro_smc.programs.scans import Fixed, Trace, run_prefix, run_step
from numpyro_smc.programs.sites import BatchPlates, is_latent, is_observed, log_density, plate_indices
from numpyro_smc.programs.supports import is_narrower

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


class Steering(NamedTuple):
    """What replaces the draws of some or all particles: a reference path, or functions of given noise.

    - **initial** - pytree for the sites before the scan. **steps** - pytree with leading time axis.
    - **handlers** - ``(one slice of them, particle index) -> `` handlers around the draws: what they find has been
      drawn, and they may replace its value.
    """

    initial: Any
    steps: Any
    handlers: Callable[[Any, Array], tuple[Messenger, ...]]


class Sequence:
    """A model with one scan, in lockstep with an optional guide. :func:`~.reading.read_sequence` makes one.

    - **model**, **guide** - the two programs as read; **path** - the sites of a guide that proposes whole paths.
    - **plates** - the plates that enclose everything and make independent problems; **bound_scale** - a scale common to
      every site. **combined** - deterministic sites that are not of one problem each: particles have no values of them.
    - **global_values** - latents drawn once for all particles; **log_global_weight** - their log p - log q.
    - **given** - names of latents to condition on; **global_observed** - data about global latents alone that stand
      outside of the plates.
    - **after** - the likelihood after the scan. **twisted** - whether twists count. **look_ahead** - where they do.
    - **steering** - what replaces draws, if anything.
    - **gradient_of_draws** - for draws without a reparameterised sampler: ``"ignore"``, ``"score"`` or ``"weights"``.
    """

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
        self.given: frozenset[str] = frozenset()
        self.global_observed: frozenset[str] = frozenset()
        self.plates = BatchPlates()
        self.combined: frozenset[str] = frozenset()
        self.bound_scale = 1.0
        self.gradient_of_draws = "ignore"
        self.masks_latents = any(
            is_latent(site) and is_masked(site) and not site.get("dummies")
            for half in (model, guide)
            for site in ([] if half is None else [*half.prefix.values(), *half.step_sites.values()])
        )
        self.twisted = guide is not None and any(s["type"] == "twist" for s in guide.step_sites.values())
        self.look_ahead: Array | None = None
        self.steering: Steering | None = None
        self._compared: set[str] = set()

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
    def log_outside(self) -> Array:
        """Log density of the data that belong to no problem in particular."""
        sites = [self.model.prefix[name] for name in self.global_observed]
        return sum((log_density(site, BatchPlates()) for site in sites), start=jnp.asarray(0.0))

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
        return self.over_problems(log_evidence) + self.log_global_weight

    def over_problems(self, values: Array) -> Array:
        """Sum over the independent problems, with the scales that were kept out of the weights."""
        return self.bound_scale * self.plates.scale * jnp.sum(values)

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
        inputs = {
            "model": self.model.scan.inputs(),
            "guide": None if self.guide is None else self.guide.scan.inputs(),
            "look ahead": self.look_ahead if self.twisted else None,
        }
        return inputs if self.steering is None else inputs | {"steering": self.steering.steps}

    def _around(self, steering: Any, index: Array) -> tuple[Messenger, ...]:
        return () if self.steering is None else self.steering.handlers(steering, index)

    # ---- one particle -----------------------------------------------------------------------------------------------

    def _init_one(self, rng_key: Array, index: Array) -> tuple[Any, Any, Move]:
        guide_key, model_key = random.split(rng_key)
        around = self._around(None if self.steering is None else self.steering.initial, index)
        log_weight = log_score = jnp.zeros(self.batch_shape)
        proposed = dict(self.global_values)
        guide_trace: Trace = {}
        state: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        if self.guide_program is not None:
            plates = plate_indices(self.guide_prefix)
            guide_trace, scan = run_prefix(
                self.guide_program,
                *around,
                CloudDraws(guide_key, index),
                Fixed(self.global_values, plates),
                is_guide=True,
            )
            guide_trace = {name: site for name, site in guide_trace.items() if name not in self.path}
            if self.guide is not None:
                assert scan is not None
                state["guide"], shared["guide"] = self.guide.split(scan.init)
        proposed |= {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
        model_trace, scan = run_prefix(
            self.model.program, *around, CloudDraws(model_key, index), Fixed(proposed, plate_indices(self.model.prefix))
        )
        assert scan is not None
        state["model"], shared["model"] = self.model.split(scan.init)
        values = {}
        if self.proposes:
            self._check_all_proposed(model_trace, self.model.particle_latents)
        for name, site in model_trace.items():
            of_particle = name not in self.global_values and name not in self.global_observed
            if not of_particle or site["type"] not in ("sample", "deterministic"):
                continue
            if not is_observed(site) and name not in self.combined:
                values[name] = site["value"]
            if site["type"] == "sample":
                increment, score = self._log_weight_of(site, guide_trace.get(name))
                log_weight, log_score = log_weight + increment, log_score + score
        for name, site in guide_trace.items():
            if name not in model_trace and is_latent(site) and name not in self.global_values:
                log_weight = log_weight - self.log_density(site)
        if self.masks_latents:
            skipped = jnp.zeros(self.batch_shape, bool)
            log_weight, state["skipped"] = self._unless_misused(log_weight, model_trace, guide_trace, skipped)
        log_twist = jnp.zeros(self.batch_shape)
        if self.twisted:
            state["log twist"] = log_twist
        return state, shared, Move(log_weight, values, log_twist, log_score)

    def _step_one(self, rng_key: Array, t: Array, inputs: Any, index: Array, state: Any, shared: Any) -> Any:
        guide_key, model_key = random.split(rng_key) if self.proposes else (rng_key, rng_key)
        plates = plate_indices(self.model.prefix) | plate_indices(self.guide_prefix)
        around = self._around(inputs.get("steering"), index)
        guide_trace: Trace = {}
        new_state: dict[str, Any] = {}
        new_shared: dict[str, Any] = {}
        if self.guide is not None:
            carry = self.guide.merge(state["guide"], shared["guide"])
            carry, _, guide_trace = run_step(
                self.guide.scan, t, carry, inputs["guide"], *around, CloudDraws(guide_key, index), Fixed({}, plates)
            )
            new_state["guide"], new_shared["guide"] = self.guide.split(carry)
        elif self.path:
            guide_trace = path_guide.draw_step(self.path, t, guide_key, index, around)
        proposed = {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
        carry = self.model.merge(state["model"], shared["model"])
        carry, output, model_trace = run_step(
            self.model.scan, t, carry, inputs["model"], *around, CloudDraws(model_key, index), Fixed(proposed, plates)
        )
        new_state["model"], new_shared["model"] = self.model.split(carry)
        log_weight, log_score, values = self._weigh(model_trace, guide_trace)
        if self.masks_latents:
            log_weight, new_state["skipped"] = self._unless_misused(
                log_weight, model_trace, guide_trace, state["skipped"]
            )
        if self.after is not None:
            log_weight = log_weight + self.after.log_density(
                t, output, carry, Fixed(self.global_values, plates), self.plates
            )
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
            if (site["type"] == "deterministic" and name not in self.combined) or (
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
                        f"{self.user}: the guide samples site '{name}' inside its scan, which the model does not. "
                        f"Remove it, or mark it infer={{'is_auxiliary': True}}."
                    )
                log_weight = log_weight - self.log_density(site)
        return log_weight, log_score, values

    def _log_weight_of(self, site: Any, proposal: Any) -> tuple[Array, Array]:
        """A model site's contribution to the log weight, and to the score of the draws."""
        nothing = jnp.zeros(self.batch_shape)
        if site["name"] in self.given and not site["is_observed"]:
            return nothing, nothing
        if not site.get("drawn", False):
            log_p = self.log_density(site)
            if proposal is None or site["is_observed"]:
                return log_p, nothing
            self._compare_supports(site, proposal)
            if site.get("dummies"):
                proposal = proposal | {"fn": unmasked(proposal["fn"])}
            log_q = self.log_density(proposal)
            return self._differentiable(log_p - log_q, log_q, proposal["fn"])
        if self.gradient_of_draws != "ignore" and not site["fn"].has_rsample:
            log_q = self.log_density(site)
            return self._differentiable(nothing, log_q, site["fn"])
        return nothing, nothing

    def _differentiable(self, increment: Array, log_q: Array, fn: Any) -> tuple[Array, Array]:
        """A log weight and the score of its draw, by how the gradient of draws is to be taken."""
        if fn.has_rsample or self.gradient_of_draws == "ignore":
            return increment, jnp.zeros(self.batch_shape)
        if self.gradient_of_draws == "score":
            return increment, log_q
        # "weights": the draw is fixed, and its proposal density is a constant of the weight.
        kept = increment + (log_q - lax.stop_gradient(log_q))
        return kept, jnp.zeros(self.batch_shape)

    def log_density(self, site: Any) -> Array:
        """Log density of a traced site, ``[*batch]``."""
        return log_density(site, self.plates, self.bound_scale)

    def _twist_value(self, site: Any) -> Array:
        if jnp.shape(site["value"]) != self.batch_shape:
            raise ValueError(
                f"Twist '{site['name']}' has shape {jnp.shape(site['value'])}; it must have the shape of the plates "
                f"that enclose the program, {self.batch_shape}. Sum or reshape its value."
            )
        return site["value"]

    def _unless_misused(
        self, log_weight: Array, model_trace: Trace, guide_trace: Trace, skipped: Array
    ) -> tuple[Array, Array]:
        """The log weight, not a number where a masked latent is used although it was drawn from nothing."""
        skipped, misused = skipped_then_used(model_trace, guide_trace, self.given, self.plates, skipped)
        return jnp.where(misused, jnp.nan, log_weight), skipped

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _compare_supports(self, site: Any, proposal: Any) -> None:
        if site["name"] not in self._compared:
            self._compared.add(site["name"])
            is_narrower(site, proposal, self.user)

    def _check_all_proposed(self, model_trace: Trace, names: frozenset[str]) -> None:
        for name in names:
            site = model_trace.get(name)
            if site is None or not is_latent(site) or not site.get("drawn", False):
                continue
            if name.endswith("_unobserved") and name.removesuffix("_unobserved") + "_observed" in model_trace:
                continue
            raise ValueError(
                f"{self.user}: the guide never samples site '{name}', which the model samples. Sample '{name}' in the "
                f"guide (inside its scan body if the model does), or use numpyro_smc.bootstrap(model) to propose from "
                f"the model itself."
            )
