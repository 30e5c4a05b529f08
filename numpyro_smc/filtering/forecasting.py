"""Running the model on beyond the data, from the final particles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro import handlers
from numpyro.ops.provenance import eval_provenance

from numpyro_smc.filtering.smoothing.genealogy import draw_final, take
from numpyro_smc.programs import streams
from numpyro_smc.programs.reading import read_sequence
from numpyro_smc.programs.replay import observed_values, simulated_step
from numpyro_smc.programs.sequence import Cloud, Program, Sequence


def forecast(
    particle_filter: Any, rng_key: Array, filter_key: Array, program: Any, history: Any, later: Any, num_samples: int
) -> dict[str, Array]:
    """Simulate further steps, observations included, from particles drawn by their final weights.

    :param later: the inputs of those steps, from :func:`later_inputs`, and their numbers.
    """
    params, args, kwargs = program
    filtered = particle_filter.read(random.split(filter_key)[0], params | history.global_values, args, kwargs)
    sequence = _simulator(particle_filter, filter_key, program, history)
    final_key, step_key = random.split(rng_key)
    chosen = draw_final(final_key, history.log_weights, num_samples)
    moving, still = iter(history.cloud.particles["model"]), iter(history.cloud.shared["model"])
    particles, shared = [], []
    # What was observed in the filter is drawn from now on, so more of the carry differs between particles.
    for number, (moved, moves) in enumerate(zip(filtered.model.moving, sequence.model.moving, strict=True)):
        if moved:
            leaf = filtered.model.from_front(number, take(next(moving), chosen, chosen.ndim - 1), 1)
        else:
            leaf = next(still)
        if moves:
            leaf = leaf if moved else jnp.broadcast_to(leaf, (num_samples, *leaf.shape))
            particles.append(sequence.model.to_front(number, leaf, 1))
        else:
            shared.append(leaf[0] if moved else leaf)
    cloud = Cloud({"model": particles}, {"model": shared})

    def step(cloud: Cloud, timed: tuple[Array, Any]) -> tuple[Cloud, dict[str, Array]]:
        t, x = timed
        inputs = {"model": x, "guide": None, "look ahead": None}
        cloud, move = sequence.step(random.fold_in(step_key, t), t, inputs, cloud, num_samples)
        return cloud, move.values

    _, values = lax.scan(step, cloud, later)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), values)


def _simulator(particle_filter: Any, filter_key: Array, program: Any, history: Any) -> Sequence:
    """The model with its observations drawn. A likelihood after the scan is left out; latents are forecast then."""
    params, args, kwargs = program
    held = params | history.global_values
    forecast_key = random.fold_in(filter_key, streams.FORECAST)

    def read(model: Program) -> Sequence:
        return read_sequence(forecast_key, model, None, held, args, kwargs, user="forecast", given_globals=False)

    sequence = read(particle_filter.model)
    if sequence.after is None:
        sequence = read(handlers.uncondition(particle_filter.model))
    # Every draw is one coherent path of all problems, and nothing is weighed.
    sequence.after, sequence.combined, sequence.masks_latents = None, frozenset(), False
    return sequence


def later_inputs(particle_filter: Any, filter_key: Array, program: Any, history: Any, steps: int, xs: Any) -> Any:
    """Inputs of the steps beyond the data: given, continued (time counters), or unneeded (only observed).

    :raises ValueError: if the body needs inputs that are not given, or given ones do not fit.
    """
    sequence = _simulator(particle_filter, filter_key, program, history)
    own = sequence.model.scan.inputs()
    if xs is not None:
        if jax.tree.structure(xs) != jax.tree.structure(own):  # type: ignore[operator]
            raise ValueError(f"forecast: xs must have the structure of the scan's xs, {jax.tree.structure(own)}.")
        for given, leaf in zip(jax.tree.leaves(xs), jax.tree.leaves(own), strict=True):
            if jnp.shape(given) != (steps, *leaf.shape[1:]):
                raise ValueError(
                    f"forecast: an input in xs has shape {jnp.shape(given)}; with steps={steps} it must have shape "
                    f"{(steps, *leaf.shape[1:])}."
                )
        return jax.tree.map(jnp.asarray, xs)
    leaves, treedef = jax.tree.flatten(own)

    def used(**inputs: Array) -> Any:
        x = jax.tree.unflatten(treedef, [inputs[f"x{i}"] for i in range(len(leaves))])
        carry, trace = simulated_step(sequence.model, 0, x)
        return jax.tree.leaves(carry), [site["value"] for site in trace.values() if site["type"] == "sample"]

    needs = eval_provenance(used, **{f"x{i}": leaf[0] for i, leaf in enumerate(leaves)}) if leaves else frozenset()
    needed = frozenset().union(*jax.tree.leaves(needs, is_leaf=lambda leaf: isinstance(leaf, frozenset)))
    later = []
    for i, leaf in enumerate(leaves):
        is_integer = jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.ndim == 1
        is_counter = is_integer and bool((np.diff(np.asarray(leaf)) == 1).all())
        if f"x{i}" in needed and not is_counter:
            raise ValueError(
                f"forecast: the scan's body uses an input of shape {leaf.shape} for more than observing it (a "
                f"covariate). Give its future values in xs, with {steps} steps on the leading axis."
            )
        ahead = (
            leaf[-1] + 1 + jnp.arange(steps, dtype=leaf.dtype) if is_counter else jnp.repeat(leaf[-1:], steps, axis=0)
        )
        later.append(ahead)
    return jax.tree.unflatten(treedef, later)


def not_finite(particle_filter: Any, rng_key: Array, program: Any, t: int) -> list[str]:
    """Names of the observed sites that hold non-finite, unmasked values at step ``t`` (-1: before the scan)."""
    params, args, kwargs = program
    sequence = particle_filter.read(random.split(rng_key)[0], params, args, kwargs)
    return not_finite_values(observed_values(sequence.model, t))


def not_finite_values(sites: dict[str, Array]) -> list[str]:
    """Names of the sites whose values are not all finite."""
    return [name for name, value in sites.items() if not np.isfinite(np.asarray(value, float)).all()]
