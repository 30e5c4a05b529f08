"""Likelihoods stated after the scan, split over time: the t-th factor is part of the weight of step t."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from numpyro import handlers
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger

from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.scans import Fixed, Trace, holds_sites, is_scan, names_in_scan
from numpyro_smc.programs.series import Series
from numpyro_smc.programs.sites import BatchPlates, log_density
from numpyro_smc.programs.tracing import TRACING


class AfterScan:
    """The observed sites after a scan. Sites of the scan's outputs are split over time; sites of its last carry alone
    are weighed at the last step."""

    def __init__(
        self,
        program: Callable[..., Any],
        args: Any,
        length: int,
        number: int,
        split: list[str],
        last: list[str],
        series: Series,
        shapes: dict[str, tuple[int, ...]],
        plates: frozenset[str] = frozenset(),
        observed: dict[str, Array] | None = None,
    ) -> None:
        self.program, self.args, self.length, self.number = program, args, length, number
        self.split, self.last, self.series, self.shapes = split, last, series, shapes
        self.plates = plates
        self.observed = observed

    def log_probs(self, outputs: Any, carry: Any) -> dict[str, Array]:
        """Log densities of the observed sites, not split over time, given the scan's stacked outputs and last carry."""
        after = run_after(self.program, self.args, outputs, carry, self.number, Fixed({}))
        return {name: after[name]["fn"].log_prob(after[name]["value"]) for name in (*self.split, *self.last)}

    def log_density(self, t: Array, output: Any, carry: Any, given: Fixed, plates: BatchPlates) -> Array:
        """Log density of the t-th factor for one particle, of the shape of the enclosing plates.

        :param given: the global latents and the plates' indices.
        """
        total = jnp.zeros(plates.shape)
        if self.split:
            leaves, treedef = jax.tree.flatten(self.args)
            cut = [
                jnp.asarray(leaf)[t][None] if runs else leaf
                for leaf, runs in zip(leaves, self.series.arguments, strict=True)
            ]
            outputs = jax.tree.map(lambda x: jnp.asarray(x)[None], output)
            slicing = _SliceTime(t, self.length, self.series.plates, self.shapes, self.observed)
            after = run_after(
                self.program, jax.tree.unflatten(treedef, cut), outputs, carry, self.number, given, slicing
            )
            total = total + sum(log_density(after[name], plates) for name in self.split)
        if self.last:
            outputs = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.length, *jnp.shape(x))), output)
            after = run_after(self.program, self.args, outputs, carry, self.number, given)
            factor = sum(log_density(after[name], plates) for name in self.last)
            total = total + jnp.where(t == self.length - 1, factor, 0.0)
        return total


class PassScan(Messenger):
    """Let the program run past its scan with given outputs, and note which sites come after it.

    :param number: of scans without sites before it.
    """

    def __init__(self, outputs: Any, carry: Any, number: int) -> None:
        super().__init__(None)
        self.result = (outputs, carry)
        self.ahead = number
        self.passed = False
        self.first: dict[str, Any] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if self.passed:
            msg["after scan"] = True
            if is_scan(msg) and holds_sites(msg):
                raise ValueError(
                    f"The program has two scans with sites: in the first {_quoted(self.first)}, in the second "
                    f"{_quoted(msg)}. Merge them into one: one step function, one carry. What needs no site may stand "
                    f"in a scan of its own, before, inside or after it."
                )
        elif is_scan(msg):
            if self.ahead == 0:
                self.passed = True
                self.first = dict(msg)
                outputs, carry = self.result
                msg["value"] = ((jnp.asarray(0), None, carry), (PytreeTrace({}), outputs))
            self.ahead -= 1


def _quoted(scan: dict[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in names_in_scan(scan)) or "keys drawn by hand"


class _SliceTime(Messenger):
    """After the scan, cut plates over time and observed values down to one step.

    :param plates: names of the plates over time. **shapes** - of the observed sites' distributions at all steps.
    :param observed: values to take instead of the program's own, by site name.
    """

    passed: PassScan

    def __init__(
        self,
        t: Array,
        length: int,
        plates: frozenset[str],
        shapes: dict[str, tuple[int, ...]],
        observed: dict[str, Array] | None,
    ) -> None:
        super().__init__(None)
        self.t, self.length, self.plates, self.shapes, self.observed = t, length, plates, shapes, observed or {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if not self.passed.passed:
            return
        if msg["type"] == "plate" and msg["name"] in self.plates:
            msg["value"] = jnp.reshape(self.t, (1,))
        elif msg["type"] == "sample" and msg["is_observed"]:
            sliced = [frame for frame in msg["cond_indep_stack"] if frame.name in self.plates]
            if msg["scale"] is not None and sliced:
                msg["scale"] = msg["scale"] / self.length ** len(sliced)
            value = self.observed.get(msg["name"], msg["value"])
            msg["value"] = self._sliced(value, self.shapes.get(msg["name"], ()), msg["fn"].shape())

    def _sliced(self, value: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
        """An observed value along the axes that its distribution has lost; those it was cut along already are kept."""
        if jnp.ndim(value) != len(before) or len(before) != len(after):
            return value
        for axis, (size, left) in enumerate(zip(before, after, strict=True)):
            if size == left * self.length and jnp.shape(value)[axis] == size != left:
                value = lax.dynamic_slice_in_dim(jnp.asarray(value), self.t * left, left, axis)
        return value


def run_after(
    program: Callable[..., Any],
    arguments: Any,
    outputs: Any,
    carry: Any,
    number: int,
    given: Fixed,
    slicing: _SliceTime | None = None,
) -> Trace:
    passing = PassScan(outputs, carry, number)
    draws = CloudDraws(random.key(0))
    around = Messenger() if slicing is None else slicing
    if slicing is not None:
        slicing.passed = passing
    with TRACING, handlers.block(), handlers.trace() as trace, draws, given, passing, around:
        program() if arguments is None else program(*arguments)
    return {name: site for name, site in trace.items() if site.get("after scan")}
