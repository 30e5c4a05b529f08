"""Density-ratio estimation of twists: latents that belong to their observations against latents that do not."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers
from numpyro.ops.provenance import eval_provenance

from numpyro_smc.engines.particles import run
from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.reading import read_sequence
from numpyro_smc.programs.scans import Fixed, run_prefix, run_step
from numpyro_smc.programs.sequence import Program, Sequence
from numpyro_smc.programs.simulated_arguments import with_simulated
from numpyro_smc.programs.sites import is_observed, plate_indices

Values = dict[str, Array]


def twist_loss(
    rng_key: Array,
    sequence: Sequence,
    params: dict[str, Any],
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_series: int,
) -> Array:
    r"""Binary cross-entropy of the classifier with logit :math:`\log r_t(x_t, y)`, averaged over series and steps.

    Positives are simulated pairs of latents and observations; negatives are latents of other simulated series beside
    the same observations. Steps with no observation after them do not count.

    :param sequence: the program as read on the real data; its global latents are held.
    :param num_series: number of simulated series of each kind.
    :return: scalar, per step the sum of the two terms, so ``2 log 2`` for a zero twist.
    """
    positive_key, negative_key = random.split(rng_key)
    held = params | {name: lax.stop_gradient(value) for name, value in sequence.global_values.items()}
    held = held | plate_indices(sequence.model.prefix)
    names = [name for name, site in sequence.model.step_sites.items() if is_observed(site)]
    if sequence.after is not None or not names:
        raise ValueError(
            "SIXO: twist_training='dre' simulates the observations inside the scan's step, and the model has none "
            "there. Move the likelihood into the step."
        )
    _check_data_unused(model, held, args, kwargs)
    start, path = simulate(positive_key, model, held, args, kwargs, num_series)
    other_start, other_path = simulate(negative_key, model, held, args, kwargs, num_series)
    observations = {name: path.pop(name) for name in names}
    for name in names:
        del other_path[name]
    both = jax.tree.map(lambda *pair: jnp.stack(pair, axis=1), (start, path), (other_start, other_path))

    def logits(observed: Values, both: tuple[Values, Values]) -> Array:
        # What the guide computes of the observations alone is shared by the pair.
        arguments = with_simulated(observed, args, _like, "SIXO (twist_training='dre')")
        return jax.vmap(lambda pair: twists_along(sequence, guide, params, arguments, kwargs, *pair))(both)

    positive, negative = jnp.moveaxis(jax.vmap(logits)(observations, both), 1, 0)
    assert sequence.look_ahead is not None
    counted = jnp.broadcast_to(sequence.look_ahead, positive.shape)
    terms = jnp.where(counted, jax.nn.softplus(-positive) + jax.nn.softplus(negative), 0.0)
    return jnp.sum(terms) / jnp.maximum(jnp.sum(counted), 1)


def simulate(
    rng_key: Array,
    model: Program,
    params: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_series: int,
) -> tuple[Values, Values]:
    """Simulate latents and observations of a sequence model, gradients stopped.

    :return: values of the sites before the scan ``[num_series, ...]``, and of the steps ``[num_series, T, ...]``.
    """
    read_key, key = random.split(rng_key)
    params = lax.stop_gradient(params)
    sequence = read_sequence(
        read_key, handlers.uncondition(model), None, params, args, kwargs, user="SIXO", given_globals=False
    )
    recursion = run(key, sequence, num_series, None, keep=lambda state, move: move.values)
    path = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), recursion.steps.history)
    return lax.stop_gradient((recursion.kept, path))


def twists_along(
    sequence: Sequence,
    guide: Program,
    params: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    start: Values,
    path: Values,
) -> Array:
    """Log twists of one given path under the guide for given observations, ``[T, *batch]``."""
    half = sequence.guide
    assert half is not None
    rng_key = random.key(0)
    plates = plate_indices(sequence.model.prefix) | plate_indices(sequence.guide_prefix)
    bound = handlers.substitute(lambda: guide(*args, **kwargs), data=params)
    _, scan = run_prefix(bound, CloudDraws(rng_key), Fixed(sequence.global_values | start, plates), is_guide=True)
    assert scan is not None

    def step(carry: list[Array], inputs: tuple[Array, Any, Values]) -> tuple[list[Array], Array]:
        t, x, values = inputs
        tree = jax.tree.unflatten(half.carry_tree, carry)
        new, _, trace = run_step(scan, t, tree, x, CloudDraws(rng_key), Fixed(values, plates, "the simulated model"))
        return half.carry_leaves(new), sum(site["value"] for site in trace.values() if site["type"] == "twist")

    inputs = (jnp.arange(sequence.length), scan.inputs(), path)
    return lax.scan(step, half.carry_leaves(scan.init), inputs)[1]


def _like(value: Array, original: Any, name: str) -> Array:
    shape = jnp.shape(original)
    if value.shape == shape:
        return value
    if value.shape[1:] == shape:
        return value[-1]
    if value.ndim > 1 and jnp.swapaxes(value, 0, 1).shape == shape:
        return jnp.swapaxes(value, 0, 1)
    raise ValueError(
        f"SIXO: site '{name}' is simulated with shape {value.shape} but the observations given have shape {shape}. "
        f"Give them with time on the leading axis (or without a time axis when only the last step is observed)."
    )


def _check_data_unused(model: Program, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Simulation must not read the real observations other than as ``obs``."""
    if not args:
        return

    def simulated(data: Any) -> Any:
        program = handlers.substitute(lambda: handlers.uncondition(model)(data, *args[1:], **kwargs), data=params)
        _, scan = run_prefix(program, CloudDraws(random.key(0)))
        if scan is None:
            return ()
        x = jax.tree.map(lambda leaf: leaf[0], scan.inputs())
        carry, _, trace = run_step(scan, jnp.asarray(0), scan.init, x, CloudDraws(random.key(0)))
        values = {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}
        return {"the carry": jax.tree.leaves(jax.tree.map(jnp.asarray, carry)), **values}

    uses = eval_provenance(simulated, data=args[0])
    for name, sets in uses.items() if uses else ():
        if any("data" in found for found in jax.tree.leaves(sets, is_leaf=lambda x: isinstance(x, frozenset))):
            raise ValueError(
                f"SIXO: twist_training='dre' simulates from the model, but its step reads the data directly (it "
                f"reaches {name}). Use the value that numpyro.sample(..., obs=...) returns instead of the data."
            )
