"""Reading what a program does after its scan: which sites stand there, and proof that they split over time."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro import handlers
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import Messenger

from numpyro_smc.programs.after_scan import AfterScan, run_after
from numpyro_smc.programs.draws import CloudDraws
from numpyro_smc.programs.halves import Half, Overwrite
from numpyro_smc.programs.made_up import NearInitial, made_up
from numpyro_smc.programs.scans import Fixed, Scan, Trace, is_scan, run_step
from numpyro_smc.programs.series import read_series
from numpyro_smc.programs.sites import BatchPlates, in_control_flow, is_latent, log_density, plate_indices


def read_after_scan(
    program: Callable[[], Any], half: Half, args: Any, kwargs: Any, *, is_guide: bool, user: str
) -> AfterScan | None:
    """Look at what a program does after its scan.

    :raises ValueError: for a second scan, latent sites after the scan, or a likelihood that does not split over time.
    """
    who = "guide" if is_guide else "model"
    output, last_carry = _output_shapes(half)

    def rest(outputs: Any, carry: Any, **latents: Array) -> dict[str, Array]:
        after = run_after(program, None, outputs, carry, half.scan.number, Overwrite(latents))
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
        after = run_after(whole, arguments, outputs, last_carry, half.scan.number, Fixed({}))
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


def _with_arguments(program: Callable[[], Any]) -> Callable[..., Any]:
    """The program with its arguments left open: a function of ``(args, kwargs)``."""
    assert isinstance(program, handlers.substitute) and isinstance(program.fn, partial)
    inner, params = program.fn.func, program.data
    return lambda args, kwargs: handlers.substitute(inner, data=params)(*args, **kwargs)


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

    Under ``jit``, parameters take values near their initial ones, and data are replaced by made-up data of the same
    shape.
    """
    program = half.program
    assert isinstance(program, handlers.substitute) and isinstance(program.fn, partial)
    assert program.data is not None
    known = {
        name: value
        for name, value in program.data.items()
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))
    }
    inner = NearInitial(handlers.substitute(program.fn.func, data=known), known)

    def both(args: Any, kwargs: Any) -> dict[str, tuple[Array, Array]]:
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

    def tried(as_probabilities: bool) -> dict[str, tuple[float, float]]:
        with jax.ensure_compile_time_eval():
            sums = both(*made_up(after.args, after.length, as_probabilities))
            return {name: (float(whole), float(total)) for name, (whole, total) in sums.items()}

    try:
        try:
            sums = tried(False)
        except ValueError:
            sums = tried(True)
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
