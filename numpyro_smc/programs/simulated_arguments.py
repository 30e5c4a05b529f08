"""Simulating a model, and handing the simulated observations to programs in place of the real ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from numpyro import handlers
from numpyro.distributions.distribution import Unit
from numpyro.primitives import Messenger

from numpyro_smc.programs.density import Draw, Pair, Params, Program, Trace
from numpyro_smc.programs.sites import Site

Fit = Callable[[Array, Any, str], Array]
Simulate = Callable[[dict[str, Array]], tuple[tuple[Any, ...], dict[str, Any]]]


class Simulation(NamedTuple):
    """One simulation of a model.

    - **trace** - of all its sites, none observed; **latents** - a draw of those that were not observed.
    - **args**, **kwargs** - arguments that hold the simulated observations.
    """

    trace: Trace
    latents: Draw
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def simulate_pair(
    rng_key: Array, index: Array, pair: Pair, params: Params, simulate: Simulate | None = None, remedy: str = ""
) -> Simulation:
    """Simulate the model of a pair at fixed parameters: its latents are then a draw from their posterior.

    :param simulate: from the simulated observations by site to the programs' ``(args, kwargs)``; by default they take
        the place of the first argument.
    :param remedy: what else one may do, for error messages.
    :raises ValueError: naming the site, for factors, and if it is not known where the observations belong.
    """
    trace = replace(pair, guide=unconditioned(pair.model)).draw(rng_key, index, lax.stop_gradient(params)).trace
    seen = {name: site for name, site in trace.items() if site.get("infer", {}).get("was_observed")}
    for name, site in seen.items():
        if isinstance(site["fn"], Unit):
            raise ValueError(
                f"{pair.user}: the model cannot be simulated, because of the factor '{name}'. State it as the density "
                f"of an observation. {remedy}".strip()
            )
    values = {name: site["value"] for name, site in seen.items()}
    if simulate is None:
        plates = [site for site in trace.values() if site["type"] == "plate"]
        args, kwargs = with_simulated(values, pair.args, fit_rows(plates, pair.user), pair.user, _SIMULATE), pair.kwargs
    else:
        args, kwargs = simulate(values)
    return Simulation(trace, Draw({name: site for name, site in trace.items() if name not in seen}), args, kwargs)


def unconditioned(program: Program) -> Program:
    """``handlers.uncondition``, inside scans too, where a simulated observation may enter the next step."""

    def simulating(*args: Any, **kwargs: Any) -> Any:
        with _UnconditionBodies():
            return handlers.uncondition(program)(*args, **kwargs)

    return simulating


class _UnconditionBodies(Messenger):
    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            msg["args"] = tuple(handlers.uncondition(part) if callable(part) else part for part in msg["args"])


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
        if not jnp.issubdtype(dtype, jnp.inexact) and jnp.issubdtype(value.dtype, jnp.inexact):
            dtype = value.dtype  # of a density over the reals whose data happen to be whole numbers
        if value.shape == shape:
            return value.astype(dtype)
        for plate in plates:
            rows = plate["value"]
            sizes = (plate["args"][0], *shape[1:]), (len(rows), *shape[1:])
            if (shape, value.shape) == sizes:
                return jnp.asarray(original, dtype).at[rows].set(value.astype(dtype))
        raise ValueError(
            f"{user}: site '{name}' is simulated with shape {value.shape}, but the data given have shape {shape}. Pass "
            f"simulate=, a function from the simulated values to the guide's (args, kwargs)."
        )

    return fit


_SIMULATE = "Or pass simulate=, a function from the simulated values to the guide's (args, kwargs)."
