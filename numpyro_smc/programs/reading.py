"""Reading a sequence model and its guide: which latents are global, which plates enclose everything,
what comes after.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro import handlers
from numpyro.util import find_stack_level

from numpyro_smc.programs import path_guide
from numpyro_smc.programs.bootstrap import Bootstrap
from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.halves import global_latents, read_half
from numpyro_smc.programs.independence import elements_of_sequence
from numpyro_smc.programs.masked_latents import check_drawn
from numpyro_smc.programs.observed_shapes import check_observed_shapes
from numpyro_smc.programs.reading_after_scan import read_after_scan
from numpyro_smc.programs.replay import look_ahead
from numpyro_smc.programs.scans import Fixed, Trace, run_prefix
from numpyro_smc.programs.sequence import Program, Sequence
from numpyro_smc.programs.sites import (
    BatchPlates,
    Site,
    common_plates,
    enclosing_plates,
    is_latent,
    is_observed,
    log_density,
    plate_indices,
    plate_scales,
)
from numpyro_smc.programs.supports import is_narrower


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
    :param params: values of ``param`` sites, and of latents to condition on: those contribute nothing to the weights,
        wherever they stand and whoever samples them.
    :param user: name of the calling class, for error messages.
    :param given_globals: without a guide, whether global latents must be given (else they are drawn from their prior).
    :raises ValueError: naming the site, for every program that cannot be filtered.
    """
    if isinstance(guide, Bootstrap):
        guide, given_globals = None, False
    guide_key, model_key = random.split(rng_key)
    params = jax.tree.map(jnp.asarray, params)
    bound_model = handlers.substitute(partial(model, *args, **kwargs), data=params)
    guide_trace: Trace = {}
    guide_half, path, bound_guide = None, {}, None
    if guide is not None:
        bound_guide = handlers.substitute(partial(guide, *args, **kwargs), data=params)
        guide_trace, guide_scan = run_prefix(bound_guide, CloudDraws(guide_key), is_guide=True)
        if guide_scan is not None:
            guide_half = read_half(bound_guide, guide_trace, guide_scan)
            read_after_scan(bound_guide, guide_half, args, kwargs, is_guide=True, user=user)
    proposed = {name: site["value"] for name, site in guide_trace.items() if is_latent(site)}
    prefix, scan = run_prefix(bound_model, CloudDraws(model_key), Fixed(proposed, plate_indices(guide_trace)))
    if scan is None:
        raise ValueError(
            f"{user}: the model has no numpyro.contrib.control_flow.scan (outside of plates and not hidden by a block "
            f"handler), so there is no sequence to filter. Write the steps as scan(step, init, xs); for other models "
            f"use NumPyro's ELBOs."
        )
    model_half = read_half(bound_model, prefix, scan)
    check_observed_shapes(user, prefix.values())
    check_observed_shapes(user, model_half.step_sites.values(), in_step=True)
    if bound_guide is not None and guide_half is None:
        path = path_guide.read_path(guide_trace, model_half.step_sites, scan.length, user)
        model_half.reach |= path_guide.path_parents(bound_guide, guide_trace, path) & model_half.latents
        guide_trace = {name: site for name, site in guide_trace.items() if name not in path}
    if guide_half is not None and guide_half.scan.length != scan.length:
        raise ValueError(
            f"{user}: the guide's scan has {guide_half.scan.length} steps, the model's has {scan.length}. "
            f"Make them equal."
        )
    sequence = Sequence(user, model_half, guide_half, path, bound_guide, guide_trace)
    sequence.given = frozenset(params)
    sequence.after = read_after_scan(bound_model, model_half, args, kwargs, is_guide=False, user=user)
    _read_globals(sequence, guide is not None, given_globals)
    _read_plates(sequence)
    sequence.log_global_weight = _log_global_weight(sequence)
    _check_masked(sequence)
    if sequence.twisted:
        sequence.look_ahead = look_ahead(sequence)
    return sequence


