"""Likelihoods stated after the scan, split over time: the t-th factor is part of the weight of step t."""

import zlib
from collections.abc import Callable, Collection
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.ops.provenance import eval_provenance
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger

from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.halves import Half, Overwrite
from numpyro_smc.programs.scans import Fixed, Scan, Trace, holds_sites, is_scan, names_in_scan, run_step
from numpyro_smc.programs.series import Series, read_series
from numpyro_smc.programs.sites import BatchPlates, in_control_flow, is_latent, log_density, plate_indices


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
        after = _run_after(self.program, self.args, outputs, carry, self.number, Fixed({}))
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
            after = _run_after(
                self.program, jax.tree.unflatten(treedef, cut), outputs, carry, self.number, given, slicing
            )
            total = total + sum(log_density(after[name], plates) for name in self.split)
        if self.last:
            outputs = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.length, *jnp.shape(x))), output)
            after = _run_after(self.program, self.args, outputs, carry, self.number, given)
            factor = sum(log_density(after[name], plates) for name in self.last)
            total = total + jnp.where(t == self.length - 1, factor, 0.0)
        return total


def read_after_scan(
    program: Callable[[], Any], half: Half, args: Any, kwargs: Any, *, is_guide: bool, user: str
) -> AfterScan | None:
    """Look at what a program does after its scan.

    :raises ValueError: for a second scan, latent sites after the scan, or a likelihood that does not split over time.
    """
    who = "guide" if is_guide else "model"
    output, last_carry = _output_shapes(half)

    def rest(outputs: Any, carry: Any, **latents: Array) -> dict[str, Array]:
        after = _run_after(program, None, outputs, carry, half.scan.number, Overwrite(latents))
        for name, site in after.items():
            if is_latent(site):
                names.append(name)
            elif site["type"] == "sample":
                observed.append(name)
                shapes[name] = site["fn"].shape()
                frames.append(frozenset(frame.name for frame in site["cond_indep_stack"]))
        return {name: after[name]["fn"].log_prob(after[name]["value"]) for name in observed}

    names: list[str] = []
    observed: list[str] = []
    frames: list[frozenset[str]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    initial = {name: half.prefix[name]["value"] for name in half.latents}
    uses = eval_provenance(rest, outputs=output, carry=last_carry, **initial)
    if names:
        raise ValueError(
            f"{user}: the {who} samples site '{names[0]}' after its scan. Latents after the scan cannot be filtered: "
            f"sample '{names[0]}' before the scan (a parameter) or inside the step (a state)."
        )
    if not observed or is_guide:
        return None
    split, last = [], []
    for name in observed:
        deps = frozenset().union(*jax.tree.leaves(uses[name], is_leaf=lambda x: isinstance(x, frozenset)))
        # What the likelihood uses other than through the scan cannot belong to a particle.
        half.reach |= deps & half.latents
        deps -= half.latents
        if deps == {"carry"}:
            last.append(name)
        elif deps == {"outputs"}:
            split.append(name)
        else:
            raise ValueError(
                f"{user}: site '{name}' after the scan depends on {' and '.join(sorted(deps)) or 'nothing'}; it may "
                f"depend on the scan's stacked outputs or on its last carry. Move the statement into the step (if it "
                f"uses the states) or before the scan."
            )
    plates = frozenset.intersection(*frames)
    whole = _with_arguments(program)

    def sites(outputs: Any, arguments: Any) -> Trace:
        after = _run_after(whole, arguments, outputs, last_carry, half.scan.number, Fixed({}))
        return {name: after[name] for name in split}

    length, number = half.scan.length, half.scan.number
    try:
        series = read_series(sites, output, (args, kwargs), length)
    except TypeError as error:  # an argument whose values the program needs while it is traced
        raise ValueError(_does_not_split(user, split[0], "its factors cannot be traced")) from error
    if series.mixed:
        raise ValueError(_does_not_split(user, series.mixed[0], "a term of it depends on several steps"))
    after = AfterScan(whole, (args, kwargs), length, number, split, last, series, shapes, plates)
    if split:
        _check_split(after, half, user)
    return after


def _does_not_split(user: str, name: str, why: str) -> str:
    return (
        f"{user}: the likelihood after the scan (site '{name}') does not split over time: {why}. Move the statement "
        f"into the step function; data and covariates must be arguments of the program with time as their leading axis."
    )


class _PassScan(Messenger):
    """Let the program run past its scan with given outputs, and note which sites come after it.

    :param number: of scans without sites before it.
    """

    def __init__(self, outputs: Any, carry: Any, number: int) -> None:
        super().__init__(None)
        self.result = (outputs, carry)
        self.ahead = number
        self.passed = False

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

    passed: _PassScan

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
            if (size, left) == (self.length, 1) and jnp.shape(value)[axis] == size != left:
                value = lax.dynamic_slice_in_dim(jnp.asarray(value), self.t, 1, axis)
        return value


def _with_arguments(program: Callable[[], Any]) -> Callable[..., Any]:
    """The program with its arguments left open: a function of ``(args, kwargs)``."""
    assert isinstance(program, handlers.substitute) and isinstance(program.fn, partial)
    inner, params = program.fn.func, program.data
    return lambda args, kwargs: handlers.substitute(inner, data=params)(*args, **kwargs)


def _run_after(
    program: Callable[..., Any],
    arguments: Any,
    outputs: Any,
    carry: Any,
    number: int,
    given: Fixed,
    slicing: _SliceTime | None = None,
) -> Trace:
    passing = _PassScan(outputs, carry, number)
    draws = CloudDraws(random.key(0))
    around = Messenger() if slicing is None else slicing
    if slicing is not None:
        slicing.passed = passing
    with handlers.block(), handlers.trace() as trace, draws, given, passing, around:
        program() if arguments is None else program(*arguments)
    return {name: site for name, site in trace.items() if site.get("after scan")}


def _output_shapes(half: Half) -> tuple[Any, Any]:
    scan: Scan = half.scan
    first = jax.tree.map(lambda x: x[0], scan.inputs())
    init = jax.tree.unflatten(half.carry_tree, half.carry_leaves(jax.tree.map(jnp.asarray, scan.init)))

    def step(carry: Any) -> tuple[Any, Any]:
        new, output, _ = run_step(scan, jnp.asarray(0), carry, first, CloudDraws(random.key(0)))
        return output, new

    output, carry = jax.eval_shape(step, init)
    stacked = jax.tree.map(lambda x: jnp.zeros((scan.length, *x.shape), x.dtype), output)
    return stacked, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), carry)


