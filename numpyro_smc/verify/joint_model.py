"""A model as the joint law of its latents and data: what checks of posterior samplers simulate from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers
from numpyro.distributions.distribution import Unit

from numpyro_smc.programs.simulated_arguments import unconditioned
from numpyro_smc.programs.simulator import element_names
from numpyro_smc.programs.sites import BatchPlates, Site, log_density, plate_scales
from numpyro_smc.programs.tracing import TRACING
from numpyro_smc.programs.unconstrained import RefuseImproper

Program = Callable[..., Any]
Values = dict[str, Array]

_WHOLE = BatchPlates()


class Draw(NamedTuple):
    """One draw of the joint law, by site and in the sites' supports: **latents** and **data**."""

    latents: Values
    data: Values


class JointModel:
    """A program at given arguments, whose data are drawn like its latents.

    What stands in the way is refused: a density that the draws do not have would make every sampler look wrong.

    :param model: a NumPyro model. **args**, **kwargs** - its arguments.
    :param observed: names of the sites that are data; by default all sites that are observed with these arguments.
    :param user: who asks, for error messages.
    :raises ValueError: naming the site, if it is unknown, a factor, scaled or in a subsampled plate; if a site is
        observed and not named; if nothing is data, or nothing is latent.
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observed: str | Sequence[str] | None,
        *,
        user: str,
    ) -> None:
        self.model, self.args, self.kwargs, self.user = model, args, kwargs, user
        trace: dict[str, Site] = {}

        def scales(rng_key: Array) -> dict[str, Any]:
            trace.update(self._simulate(rng_key))
            self._check_trace(trace)
            sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
            return {name: site["scale"] for name, site in sites.items() if site["scale"] is not None}

        self._check_scales(jax.jit(scales)(random.key(0)))
        sites = [name for name, site in trace.items() if site["type"] == "sample"]
        given = [name for name in sites if trace[name]["infer"].get("was_observed")]
        self.observed = tuple(given if observed is None else [observed] if isinstance(observed, str) else observed)
        self.latent = tuple(name for name in sites if name not in self.observed)
        self._check_names(sites, given)

    def draw(self, rng_key: Array) -> Draw:
        """Latents and data from the joint law."""
        trace = self._simulate(rng_key)
        return Draw(*({name: jnp.asarray(trace[name]["value"]) for name in of} for of in (self.latent, self.observed)))

    def redraw(self, rng_key: Array, latents: Values) -> Values:
        """Data given all latents."""
        trace = self._simulate(rng_key, latents)
        return {name: jnp.asarray(trace[name]["value"]) for name in self.observed}

    def log_densities(self, draw: Draw) -> tuple[Array, Array]:
        """Of the latents, and of the data given them."""
        trace = self._simulate(random.key(0), draw.latents | draw.data)
        parts = ([log_density(trace[name], _WHOLE) for name in of] for of in (self.latent, self.observed))
        prior, likelihood = (jnp.sum(jnp.stack(part)) for part in parts)
        return prior, likelihood

    def supports(self, latents: Values) -> dict[str, Any]:
        """Of the latent sites, where the others have these values."""
        trace = self._simulate(random.key(0), latents)
        return {name: trace[name]["fn"].support for name in self.latent}

    def _simulate(self, rng_key: Array, values: Values | None = None) -> dict[str, Site]:
        program = handlers.seed(RefuseImproper(unconditioned(self.model), self.user), rng_key)
        if values:
            program = handlers.substitute(program, data=values)
        with TRACING, handlers.block():
            return handlers.trace(program).get_trace(*self.args, **self.kwargs)

    def _check_trace(self, trace: dict[str, Site]) -> None:
        for name, site in trace.items():
            if site["type"] == "sample" and isinstance(site["fn"], Unit):
                raise ValueError(
                    f"{self.user}: the model cannot be simulated, because of the factor '{name}'. State it as the "
                    f"density of an observation, or check a model without it."
                )
        for name, scale in plate_scales(trace).items():
            if scale != 1.0:
                raise ValueError(
                    f"{self.user}: plate '{name}' is subsampled, so the posterior is not that of the simulated data. "
                    f"Give the plate its full size (no subsample_size)."
                )

    def _check_scales(self, scales: dict[str, Any]) -> None:
        for name, scale in scales.items():
            if not np.all(np.asarray(scale) == 1.0):
                raise ValueError(
                    f"{self.user}: the density of site '{name}' is scaled (handlers.scale), its draws are not: no "
                    f"sampler could agree with both. Check the model without the scale."
                )

    def _check_names(self, sites: list[str], given: list[str]) -> None:
        for name in self.observed:
            if name not in sites:
                raise ValueError(
                    f"{self.user}: observed names site '{name}', which the model does not sample. Its sites: {sites}."
                )
        for name in given:
            if name not in self.observed:
                raise ValueError(
                    f"{self.user}: site '{name}' is observed in the model, but observed={list(self.observed)} does not "
                    f"name it, so it would be redrawn as a latent. Name it too."
                )
        if not self.observed:
            raise ValueError(
                f"{self.user}: which sites are data? The model observes none with these arguments; name them, as in "
                f"observed=('{sites[-1] if sites else 'y'}',). Sites: {sites}."
            )
        if not self.latent:
            raise ValueError(f"{self.user}: all sites of the model are data ({sites}); there is nothing to sample.")


def names_of_elements(values: dict[str, Any]) -> tuple[str, ...]:
    """Names of all elements, in the order of :func:`raveled`."""
    return tuple(element for name, value in values.items() for element in element_names(name, np.shape(value)))


def raveled(values: dict[str, Any]) -> Array:
    """All elements as one vector of floats, in the order of :func:`names_of_elements`."""
    return jnp.concatenate([jnp.ravel(jnp.asarray(value)).astype(jnp.result_type(float)) for value in values.values()])
