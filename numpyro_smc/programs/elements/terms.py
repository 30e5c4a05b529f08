"""Labels of the terms that the outputs of a traced function are sums of.

A sum over an axis depends on all elements, and yet it splits into functions of single elements if its terms do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from numpyro_smc.programs.elements.labels import Labels, concrete, join
from numpyro_smc.programs.elements.tracing import CALLS, one_operation


class Sum(NamedTuple):
    """Labels of an array, and of the terms whose total is that of the array, up to factors that have no labels.

    - **known** - the array, where it is known while tracing. **terms** - empty for what is no sum.
    """

    labels: Labels
    known: np.ndarray | None = None
    terms: tuple[Labels, ...] = ()

    def parts(self) -> tuple[Labels, ...]:
        return self.terms or (self.labels,)


_KEPT = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "convert_element_type", "neg"})
_ADDED = frozenset({"add", "sub", "add_any"})


def trace_terms(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """As :func:`~numpyro_smc.programs.elements.tracing.trace`, with a :class:`Sum` for every output."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    consts = [Sum(None, concrete(const)) for const in closed.consts]

    def sums_of(*labels: Any) -> Any:
        flat = jax.tree.leaves(labels, is_leaf=lambda leaf: leaf is None)
        sums = _propagate(closed.jaxpr, consts, [Sum(label) for label in flat])
        return jax.tree.unflatten(jax.tree.structure(shapes), sums)

    return sums_of


def _propagate(jaxpr: Jaxpr, consts: list[Sum], args: list[Sum]) -> list[Sum]:
    found: dict[Any, Sum] = {}

    def read(atom: Any) -> Sum:
        return Sum(None, concrete(atom.val)) if isinstance(atom, Literal) else found[atom]

    for variable, given in (*zip(jaxpr.constvars, consts, strict=True), *zip(jaxpr.invars, args, strict=True)):
        shape = getattr(variable.aval, "shape", ())
        labels = None if given.labels is None else np.broadcast_to(given.labels, shape)
        found[variable] = given._replace(labels=labels)
    for eqn in jaxpr.eqns:
        found |= dict(zip(eqn.outvars, _one(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _one(eqn: Any, inputs: list[Sum]) -> list[Sum]:
    inner = eqn.params.get(CALLS.get(eqn.primitive.name))
    if inner is not None:
        consts = list(inner.consts) if isinstance(inner, ClosedJaxpr) else []
        jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        return _propagate(jaxpr, [Sum(None, concrete(const)) for const in consts], inputs)
    outputs = one_operation(eqn, [given.labels for given in inputs], [given.known for given in inputs])
    terms = _terms(eqn, inputs) if len(outputs) == 1 else ()
    return [Sum(labels, known, terms) for labels, known in outputs]


def _terms(eqn: Any, inputs: list[Sum]) -> tuple[Labels, ...]:
    name = eqn.primitive.name
    if name == "reduce_sum":
        return inputs[0].parts()
    if not any(given.terms for given in inputs):
        return ()
    if name in _KEPT:
        return inputs[0].terms
    if name in _ADDED:
        return tuple(part for given in inputs for part in given.parts())
    if name == "mul" and not (inputs[0].terms and inputs[1].terms):
        which = 0 if inputs[0].terms else 1
        return _times(inputs[which].terms, inputs[1 - which], eqn.invars[1 - which])
    if name == "div" and not inputs[1].terms:
        return _times(inputs[0].terms, inputs[1], eqn.invars[1])
    if name == "select_n" and not inputs[0].terms:
        chosen = tuple(part for given in inputs[1:] for part in given.parts())
        return _times(chosen, inputs[0], eqn.invars[0])
    return ()


def _times(terms: tuple[Labels, ...], factor: Sum, atom: Any) -> tuple[Labels, ...]:
    """The terms, which depend on a factor too; none if it has labels and is not one number."""
    if factor.labels is None:
        return terms
    return tuple(join(term, factor.labels.reshape(())) for term in terms) if np.prod(atom.aval.shape) == 1 else ()
