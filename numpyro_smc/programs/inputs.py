"""What a user's programs are called with, checked before anything is compiled: key, arguments, parameters.

A program is run once, abstractly, at its own initial values; what it is then known to have (parameters with shapes and
constraints, sites) is kept for the next call with arguments of the same shapes.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

from numpyro_smc.programs.bootstrap import Bootstrap
from numpyro_smc.programs.compiled import is_array
from numpyro_smc.programs.sites import Site, is_latent, is_observed
from numpyro_smc.programs.tracing import TRACING
from numpyro_smc.programs.unconstrained import FreeOfImproper

Program = Callable[..., Any]
Params = dict[str, Any]

_MAX_KEPT = 64
# Handlers of these hand arguments on as they are.
_WRAPPERS = ("numpyro.handlers", "numpyro_smc.")
_MAX_LOOKED_AT = 10_000
_REAL = (constraints.real, constraints.real_vector, constraints.real_matrix)


class Call(NamedTuple):
    """A checked call: arrays where the user gave lists, series or tables of numbers."""

    rng_key: Array
    params: Params
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Known(NamedTuple):
    """What a program has: shape (``None`` if unknown) and support of parameters and of latents; names of all sites."""

    parameters: dict[str, tuple[tuple[int, ...] | None, Any]]
    latents: dict[str, tuple[tuple[int, ...] | None, Any]]
    names: frozenset[str]
    observes: bool


class _Rules(NamedTuple):
    """What an entry asks of a call; see :func:`check_program`."""

    needs_data: bool
    may_lack: str
    may_be_nan: bool
    may_reshape: bool


_KEPT: dict[Any, _Known | None] = {}
_PASSED: dict[Any, dict[str, Any]] = {}


def checked_call(
    user: str,
    rng_key: Any,
    model: Program,
    guide: Program | None,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    options: Iterable[Callable[..., Any]] = (),
    needs_data: bool = True,
    may_lack: str = "all",
) -> Call:
    """Key, arguments and parameters of a call, as arrays, checked by :func:`check_program`.

    :raises TypeError: if the key is none.
    """
    rng_key = one_key(user, rng_key)
    (args, kwargs), params = as_data(user, (args, kwargs)), as_params(user, params)
    check_program(user, model, guide, params, args, kwargs, options=options, needs_data=needs_data, may_lack=may_lack)
    return Call(rng_key, params, args, kwargs)


def check_program(
    user: str,
    model: Program,
    guide: Program | None,
    params: Params,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    options: Iterable[Callable[..., Any]] = (),
    needs_data: bool = True,
    may_lack: str = "all",
    argument: str = "params",
    may_be_nan: bool = False,
    may_reshape: bool = False,
) -> None:
    """Programs can be called with the arguments, and every name of ``params`` is one of theirs, with a value that fits.

    Without any parameter the programs run at their initial values. Without a guide, names that resemble none of the
    model's are taken for those of the guide that the model was trained with.

    :param user: the public class or function, for messages.
    :param guide: ``None`` where none was given.
    :param options: functions whose keyword options a user may have misspelled.
    :param needs_data: whether a model that observes nothing is an error where there is no guide.
    :param may_lack: which parameters may have no value: ``"all"`` of them or none, ``"any"``, or ``"none"``.
    :param argument: what the user calls ``params``.
    :param may_be_nan: whether values may be no numbers; **may_reshape** - have other shapes than the initial ones.
    :raises TypeError: naming program and argument, if it cannot be called so.
    :raises ValueError: naming the parameter, if it is unknown, missing, of another shape or outside its constraint.
    """
    guide = None if isinstance(guide, Bootstrap) and guide.model is model else guide
    programs = {"model": model} if guide is None else {"model": model, "guide": guide}
    rules = _Rules(needs_data, may_lack, may_be_nan, may_reshape)
    outline: Any
    try:
        outline = (model, guide, rules, _outline((args, kwargs)), _outline(params))
        valued = _PASSED.get(outline)
    except TypeError:  # something that is not hashable, which is refused where it is compiled
        outline = valued = None
    if valued is None:
        for role, program in programs.items():
            if not callable(program):
                raise TypeError(f"{user}: {role} must be a NumPyro program, a function, got {program!r}.")
            check_arguments(user, program, args, kwargs, options)
        valued = {}
        if outline is not None and (params or needs_data or may_lack == "none"):
            valued = _checked_params(user, argument, programs, params, args, kwargs, rules)
        if outline is not None:
            _keep(_PASSED, outline, valued)
    for name, support in valued.items():
        _check_value(user, argument, name, params[name], support, rules)


def _checked_params(
    user: str, argument: str, programs: dict[str, Program], params: Params, args: Any, kwargs: Any, rules: _Rules
) -> dict[str, Any]:
    """Supports of the parameters whose values are to be looked at, once their names and shapes are in order."""
    known: dict[str, _Known] = {}
    for anew in (False, True):  # what the programs close over may have changed since they were looked at
        known = _known(programs, params, args, kwargs, anew=anew)
        if "model" not in known:
            return {}
        if len(known) < len(programs):  # names of the guide are not known
            params, rules = {}, rules._replace(may_lack="all")
        fault = _fault(known, params, rules)
        if fault is None:
            break
    if fault is not None:
        raise ValueError(f"{user}: {fault.replace('params', argument, 1)}")
    sites = [site for program in known.values() for site in (program.parameters | program.latents).items()]
    return {name: support for name, (_, support) in sites if name in params and support not in (None, *_REAL)}


def _outline(tree: Any) -> tuple[Any, ...]:
    """What names and shapes of a program's sites depend on: numbers are values, as those of arrays are."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple([_token(leaf) for leaf in leaves])