def _read_globals(sequence: Sequence, has_guide: bool, given_globals: bool) -> None:
    model, guide, user = sequence.model, sequence.guide, sequence.user
    for name in sequence.guide_prefix:
        site = sequence.guide_prefix[name]
        if is_latent(site) and name not in model.prefix and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"{user}: the guide samples site '{name}' before its scan, which the model does not. Remove it, or "
                f"mark it infer={{'is_auxiliary': True}}."
            )
    halves = [model] + ([guide] if guide is not None else [])
    names = global_latents(halves)
    for half in halves:
        half.settle(names)
    if sequence.path:
        # A path guide has no scan whose steps could use its latents; what is not an initial state of the model is
        # global.
        names |= {n for n, site in sequence.guide_prefix.items() if is_latent(site) and n not in model.particle_latents}
    for name in names:
        in_guide = name in sequence.guide_prefix
        site = sequence.guide_prefix[name] if in_guide else model.prefix[name]
        if not in_guide and site.get("drawn", False) and (has_guide or given_globals):
            raise ValueError(
                f"{user}: site '{name}' is a global latent (the scan's steps use it directly) and nothing gives or "
                f"proposes it. Give its value in params={{'{name}': ...}}, condition the model on it, or sample "
                f"'{name}' in a guide."
            )
        sequence.global_values[name] = site["value"]


def _read_plates(sequence: Sequence) -> None:
    halves = [sequence.model] + ([sequence.guide] if sequence.guide is not None else [])
    sites = [site for half in halves for site in half.step_sites.values() if site["type"] == "sample"]
    uses, particle_latents = sequence.model.uses, sequence.model.particle_latents
    prefix_sites = [
        site
        for trace in (sequence.model.prefix, sequence.guide_prefix)
        for name, site in trace.items()
        if site["type"] == "sample" and name not in sequence.global_values
    ]
    of_globals = [s for s in prefix_sites if is_observed(s) and not uses[s["name"]] & particle_latents]
    prefix_sites = [site for site in prefix_sites if not any(site is other for other in of_globals)]
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
    within = None if sequence.after is None else sequence.after.plates
    of_problems = sites + prefix_sites
    independent = _independent_plates(sequence, common_plates(of_problems, scales, within), scales)
    sequence.plates = enclosing_plates(of_problems, scales, independent)
    prefix_plates = plate_indices(sequence.model.prefix) | plate_indices(sequence.guide_prefix)
    for name in sequence.plates.names:
        if scales.get(name, 1.0) != 1.0 and name not in prefix_plates:
            raise ValueError(
                f"{sequence.user}: plate '{name}' is subsampled inside the scan's step only, so each step would see "
                f"other elements of it. Make the plate before the scan, plate = numpyro.plate('{name}', ...), and "
                f"enter it in the step."
            )
    # Data about global latents alone weigh every particle alike. Outside of the plates they belong to no problem in
    # particular; inside, to the problem of their element.
    if sequence.plates.names:
        outside = [site for site in of_globals if not _is_inside(site, sequence.plates)]
        sequence.global_observed = frozenset(site["name"] for site in outside)
    else:
        prefix_sites += of_globals
    # A scale common to every site scales the bound; other scales stay within the weights.
    known = {site["scale"] for site in sites} | {_concrete(site["scale"]) for site in prefix_sites}
    common = known.pop() if len(known) == 1 else None
    if common is not None and sequence.after is None:
        sequence.bound_scale = common / sequence.plates.scale


def _check_masked(sequence: Sequence) -> None:
    steps = sequence.model.step_sites
    sites = [site for site in [*sequence.model.prefix.values(), *steps.values()] if site["type"] == "sample"]
    proposed = set(sequence.path) | set(sequence.guide_prefix)
    proposed |= set() if sequence.guide is None else set(sequence.guide.step_sites)
    drawn = [s for s in sites if is_latent(s) and not (s["name"] in sequence.given or s["name"] in proposed)]
    check_drawn(drawn, [site for site in sites if is_observed(site)], sequence.user)


