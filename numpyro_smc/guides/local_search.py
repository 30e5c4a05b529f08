"""The search for the best distribution of every datum of a batch, as one program."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax, random
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.infer.autoguide import AutoContinuous, AutoDiagonalNormal, AutoGuide, AutoMultivariateNormal
from numpyro.infer.initialization import init_to_value
from numpyro.infer.util import transform_fn

from numpyro_smc.evidence.estimate import log_mean_and_error
from numpyro_smc.guides.data_rows import DataRows
from numpyro_smc.guides.starts import Start, encoder_start, plain_start
from numpyro_smc.programs.density import Params, Program, log_weights
from numpyro_smc.programs.tracing import TRACING

if TYPE_CHECKING:
    from numpyro_smc.guides.local import LocalOptimizer

GAUSSIANS: dict[str, type[AutoContinuous]] = {
    "factorised": AutoDiagonalNormal,
    "ffg": AutoDiagonalNormal,
    "full_rank": AutoMultivariateNormal,
}
_USER = "LocalOptimizer"


def optima(
    optimizer: "LocalOptimizer", model: Program, guide: Program | None, keys: Array, params: Params, rows: DataRows
) -> dict[str, Any]:
    """Arrays of a :class:`~numpyro_smc.guides.local.LocalOptimum`, by name, of all rows."""
    fixed = handlers.block(handlers.substitute(model, data=params), hide_fn=lambda site: site["type"] == "param")
    num_starts, num_eval = len(optimizer.starts), optimizer.num_eval

    def one(rng_key: Array, row: list[Array]) -> dict[str, Any]:
        start_key, search_key, choice_key, final_key = random.split(rng_key, 4)
        args, kwargs = rows.one(row)
        starts = []
        for number, kind in enumerate(optimizer.starts):
            key = random.fold_in(start_key, number)
            if kind == "encoder":
                starts.append(encoder_start(key, model, guide, params, args, kwargs, num_eval, _USER))
            else:
                starts.append(plain_start(kind, key, fixed, args, kwargs))
        local, bijections, points = _parametrised(optimizer, fixed, starts, start_key, args, kwargs)

        def weights(point: Params, rng_key: Array, num: int) -> Array:
            values = transform_fn(bijections, point)
            sizes = {"num_particles": num, "batch_size": optimizer.num_mc}
            return log_weights(rng_key, fixed, local, values, args, kwargs, **sizes, plates=None, user=_USER).values

        def loss(point: Params, rng_key: Array) -> Array:
            return -jnp.mean(weights(point, rng_key, optimizer.num_mc))

        search = partial(_descend, optimizer, loss)
        ends, num_steps, converged = jax.vmap(search)(points, random.split(search_key, num_starts))
        candidates = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), points, ends)
        bounds = lax.map(lambda point: jnp.mean(weights(point, choice_key, num_eval)), candidates)
        choice = jnp.argmax(jnp.where(jnp.isfinite(bounds), bounds, -jnp.inf))
        best = jax.tree.map(lambda leaf: leaf[choice], candidates)
        found = weights(best, final_key, num_eval)
        iwae, iwae_error, _ = log_mean_and_error(found)
        start = choice % num_starts
        return {
            "elbo": jnp.mean(found),
            "elbo_error": jnp.std(found, ddof=min(1, num_eval - 1)) / jnp.sqrt(num_eval),
            "iwae": iwae,
            "iwae_error": iwae_error,
            "num_steps": jnp.where(choice < num_starts, 0, num_steps[start]),
            "start": start,
            "converged": converged[start],
            "params": transform_fn(bijections, best),
        }

    return jax.vmap(one)(keys, rows.rows)


def _descend(
    optimizer: "LocalOptimizer", loss: Callable[[Params, Array], Array], start: Params, rng_key: Array
) -> tuple[Params, Array, Array]:
    """Parameters after the last step, number of steps, and whether the loss had stopped to fall, of one datum.

    Under ``vmap`` the loop goes on until the last datum is done; those that are done stay as they are.
    """
    adam = optax.apply_if_finite(optax.scale_by_adam(), optimizer.max_steps)
    rates = jnp.asarray(optimizer.rates)

    def window(search: tuple[Any, ...]) -> tuple[Any, ...]:
        point, moments, best, failures, stage, first = search

        def step(carry: tuple[Params, Any], number: Array) -> tuple[tuple[Params, Any], Array]:
            point, moments = carry
            value, gradient = jax.value_and_grad(loss)(point, random.fold_in(rng_key, number))
            direction, moments = adam.update(gradient, moments)
            return (jax.tree.map(lambda x, d: x - rates[stage] * d, point, direction), moments), value

        (point, moments), losses = lax.scan(step, (point, moments), first + jnp.arange(optimizer.check_every))
        mean = jnp.mean(losses)
        failures = jnp.where(mean < best, 0, failures + 1)
        spent = failures >= optimizer.patience
        best = jnp.where(mean < best, mean, best)
        return point, moments, best, jnp.where(spent, 0, failures), stage + spent, first + optimizer.check_every

    def goes_on(search: tuple[Any, ...]) -> Array:
        *_, stage, first = search
        return (stage < len(rates)) & (first < optimizer.max_steps)

    zero = jnp.zeros((), int)
    state = (start, adam.init(start), jnp.asarray(jnp.inf), zero, zero, zero)
    point, *_, stage, first = lax.while_loop(goes_on, window, state)
    return point, first, stage == len(rates)


def _parametrised(
    optimizer: "LocalOptimizer", model: Program, starts: list[Start], rng_key: Array, args: Any, kwargs: Any
) -> tuple[Program, dict[str, Any], Params]:
    """The guide of one datum, the bijections of its parameters, and their unconstrained values at all starts."""
    points = []
    for number, start in enumerate(starts):
        guide = _make_guide(optimizer, model, start, optimizer.starts[number])
        seeded = handlers.seed(guide, random.fold_in(rng_key, number))
        with TRACING, handlers.block():
            trace = handlers.trace(seeded).get_trace(*args, **kwargs)
        sites = {name: site for name, site in trace.items() if site["type"] == "param"}
        values = {name: site["value"] for name, site in sites.items()}
        if isinstance(optimizer.family, str):
            values |= start.scale_params(guide)  # type: ignore[arg-type]
        bijections = {name: biject_to(s["kwargs"].get("constraint", constraints.real)) for name, s in sites.items()}
        points.append(transform_fn(bijections, values, invert=True))
    return guide, bijections, jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)


def _make_guide(optimizer: "LocalOptimizer", model: Program, start: Start, kind: str) -> Program:
    family, strategy = optimizer.family, init_to_value(values=start.values)
    if isinstance(family, str):
        return GAUSSIANS[family](model, init_loc_fn=strategy)
    takes = inspect.signature(family).parameters
    if (isinstance(family, type) and issubclass(family, AutoGuide)) or "init_loc_fn" in takes:
        return family(model, init_loc_fn=strategy)
    if "start" in takes:
        return family(model, start=start)
    if kind != "random":
        raise ValueError(
            f"{_USER}: init={kind!r} needs a family that can be told where to start, and '{optimizer.name}' takes "
            f"neither start nor init_loc_fn. Let the function take one of them, or pass the number of random starts, "
            f"as init=1: then the guide's own initial parameters are taken."
        )
    return family(model)
