"""The program of a kernel that does not hold all of the model's latents, for those who run it at the kernel's draws."""

from typing import Any

from jax import random
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK

from numpyro_smc.programs.density import Program
from numpyro_smc.programs.sites import is_latent, is_observed


class KernelProgram:
    """A model that, run without random keys, has the values that its kernel holds.

    A chain of parameters alone has no likelihood of single observations, which would need the states that were
    integrated out. At draws that lack latents (as ``log_likelihood`` does, and ArviZ with it),
    the program then shows no observed site, in place of failing at the first latent that it is not given.

    :param model: the user's program, which it equals.
    :param params: values held by the kernel.
    """

    def __init__(self, model: Program, params: dict[str, Any]) -> None:
        self.model, self.params = model, params
        self.__name__ = getattr(model, "__name__", type(model).__name__)
        self.__wrapped__ = model  # whose signature it has

    def __eq__(self, other: object) -> bool:
        return self.model == (other.model if isinstance(other, KernelProgram) else other)

    def __hash__(self) -> int:
        return hash(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(handler, handlers.seed) for handler in _PYRO_STACK):
            return self.model(*args, **kwargs)
        program = handlers.substitute(self.model, data=self.params)
        given: set[str] = set()
        for handler in _PYRO_STACK:
            if isinstance(handler, handlers.substitute | handlers.condition):
                given |= set(handler.data or {})
        seeded = handlers.seed(program, random.key(0))
        with handlers.block():
            trace = handlers.trace(seeded).get_trace(*args, **kwargs)
        if {name for name, site in trace.items() if is_latent(site)} <= given | set(self.params):
            return program(*args, **kwargs)
        return handlers.block(seeded, hide_fn=lambda site: site["type"] == "sample" and is_observed(site))(
            *args, **kwargs
        )
