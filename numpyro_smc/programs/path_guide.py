"""Guides that propose a whole path as one factorised site: the t-th factor is the proposal at step t."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro.distributions import Delta, Distribution, ExpandedDistribution, Independent, MaskedDistribution
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import Messenger

from numpyro_smc.programs.draws import CloudDraws, draw
from numpyro_smc.programs.halves import Overwrite
from numpyro_smc.programs.scans import Trace, run_prefix
from numpyro_smc.programs.sites import is_latent


def read_path(guide_trace: Trace, step_sites: Trace, length: int, user: str) -> Trace:
    """The guide's sites that propose whole paths of the model's step latents, each with shape ``[T, ...]``.

    :raises ValueError: naming a step latent that the guide does not sample, or whose path is not factorised over time.
    """
    path = {}
    for name, site in step_sites.items():
        if not is_latent(site) or site["given"]:
            continue
        if name not in guide_trace:
            raise ValueError(
                f"{user}: the guide has no scan and never samples site '{name}', which the model samples inside its "
                f"scan. Sample '{name}' in a scan of the guide, as one site of shape [{length}, ...], or use "
                f"numpyro_smc.bootstrap(model)."
            )
        proposal = guide_trace[name]
        expected = (length, *site["value"].shape)
        if jnp.shape(proposal["value"]) != expected:
            raise ValueError(
                f"{user}: the guide proposes the path of '{name}' with shape {jnp.shape(proposal['value'])}; the "
                f"model's scan makes it {expected}."
            )
        time_slice(proposal["fn"], jnp.asarray(0), length, name, user)
        path[name] = proposal | {"path": (length, user)}
    return path


def path_parents(program: Callable[[], Any], guide_trace: Trace, path: Trace) -> frozenset[str]:
    """The guide's other latents that the path's distribution is built from: they cannot differ between particles."""
    latents = {name: site["value"] for name, site in guide_trace.items() if is_latent(site) and name not in path}

    def densities(**values: Array) -> list[Array]:
        trace, _ = run_prefix(program, CloudDraws(random.key(0)), Overwrite(values), is_guide=True)
        return [jnp.asarray(trace[name]["fn"].log_prob(path[name]["value"])) for name in path]

    return frozenset().union(*eval_provenance(densities, **latents)) if latents else frozenset()


def draw_step(path: Trace, t: Array, rng_key: Array, index: Array, around: tuple[Messenger, ...] = ()) -> Trace:
    """One step's sites of a factorised path guide, drawn for the particle ``index`` under the handlers ``around``."""
    trace = {}
    for name, site in path.items():
        rng_key, key = random.split(rng_key)
        fn = time_slice(site["fn"], t, *([site["path"][0], name, site["path"][1]]))
        frames = [frame for frame in site["cond_indep_stack"] if -frame.dim <= len(fn.batch_shape)]
        value = draw(key, fn, index)[0]
        trace[name] = site | {"fn": fn, "value": value, "intermediates": [], "cond_indep_stack": frames, "drawn": True}
        for handler in reversed(around):
            handler.process_message(trace[name])
    return trace


def time_slice(fn: Distribution, t: Array, length: int, name: str, user: str) -> Distribution:
    """The t-th factor of a distribution whose leading axis is time."""
    if isinstance(fn, Independent):
        base = time_slice(fn.base_dist, t, length, name, user)
        kept = fn.reinterpreted_batch_ndims - (len(fn.base_dist.batch_shape) == fn.reinterpreted_batch_ndims)
        return base.to_event(kept) if kept else base
    if isinstance(fn, MaskedDistribution):
        base = time_slice(fn.base_dist, t, length, name, user)
        mask = fn._mask
        return base.mask(mask[t] if jnp.ndim(mask) else mask)
    if isinstance(fn, ExpandedDistribution):
        base, rank = fn.base_dist, len(fn.batch_shape)
        if len(base.batch_shape) == rank and base.batch_shape[0] == length:
            base = time_slice(base, t, length, name, user)
        elif len(base.batch_shape) == rank:
            base = jax.tree.map(lambda leaf: leaf[0], base)
        return base.expand(fn.batch_shape[1:])
    if not fn.batch_shape or fn.batch_shape[0] != length or not fn.arg_constraints or isinstance(fn, Delta):
        raise ValueError(
            f"{user}: the guide proposes the path of '{name}' by a {type(fn).__name__} with batch shape "
            f"{fn.batch_shape}, which is not a product over time. Propose the steps in a scan of the guide, or use a "
            f"distribution whose leading batch axis is time."
        )
    rank = len(fn.batch_shape)
    arguments = {}
    for argument, constraint in fn.arg_constraints.items():
        value = vars(fn).get(argument)
        if value is None:
            continue
        leaf = jnp.asarray(value)
        if leaf.ndim - constraint.event_dim == rank:
            leaf = leaf[t] if leaf.shape[0] == length else leaf[0]
        arguments[argument] = leaf
    return type(fn)(**arguments)