def _token(leaf: Any) -> Any:
    if is_array(leaf):
        return leaf.shape, leaf.dtype
    return float if isinstance(leaf, float) else (type(leaf), leaf)


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    if len(kept) > _MAX_KEPT:
        del kept[next(iter(kept))]


# ---- keys --------------------------------------------------------------------------------------------------------


def one_key(user: str, rng_key: Any) -> Array:
    """:raises TypeError: unless it is a single key of JAX's, typed or of two numbers."""
    dtype, shape = getattr(rng_key, "dtype", None), getattr(rng_key, "shape", ())
    if _is_key_type(dtype):
        found = f"{shape} of them" if shape else ""
    elif dtype == jnp.uint32 and shape[-1:] in ((2,), (4,)):  # as random.PRNGKey makes them
        found = f"{shape[:-1]} of them" if len(shape) > 1 else ""
    else:
        found = repr(rng_key) if dtype is None else f"an array of type {dtype} and shape {shape}"
    if not found:
        return rng_key
    raise TypeError(f"{user}: rng_key must be one random key, got {found}. Give jax.random.key(0), say.")


@lru_cache(maxsize=64)
def _is_key_type(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


# ---- data --------------------------------------------------------------------------------------------------------


def as_data(user: str, tree: Any) -> Any:
    """Series, tables and lists of real numbers as arrays; everything else as it is."""
    if not any(map(_is_data, jax.tree.leaves(tree, is_leaf=_is_data))):
        return tree
    return jax.tree.map(lambda leaf: _as_array(user, leaf), tree, is_leaf=_is_data)


def check_arrays(user: str, tree: Any) -> None:
    """:raises TypeError: naming the type, for series, tables and lists of numbers, where NumPyro reads them itself."""
    for leaf in jax.tree.leaves(tree, is_leaf=_is_data):
        if _is_data(leaf):
            raise TypeError(
                f"{user}: an argument of the model is a {type(leaf).__name__}, and NumPyro's kernels take arrays. Give "
                f"jax.numpy.asarray of it."
            )


def _is_data(leaf: Any) -> bool:
    return not is_array(leaf) and (callable(getattr(leaf, "to_numpy", None)) or _is_list_of_reals(leaf))


def _is_list_of_reals(leaf: Any) -> bool:
    """A list with a float in it, which no program takes for sizes or names; the lists of a table are all as long."""
    if not isinstance(leaf, list) or not leaf:
        return False
    if all(isinstance(entry, list) for entry in leaf):
        return len({len(entry) for entry in leaf}) == 1 and any(map(_is_list_of_reals, leaf))
    numbers = all(isinstance(entry, int | float | np.number) and not isinstance(entry, bool) for entry in leaf)
    return numbers and any(isinstance(entry, float | np.floating) for entry in leaf)


def _as_array(user: str, leaf: Any) -> Any:
    if not _is_data(leaf):
        return leaf
    values = np.asarray(leaf.to_numpy() if hasattr(leaf, "to_numpy") else leaf)
    if values.dtype.kind not in "biufc":
        raise TypeError(
            f"{user}: an argument is a {type(leaf).__name__} whose values have type {values.dtype}, which is not "
            f"numeric. Leave out columns of text and dates, and convert the others to numbers."
        )
    return jnp.asarray(values)


# ---- arguments ---------------------------------------------------------------------------------------------------


def check_arguments(
    user: str,
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Iterable[Callable[..., Any]] = (),
) -> None:
    """:raises TypeError: naming program and argument, if it cannot be called with them."""
    inner = program
    while isinstance(inner, Messenger) and type(inner).__module__.startswith(_WRAPPERS) and inner.fn is not None:
        inner = inner.fn
    try:
        signature = inspect.signature(inner)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
        return
    except TypeError as error:
        reason = f"{error}."
    parameters = signature.parameters.values()
    own = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [name for name in kwargs if name not in own]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = own + [name for function in options for name in _keywords(function)]
        reason = f"it has no argument {unknown[0]!r}.{_meant(unknown[0], known)}"
    raise TypeError(f"{user}: {_name(program)}{signature} cannot be called with the arguments given: {reason}")


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]


