r"""The learned score of Monte Carlo diffusion: a network in the drift of the reversal.

The ideal reversal of a Langevin transition drifts along the score of the particles' own law, not of the bridging
density. The network :math:`s(z, k)` is the difference: two residual softplus layers over the state and an embedding of
the transition's number, scaled by a number that starts at zero, so that the untrained sampler is the plain one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, random
from numpyro import handlers
from numpyro.distributions.transforms import biject_to

from numpyro_smc.engines.learned_schedule import PREFIX, undeclared
from numpyro_smc.engines.path import Score
from numpyro_smc.programs.guide_target import GuideTarget, State, moves
from numpyro_smc.programs.plate_choice import chosen_plates
from numpyro_smc.programs.sites import BatchPlates, Site, plate_scales
from numpyro_smc.programs.tracing import TRACING

NAME = PREFIX + "score"

_EMBEDDING = 20


def declare(trace: dict[str, Site], plates: Any, num_transitions: int) -> None:
    """The ``param`` statement of a network for the latent sites of a guide's trace.

    :param plates: the ``plates`` argument of the bound.
    """
    sites = [site for site in trace.values() if site["type"] == "sample"]
    batch = chosen_plates(sites, plate_scales(trace), plates)
    # Shapes alone are needed: inside the guide's own handlers, nothing must be drawn or evaluated for them.
    shapes = [jax.eval_shape(biject_to(s["fn"].support).inv, s["value"]).shape for s in sites if moves(s)]
    dimension = sum(math.prod(shape) for shape in shapes) // math.prod(batch.shape)
    numpyro.param(NAME, lambda rng_key: initial(rng_key, dimension, num_transitions))


def initial(rng_key: Array, dimension: int, num_transitions: int) -> dict[str, Array]:
    """Weights of a network of states ``[dimension]``."""
    width = dimension + _EMBEDDING
    keys = random.split(rng_key, 4)

    def layer(key: Array, rows: int) -> Array:
        return random.normal(key, (rows, width)) / jnp.sqrt(width)

    return {
        "embedding": random.normal(keys[0], (num_transitions, _EMBEDDING)),
        "hidden": jnp.stack([layer(keys[1], width), layer(keys[2], width)]),
        "hidden_bias": jnp.zeros((2, width)),
        "out": layer(keys[3], dimension),
        "scale": jnp.zeros(()),
    }


def bind(user: str, params: dict[str, Any], target: GuideTarget) -> Score:
    """The network at given parameters, as a function ``(k, state) -> drift``.

    :raises ValueError: if it was not declared, or for other plates.
    """
    if NAME not in params:
        raise undeclared(user, [NAME])
    weights, plates = params[NAME], target.plates

    def score(k: Array, state: State) -> State:
        flat = _per_problem(state, plates)
        if flat.shape[-1] != weights["out"].shape[0]:
            raise ValueError(
                f"{user}: the score network was declared for {weights['out'].shape[0]} latent numbers per problem, but "
                f"model and guide together have {flat.shape[-1]}: plates {list(plates.names)} enclose both, others "
                f"the guide alone. Pass their names, or None, as `plates`."
            )
        return _like(_network(weights, k, flat), state, plates)

    return score


def _network(weights: dict[str, Array], k: Array, z: Array) -> Array:
    embedding = jnp.broadcast_to(weights["embedding"][k], (*z.shape[:-1], _EMBEDDING))
    hidden = jnp.concatenate([z, embedding], axis=-1)
    for matrix, bias in zip(weights["hidden"], weights["hidden_bias"], strict=True):
        hidden = hidden + jax.nn.softplus(hidden @ matrix.T + bias)
    return weights["scale"] * (hidden @ weights["out"].T)


def _per_problem(state: State, plates: BatchPlates) -> Array:
    return jnp.concatenate([leaf.reshape(*plates.shape, -1) for leaf in state.values()], axis=-1)


def _like(flat: Array, state: State, plates: BatchPlates) -> State:
    rank, sizes = len(plates.shape), [math.prod(leaf.shape) // math.prod(plates.shape) for leaf in state.values()]
    parts = jnp.split(flat, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)], axis=rank)
    return {name: part.reshape(leaf.shape) for (name, leaf), part in zip(state.items(), parts, strict=True)}


def with_score(guide: Any, plates: Any, num_transitions: int) -> Any:
    """The same guide, which also declares the network."""

    def scored_guide(*args: Any, **kwargs: Any) -> Any:
        with TRACING, handlers.trace() as trace:
            result = guide(*args, **kwargs)
        declare(trace, plates, num_transitions)
        return result

    return scored_guide
