"""Finding the scan statement of a NumPyro program, and running one step of it.

The scan meant is the first that holds sites; scans without sites are ordinary computation, and run where they stand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.primitives import _PYRO_STACK, Messenger

from numpyro_smc.programs.masked_latents import with_proper_dummies
from numpyro_smc.programs.sites import in_control_flow
from numpyro_smc.programs.tracing import TRACING

Trace = dict[str, dict[str, Any]]

_HARMLESS_HANDLERS = (
    handlers.trace,
    handlers.seed,
    handlers.infer_config,
    handlers.block,
    handlers.lift,
    handlers.condition,
    handlers.substitute,
    handlers.replay,
)


class Scan(NamedTuple):
    """One ``scan(f, init, xs, length)`` statement of a program, with the handlers that enclose it.

    - **body** - the step function ``(carry, x) -> (carry, y)``.
    - **init** - the initial carry, as the program gave it.
    - **xs** - inputs with leading time axis.
    - **length** - number of steps.
    - **substitutions** - values that handlers around the scan fix, innermost first: pairs ``(kind, values)``.
    - **wrappers** - functions ``(body, t) -> body`` that apply the enclosing mask, scale and uncondition handlers.
    - **number** - of scans that the program runs before it.
    """

    body: Callable[[Any, Any], tuple[Any, Any]]
    init: Any
    xs: Any
    length: int
    substitutions: tuple[tuple[str, Any], ...]
    wrappers: tuple[Callable[[Callable, Array], Callable], ...]
    number: int = 0

    def at(self, t: Array) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The step function at step ``t``, under the handlers that enclose the scan."""
        body = self.body
        for kind, values in self.substitutions:
            body = _TimedValues(body, kind, values, t, self.length)
        for wrap in self.wrappers:
            body = wrap(body, t)
        return body

    def inputs(self) -> Any:
        """``xs`` as arrays."""
        return jax.tree.map(jnp.asarray, self.xs)


class _ScanReached(Exception):
    def __init__(self, scan: Scan) -> None:
        self.scan = scan


class _SiteReached(Exception):
    pass


class _TimedValues(Messenger):
    """Fix sites of a step to the slice that belongs to step ``t``, as NumPyro's own scan does."""

    def __init__(self, fn: Callable, kind: str, values: Any, t: Array, length: int) -> None:
        super().__init__(fn)
        self.kind, self.values, self.t, self.length = kind, values, t, length

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or (msg["is_observed"] and self.kind != "condition"):
            return
        if callable(self.values):
            value = self.values(msg)
        elif self.kind == "replay":
            site = self.values.get(msg["name"])
            value = None if site is None else site["value"]
        else:
            value = self.values.get(msg["name"])
        if value is None:
            return
        value = jnp.asarray(value)
        ndim = len(msg["kwargs"].get("sample_shape", ())) + len(msg["fn"].shape())
        if value.ndim == ndim + 1:
            if value.shape[0] > self.length:
                raise ValueError(
                    f"Site '{msg['name']}' is given {value.shape[0]} values but the scan has {self.length} steps. "
                    f"Lengthen the scan or shorten the values."
                )
            if value.shape[0] == 0:
                raise ValueError(f"Site '{msg['name']}' is given a series of length 0.")
            if value.shape[0] < self.length:
                given = value[jnp.minimum(self.t, value.shape[0] - 1)]
                msg["given_until"] = (self.t, value.shape[0], given)
                msg["is_observed"] = self.kind == "condition"
                return
            value = value[self.t]
        elif value.ndim != ndim:
            raise ValueError(
                f"Site '{msg['name']}' has {ndim} dimensions in a step but is given a value of shape {value.shape}. "
                f"Give it shape [time, ...] with {ndim + 1} dimensions."
            )
        msg["value"] = value
        if self.kind == "condition":
            msg["is_observed"] = True


def is_scan(msg: dict[str, Any]) -> bool:
    """Whether a message is a scan statement (and not, say, a ``cond``)."""
    return msg["type"] == "control_flow" and msg["fn"] is scan_wrapper


def _check_flow(trace: Trace) -> None:
    """:raises ValueError: for latents inside a ``cond`` or a nested scan: they are drawn where no particle is seen."""
    for name, site in trace.items():
        if site["type"] == "sample" and not site["is_observed"] and in_control_flow(site):
            raise ValueError(
                f"Site '{name}' stands inside a cond or a nested scan, where draws are not told apart by particle. "
                f"Sample '{name}' directly in the step and choose its parameters with jnp.where."
            )


