"""What a function computes with besides its arguments, as a key: its code, closure, defaults and the globals it names.

A compiled program, and a checkpoint, is of a function **and** of all that it looks up elsewhere. The walk goes through
functions of the user, closures, bound methods, partials, handlers and other objects; numbers and arrays count by value,
libraries by name, what cannot be looked into by identity. Not seen are what is looked up by a string or read from
files, attributes of libraries that are set from outside, and what a program itself changes while it is traced.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from operator import is_
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.distributions import Distribution
from numpyro.infer.autoguide import AutoGuide

from numpyro_smc.programs import lookups
from numpyro_smc.programs.digests import ARRAYS, Same, array_digest, rendered
from numpyro_smc.programs.lookups import Chains

_ATOMS = frozenset({type(None), bool, int, str, bytes, type(Ellipsis), type(NotImplemented), range})
_LINEN_STATE = frozenset({"_id", "_state", "_parent_ref", "parent", "scope"})
_MISSING = object()
_FIRST: weakref.WeakKeyDictionary[types.FunctionType, tuple[Any, ...]] = weakref.WeakKeyDictionary()

#: Names in holders that do not count, by the holder's identity; the holder is kept, so that no other takes its place.
Ignored = dict[tuple[int, Any], Any]


class Fingerprint:
    """All that some values depend on, as a hashable key: equal for what computes the same, in this process.

    :param ignored: what is left out, as :meth:`changed` returned it.
    """

    def __init__(self, values: tuple[Any, ...], ignored: Ignored) -> None:
        self._walk = walk = _Walk(ignored)
        for value in values:
            walk.visit(value)
        self.key = tuple(walk.tokens)
        self._hash = hash(self.key)
        firsts = [(_FIRST.setdefault(function, tokens), tokens) for function, tokens in walk.functions]
        #: Whether some function had a fingerprint before, and another one.
        self.is_renewed = any(first != tokens for first, tokens in firsts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Fingerprint) and self.key == other.key)

    def holds(self) -> bool:
        """Whether all is as it was, object by object; much cheaper than another fingerprint."""
        return all(map(_Slots.hold, self._walk.slots)) and not any(True for _ in self._changed_containers())

    def changed(self) -> Ignored:
        """What is not as it was."""
        found: Ignored = {(id(c), None): c for c in self._changed_containers()}
        for slots in self._walk.slots:
            found |= {(id(slots.holder), name): slots.holder for name in slots.changed()}
        return found

    def _changed_containers(self) -> Iterator[Any]:
        for container, elements in self._walk.containers:
            if len(container) != len(elements) or not all(map(is_, container, elements)):
                yield container
        for array, digest in self._walk.arrays:
            if array_digest(array) != digest:
                yield array

    @cached_property
    def _rendered(self) -> tuple[str, tuple[str, ...]]:
        return rendered(self.key)

    @property
    def digest(self) -> str:
        """The same in every process, but for what the objects of :attr:`unknown` types hold."""
        return self._rendered[0]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Types of objects that cannot be told apart in another process."""
        return self._rendered[1]


def fingerprint(*values: Any, ignored: Ignored | None = None) -> Fingerprint:
    """The :class:`Fingerprint` of functions, objects and other values."""
    return Fingerprint(values, ignored or {})


class _Slots(NamedTuple):
    """Values found under names of a holder; **whole** is the mapping if no other name may join."""

    holder: Any
    read: Callable[[Any], Any]
    names: tuple[Any, ...]
    values: tuple[Any, ...]
    whole: Any
    size: int

    def hold(self) -> bool:
        _, read, names, values, whole, size = self
        return (whole is None or len(whole) == size) and all(map(is_, map(read, names), values))

    def changed(self) -> Iterator[Any]:
        yield from (name for name, value in zip(self.names, self.values, strict=True) if self.read(name) is not value)
        yield from () if self.whole is None else set(self.whole).difference(self.names)


