r"""Log densities of a model and a guide, per element of the plates that enclose both programs.

For every particle the guide is run once, its latents are handed to the model, and the log densities of all sites are
summed over everything but the enclosing plates: :math:`\log p(x \mid z)`, :math:`\log p(z_l)` and
:math:`\log q(z_l)` by latent site :math:`l`, from which all importance weights and score-function gradients are made.
"""

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers
from numpyro.distributions import Delta, Distribution
from numpyro.primitives import Messenger

from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.masked_latents import check_weighed, is_masked, unmasked, with_proper_dummies
from numpyro_smc.programs.observed_shapes import check_observed_shapes
from numpyro_smc.programs.pair_independence import FromBase, couplings
from numpyro_smc.programs.plate_choice import choose_plates, chosen_plates
from numpyro_smc.programs.sites import (
    BatchPlates,
    Site,
    in_control_flow,
    is_latent,
    is_one,
    log_density,
    plate_scales,
    remaining_scale,
    unscaled_log_density,
)
from numpyro_smc.programs.supports import is_narrower
from numpyro_smc.programs.tracing import TRACING

Program = Callable[..., Any]
Params = dict[str, Any]
Trace = dict[str, Site]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Densities:
    r"""Log densities of one particle, each of the shape of the enclosing plates; of a cloud, with leading axes.

    ``handlers.scale`` is inside all but ``score``; the scale of the enclosing plates is left to the bound.

    - **log_likelihood** - sum over the model's observed sites, factors included.
    - **log_prior** - by latent site of the model.
    - **log_q** - by site of the guide.
    - **score** - unscaled :math:`\log q`, by latent site whose gradient is by its score function.
    - **statements** - values that the guide states for particular losses, by name; **mutable** - the new values of
      ``numpyro.mutable`` sites.
    - **plates** - the enclosing plates; **unscaled** - sites of ``score`` whose ``log_q`` is the same;
      **shared_params** - parameters of both programs; **narrow** - sites where the guide's support is known to be
      smaller than the model's; **masked** - latents that the guide draws under a mask.
    """

    log_likelihood: Array
    log_prior: dict[str, Array]
    log_q: dict[str, Array]
    score: dict[str, Array]
    statements: dict[str, Array]
    mutable: dict[str, Any]
    plates: BatchPlates = field(metadata={"static": True})
    unscaled: frozenset[str] = field(default=frozenset(), metadata={"static": True})
    shared_params: frozenset[str] = field(default=frozenset(), metadata={"static": True})
    narrow: frozenset[str] = field(default=frozenset(), metadata={"static": True})
    masked: frozenset[str] = field(default=frozenset(), metadata={"static": True})

    def log_weights(self, kl_weight: Any = 1.0, free_bits: float = 0.0) -> Array:
        r"""Importance log weights :math:`\log p(x \mid z) - \beta \sum_l \max(\log q(z_l) - \log p(z_l), \lambda)`."""
        if free_bits > 0.0:
            terms = [jnp.minimum(self.log_prior[name] - self.log_q[name], -free_bits) for name in self.log_prior]
        else:
            terms = [*self.log_prior.values(), *(-value for value in self.log_q.values())]
        latent = sum(terms, start=jnp.zeros_like(self.log_likelihood))
        return self.log_likelihood + (latent if is_one(kl_weight) else kl_weight * latent)

    def with_fixed_guide(self, names: Collection[str]) -> "Densities":
        """The same densities, with no gradient through ``log_q`` of these sites."""
        return replace(
            self,
            log_q={name: lax.stop_gradient(value) if name in names else value for name, value in self.log_q.items()},
        )