def holds_sites(msg: dict[str, Any]) -> bool:
    """Whether the body of a scan statement draws, observes, weighs or learns anything. Nothing is computed."""
    try:
        with handlers.block(), _StopAtSite():
            _trace_body(msg)
    except _SiteReached:
        return True
    return False


def names_in_scan(msg: dict[str, Any]) -> list[str]:
    """Names of the sample and param sites in the body of a scan statement."""
    with TRACING, handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=random.key(0)):
        _trace_body(msg)
    return [name for name, site in trace.items() if site["type"] in ("sample", "param")]


def _trace_body(msg: dict[str, Any]) -> None:
    body, init, xs = msg["args"][:3]
    jax.eval_shape(body, init, jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.asarray(x).dtype), xs))


class _StopAtSite(Messenger):
    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            if subsample_size in (None, size):
                return
        elif msg["type"] in ("deterministic", "control_flow", "inspect"):
            return
        raise _SiteReached


class _CatchScan(Messenger):
    """Stop the program at its scan with sites and hand the statement out.

    :param trace: of the program; **without_sites** - what it was at the first scan without sites, and how to make
        that one the scan after all.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__(None)
        self.trace = trace
        self.number = 0
        self.without_sites: tuple[Trace, Callable[[], Scan]] | None = None

    def process_message(self, msg: dict[str, Any]) -> None:
        if not is_scan(msg):
            return
        stack = _PYRO_STACK[_PYRO_STACK.index(self) + 1 :]
        if holds_sites(msg):
            raise _ScanReached(_scan_from_message(msg, stack, self.number))
        if self.without_sites is None and not msg["args"][4]:
            kept = msg | {"kwargs": {"substitute_stack": list(msg["kwargs"]["substitute_stack"])}}
            self.without_sites = dict(self.trace), partial(_scan_from_message, kept, stack, self.number)
        self.number += 1


def _wrapped(handler: Messenger, length: int, body: Callable, t: Array) -> Callable:
    """The step function under a handler that encloses the scan."""
    if isinstance(handler, handlers.uncondition):
        return handlers.uncondition(body)
    if isinstance(handler, handlers.reparam | handlers.do):
        return _OnlyOutside(body, handler)
    return _Enclosing(body, handler, t, length)


def _enclosing_message(name: str) -> str:
    return (
        f"handlers.{name} encloses the scan. Apply it inside the step function: scan({name}(step, ...), init, xs); "
        f"around the whole program it may name sites before the scan only."
    )


class _OnlyOutside(Messenger):
    """Refuse sites of a step that a handler around the scan would rewrite."""

    def __init__(self, fn: Callable, handler: Messenger) -> None:
        super().__init__(fn)
        self.handler = handler

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample":
            return
        if isinstance(self.handler, handlers.do):
            touched = msg["name"] in (self.handler.data or {})
        else:
            config = self.handler.config
            touched = (config.get(msg["name"]) if isinstance(config, dict) else config(msg)) is not None
        if touched:
            raise NotImplementedError(f"Site '{msg['name']}': {_enclosing_message(type(self.handler).__name__)}")


class _Enclosing(Messenger):
    """A mask or a scale around the scan: it applies to the stacked sites, so the slice of each step is its own."""

    def __init__(self, fn: Callable, handler: Messenger, t: Array, length: int) -> None:
        super().__init__(fn)
        self.handler, self.t, self.length = handler, t, length

    def process_message(self, msg: dict[str, Any]) -> None:
        is_mask = isinstance(self.handler, handlers.mask)
        value = self.handler.mask if is_mask else self.handler.scale
        if msg["type"] == "sample" and jnp.ndim(value) > len(msg["fn"].batch_shape):
            value = jnp.broadcast_to(value, (self.length, *jnp.shape(value)[1:]))[self.t]
        (handlers.mask(mask=value) if is_mask else handlers.scale(scale=value)).process_message(msg)


def _scan_from_message(msg: dict[str, Any], enclosing: list[Messenger], number: int) -> Scan:
    body, init, xs, length, reverse = msg["args"]
    if reverse:
        raise NotImplementedError(
            "A scan with reverse=True cannot be filtered: particles move forward in time. Reverse the data and the "
            "inputs instead, and scan forward."
        )
    if length is None:
        leaves = jax.tree.leaves(xs)
        if not leaves:
            raise ValueError("The scan has neither xs nor length: give scan(..., length=number_of_steps).")
        if not np.shape(leaves[0]):
            raise ValueError(
                f"The scan's xs hold {leaves[0]!r}, which has no axis of time. Give arrays: a list of numbers is "
                f"jax.numpy.asarray(list)."
            )
        length = np.shape(leaves[0])[0]
    if length == 0:
        raise ValueError("The scan has length 0: there is no series to filter. Give at least one step.")
    for leaf in jax.tree.leaves(xs):
        if jnp.shape(leaf)[:1] != (length,):
            raise ValueError(
                f"An input of the scan has shape {jnp.shape(leaf)}; its leading axis must be length {length}."
            )
    wrappers = []
    for handler in reversed(enclosing):
        if isinstance(handler, handlers.mask | handlers.scale | handlers.uncondition | handlers.reparam | handlers.do):
            wrappers.append(partial(_wrapped, handler, length))
        elif type(handler).__module__.startswith("numpyro.") and not isinstance(handler, _HARMLESS_HANDLERS):
            raise NotImplementedError(_enclosing_message(type(handler).__name__))
    return Scan(body, init, xs, int(length), tuple(msg["kwargs"]["substitute_stack"]), tuple(wrappers), number)


def run_prefix(program: Callable[[], Any], *around: Messenger, is_guide: bool = False) -> tuple[Trace, Scan | None]:
    """Run a program up to its scan statement.

    :param program: the program with its arguments bound.
    :param around: handlers to put around it, outermost first.
    :param is_guide: take no scan without sites; else, where no scan has sites, the first is taken.
    :return: the trace of the sites before the scan, and the scan (``None`` when the program ends without one; the
        trace then holds every site).
    """
    with TRACING, handlers.block(), handlers.trace() as trace:
        catch = _CatchScan(trace)
        try:
            with catch:
                _run_under(around, program)
        except _ScanReached as reached:
            _check_flow(trace)
            return with_proper_dummies(trace), reached.scan
    if catch.without_sites is not None and not is_guide:
        before, make_scan = catch.without_sites
        _check_flow(before)
        return with_proper_dummies(before), make_scan()
    _check_flow(trace)
    return with_proper_dummies(trace), None


def run_step(scan: Scan, t: Array, carry: Any, x: Any, *around: Messenger) -> tuple[Any, Any, Trace]:
    """Run the step function once.

    :return: the new carry, the step's output, and the trace of its sites.
    """
    with TRACING, handlers.block(), handlers.trace() as trace:
        new_carry, output = _run_under(around, lambda: scan.at(t)(carry, x))
    _check_flow(trace)
    for name, site in trace.items():
        if site["type"] == "param":
            raise ValueError(
                f"numpyro.param '{name}' stands inside the scan body. Declare it (and any network) before the scan and "
                f"let the body use its value."
            )
    return new_carry, output, with_proper_dummies(trace)


def _run_under(around: tuple[Messenger, ...], program: Callable[[], Any]) -> Any:
    if not around:
        return program()
    with around[0]:
        return _run_under(around[1:], program)


class Fixed(Messenger):
    """Give sites (and the indices of plates) their values, checking shapes; scan statements are left alone.

    :param values: values by site name.
    :param plates: plate indices by plate name.
    :param source: who proposes the values, for error messages.
    """

    def __init__(
        self, values: dict[str, Array], plates: dict[str, Array] | None = None, source: str = "the guide"
    ) -> None:
        super().__init__(None)
        self.values, self.plates, self.source = values, plates or {}, source

    def process_message(self, msg: dict[str, Any]) -> None:
        name = msg.get("name")
        if msg["type"] == "plate" and name in self.plates:
            msg["value"] = self.plates[name]
        elif msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is None and name in self.values:
            value = self.values[name]
            expected = msg["kwargs"].get("sample_shape", ()) + msg["fn"].shape()
            if jnp.shape(value) != expected:
                raise ValueError(
                    f"Site '{name}' has shape {expected} in the model but {self.source} gives it shape "
                    f"{jnp.shape(value)}. Make the two shapes equal (see to_event and the enclosing plates)."
                )
            msg["value"] = value
            msg["proposed"] = True