def _independent_plates(sequence: Sequence, plates: BatchPlates, scales: dict[str, float]) -> frozenset[str]:
    """Names of the plates whose elements are independent problems. Notes which axes of the carries run over them.

    Where several plates enclose the program, those inside one that is not independent are not taken either.

    :raises ValueError: for a plate that is subsampled although its elements depend on each other.
    """
    if not plates.names:
        return frozenset()
    halves = [sequence.model] + ([sequence.guide] if sequence.guide is not None else [])
    loose = []
    if sequence.guide is None and sequence.guide_program is not None:
        loose.append((sequence.guide_program, sequence.guide_prefix | sequence.path))
    after = None if sequence.after is None else sequence.after.log_probs
    shared = sequence.given | sequence.global_values.keys()
    found = elements_of_sequence(halves, loose, plates, shared, after)
    kept = 0
    while kept < len(found) and found[kept].coupling is None:
        kept += 1
    if kept < len(found):
        coupling = found[kept].coupling
        for name in plates.names[kept:]:
            if scales.get(name, 1.0) != 1.0:
                raise ValueError(
                    f"{sequence.user}: {coupling}. It is also subsampled, so the particle weights would be biased. "
                    f"Do not subsample it, or let each element depend on its own latents alone."
                )
        warnings.warn(
            f"{sequence.user}: {coupling}. All its elements are filtered as one problem, with one weight a particle "
            f"for them together.",
            stacklevel=find_stack_level(),
        )
    for elements, name in zip(found[:kept], plates.names, strict=False):
        for twist in elements.twists:
            raise ValueError(
                f"{sequence.user}: twist '{twist}' at one element of plate '{name}' depends on other elements, or its "
                f"shape is not that of the plates that enclose the program, {plates.shape[:kept]}. State one value per "
                f"element, from that element's latents."
            )
    for number, half in enumerate(halves):
        axes = [tuple(elements.axes[number][leaf] for elements in found[:kept]) for leaf in range(len(half.moving))]
        half.moving = [moves and (not kept or None not in its) for moves, its in zip(half.moving, axes, strict=True)]
        half.batch_axes = [tuple(axis for axis in its if axis is not None) for its in axes]
    deterministic = {
        name: site
        for trace in (sequence.model.prefix, sequence.model.step_sites)
        for name, site in trace.items()
        if site["type"] == "deterministic"
    }
    of_elements = {
        name
        for name, site in deterministic.items()
        if getattr(site["value"], "shape", ())[:kept] == plates.shape[:kept]
    }
    combined = set().union(*(elements.combined for elements in found[:kept])) if kept else set()
    sequence.combined = frozenset(combined | (deterministic.keys() - of_elements))
    return frozenset(plates.names[:kept])


def _is_inside(site: Site, plates: BatchPlates) -> bool:
    frames = {(frame.name, frame.dim) for frame in site["cond_indep_stack"]}
    return frames.issuperset(zip(plates.names, plates.dims, strict=True))


def _concrete(scale: Any) -> float | None:
    if scale is None:
        return 1.0
    return None if isinstance(scale, jax.core.Tracer) or jnp.ndim(scale) else float(scale)


def _log_global_weight(sequence: Sequence) -> Array:
    """log p - log q of the global latents; given values and draws from the prior contribute nothing."""
    total = jnp.asarray(0.0)
    whole = BatchPlates()
    for name in sequence.global_values.keys() - sequence.given:
        proposal = sequence.guide_prefix.get(name)
        if proposal is not None:
            total = total - log_density(proposal, whole)
            if name in sequence.model.prefix:
                is_narrower(sequence.model.prefix[name], proposal, sequence.user)
                total = total + log_density(sequence.model.prefix[name], whole)
    return total + sequence.log_outside
