"""Single steps of a sequence model outside the particle recursion: densities of given paths,
and what is observed when.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.ops.provenance import eval_provenance

from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.halves import Half, OverwriteAll
from numpyro_smc.programs.scans import Fixed, Trace, run_prefix, run_step
from numpyro_smc.programs.sequence import Sequence
from numpyro_smc.programs.sites import is_latent, is_observed, observed_elements, plate_indices, unmasked_value


def step_latents(sequence: Sequence) -> list[str]:
    """Names of the latent sites of a step."""
    return [name for name, site in sequence.model.step_sites.items() if is_latent(site)]


def replay_step(
    sequence: Sequence,
    t: Array,
    x: Any,
    particles: Any,
    shared: Any,
    values: dict[str, Array],
    rng_key: Array | None = None,
) -> tuple[list[Array], Any, Trace]:
    """One particle's model step with its latents given.

    :return: the moving part of the new carry, the output with the whole new carry, and the trace.
    """
    model = sequence.model
    carry = model.merge(particles["model"], shared["model"])
    given = Fixed(values, plate_indices(model.prefix), "the path")
    draws = CloudDraws(random.key(0) if rng_key is None else rng_key)
    carry, output, trace = run_step(model.scan, t, carry, x, draws, given)
    return model.split(carry)[0], (output, carry), trace


def transition_density(
    sequence: Sequence, t: Array, x: Any, particles: Any, shared: Any, values: dict[str, Array]
) -> Array:
    """Log density of a step's latents and observations given one particle of the step before, ``[*batch]``."""
    _, (output, carry), trace = replay_step(sequence, t, x, particles, shared, values)
    total = jnp.zeros(sequence.batch_shape)
    for site in trace.values():
        # Latents to condition on have no weight, here as in the filter.
        if site["type"] == "sample" and (site["is_observed"] or site["name"] not in sequence.given):
            total = total + sequence.log_density(site)
    if sequence.after is not None:
        given = Fixed(sequence.global_values, plate_indices(sequence.model.prefix))
        total = total + sequence.after.log_density(t, output, carry, given, sequence.plates)
    return total


def along_paths(sequence: Sequence, paths: dict[str, Array]) -> dict[str, Array]:
    """Whole paths with the deterministic sites computed on them.

    :param paths: by site, ``[num_paths, T, ...]``, and ``[num_paths, ...]`` before the scan.
    """
    model = sequence.model
    if not any(site["type"] == "deterministic" for site in (model.prefix | model.step_sites).values()):
        return paths
    names = [name for name, site in model.step_sites.items() if site["type"] == "sample" and name in paths]

    def one(path: dict[str, Array]) -> dict[str, Array]:
        given = OverwriteAll(sequence.global_values | path, plate_indices(model.prefix))
        before, scan = run_prefix(model.program, CloudDraws(random.key(0)), given)
        assert scan is not None

        def step(carry: list[Array], inputs: tuple[Array, Any, dict[str, Array]]) -> tuple[list[Array], Any]:
            t, x, values = inputs
            whole = jax.tree.unflatten(model.carry_tree, carry)
            new, _, trace = run_step(scan, t, whole, x, CloudDraws(random.key(0)), OverwriteAll(values))
            return model.carry_leaves(new), _deterministic(trace)

        inputs = jnp.arange(sequence.length), scan.inputs(), {name: path[name] for name in names}
        return _deterministic(before) | lax.scan(step, model.carry_leaves(scan.init), inputs)[1]

    return paths | jax.vmap(one)(paths)


def _deterministic(trace: Trace) -> dict[str, Array]:
    return {name: jnp.asarray(site["value"]) for name, site in trace.items() if site["type"] == "deterministic"}


def simulated_step(model: Half, t: int, x: Any) -> tuple[Any, Trace]:
    """One step from the initial carry, latents drawn: for questions about sites rather than about values."""
    carry = jax.tree.unflatten(model.carry_tree, model.carry_leaves(model.scan.init))
    carry, _, trace = run_step(model.scan, jnp.asarray(t), carry, x, CloudDraws(random.key(0)))
    return carry, trace


def observed_values(model: Half, t: int) -> dict[str, Array]:
    """Unmasked observed values of step ``t`` (-1: before the scan), masked ones replaced by zero."""
    trace = model.prefix
    if t >= 0:
        _, trace = simulated_step(model, t, jax.tree.map(lambda leaf: leaf[t], model.scan.inputs()))
    return {name: unmasked_value(site) for name, site in trace.items() if is_observed(site)}


def look_ahead(sequence: Sequence) -> Array:
    """For each step and problem, whether any unmasked observation follows it: bool ``[T, *batch]``.

    Where masks depend on particles, or the likelihood stands after the scan, every step counts as observed.
    """
    observed = jnp.ones((sequence.length, *sequence.batch_shape), bool)
    if sequence.model.masks_are_fixed and sequence.after is None:
        observed = _observed_per_step(sequence)
    later = jnp.flip(lax.cummax(jnp.flip(observed.astype(jnp.int32), 0), axis=0), 0)
    return jnp.concatenate([later[1:], jnp.zeros_like(later[:1])]) > 0


def _observed_per_step(sequence: Sequence) -> Array:
    model, batch_shape = sequence.model, sequence.batch_shape
    moving, still = model.split(model.scan.init)

    def observe(still: list[Array], inputs: tuple[Array, Any]) -> tuple[list[Array], Array]:
        t, x = inputs
        carry, _, trace = run_step(model.scan, t, model.merge(moving, still), x, CloudDraws(random.key(0)))
        seen = jnp.zeros(batch_shape, bool)
        for site in trace.values():
            if is_observed(site):
                seen = seen | observed_elements(site, sequence.plates)
        return model.split(carry)[1], seen

    return lax.scan(observe, still, (jnp.arange(sequence.length), model.scan.inputs()))[1]


def depends_on_past(sequence: Sequence) -> bool:
    """Whether a step's new carry depends on the old one in other ways than through the step's own latents.

    The past of a path cannot be exchanged then without changing the carries of its whole future.
    """
    cloud, move = jax.eval_shape(
        lambda: sequence.step(random.key(0), jnp.asarray(0), _first(sequence.inputs()), _initial(sequence), 1)
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (cloud, move.values))
    past = jax.tree.map(lambda leaf: leaf[0], zeros[0].particles)
    future = {name: zeros[1][name][0] for name in step_latents(sequence)}
    x = _first(sequence.inputs()["model"])

    def carry(past: Any, future: Any) -> Any:
        # What else a step draws (by numpyro.prng_key) is part of the past, too: it is not among the latents.
        past, rng_key = past
        return replay_step(sequence, jnp.asarray(0), x, past, zeros[0].shared, future, rng_key)[0]

    uses = eval_provenance(carry, past=(past, random.key(0)), future=future)
    return any("past" in found for found in jax.tree.leaves(uses, is_leaf=lambda leaf: isinstance(leaf, frozenset)))


def _initial(sequence: Sequence) -> Any:
    return sequence.init(random.key(0), 1)[0]


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)