class _SimulateAfter(Messenger):
    """Note what a program's scan returns, and draw the observed sites after it."""

    def __init__(self, number: int) -> None:
        super().__init__(None)
        self.ahead = number
        self.outputs: Any = None
        self.carry: Any = None
        self.passed = False

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and self.passed and msg["is_observed"] and not in_control_flow(msg):
            msg["value"], msg["is_observed"] = None, False

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if is_scan(msg) and not self.passed:
            self.passed = self.ahead == 0
            self.ahead -= 1
            (_, _, self.carry), (_, self.outputs) = msg["value"]


class _NearInitial(Messenger):
    """Move parameters away from their initial values, at which something may vanish that does not elsewhere."""

    def __init__(self, fn: Callable[..., Any], known: Collection[str]) -> None:
        super().__init__(fn)
        self.known = known

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "param" or msg["name"] in self.known:
            return
        transform = biject_to(msg["kwargs"].get("constraint", constraints.real))
        generator = np.random.default_rng(zlib.crc32(msg["name"].encode()))

        def moved(leaf: Any) -> Any:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                return leaf
            free = jnp.asarray(transform.inv(leaf))
            step = jnp.asarray(generator.uniform(0.05, 0.1, free.shape), free.dtype)
            return transform(jnp.where(free == 0, step, free * (1 + step)))

        msg["value"] = jax.tree.map(moved, msg["value"])


def _check_split(after: AfterScan, half: Half, user: str) -> None:
    """Confirm on one simulated path that the factors over time add up to the whole likelihood, site by site.

    Under ``jit``, parameters take values near their initial ones, and data are replaced by made-up data of the same
    shape.
    """
    generator = np.random.default_rng(0)

    def stand_in(x: Any) -> Any:
        if not isinstance(x, jax.core.Tracer):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return random.key(0)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return np.asarray(generator.uniform(0.2, 0.8, x.shape), x.dtype)
        return np.ones(x.shape, x.dtype)

    program = half.program
    assert isinstance(program, handlers.substitute) and isinstance(program.fn, partial)
    args, kwargs = jax.tree.map(stand_in, after.args)
    assert program.data is not None
    known = {
        name: value
        for name, value in program.data.items()
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))
    }
    inner = _NearInitial(handlers.substitute(program.fn.func, data=known), known)

    def both() -> dict[str, tuple[Array, Array]]:
        simulate = _SimulateAfter(after.number)
        with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=random.key(1)), simulate:
            inner(*args, **kwargs)
        prefix = {name: site for name, site in trace.items() if name in half.prefix}
        fixed = {name: s["value"] for name, s in prefix.items() if s["type"] == "sample" and not s["is_observed"]}
        given = Fixed(fixed, plate_indices(prefix))
        drawn = {name: trace[name]["value"] for name in after.split}

        def factor(name: str, t: Array, output: Any) -> Array:
            one = copy(after)
            one.program, one.args = lambda a, k: inner(*a, **k), (args, kwargs)
            one.split, one.last, one.observed = [name], [], drawn
            return one.log_density(t, output, simulate.carry, given, BatchPlates())

        def factors(name: str) -> Array:
            return jax.vmap(partial(factor, name))(jnp.arange(after.length), simulate.outputs)

        return {name: (log_density(trace[name], BatchPlates()), jnp.sum(factors(name))) for name in after.split}

    try:
        with jax.ensure_compile_time_eval():
            sums = {name: (float(whole), float(total)) for name, (whole, total) in both().items()}
    except (TypeError, ValueError, IndexError) as error:
        why = "its factors at the single steps do not fit the scan's outputs there"
        raise ValueError(_does_not_split(user, after.split[0], why)) from error
    for name, (whole, total) in sums.items():
        if not np.isfinite(whole) or not np.allclose(whole, total, rtol=1e-3, atol=1e-3):
            why = (
                f"its factors at the single steps do not add up to the whole (on one simulated path, {total:.4f} "
                f"against {whole:.4f})"
            )
            raise ValueError(_does_not_split(user, name, why))
