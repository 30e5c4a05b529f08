"""Holding one particle on a given path: what makes a filter of the recursion a conditional one."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from numpyro.primitives import Messenger

from numpyro_smc.programs.sequence import Sequence, Steering
from numpyro_smc.programs.sites import is_latent

Path = dict[str, Array]


class Pinned(Messenger):
    """Give particle 0 its values, after every particle has drawn its own."""

    def __init__(self, values: Path, index: Array) -> None:
        super().__init__(None)
        self.values, self.index = values, index

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg.get("drawn") and msg["name"] in self.values:
            msg["value"] = jnp.where(self.index == 0, self.values[msg["name"]], msg["value"])
            msg["pinned"] = True
            msg["intermediates"] = []  # those of the draw, which is no longer the value


def path_sites(sequence: Sequence) -> tuple[list[str], list[str]]:
    """Names of the latent sites of a path: those before the scan that belong to each particle, and those of a step.

    :raises NotImplementedError: naming what a path cannot hold, draws that are not sites of the model.
    """
    for half in (sequence.model, sequence.guide):
        for name, site in {} if half is None else (half.prefix | half.step_sites).items():
            if site["type"] == "prng_key":
                raise NotImplementedError(
                    f"{sequence.user}: the program asks for a random key (numpyro.prng_key '{name}'), so a path of its "
                    f"sites does not determine it. Draw with numpyro.sample instead."
                )
            if is_latent(site) and site["infer"].get("is_auxiliary"):
                raise NotImplementedError(
                    f"{sequence.user}: the guide's site '{name}' is auxiliary, so a path of the model's sites does not "
                    f"determine its own proposal density. Use a guide that samples the model's sites only."
                )
    initial = [name for name in sequence.model.prefix if name in sequence.model.particle_latents]
    steps = sequence.model.step_sites.items()
    return initial, [name for name, site in steps if is_latent(site) and not site["given"]]


def pin(sequence: Sequence, path: Path) -> None:
    """Hold particle 0 of a sequence model on a path.

    :param path: by site of :func:`path_sites`, ``[...]`` for sites before the scan and ``[T, ...]`` for steps.
    """
    initial, steps = path_sites(sequence)
    sequence.steering = Steering(
        {name: path[name] for name in initial},
        {name: path[name] for name in steps},
        lambda values, index: (Pinned(values, index),),
    )
