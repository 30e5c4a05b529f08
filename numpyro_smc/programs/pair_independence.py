"""Whether the elements of plates around a model and its guide are independent problems, proved from the programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.primitives import Messenger

from numpyro_smc.programs.elements.labels import Labels, along
from numpyro_smc.programs.elements.plates import coupled_density, densities, fits, labels_of
from numpyro_smc.programs.elements.tracing import trace
from numpyro_smc.programs.sites import BatchPlates, Site, is_latent

Trace = dict[str, Site]


class FromBase(Messenger):
    """Draws of transformed distributions from given draws of their bases: for densities that know no inverse."""

    def __init__(self, bases: dict[str, Array]) -> None:
        super().__init__(None)
        self.bases = bases

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["name"] not in self.bases:
            return
        value = self.bases[msg["name"]]
        intermediates = []
        for transform in msg["fn"].transforms:
            before = value
            value, between = transform.call_with_intermediates(before)
            intermediates.append([before, between])
        msg["value"], msg["intermediates"] = value, intermediates


def couplings(
    run: Callable[[dict[str, Array], FromBase], tuple[Trace, Trace]], guide: Trace, plates: BatchPlates
) -> dict[str, str]:
    """For each plate whose elements are not proved independent, what joins them, in words.

    They are independent if no log density of one element, of the guide or of the model, depends on latents of another.

    :param run: both programs at given values, and at given draws of bases: the traces of the guide and of the model.
    :param guide: the trace of one draw of the guide.
    """
    latents = {name: site for name, site in guide.items() if is_latent(site)}
    bases = {name: site for name, site in latents.items() if site["intermediates"]}
    values = {name: site for name, site in latents.items() if name not in bases}

    def of_latents(values: dict[str, Array], bases: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        of_guide, of_model = run(values, FromBase(bases))
        return densities(of_guide), densities(of_model)

    def shape(value: Any) -> Any:
        return jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value))

    drawn = {name: shape(site["value"]) for name, site in values.items()}
    first = {name: shape(site["intermediates"][0][0]) for name, site in bases.items()}
    labels = trace(of_latents, drawn, first)
    found: dict[str, str] = {}
    for name, dim, size in zip(plates.names, plates.dims, plates.shape, strict=True):
        of_bases: dict[str, Labels] = {
            site: along(base.shape, len(bases[site]["fn"].batch_shape) + dim) for site, base in first.items()
        }
        for results in labels(labels_of(values, (), dim), of_bases):
            for site, label in results.items():
                if not fits(label, dim, size):
                    found.setdefault(
                        name, f"plate '{name}' does not make independent problems: {coupled_density(site)}"
                    )
    return found
