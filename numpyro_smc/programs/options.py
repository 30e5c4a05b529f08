"""A function's own options and the arguments of the user's program, which share one ``**kwargs``, told apart."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from numpyro.primitives import Messenger

_P = ParamSpec("_P")
_R = TypeVar("_R")


def keeps_options_apart(*programs: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Refuse a keyword that is an option of the decorated function and would never reach the program that has it too.

    :param programs: where the user's programs are: a parameter's name, or a path of attributes from one.
    """

    def decorate(fn: Callable[_P, _R]) -> Callable[_P, _R]:
        parameters = inspect.signature(fn).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        options = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

        @wraps(fn)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            own = options | set(positional[: len(args)])
            given = [name for name, value in kwargs.items() if name in own and not _is_plain(name, value)]
            if given:
                bound = dict(zip(positional, args, strict=False)) | kwargs
                num_args = max(len(args) - len(positional), 0)
                for path in programs:
                    _check(fn.__qualname__, given, _at(bound, path), num_args)
            return fn(*args, **kwargs)

        return checked

    return decorate


def _is_plain(name: str, value: Any) -> bool:
    """Whether a value can only be meant as the option: values by site have sites, or are refused for that."""
    return value is None or (name == "params" and isinstance(value, Mapping))


def takes(program: Any, name: str) -> bool:
    """Whether a keyword of this name would reach the program."""
    return name in _keywords(program, 0) or any(p.kind is p.VAR_KEYWORD for p in _parameters(_innermost(program)[0]))


def _check(user: str, given: list[str], program: Any, num_args: int) -> None:
    if program is None:
        return
    taken = _keywords(program, num_args)
    for name in given:
        if name in taken:
            called = getattr(_innermost(program)[0], "__name__", type(program).__name__)
            raise TypeError(
                f"{user}: '{name}' is an argument of {called} and an option here, which it would be taken for. Bind "
                f"the program's with functools.partial({called}, {name}=...), or pass it by position."
            )


def _at(bound: dict[str, Any], path: str) -> Any:
    name, *attributes = path.split(".")
    found = bound.get(name)
    for attribute in attributes:
        found = getattr(found, attribute, None)
    return found


def _keywords(program: Any, num_args: int) -> list[str]:
    """Names of the arguments that neither ``functools.partial`` nor a position has bound."""
    fn, num_bound, names = _innermost(program)
    parameters = [p for p in _parameters(fn) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    free = parameters[num_bound + num_args :] + [p for p in _parameters(fn) if p.kind is p.KEYWORD_ONLY]
    return [p.name for p in free if p.name not in names and p.kind is not p.POSITIONAL_ONLY]


def _innermost(program: Any) -> tuple[Any, int, frozenset[str]]:
    """The function inside of handlers and ``functools.partial``, and how many and which arguments these have bound."""
    num_bound, names = 0, frozenset[str]()
    while isinstance(program, partial | Messenger):
        if isinstance(program, partial):
            num_bound, names = num_bound + len(program.args), names | program.keywords.keys()
            program = program.func
        else:
            program = program.fn
    return program, num_bound, names


def _parameters(program: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(program).parameters.values())
    except (TypeError, ValueError):
        return []
