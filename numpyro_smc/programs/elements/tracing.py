"""Which elements of an axis each number of a traced function depends on, read off its jaxpr without computing anything.

Every number of the inputs gets a label, and every equation of the jaxpr hands labels on. A label never claims less than
the truth: independence that is read off labels is proved, while a dependence may be one in form only (a product with a
matrix that happens to be diagonal).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from numpyro_smc.programs.elements.labels import MIXED, Labels, concrete, join, join_over, total
from numpyro_smc.programs.elements.rules import RULES, Rule, anything, evaluated

# Operations that do nothing but call a jaxpr.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
}


def trace(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Trace a function once, to ask for the labels of its outputs many times.

    :param args: pytrees of arrays or shapes.
    :return: a function of the labels of the arguments (pytrees of the same structure) to those of the outputs.
    """
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    treedef = jax.tree.structure(shapes)
    known = [concrete(const) for const in jaxpr.consts]

    def labels_of(*labels: Any) -> Any:
        flat = jax.tree.leaves(labels, is_leaf=lambda leaf: leaf is None)
        outputs = _propagate(jaxpr.jaxpr, [None] * len(known), known, flat, [None] * len(flat))
        return jax.tree.unflatten(
            treedef, [label if label is not None and label.any() else None for label, _ in outputs]
        )

    return labels_of


def _propagate(
    jaxpr: Jaxpr, const_labels: list[Labels], consts: list[Any], labels: list[Labels], values: list[Any]
) -> list[tuple[Labels, np.ndarray | None]]:
    """Labels of a jaxpr's outputs, with their values where they are known."""
    found: dict[Any, tuple[Labels, np.ndarray | None]] = {}

    def read(atom: Any) -> tuple[Labels, np.ndarray | None]:
        return (None, concrete(atom.val)) if isinstance(atom, Literal) else found[atom]

    for variables, its_labels, its_values in (
        (jaxpr.constvars, const_labels, consts),
        (jaxpr.invars, labels, values),
    ):
        for variable, label, value in zip(variables, its_labels, its_values, strict=True):
            shape = getattr(variable.aval, "shape", ())
            found[variable] = (None if label is None else np.broadcast_to(label, shape), value)
    for eqn in jaxpr.eqns:
        pairs = [read(atom) for atom in eqn.invars]
        outputs = one_operation(eqn, [label for label, _ in pairs], [value for _, value in pairs])
        found |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def one_operation(eqn: Any, labels: list[Labels], values: list[Any]) -> list[tuple[Labels, np.ndarray | None]]:
    """Labels of an operation's outputs, with their values where they are known."""
    inner = eqn.params.get(CALLS.get(eqn.primitive.name))
    if inner is not None:
        jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        consts = list(inner.consts) if isinstance(inner, ClosedJaxpr) else []
        return _propagate(jaxpr, [None] * len(consts), [concrete(const) for const in consts], labels, values)
    if all(label is None for label in labels):
        return [(None, value) for value in evaluated(eqn, values)]
    rule = _ALL_RULES.get(eqn.primitive.name)
    shapes = [out.aval.shape for out in eqn.outvars]
    outputs = anything(eqn, labels, values) if rule is None else rule(eqn, labels, values)
    return [
        (None if label is None else np.broadcast_to(label, shape), None)
        for label, shape in zip(outputs, shapes, strict=True)
    ]


def _call(jaxpr: Any, labels: list[Labels]) -> list[Labels]:
    consts = [concrete(const) for const in jaxpr.consts]
    found = _propagate(jaxpr.jaxpr, [None] * len(consts), consts, labels, [None] * len(labels))
    return [label for label, _ in found]


def settled(step: Callable[[list[Labels]], list[Labels]], labels: list[Labels]) -> list[Labels]:
    """The labels of a loop's carry, whatever the number of its rounds."""
    while True:
        new = [join(before, after) for before, after in zip(labels, step(labels), strict=True)]
        if all(_same(before, after) for before, after in zip(labels, new, strict=True)):
            return new
        labels = new


def _same(a: Labels, b: Labels) -> bool:
    return a is b or (b is None if a is None else b is not None and bool(np.all(a == b)))


def _scanned(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    params = eqn.params
    first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, carry = labels[:first], labels[first:second]
    xs = [join_over(label, (0,)) for label in labels[second:]]
    carry = settled(lambda c: _call(params["jaxpr"], [*consts, *c, *xs])[: len(c)], carry)
    if all(label is None for label in (*consts, *carry)):
        numbers = _one_by_one(labels[second:])
        if numbers is not None:
            ones = [None if label is None else (label != 0).any(axis=0).astype(np.int32) for label in labels[second:]]
            outputs = _call(params["jaxpr"], [*consts, *carry, *ones])[len(carry) :]
            return [*carry, *(_at_each(label, numbers) for label in outputs)]
    outputs = _call(params["jaxpr"], [*consts, *carry, *xs])[len(carry) :]
    return [*carry, *(None if label is None else label[None] for label in outputs)]


def _one_by_one(inputs: list[Labels]) -> np.ndarray | None:
    """The one element that each round of a loop sees of its inputs, ``[rounds]``; ``None`` where one sees several."""
    seen = [join_over(label, tuple(range(1, label.ndim))) for label in inputs if label is not None]
    together = join(*seen)
    return None if together is None or np.any(together == MIXED) else together


def _at_each(label: Labels, numbers: np.ndarray) -> Labels:
    """Labels over the rounds of a loop, from those of a round that sees element 1."""
    if label is None:
        return None
    return np.where(label == 1, numbers.reshape(-1, *(1,) * label.ndim), label)


def _repeated(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    params = eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_condition, of_body = labels[:first], labels[first:second]

    def step(carry: list[Labels]) -> list[Labels]:
        until = total(_call(params["cond_jaxpr"], [*of_condition, *carry]))
        return [join(label, until) for label in _call(params["body_jaxpr"], [*of_body, *carry])]

    carry = settled(step, labels[second:])
    until = total(_call(params["cond_jaxpr"], [*of_condition, *carry]))
    shapes = [out.aval.shape for out in eqn.outvars]
    return [
        join(label, None if until is None else np.broadcast_to(until, shape))
        for label, shape in zip(carry, shapes, strict=True)
    ]


def _branched(eqn: Any, labels: list[Labels], values: list[Any]) -> list[Labels]:
    outputs = [_call(branch, labels[1:]) for branch in eqn.params["branches"]]
    return [join(labels[0], *found) for found in zip(*outputs, strict=True)]


_ALL_RULES: dict[str, Rule] = {**RULES, "scan": _scanned, "while": _repeated, "cond": _branched}
