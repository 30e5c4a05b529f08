"""Whether the elements of a plate are independent problems, proved from the program.

NumPyro's plate says that its elements are independent given what stands outside of it, such as the states of all
elements at the step before. They are independent problems only if no density and no carry of one element depends on
latents of another. Every latent's elements are labelled, and the labels are followed through the initial part, through
the step until those of the carry settle, and through the likelihood after the scan.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.elements.labels import MIXED, Labels
from numpyro_smc.programs.elements.plates import (
    axis_of,
    coupled_density,
    densities,
    fits,
    labels_of,
    not_independent,
    shapes,
    values_of,
)
from numpyro_smc.programs.elements.tracing import settled, trace
from numpyro_smc.programs.halves import Half, Overwrite, OverwriteAll
from numpyro_smc.programs.scans import Trace, run_prefix, run_step
from numpyro_smc.programs.sites import BatchPlates, Site, is_latent

# Labels of the log densities after the scan, given the labels of the outputs and of the last carry.
After = Callable[[Any, Any], dict[str, Array]]


class Elements(NamedTuple):
    """What the labels of one plate say.

    - **coupling** - the first thing found to depend on several elements, in words; ``None`` if there is none.
    - **axes** - for each program, for each leaf of its carry, the axis that moves with the plate; ``None`` where
      nothing depends on any element.
    - **combined** - names of deterministic sites whose leading axes are not the plate's.
    - **twists** - names of twists that do not keep the elements apart.
    """

    coupling: str | None
    axes: list[list[int | None]]
    combined: frozenset[str]
    twists: frozenset[str]


class _Read(NamedTuple):
    """A program traced for its labels: the function, and its latents before the scan and within."""

    labels: Callable[..., Any]
    half: Half
    before: dict[str, Site]
    within: dict[str, Site]


def elements_of_sequence(
    halves: list[Half],
    prefixes: list[tuple[Callable[[], Any], Trace]],
    plates: BatchPlates,
    shared: Collection[str],
    after: After | None,
) -> list[Elements]:
    """What the labels say of each of ``plates``.

    :param halves: the model, and the guide if it has a scan.
    :param prefixes: programs without a scan, with their traces: guides that propose whole paths.
    :param shared: latents that are the same for all particles: given, or global.
    :param after: log densities after the model's scan, from its stacked outputs and last carry.
    """
    reads = [_read(half) for half in halves]
    loose = [_read_prefix(program, sites) for program, sites in prefixes]
    of_after = None if after is None else _trace_after(after, halves[0])
    return [_elements(reads, loose, of_after, shared, plates, place) for place in range(len(plates.names))]


def _read(half: Half) -> _Read:
    before = {name: site for name, site in half.prefix.items() if is_latent(site)}
    within = {
        name: site
        for name, site in half.step_sites.items()
        if site["type"] == "sample" and (site["given_until"] or not (site["is_observed"] or site["given"]))
    }
    rng_key = random.key(0)

    def step(index: Array, t: Array, carry: list[Array], prefix: dict[str, Array], latents: dict[str, Array]) -> Any:
        trace, scan = run_prefix(half.program, CloudDraws(rng_key, index), Overwrite(prefix))
        assert scan is not None
        x = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, t, 0, keepdims=False), scan.inputs())
        whole = jax.tree.unflatten(half.carry_tree, carry)
        new, output, sites = run_step(scan, t, whole, x, CloudDraws(rng_key, index), OverwriteAll(latents))
        return {
            "init": half.carry_leaves(scan.init),
            "carry": half.carry_leaves(new),
            "output": output,
            "before": densities(trace),
            "within": densities(sites),
            "twists": values_of(sites, "twist"),
            "deterministic": values_of(trace, "deterministic") | values_of(sites, "deterministic"),
        }

    carry = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in half.carry_leaves(half.scan.init)]
    number = jax.ShapeDtypeStruct((), jnp.asarray(0).dtype)
    labels = trace(step, number, number, carry, shapes(before), shapes(within))
    return _Read(labels, half, before, within)


def _read_prefix(program: Callable[[], Any], sites: Trace) -> tuple[Any, dict[str, Site]]:
    latents = {name: site for name, site in sites.items() if is_latent(site)}
    rng_key = random.key(0)

    def prefix(index: Array, values: dict[str, Array]) -> dict[str, Array]:
        return densities(run_prefix(program, CloudDraws(rng_key, index), Overwrite(values))[0])

    number = jax.ShapeDtypeStruct((), jnp.asarray(0).dtype)
    return trace(prefix, number, shapes(latents)), latents


def _trace_after(after: After, model: Half) -> Callable[..., dict[str, Labels]]:
    first = jax.tree.map(lambda x: x[0], model.scan.inputs())

    def step(carry: list[Array]) -> Any:
        whole = jax.tree.unflatten(model.carry_tree, carry)
        return run_step(model.scan, jnp.asarray(0), whole, first, CloudDraws(random.key(0)))[:2]

    carry, output = jax.eval_shape(step, model.carry_leaves(model.scan.init))
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((model.scan.length, *x.shape), x.dtype), output)
    return trace(after, stacked, carry)


def _elements(
    reads: list[_Read],
    loose: list[tuple[Any, dict[str, Site]]],
    after: Callable[..., dict[str, Labels]] | None,
    shared: Collection[str],
    plates: BatchPlates,
    place: int,
) -> Elements:
    """Follow the labels of one plate."""
    size, dim, name = plates.shape[place], plates.dims[place], plates.names[place]
    # What else a program draws (by numpyro.prng_key) belongs to no element.
    index = np.full((), MIXED, np.int32)
    coupling: list[str] = []
    axes: list[list[int | None]] = []
    combined: set[str] = set()
    twists: set[str] = set()
    for read in reads:
        before, within = (labels_of(sites, shared, dim) for sites in (read.before, read.within))

        def step(carry: list[Labels], read: Any = read, before: Any = before, within: Any = within) -> Any:
            return read.labels(index, None, carry, before, within)

        nothing: list[Labels] = [None] * len(read.half.carry_dtypes)
        initial = step(nothing)["init"]
        carry = settled(lambda labels, step=step: step(labels)["carry"], initial)  # type: ignore[misc]
        found = step(carry)
        for labels in (found["before"], found["within"]):
            coupling += [coupled_density(site) for site, label in labels.items() if not fits(label, dim, size)]
        twists |= {site for site, label in found["twists"].items() if not fits(label, place, size)}
        its_axes = [axis_of(label, place, size) for label in carry]
        for number, (label, axis) in enumerate(zip(carry, its_axes, strict=True)):
            if label is not None and axis is None:
                coupling.append(
                    f"entry {number} of the scan's carry (shape {label.shape}) has no axis whose elements depend on "
                    f"the plate's one by one"
                )
        axes.append(its_axes)
        if read is reads[0]:
            combined |= _combined(found["deterministic"], place, size)
            if after is not None:
                stacked = jax.tree.map(_stacked, found["output"], is_leaf=lambda leaf: leaf is None)
                rest = after(stacked, jax.tree.unflatten(read.half.carry_tree, carry))
                coupling += [coupled_density(site) for site, label in rest.items() if not fits(label, dim, size)]
    for trace_labels, latents in loose:
        found = trace_labels(index, labels_of(latents, shared, dim))
        coupling += [coupled_density(site) for site, label in found.items() if not fits(label, dim, size)]
    words = not_independent(name, coupling[0]) if coupling else None
    return Elements(words, axes, frozenset(combined), frozenset(twists))


def _stacked(label: Labels) -> Labels:
    return None if label is None else label[None]


def _combined(values: dict[str, Labels], place: int, size: int) -> set[str]:
    return {name for name, label in values.items() if label is not None and axis_of(label, place, size) != place}