class _Walk:
    """Tokens of values in the order met, and the places they were read from."""

    def __init__(self, ignored: Ignored) -> None:
        self.ignored = ignored
        self.tokens: list[Any] = []
        self.slots: list[_Slots] = []
        self.containers: list[tuple[Any, tuple[Any, ...]]] = []
        self.arrays: list[tuple[Any, bytes]] = []
        self.functions: list[tuple[types.FunctionType, tuple[Any, ...]]] = []
        self.seen: dict[int, tuple[int, Any]] = {}
        self.packages: set[str] = set()  # of the functions walked through

    def visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _ATOMS:
            self.tokens.append((kind, value))
        elif kind is types.CodeType:
            self.tokens.append(value)
        elif kind in (float, complex):
            self.tokens.append((kind, repr(value)))  # tells -0.0 from 0.0
        elif id(value) in self.seen:
            self.tokens.append(("again", self.seen[id(value)][0]))
        else:
            if kind is not tuple:  # equal ones may be one object or several
                self.seen[id(value)] = len(self.seen), value
            self._visit(value)

    def _visit(self, value: Any) -> None:
        if (id(value), None) in self.ignored:
            self.tokens.append("ignored")
        elif isinstance(value, types.ModuleType):
            self.tokens.append(("module", value.__name__))
        elif lookups.has_library_name(value):
            self.tokens.append(("library", value.__module__, value.__qualname__))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._parts("method", value.__func__, value.__self__)
        elif isinstance(value, partial):
            self._parts(type(value), value.func, value.args, value.keywords)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, ARRAYS) or hasattr(type(value), "__array__"):
            self._array(value)
        elif isinstance(value, dict | types.MappingProxyType):
            self._mapping(value, value, tuple(value), value)
        elif isinstance(value, list | tuple | set | frozenset):
            if not isinstance(value, tuple | frozenset):
                self.containers.append((value, tuple(value)))
            has_order = isinstance(value, list | tuple)
            self._parts(type(value), *(value if has_order else sorted(value, key=lambda x: (str(type(x)), repr(x)))))
        elif isinstance(value, property | staticmethod | classmethod | cached_property):
            self._parts(type(value), *(getattr(value, name, None) for name in ("fget", "__func__", "func")))
        elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            self._parts(("built in", value.__qualname__), value.__self__)
        elif isinstance(value, weakref.ref):
            self._parts("weak", value())
        elif hasattr(type(value), "__fingerprint__"):
            self._parts(type(value), *value.__fingerprint__())
        else:
            self._instance(value)

    def _parts(self, kind: Any, *parts: Any) -> None:
        self.tokens.append((kind, len(parts)))
        for part in parts:
            self.visit(part)

    def _read(self, holder: Any, read: Callable[[Any], Any], names: tuple[Any, ...], whole: Any = None) -> dict:
        names = tuple(name for name in names if (id(holder), name) not in self.ignored)
        values = tuple(map(read, names))
        self.slots.append(_Slots(holder, read, names, values, whole, 0 if whole is None else len(whole)))
        return dict(zip(names, values, strict=True))

    def _mapping(self, holder: Any, mapping: Any, names: tuple[Any, ...], whole: Any) -> None:
        found = self._read(holder, mapping.get, names, whole)
        self.tokens.append((type(mapping), len(found)))
        for name, value in found.items():
            self.visit(name)
            self.visit(value)

    def _array(self, value: Any) -> None:
        try:
            digest = array_digest(value)
        except Exception:  # traced, deleted, or on other machines
            self.tokens.append(Same(value))
            return
        if not isinstance(value, jax.Array | np.generic):
            self.arrays.append((value, digest))
        self.tokens.append(("array" if isinstance(value, ARRAYS) else type(value), digest))

    def _function(self, function: types.FunctionType) -> None:
        code, scope = function.__code__, function.__globals__
        named, module = lookups.lookups(code), scope.get("__name__")
        cells = tuple(zip(code.co_freevars, function.__closure__ or (), strict=True))
        if lookups.is_library(module):  # which does not rebind what its functions close over
            self._parts("of library", code, function.__defaults__, function.__kwdefaults__)
            for _, cell in cells:
                self.visit(_attribute(cell, "cell_contents"))
            return
        first, names = len(self.tokens), ("__code__", "__defaults__", "__kwdefaults__")
        self._parts("function", *self._read(function, function.__getattribute__, names).values())
        for name, cell in cells:
            for content in self._read(cell, partial(_attribute, cell), ("cell_contents",)).values():
                self._named(module, content, named.get(name, ()))
        self.packages.add(lookups.root(module))
        outside = tuple(name for name in named if name not in code.co_freevars)
        for name, value in self._read(scope, scope.get, outside).items():
            if value is not None:  # else a builtin
                self.tokens.append(name)
                self._named(module, value, named[name])
        for imported, attributes in lookups.imports(code):
            found = sys.modules.get(imported) or sys.modules.get(f"{scope.get('__package__')}.{imported}")
            if found is not None:
                self._named(module, found, tuple((name,) for name in attributes if name in vars(found)))
        if function.__dict__:
            self.visit(function.__dict__)
        self.functions.append((function, tuple(self.tokens[first:])))

    def _named(self, user: Any, value: Any, chains: Chains) -> None:
        """What a function of the module ``user`` names; of a module, the attributes that it names."""
        if isinstance(value, types.ModuleType):
            self.tokens.append(("module", value.__name__))
            if not lookups.is_library(value.__name__):
                names = tuple(dict.fromkeys(chain[0] for chain in chains if chain))
                for name, attribute in self._read(vars(value), vars(value).get, names).items():
                    self.tokens.append(name)
                    self._named(user, attribute, tuple(chain[1:] for chain in chains if chain[:1] == (name,)))
            return
        package = lookups.root(getattr(value, "__module__", None))
        known = lookups.is_library(package) or package == lookups.root(user) or not lookups.is_installed(package)
        if known or not callable(value):
            self.visit(value)
        else:
            self.tokens.append(Same(value))

    def _class(self, value: type) -> None:
        package = lookups.root(value.__module__)
        if package not in self.packages and lookups.is_installed(package):
            self.tokens.append(Same(value))
            return
        self._parts(("class", value.__qualname__), *value.__bases__)
        own = vars(value)
        names = tuple(n for n, v in own.items() if not (n.startswith("__") and n.endswith("__")) or callable(v))
        self._mapping(value, own, tuple(name for name in names if name not in ("_abc_impl", "__annotate__")), None)

    def _instance(self, value: Any) -> None:
        kind, held = type(value), getattr(value, "__dict__", None)
        wrapped = getattr(value, "__wrapped__", None)
        slots = [name for base in kind.__mro__ for name in _listed(vars(base).get("__slots__", ()))]
        if held is None and wrapped is None and not slots:
            self.tokens.append(Same(value))
            return
        self.visit(kind)
        if wrapped is not None:
            self._parts("wrapped", wrapped)
        if slots:
            names = tuple(name for name in slots if name not in ("__dict__", "__weakref__"))
            self._parts("slots", *self._read(value, partial(_attribute, value), names).values())
        if held is not None:
            names = _configuration(value, held)
            self._mapping(value, held, names, held if len(names) == len(held) else None)


def _configuration(value: Any, held: dict[str, Any]) -> tuple[str, ...]:
    """Names of an object's attributes, but for those that a library sets and changes while it runs."""
    if isinstance(value, AutoGuide):
        arguments = {name for base in type(value).__mro__ for name in _arguments(base)}
        return tuple(name for name in held if name in arguments or name.removeprefix("_") in arguments)
    if isinstance(value, Distribution):
        fields = {*value.gather_pytree_data_fields(), *value.gather_pytree_aux_fields()}
        return tuple(name for name in held if name in fields)
    if any((base.__module__, base.__name__) == ("flax.linen.module", "Module") for base in type(value).__mro__):
        return tuple(name for name in held if name not in _LINEN_STATE)
    return tuple(held)


def _arguments(kind: type) -> tuple[str, ...]:
    code = getattr(vars(kind).get("__init__"), "__code__", None)
    return () if code is None else code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]


def _attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, _MISSING)
    except ValueError:  # a cell that is still empty
        return _MISSING


def _listed(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
