"""Which plates make independent problems in a model and its guide, and what is lost where none does."""

import warnings
from collections.abc import Collection, Mapping
from types import MappingProxyType

from numpyro.util import find_stack_level

from numpyro_smc.programs.sites import BatchPlates, Site, common_plates, in_control_flow, is_latent, is_one

_LARGE = 10


def choose_plates(
    model: list[Site],
    guide: list[Site],
    scales: dict[str, float],
    plates: str | Collection[str] | None,
    num_particles: int,
    user: str,
    coupled: Mapping[str, str] = MappingProxyType({}),
) -> BatchPlates:
    """The plates whose elements get importance weights of their own.

    :param model: sample sites of the model; **guide** - of the guide.
    :param scales: full size over subsampled size, by plate name.
    :param plates: ``"auto"`` for all plates of independent elements that enclose every site, names that must, or
        ``None`` for none.
    :param num_particles: number of weights that are averaged; with one there is nothing to lose.
    :param coupled: what joins the elements of plates that are not independent problems, by plate.
    :raises ValueError: if a plate named does not enclose every site or is not of independent problems, or a subsampled
        plate has no weights of its own.
    """
    sites = model + guide
    _check_scans(sites, scales, user)
    for name in () if plates is None or plates == "auto" else plates:
        _check_encloses(name, model, guide, user)
        if name in coupled:
            raise ValueError(
                f"{user}: plates names '{name}', but {coupled[name]}. Leave the plate out of `plates`, or let each "
                f"element depend on its own latents alone."
            )
    of_all = chosen_plates(sites, scales, plates)
    joined = [name for name in of_all.names if name in coupled]
    chosen = chosen_plates(sites, scales, [name for name in of_all.names if name not in coupled])
    if num_particles == 1:
        return chosen
    for name, scale in scales.items():
        if scale != 1.0 and name not in chosen.names:
            if name in joined:
                raise ValueError(
                    f"{user}: {coupled[name]}. It is also subsampled, so its scaled log density would stand inside the "
                    f"average over particles and the bound would be wrong. Use the full data, or num_particles=1."
                )
            outside = _outside(name, sites)
            raise ValueError(
                f"{user}: plate '{name}' is subsampled but does not enclose every sample site of model and guide "
                f"({outside}), so its scaled log density would stand inside the average over particles and the bound "
                f"would be wrong. Put every site inside the plate, use the full data, or num_particles=1."
            )
    for name in joined:
        warnings.warn(
            f"{user}: {coupled[name]}. All its elements are one problem, with one weight a particle for them together.",
            stacklevel=find_stack_level(),
        )
    if plates == "auto" and not of_all.names:
        _warn_of_lost_plates(model, sites, user)
    if plates is not None:
        _warn_of_missing_plates(model, user)
    return chosen


def chosen_plates(sites: list[Site], scales: dict[str, float], plates: str | Collection[str] | None) -> BatchPlates:
    """The plates meant by ``plates`` that enclose all ``sites``."""
    return common_plates(sites, scales, None if plates == "auto" else tuple(plates or ()))


def _check_scans(sites: list[Site], scales: dict[str, float], user: str) -> None:
    """A plate statement inside a scan leaves no trace but its sites, whose scale may be that of a subsample."""
    for site in sites:
        for frame in site["cond_indep_stack"]:
            if frame.name not in scales and not is_one(1.0 if site["scale"] is None else site["scale"]):
                raise ValueError(
                    f"{user}: plate '{frame.name}' stands inside a scan, and site '{site['name']}' there is scaled. If "
                    f"the plate is subsampled, each step would draw other rows: put the plate around the scan and hand "
                    f"the rows in. If handlers.scale is meant, put the plate around the scan too."
                )


def _check_encloses(name: str, model: list[Site], guide: list[Site], user: str) -> None:
    for program, sites in (("model", model), ("guide", guide)):
        for site in sites:
            if name not in {frame.name for frame in site["cond_indep_stack"]}:
                raise ValueError(
                    f"{user}: plates names '{name}', but site '{site['name']}' of the {program} is outside that plate. "
                    f"Put it inside, or leave the plate out of `plates`."
                )


def _outside(name: str, sites: list[Site]) -> str:
    outside = [s["name"] for s in sites if name not in {frame.name for frame in s["cond_indep_stack"]}]
    return f"outside it: {', '.join(map(repr, dict.fromkeys(outside)))}" if outside else "left out by `plates`"


def _warn_of_lost_plates(model: list[Site], sites: list[Site], user: str) -> None:
    frames = {frame.name: frame.size for site in model if is_latent(site) for frame in site["cond_indep_stack"]}
    for name, size in frames.items():
        if size > _LARGE:
            warnings.warn(
                f"{user}: plate '{name}' ({size} elements) does not enclose every sample site "
                f"({_outside(name, sites)}), so each particle gets one weight for the whole model, and the bound is "
                f"looser the larger the plate. Put every site of model and guide inside it for weights per element, or "
                f"pass plates=None if one weight is meant.",
                stacklevel=find_stack_level(),
            )


def _warn_of_missing_plates(model: list[Site], user: str) -> None:
    for site in model:
        dims = {frame.dim for frame in site["cond_indep_stack"]}
        batch_shape = site["fn"].batch_shape
        first = 1 if in_control_flow(site) else 0
        for axis in range(first, len(batch_shape)):
            dim = axis - len(batch_shape)
            if batch_shape[axis] > _LARGE and dim not in dims:
                # One site is enough to say so.
                return warnings.warn(
                    f"{user}: batch dimension {dim} of site '{site['name']}' ({batch_shape[axis]} elements) belongs to "
                    f"no plate, so its elements share one importance weight. Put independent data in a numpyro.plate "
                    f"(for weights per element), or declare the dimension with to_event.",
                    stacklevel=find_stack_level(),
                )
