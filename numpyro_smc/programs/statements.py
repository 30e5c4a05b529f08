"""Statements of a program that only the losses they are meant for read; every other handler passes them by."""

from typing import Any

from numpyro.primitives import _PYRO_STACK, apply_stack


def state(kind: str, name: str, value: Any) -> Any:
    """Record ``value`` in the trace as a site of type ``kind``.

    :return: the value, as handlers left it.
    """
    if not _PYRO_STACK:
        return value
    return apply_stack({"type": kind, "name": name, "value": value, "cond_indep_stack": []})["value"]