class Draw(NamedTuple):
    """One run of the guide: its trace and the keys that it was given besides those of its sites, in order."""

    trace: Trace
    keys: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A model and a guide with their arguments.

    :param plates: ``"auto"`` (the plates that enclose every sample site of both), names of plates, or ``None``.
    :param user: who asks, for error messages.
    :param plate_key: key of subsampling; every run, particle and program gets the same rows.
    :param num_particles: number of weights that will be averaged.
    :ivar proofs: what joins the elements of plates, by plate, for each pair of programs that was run.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plate_key: Array
    plates: str | Collection[str] | None = "auto"
    user: str = "density"
    num_particles: int = 1
    proofs: dict[tuple[int, int], dict[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def draw(
        self, rng_key: Array, index: Array, params: Params, is_score: Callable[[Site], bool] | None = None
    ) -> Draw:
        """Run the guide for the particle ``index``; values of sites with ``is_score`` get no gradient."""
        draws = _Draws(rng_key, index, self.plate_key)
        with TRACING, handlers.block(), _StopGradient(is_score), handlers.trace() as trace, draws:
            self._run(self.guide, params)
        return Draw(with_proper_dummies(trace), tuple(draws.handed_out))

    def redraw(self, rng_key: Array, index: Array, params: Params, draw: Draw) -> Draw:
        """Run the guide again with other parameters at the values of ``draw``; only point masses move."""
        values = {
            name: site
            for name, site in draw.trace.items()
            if site["type"] == "plate" or (is_latent(site) and not is_point(site["fn"]))
        }
        draws = _Draws(rng_key, index, self.plate_key, draw.keys)
        with TRACING, handlers.block(), handlers.trace() as trace, draws, handlers.replay(trace=values):
            self._run(self.guide, params)
        return Draw(with_proper_dummies(trace), draw.keys)

    def run_guide(self, rng_key: Array, params: Params, given: Messenger) -> Draw:
        """Run the guide with the values that a handler gives to its sites."""
        draws = _Draws(rng_key, None, self.plate_key)
        with TRACING, handlers.block(), handlers.trace() as trace, draws, given:
            self._run(self.guide, params)
        return Draw(with_proper_dummies(trace), tuple(draws.handed_out))

    def run_model(self, rng_key: Array, index: Array | None, params: Params, draw: Draw) -> Trace:
        """Run the model at the latents of ``draw``."""
        trace = self._model_at(rng_key, index, params, draw)
        self._check_match(trace, draw.trace)
        if self._programs not in self.proofs:
            self.proofs[self._programs] = self._couplings(params, draw, trace)
        return trace

    def _model_at(self, rng_key: Array, index: Array | None, params: Params, draw: Draw) -> Trace:
        draws = _Draws(rng_key, index, self.plate_key)
        latents = {name: site for name, site in draw.trace.items() if site["type"] == "plate" or is_latent(site)}
        with TRACING, handlers.block(), handlers.trace() as trace, draws:
            self._run(handlers.replay(self.model, trace=latents), params)
        return with_proper_dummies(trace)

    @property
    def _programs(self) -> tuple[int, int]:
        return id(self.model), id(self.guide)

    def _couplings(self, params: Params, guide: Draw, model: Trace) -> dict[str, str]:
        sites = [site for trace in (guide.trace, model) for site in trace.values() if site["type"] == "sample"]
        chosen = chosen_plates(sites, plate_scales(guide.trace) | plate_scales(model), self.plates)
        key = random.key(0)

        def run(values: dict[str, Array], bases: FromBase) -> tuple[Trace, Trace]:
            given = {name: {**guide.trace[name], "value": value} for name, value in values.items()}
            draws = _Draws(key, None, self.plate_key, guide.keys)
            with TRACING, handlers.block(), handlers.trace() as trace, draws, handlers.replay(trace=given), bases:
                self._run(self.guide, params)
            return trace, self._model_at(key, None, params, Draw(trace))

        return couplings(run, guide.trace, chosen) if chosen.names else {}

    def densities(
        self, guide: Draw, model: Trace, is_score: Callable[[Site], bool] | None = None, moves: bool = False
    ) -> Densities:
        """Log densities of a run of the guide and of the model at its latents.

        :param is_score: which latent sites of the guide get their gradient by the score function; ``None`` for none.
        :param moves: whether latents will be moved, so that the dummies of ``obs_mask`` need a law of their own even
            where the guide masks them as the model does.
        """
        model = model | {
            name: site | {"fn": site["as written"]}
            for name, site in model.items()
            if site.get("dummies") and name in guide.trace and not moves and is_masked(guide.trace[name])
        }
        dummies = {name for name, site in model.items() if site.get("dummies") and site["fn"] is not site["as written"]}
        of_guide = [site for site in guide.trace.values() if site["type"] == "sample"]
        of_guide = [site | {"fn": unmasked(site["fn"])} if site["name"] in dummies else site for site in of_guide]
        of_model = [site for site in model.values() if site["type"] == "sample"]
        check_observed_shapes(self.user, of_model)
        scales = plate_scales(guide.trace) | plate_scales(model)
        coupled = self.proofs.get(self._programs, {})
        plates = choose_plates(of_model, of_guide, scales, self.plates, self.num_particles, self.user, coupled)
        log_q, score, unscaled = {}, {}, set()
        for site in of_guide:
            name = site["name"]
            try:
                log_q[name] = log_density(site, plates)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{self.user} needs the guide's log density at a given value of site '{name}', and its "
                    f"distribution has none, most often for want of an inverse transform ({error}). Use IWELBO, or "
                    f"pathwise=True, which need no inverse, or an invertible transform."
                ) from error
            if is_score is not None and is_latent(site) and is_score(site):
                is_plain = is_one(remaining_scale(site, plates))
                score[name] = log_q[name] if is_plain else unscaled_log_density(site, plates)
                unscaled |= {name} if is_plain else set()
        log_likelihood = jnp.zeros(plates.shape)
        log_prior = {}
        for site in of_model:
            if is_latent(site):
                log_prior[site["name"]] = log_density(site, plates)
            else:
                log_likelihood = log_likelihood + log_density(site, plates)
        statements = {
            name: jnp.broadcast_to(site["value"], plates.shape)
            for name, site in guide.trace.items()
            if site["type"] == "baseline"
        }
        mutable = {n: s["value"] for n, s in (guide.trace | model).items() if s["type"] == "mutable"}
        narrow = {s["name"] for s in of_guide if s["name"] in log_prior and is_narrower(model[s["name"]], s, self.user)}
        masked = {site["name"] for site in of_guide if is_latent(site) and is_masked(site)}
        names = [{n for n, s in trace.items() if s["type"] == "param"} for trace in (guide.trace, model)]
        return Densities(
            log_likelihood,
            log_prior,
            log_q,
            score,
            statements,
            mutable,
            plates,
            frozenset(unscaled),
            frozenset(names[0] & names[1]),
            frozenset(narrow),
            frozenset(masked),
        )

    def _run(self, program: Program, params: Params) -> None:
        # A copy, because networks with state write their new state into the dict that they are given.
        data = jax.tree.map(lambda x: x, params)
        handlers.substitute(program, data=data)(*self.args, **self.kwargs)

    def _check_match(self, model: Trace, guide: Trace) -> None:
        proposed = {name: site for name, site in guide.items() if is_latent(site)}
        for name, site in model.items():
            if not is_latent(site):
                continue
            if name not in proposed:
                enumerated = site["infer"].get("enumerate") == "parallel"
                hint = (
                    "Enumeration is not available here: sample it in the guide, or marginalise it in the model "
                    "(dist.MixtureSameFamily)."
                    if enumerated
                    else "Sample it in the guide."
                )
                raise ValueError(f"{self.user}: the guide never samples site '{name}', which the model samples. {hint}")
            given = jnp.shape(proposed[name]["value"])
            expected = site["kwargs"].get("sample_shape", ()) + site["fn"].shape()
            # After a scan, NumPyro leaves distributions that hold distributions without their time axis.
            if given != expected and not (in_control_flow(site) and given[1:] == expected):
                raise ValueError(
                    f"{self.user}: site '{name}' has shape {expected} in the model but {given} in the guide. Make the "
                    f"two shapes equal (see to_event, expand and the enclosing plates)."
                )
        for name, site in proposed.items():
            if name not in model and not site["infer"].get("is_auxiliary"):
                raise ValueError(
                    f"{self.user}: the guide samples site '{name}', which the model does not have, so the weights "
                    f"would not be importance weights. Remove it, correct the name, or mark it with "
                    f"infer={{'is_auxiliary': True}} if the model's densities account for it."
                )


def check_masked(pair: Pair, params: Params) -> None:
    """:raises ValueError: naming a latent whose draws nothing weighs though data depend on them. Not for ``jit``."""
    draw = pair.draw(random.key(0), jnp.asarray(0), params)
    model = pair.run_model(random.key(0), jnp.asarray(0), params, draw)
    check_weighed(model, draw.trace, pair.densities(draw, model).plates, pair.user)


def is_point(fn: Distribution) -> bool:
    """Whether a distribution is a point mass, behind any wrappers."""
    while hasattr(fn, "base_dist") and not isinstance(fn, Delta):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def over_particles(fn: Callable[[Array, Array], Any], rng_key: Array, num: int, batch_size: int | None) -> Any:
    """``fn(rng_key, index)`` for every particle, stacked on a leading axis.

    :param batch_size: particles at a time; each batch is recomputed in the backward pass, so that its memory does not
        grow with ``num``.
    """
    if batch_size is None or batch_size >= num:
        return jax.vmap(fn, (None, 0))(rng_key, jnp.arange(num))

    @jax.checkpoint
    def batch(number: Array) -> Any:
        return jax.vmap(fn, (None, 0))(random.fold_in(rng_key, number), jnp.arange(batch_size))

    stacked = lax.map(batch, jnp.arange(-(-num // batch_size)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num], stacked)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogWeights:
    """Importance log weights, the plates whose elements have weights of their own, and what :class:`Densities` say of
    the guide's **narrow** and **masked** sites."""

    values: Array
    plates: BatchPlates = field(metadata={"static": True})
    narrow: frozenset[str] = field(default=frozenset(), metadata={"static": True})
    masked: frozenset[str] = field(default=frozenset(), metadata={"static": True})


def log_weights(
    rng_key: Array,
    model: Program,
    guide: Program,
    params: Params,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_particles: int,
    batch_size: int | None = None,
    plates: str | Collection[str] | None = "auto",
    user: str = "log_weights",
) -> LogWeights:
    """Importance log weights of draws from the guide, ``[num_particles, *plates]``."""
    plate_key, rng_key = random.split(rng_key)
    pair = Pair(model, guide, args, kwargs, plate_key, plates, user, num_particles)

    def particle(rng_key: Array, index: Array) -> LogWeights:
        guide_key, model_key = random.split(rng_key)
        draw = pair.draw(guide_key, index, params)
        densities = pair.densities(draw, pair.run_model(model_key, index, params, draw))
        return LogWeights(densities.log_weights(), densities.plates, densities.narrow, densities.masked)

    return over_particles(particle, rng_key, num_particles, batch_size)


class _Draws(CloudDraws):
    """Draws for one run of a program: sites, scans and keys per particle, plates shared by all.

    :param keys: what ``numpyro.prng_key`` and scans get, in this order, before new ones.
    """

    def __init__(self, rng_key: Array, index: Array | None, plate_key: Array, keys: tuple[Array, ...] = ()) -> None:
        super().__init__(rng_key, index)
        self.plate_key = plate_key
        self.keys = list(keys)
        self.handed_out: list[Array] = []

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            msg["kwargs"]["rng_key"] = random.fold_in(self.plate_key, zlib.crc32(msg["name"].encode()))
        elif msg["type"] in ("prng_key", "control_flow") and msg["value"] is None and msg["kwargs"]["rng_key"] is None:
            rng_key = self.keys.pop(0) if self.keys else self._own_key()
            self.handed_out.append(rng_key)
            if msg["type"] == "prng_key":
                msg["value"] = rng_key
            else:
                msg["kwargs"]["rng_key"] = rng_key
        else:
            super().process_message(msg)

    def _own_key(self) -> Array:
        rng_key = self._next_key()
        return rng_key if self.index is None else random.fold_in(rng_key, self.index)


class _StopGradient(Messenger):
    """Cut the gradient through the values of some latent sites."""

    def __init__(self, is_cut: Callable[[Site], bool] | None) -> None:
        super().__init__(None)
        self.is_cut = is_cut

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if self.is_cut is not None and msg["type"] == "sample" and not msg["is_observed"] and self.is_cut(msg):
            msg["value"] = lax.stop_gradient(msg["value"])
            msg["intermediates"] = []
