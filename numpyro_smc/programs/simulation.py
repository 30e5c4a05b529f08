"""One simulation of a model: its data as the programs' arguments, and its latents as a state of the guide."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax, random
from numpyro.distributions.transforms import biject_to
from numpyro.infer.autoguide import AutoContinuous

from numpyro_smc.programs.automatic_guides import latent_vector
from numpyro_smc.programs.density import Draw, Pair, Params, is_point
from numpyro_smc.programs.guide_target import State
from numpyro_smc.programs.simulated_arguments import Simulate, simulate_pair
from numpyro_smc.programs.sites import is_latent


def simulated(
    rng_key: Array, pair: Pair, params: Params, simulate: Simulate | None
) -> tuple[tuple[Any, ...], dict[str, Any], State]:
    """Simulate latents and data from the model: then the latents are an exact draw from their posterior.

    :param simulate: from the simulated observations by site to the programs' ``(args, kwargs)``; by default they take
        the place of the first argument.
    :return: arguments, keyword arguments, and the guide's unconstrained state at the simulated latents.
    :raises ValueError: naming the site, for factors, and for latents of the guide that the model does not have.
    """
    params = lax.stop_gradient(params)
    model_key, guide_key = random.split(rng_key)
    _, latents, args, kwargs = simulate_pair(model_key, jnp.asarray(0), pair, params, simulate)
    return args, kwargs, _state(guide_key, replace(pair, args=args, kwargs=kwargs), params, latents)


def _state(rng_key: Array, pair: Pair, params: Params, latents: Draw) -> State:
    guide = pair.guide
    if isinstance(guide, AutoContinuous):
        # Its one latent is a vector that holds the unconstrained sites one after the other.
        reals = {
            name: biject_to(site["fn"].support).inv(site["value"])
            for name, site in latents.trace.items()
            if is_latent(site)
        }
        return {f"_{guide.prefix}_latent": latent_vector(guide, reals)}
    trace = pair.redraw(rng_key, jnp.asarray(0), params, latents).trace
    moving = {name: site for name, site in trace.items() if is_latent(site) and not is_point(site["fn"])}
    for name in moving:
        if name not in latents.trace:
            raise ValueError(
                f"{pair.user}: a reverse chain starts at exact draws of the guide's latents, and site '{name}' is not "
                f"one of the model's. Use the prior (guide=None) or a guide that samples the model's sites directly."
            )
    return {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in moving.items()}
