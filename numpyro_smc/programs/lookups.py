"""What a function looks up outside of itself, read off its code, and what belongs to a library."""

import dis
import sys
import sysconfig
import types
from functools import lru_cache
from typing import Any

#: Libraries whose functions are known by their names.
_LIBRARIES = frozenset(
    {"jax", "jaxlib", "numpyro", "numpyro_smc", "numpy", "scipy", "optax", "flax", "equinox", "jaxtyping", "chex"}
    | {"blackjax", "diffrax", "ml_dtypes", *sys.stdlib_module_names}
)
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_GLOBALS")
_KNOWN: dict[int, Any] = {}

Chains = tuple[tuple[str, ...], ...]


@lru_cache(maxsize=4096)
def lookups(code: types.CodeType) -> dict[str, Chains]:
    """Global and closed-over names in a function's code, with the attributes that follow: ``np.linalg.inv``."""
    found: dict[str, dict[tuple[str, ...], None]] = {}
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if chain and name in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(value)
            continue
        if chain:
            found.setdefault(chain[0], {})[tuple(chain[1:])] = None
        chain = [value] if name in _LOADS and value not in code.co_cellvars else []
    for inner in _inner(code):
        for name, chains in lookups(inner).items():
            if name not in inner.co_freevars or name in code.co_freevars:
                found.setdefault(name, {}).update(dict.fromkeys(chains))
    return {name: tuple(chains) for name, chains in found.items()}


@lru_cache(maxsize=4096)
def imports(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Modules that a function imports when it is called, each with the attributes that its code may mean."""
    names = [instruction.argval for instruction in dis.get_instructions(code) if instruction.opname == "IMPORT_NAME"]
    found = [(name, code.co_names) for name in names if root(name) not in _LIBRARIES]
    return (*found, *(pair for inner in _inner(code) for pair in imports(inner)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def root(module: Any) -> str:
    """The package of a module's name."""
    return module.partition(".")[0] if isinstance(module, str) else ""


def is_library(module: Any) -> bool:
    """Whether functions of a module are known by their names."""
    return root(module) in _LIBRARIES


@lru_cache(maxsize=1024)
def is_installed(package: str) -> bool:
    """Whether a package was installed, rather than written by who runs it."""
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return file.startswith((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))


def has_library_name(value: Any) -> bool:
    """Whether an object is what a library calls by its name."""
    if id(value) in _KNOWN:
        return True
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not is_library(module) or not isinstance(name, str):
        return False
    found: Any = sys.modules.get(module)  # type: ignore[arg-type]
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is value:
        _KNOWN[id(value)] = value  # it lives as long as its library
    return found is value
