"""What a simulator draws besides its parameters: hidden from handlers, and looked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import random
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_smc.programs.sites import Site, is_latent
from numpyro_smc.programs.tracing import TRACING


class Hides(Messenger):
    """Show sites of the given names to no handler outside, and draw them by a fixed key.

    Names that the program does not have, such as those of Jacobians and of reparametrised parameters, come from the
    handlers outside, and pass.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.rng_key = random.key(0)
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] not in ("prng_key", "control_flow") and msg.get("name") not in self.names:
            return
        msg["stop"] = True
        drawn = msg["type"] in ("sample", "prng_key", "plate", "control_flow")
        if drawn and msg["value"] is None and msg["kwargs"].get("rng_key") is None:
            self.rng_key, msg["kwargs"]["rng_key"] = random.split(self.rng_key)


def is_tractable(
    model: Callable[..., Any],
    trace: dict[str, Site],
    params: Sequence[str],
    observed: Sequence[str],
    context: Sequence[str],
) -> bool:
    """Whether the program itself gives the likelihood: no hidden draw, and every output a sample site."""
    known = {*params, *observed, *context}
    hidden = any(is_latent(site) and name not in known for name, site in trace.items())
    keys = _CountsKeys()
    with TRACING, handlers.block(), keys:
        handlers.seed(model, random.key(0))()
    return not hidden and not keys.number and all(trace[name]["type"] == "sample" for name in observed)


class _CountsKeys(Messenger):
    """Count the keys that a program draws by hand."""

    def __init__(self) -> None:
        self.number = 0
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        self.number += msg["type"] == "prng_key"
