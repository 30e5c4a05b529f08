"""Arguments that hand simulated observations to a program in place of the real ones."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from numpyro_smc.programs.sites import Site

Fit = Callable[[Array, Any, str], Array]


def with_simulated(
    values: dict[str, Array], args: tuple[Any, ...], fit: Fit, user: str, remedy: str = ""
) -> tuple[Any, ...]:
    """The arguments with the first one, the data, replaced by simulated observations.

    :param values: simulated observations by site.
    :param fit: ``fit(value, original, name)`` brings a value to the form of the original.
    :param user: what needs simulated data, and **remedy** what else one may do, for error messages.
    """
    original = args[0] if args else None
    if isinstance(original, dict):
        missing = set(original) - set(values)
        if missing:
            raise ValueError(f"{user}: the first argument has entries {sorted(missing)} that no observed site has.")
        data: Any = {name: fit(values[name], original[name], name) for name in original}
    elif len(values) == 1 and hasattr(original, "shape"):
        ((name, value),) = values.items()
        data = fit(value, original, name)
    else:
        raise ValueError(
            f"{user} runs the guide on simulated observations, so the first argument of model and guide must be the "
            f"observations: an array, or a dict of arrays by site name (observed sites: {sorted(values)}; got "
            f"{type(original).__name__}). {remedy}".strip()
        )
    return data, *args[1:]


def fit_rows(plates: list[Site], user: str) -> Fit:
    """Give simulated observations the shape and type of the data; those of a subsample take the place of its rows.

    :param plates: the traced plates of the simulation.
    """

    def fit(value: Array, original: Any, name: str) -> Array:
        shape, dtype = jnp.shape(original), jnp.result_type(original)
        if value.shape == shape:
            return value.astype(dtype)
        for plate in plates:
            rows = plate["value"]
            sizes = (plate["args"][0], *shape[1:]), (len(rows), *shape[1:])
            if (shape, value.shape) == sizes:
                return jnp.asarray(original).at[rows].set(value.astype(dtype))
        raise ValueError(
            f"{user}: site '{name}' is simulated with shape {value.shape}, but the data given have shape {shape}. Pass "
            f"simulate=, a function from the simulated values to the guide's (args, kwargs)."
        )

    return fit
