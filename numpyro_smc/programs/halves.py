"""What one program (a sequence model, or its guide) looks like: its sites, its carry, and what depends on what."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.ops.provenance import eval_provenance

from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.scans import Fixed, Scan, Trace, run_prefix, run_step
from numpyro_smc.programs.sites import Site, is_latent, is_observed, site_mask

_INDEX = "particle index"


@dataclass
class Half:
    """A program read once, outside any vectorisation over particles.

    - **program** - the program with its arguments and parameters bound.
    - **prefix** - trace of the sites before the scan, drawn once; **scan** - its scan statement.
    - **step_sites** - messages of one step (shapes, plates and flags are meaningful, values are not).
    - **carry_dtypes**, **carry_tree** - the carry's types after promotion, its structure.
    - **moving** - for each carry leaf, whether it differs between particles; **batch_axes** - for each that does, its
      axes that run over the enclosing plates. :meth:`split` moves them to the front, :meth:`merge` moves them back.
    - **latents** - names of the latent sites before the scan. **reach** - those that reach the steps other than through
      the carry. **uses** - for each sample site before the scan, the latents its density depends on.
    - **particle_latents** - latents that belong to each particle, once :meth:`settle` has been told the global ones.
    - **masks_are_fixed** - whether no observation mask depends on a particle.
    """

    program: Callable[[], Any]
    prefix: Trace
    scan: Scan
    step_sites: Trace = field(default_factory=dict)
    carry_tree: Any = None
    carry_dtypes: list[Any] = field(default_factory=list)
    moving: list[bool] = field(default_factory=list)
    batch_axes: list[tuple[int, ...]] = field(default_factory=list)
    latents: frozenset[str] = frozenset()
    reach: frozenset[str] = frozenset()
    uses: dict[str, frozenset[str]] = field(default_factory=dict)
    particle_latents: frozenset[str] = frozenset()
    masks_are_fixed: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)

    def settle(self, global_latents: set[str]) -> None:
        """Given the latents drawn once for all particles, find what differs between particles."""
        self.particle_latents = self.latents - global_latents
        own = self.particle_latents | {_INDEX}
        moving = [bool(uses & own) for uses in self.provenance["init"]]
        while True:
            moved = {f"carry {i}" for i, moves in enumerate(moving) if moves} | own
            updated = [
                moves or bool(uses & moved) for moves, uses in zip(moving, self.provenance["carry"], strict=True)
            ]
            if updated == moving:
                break
            moving = updated
        self.moving = moving
        self.masks_are_fixed = not (_union(self.provenance["masks"]) & moved)

    def carry_leaves(self, carry: Any) -> list[Array]:
        """The leaves of a carry, in their promoted types."""
        leaves, tree = jax.tree.flatten(carry)
        if tree != self.carry_tree:
            raise ValueError(f"The scan's carry has structure {tree} after a step but {self.carry_tree} before it.")
        return [lax.convert_element_type(leaf, dtype) for leaf, dtype in zip(leaves, self.carry_dtypes, strict=True)]

    def split(self, carry: Any) -> tuple[list[Array], list[Array]]:
        """Carry leaves that differ between particles, and those that do not."""
        leaves = self.carry_leaves(carry)
        moving = [self.to_front(i, leaf) for i, leaf in enumerate(leaves) if self.moving[i]]
        return moving, [leaf for leaf, moves in zip(leaves, self.moving, strict=True) if not moves]

    def merge(self, moving: list[Array], still: list[Array]) -> Any:
        leaves_moving, leaves_still = iter(moving), iter(still)
        leaves = [
            self.from_front(i, next(leaves_moving)) if moves else next(leaves_still)
            for i, moves in enumerate(self.moving)
        ]
        return jax.tree.unflatten(self.carry_tree, leaves)

    def to_front(self, number: int, leaf: Array, first: int = 0) -> Array:
        """A moving carry leaf with its batch axes in front, after ``first`` other axes."""
        axes = self.batch_axes[number] if self.batch_axes else ()
        return jnp.moveaxis(leaf, [first + axis for axis in axes], range(first, first + len(axes)))

    def from_front(self, number: int, leaf: Array, first: int = 0) -> Array:
        """The opposite of :meth:`to_front`."""
        axes = self.batch_axes[number] if self.batch_axes else ()
        return jnp.moveaxis(leaf, range(first, first + len(axes)), [first + axis for axis in axes])


def read_half(program: Callable[[], Any], prefix: Trace, scan: Scan) -> Half:
    """Run one abstract step of a program and find what depends on what. No array is computed."""
    half = Half(program, prefix, scan)
    rng_key = random.key(0)
    first = jax.tree.map(lambda x: x[0], scan.inputs())

    def step(carry: Any, index: Array) -> tuple[Any, Trace]:
        new_carry, _, trace = run_step(scan, jnp.asarray(0), carry, first, CloudDraws(rng_key, index))
        return new_carry, trace

    leaves = _promoted_carry(scan, step)
    half.carry_tree = jax.tree.structure(scan.init)
    half.carry_dtypes = [leaf.dtype for leaf in leaves]

    latents = {name: site["value"] for name, site in prefix.items() if is_latent(site)}
    flags = {name: site["infer"].get("particle") for name, site in prefix.items() if is_latent(site)}

    def dependencies(**inputs: Any) -> dict[str, Any]:
        index = inputs.pop(_INDEX)
        carry = [inputs.pop(f"carry {i}") for i in range(len(leaves))]
        trace, found = run_prefix(program, CloudDraws(rng_key, index), Overwrite(inputs))
        assert found is not None
        init = jax.tree.leaves(found.init)
        x = jax.tree.map(lambda x: x[0], found.inputs())
        new_carry, output, sites = run_step(
            found, jnp.asarray(0), jax.tree.unflatten(half.carry_tree, carry), x, CloudDraws(rng_key, index)
        )
        half.step_sites = {name: _without_arrays(site) for name, site in sites.items()}
        return {
            "prefix": {name: _density(site) for name, site in trace.items() if site["type"] == "sample"},
            "init": [jnp.asarray(leaf) for leaf in init],
            "carry": [jnp.asarray(leaf) for leaf in jax.tree.leaves(new_carry)],
            "step": [output]
            + [(_density(site), site["value"]) for site in sites.values() if site["type"] == "sample"]
            + [site["value"] for site in sites.values() if site["type"] in ("deterministic", "twist")],
            "masks": [site_mask(site) for site in sites.values() if is_observed(site)],
        }

    carried = {f"carry {i}": leaf for i, leaf in enumerate(leaves)}
    found = eval_provenance(dependencies, **{_INDEX: jnp.asarray(0)}, **latents, **carried)
    reach = _union(found["step"]) | _union(found["carry"])
    half.latents = frozenset(latents)
    half.reach = frozenset(name for name in latents if name in reach or flags[name] is False)
    half.uses = {name: uses & half.latents for name, uses in found["prefix"].items()}
    half.provenance = found
    for name, flag in flags.items():
        if flag and name in reach:
            raise ValueError(
                f"Site '{name}' is marked infer={{'particle': True}} but the scan's step uses it directly. Pass it to "
                f"the step through the initial carry, or drop the mark to draw it once for all particles."
            )
    return half


def global_latents(halves: list[Half]) -> set[str]:
    """Latents before the scan that must be drawn once for all particles.

    Those that reach the steps other than through the carry, and those that the density of a global latent depends on.
    """
    found = {name for half in halves for name in half.reach}
    while True:
        parents = {
            name
            for half in halves
            for site in found
            if site in half.latents
            for name in half.uses.get(site, frozenset())
        }
        if parents <= found:
            return found
        found |= parents


class Overwrite(Fixed):
    """Replace the values of latent sites, whatever value they already have."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class OverwriteAll(Overwrite):
    """Replace the values of any sites, those whose data end at some step included."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def _promoted_carry(scan: Scan, step: Callable[[Any, Array], tuple[Any, Trace]]) -> list[Array]:
    """The initial carry's leaves, promoted as ``lax.scan`` would promote them."""
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, scan.init))
    for _ in range(3):
        new = jax.eval_shape(lambda c: step(jax.tree.unflatten(tree, c), jnp.asarray(0))[0], leaves)
        if jax.tree.structure(new) != tree:  # type: ignore[operator]
            raise ValueError(
                f"The scan's step returns a carry of structure {jax.tree.structure(new)}; its initial carry has {tree}."
            )
        promoted = []
        for leaf, out in zip(leaves, jax.tree.leaves(new), strict=True):
            if jnp.shape(leaf) != out.shape:
                raise ValueError(f"The scan's carry changes shape in a step: {jnp.shape(leaf)} becomes {out.shape}.")
            if leaf.dtype != out.dtype and not leaf.weak_type:
                raise ValueError(f"The scan's carry changes type in a step: {leaf.dtype} becomes {out.dtype}.")
            promoted.append(lax.convert_element_type(leaf, out.dtype) if leaf.dtype != out.dtype else leaf)
        if all(a.dtype == b.dtype for a, b in zip(leaves, promoted, strict=True)):
            return [lax.convert_element_type(leaf, leaf.dtype) for leaf in promoted]
        leaves = promoted
    raise ValueError("The types of the scan's carry do not settle after three steps: give the initial carry as arrays.")


def _density(site: Site) -> Array:
    return jnp.asarray(site["fn"].log_prob(site["value"]))


def _without_arrays(site: Site) -> Site:
    kept = {key: site.get(key) for key in ("name", "type", "is_observed", "cond_indep_stack", "infer", "args")}
    kept["value"] = jax.ShapeDtypeStruct(jnp.shape(site["value"]), jnp.result_type(site["value"]))
    scale = 1.0 if site.get("scale") is None else site["scale"]
    known = not isinstance(scale, jax.core.Tracer) and jnp.ndim(scale) == 0
    kept["scale"] = float(scale) if known else None
    if site["type"] == "sample":
        kept["fn"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), site["fn"])
        kept["dummies"] = site.get("dummies", False)
        kept["has_rsample"] = site["fn"].has_rsample
        kept["given_until"] = "given_until" in site
        kept["given"] = not site["is_observed"] and not site.get("drawn", False)
    return kept


def _union(tree: Any) -> frozenset[str]:
    return frozenset().union(*jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, frozenset)))