def _name(program: Any) -> str:
    while isinstance(program, Messenger) and program.fn is not None:
        program = program.fn
    program = getattr(program, "func", program)
    return getattr(program, "__name__", type(program).__name__)


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


# ---- parameters --------------------------------------------------------------------------------------------------


def as_params(user: str, params: Any) -> Params:
    """Parameters by name as arrays, so that a new number is a new value and not a new program; ``None`` is empty.

    :raises TypeError: naming the parameter whose value is not numeric.
    """
    if params is None:
        return {}
    if not isinstance(params, Mapping):
        raise TypeError(
            f"{user}: params must be a dict of values by name, as svi.get_params(state) returns it, got "
            f"{type(params).__name__}."
        )
    arrays = {}
    for name, value in params.items():
        try:
            arrays[name] = jax.tree.map(jnp.asarray, value)
        except TypeError as error:
            raise TypeError(f"{user}: the value {value!r} of params[{name!r}] is not numeric: {error}") from error
    return arrays


def check_names(user: str, argument: str, given: Iterable[str], known: Iterable[str]) -> None:
    """:raises ValueError: naming the first of the given names that is not known, and the one that may be meant."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(
                f"{user}: {argument} has a value for '{name}', and there is no such site.{_meant(name, known)} "
                f"The names there are {_listed(known)}."
            )


def _known(
    programs: dict[str, Program], params: Params, args: Any, kwargs: Any, *, anew: bool = False
) -> dict[str, _Known]:
    """What is known of the programs that run abstractly."""
    found = {}
    for role, program in programs.items():
        key = (program, _outline((args, kwargs)))
        if anew or key not in _KEPT:
            _keep(_KEPT, key, _look_at(program, params, args, kwargs))
        known = _KEPT[key]
        if known is not None:
            found[role] = known
    return found


def _look_at(program: Program, params: Params, args: Any, kwargs: Any) -> _Known | None:
    """Run a program abstractly; ``None`` if it does not run so, and its errors come where it is used."""
    if isinstance(program, AutoGuide) and program.prototype_trace is None:
        return None  # its first run must not be an abstract one: it keeps what it finds
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    traces: list[dict[str, Site]] = []

    def run(arrays: list[Any], values: Params) -> None:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(treedef, [next(rest) if is_array(leaf) else leaf for leaf in leaves])
        at_values = handlers.substitute(program, data=values)
        with TRACING, handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=0), FreeOfImproper():
            at_values(*args, **kwargs)
        traces.append(trace)

    # A parameter without an initial value has no other than the one given.
    for values in ({}, params):
        try:
            with TRACING:
                jax.eval_shape(run, arrays, values)
            break
        except Exception:  # of the user's program
            continue
    if not traces:
        return None
    (trace,) = traces
    return _Known(
        {name: _shape_and(site, "kwargs") for name, site in trace.items() if site["type"] == "param"},
        {name: _shape_and(site, "fn") for name, site in trace.items() if is_latent(site)},
        frozenset(trace),
        any(is_observed(site) for site in trace.values()),
    )


def _shape_and(site: Site, where: str) -> tuple[tuple[int, ...] | None, Any]:
    """Shape and support of a site, which keep nothing of the run: supports that depend on it are unknown."""
    value = site["value"]
    shape = jnp.shape(value) if isinstance(value, jax.Array | np.ndarray | float | int) else None
    try:
        support = site["kwargs"].get("constraint", constraints.real) if where == "kwargs" else site["fn"].support
    except NotImplementedError:
        support = None
    parts = jax.tree.leaves(support)
    return shape, None if any(isinstance(part, jax.core.Tracer) for part in parts) else support


def _fault(known: dict[str, _Known], params: Params, rules: _Rules) -> str | None:
    """What is wrong with parameters, if anything is."""
    # From a guide, the normalizing constant of a density that is one of latents alone is a question one may ask.
    if rules.needs_data and "guide" not in known and not known["model"].observes:
        return (
            f"nothing is observed: every site of the model is latent ({_listed(known['model'].latents)}), so there is "
            f"no evidence, and the posterior is the prior. Pass the data (obs=), or condition the model on them."
        )
    names = frozenset().union(*(program.names for program in known.values()))
    owners = {name: role for role, program in known.items() for name in program.parameters}
    latents = [name for program in known.values() for name in program.latents]
    missing = [name for name in owners if name not in params]
    # Where the guide leaves out latents of the model, that is what there is to say.
    fits = "guide" in known and known["model"].latents.keys() <= known["guide"].names
    for name in params:
        meant = "" if name in names else _meant(name, [*missing, *(site for site in latents if site not in params)])
        if name not in names and (fits or missing or meant):
            return (
                f"params has a value for '{name}', and there is no such site in {' and '.join(known)}.{meant} The "
                f"names there are {_listed([*owners, *latents])}."
            )
    some = rules.may_lack == "all" and len(missing) < len(owners)
    if missing and (some or rules.may_lack == "none"):
        return (
            f"params has no value for parameter '{missing[0]}' of the {owners[missing[0]]}, which would stay as it was "
            f"initialised. Pass all trained parameters, as svi.get_params(state) returns them."
        )
    for program in known.values():
        for name, (shape, _) in (program.parameters | program.latents).items():
            value: Any = params.get(name)
            if shape is not None and is_array(value) and value.shape != shape and not rules.may_reshape:
                return (
                    f"params gives '{name}' the shape {value.shape}, but the program makes it {shape}. Give a value of "
                    f"that shape, or start the site at one of the shape meant."
                )
    return None


def _check_value(user: str, argument: str, name: str, value: Any, support: Any, rules: _Rules) -> None:
    """:raises ValueError: naming the parameter, if its value is known and outside its constraint."""
    if not is_array(value) or isinstance(value, jax.core.Tracer) or value.size > _MAX_LOOKED_AT:
        return
    numbers = np.asarray(value)
    if np.all(support(numbers)) or (rules.may_be_nan and np.isnan(numbers).any()):
        return
    raise ValueError(
        f"{user}: {argument} gives '{name}' the value {_short(numbers)}, outside its constraint {support}. Give a "
        f"constrained value, as svi.get_params(state) returns it."
    )


def _short(numbers: np.ndarray) -> str:
    return np.array2string(numbers, threshold=5, precision=4)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names))) or "none"
