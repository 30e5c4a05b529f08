"""Likelihoods stated after the scan, split over time: the t-th factor is part of the weight of step t."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers
from numpyro.ops.provenance import eval_provenance
from numpyro.ops.pytree import PytreeTrace
from numpyro.primitives import Messenger

from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.halves import Half, Overwrite
from numpyro_smc.programs.scans import Fixed, Scan, Trace, holds_sites, is_scan, names_in_scan, run_step
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
        plates: frozenset[str] = frozenset(),
        observed: dict[str, Array] | None = None,
    ) -> None:
        self.program, self.args, self.length, self.number = program, args, length, number
        self.split, self.last = split, last
        self.plates = plates
        self.observed = observed

    def log_probs(self, outputs: Any, carry: Any) -> dict[str, Array]:
        """Log densities of the observed sites, not split over time, given the scan's stacked outputs and last carry."""
        after = _run_after(self.program, self.args, outputs, carry, self.length, self.number, Fixed({}), None, set())
        return {name: after[name]["fn"].log_prob(after[name]["value"]) for name in (*self.split, *self.last)}

    def log_density(self, t: Array, output: Any, carry: Any, given: Fixed, plates: BatchPlates) -> Array:
        """Log density of the t-th factor for one particle, of the shape of the enclosing plates.

        :param given: the global latents and the plates' indices.
        """
        total = jnp.zeros(plates.shape)
        if self.split:
            sliced = jax.tree.map(lambda x: jnp.asarray(x)[t][None] if _is_series(x, self.length) else x, self.args)
            outputs = jax.tree.map(lambda x: jnp.asarray(x)[None], output)
            names = set(plates.names)
            after = _run_after(
                self.program, sliced, outputs, carry, self.length, self.number, given, t, names, self.observed
            )
            total = total + sum(log_density(after[name], plates) for name in self.split)
        if self.last:
            outputs = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.length, *jnp.shape(x))), output)
            after = _run_after(
                self.program, self.args, outputs, carry, self.length, self.number, given, None, set(plates.names)
            )
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
        after = _run_after(
            program, None, outputs, carry, half.scan.length, half.scan.number, Overwrite(latents), None, set()
        )
        for name, site in after.items():
            if is_latent(site):
                names.append(name)
            elif site["type"] == "sample":
                observed.append(name)
                frames.append(frozenset(frame.name for frame in site["cond_indep_stack"]))
        return {name: after[name]["fn"].log_prob(after[name]["value"]) for name in observed}

    names: list[str] = []
    observed: list[str] = []
    frames: list[frozenset[str]] = []
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
    after = AfterScan(_with_arguments(program), (args, kwargs), half.scan.length, half.scan.number, split, last, plates)
    if split:
        _check_split(after, half, user)
    return after


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

    :param observed: values to take instead of the program's own, by site name.
    """

    def __init__(
        self, t: Array, length: int, keep: set[str], passed: _PassScan, observed: dict[str, Array] | None
    ) -> None:
        super().__init__(None)
        self.t, self.length, self.keep, self.passed, self.observed = t, length, keep, passed, observed or {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if not self.passed.passed:
            return
        if msg["type"] == "plate" and msg["args"][0] == self.length and msg["name"] not in self.keep:
            msg["value"] = jnp.reshape(self.t, (1,))
        elif msg["type"] == "sample" and msg["is_observed"]:
            sliced = [f for f in msg["cond_indep_stack"] if f.size == 1 and f.name not in self.keep]
            if msg["scale"] is not None and sliced:
                msg["scale"] = msg["scale"] / self.length ** len(sliced)
            value, shape = self.observed.get(msg["name"], msg["value"]), msg["fn"].shape()
            msg["value"] = value
            if _is_series(value, self.length) and shape[:1] == (1,) and self.length != 1:
                msg["value"] = jnp.asarray(value)[self.t][None]


def _is_series(x: Any, length: int) -> bool:
    return hasattr(x, "shape") and x.ndim > 0 and x.shape[0] == length


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
    length: int,
    number: int,
    given: Fixed,
    t: Array | None,
    keep: set[str],
    observed: dict[str, Array] | None = None,
) -> Trace:
    passing = _PassScan(outputs, carry, number)
    draws = CloudDraws(random.key(0))
    slicing = Messenger() if t is None else _SliceTime(t, length, keep, passing, observed)
    with handlers.block(), handlers.trace() as trace, draws, given, passing, slicing:
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


def _check_split(after: AfterScan, half: Half, user: str) -> None:
    """Confirm on one simulated path that the factors over time add up to the whole likelihood, site by site.

    Under ``jit``, parameters take their initial values and data are replaced by made-up data of the same shape.
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
    inner = handlers.substitute(program.fn.func, data=known)

    def both() -> dict[str, tuple[Array, Array]]:
        simulate = _SimulateAfter(after.number)
        with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=random.key(1)), simulate:
            inner(*args, **kwargs)
        prefix = {name: site for name, site in trace.items() if name in half.prefix}
        fixed = {name: s["value"] for name, s in prefix.items() if s["type"] == "sample" and not s["is_observed"]}
        given = Fixed(fixed, plate_indices(prefix))
        drawn = {name: trace[name]["value"] for name in after.split}

        def factor(name: str, t: Array, output: Any) -> Array:
            one = AfterScan(
                lambda a, k: inner(*a, **k), (args, kwargs), after.length, after.number, [name], [], observed=drawn
            )
            return one.log_density(t, output, simulate.carry, given, BatchPlates())

        def factors(name: str) -> Array:
            return jax.vmap(partial(factor, name))(jnp.arange(after.length), simulate.outputs)

        return {name: (log_density(trace[name], BatchPlates()), jnp.sum(factors(name))) for name in after.split}

    def message(name: str) -> str:
        return (
            f"{user}: the likelihood after the scan (site '{name}') does not split over time: its factors at the "
            f"single steps do not add up to the whole. Move the statement into the step function; data and covariates "
            f"must be arguments of the program with time as their leading axis."
        )

    try:
        with jax.ensure_compile_time_eval():
            sums = {name: (float(whole), float(total)) for name, (whole, total) in both().items()}
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(message(after.split[0])) from error
    for name, (whole, total) in sums.items():
        if not np.isfinite(whole) or not np.allclose(whole, total, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{message(name)} On one simulated path: {total:.4f} against {whole:.4f}.")
