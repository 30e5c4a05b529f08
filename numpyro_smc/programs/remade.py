"""Objects that travel by pickle and copy as the arguments they were made with."""

from typing import Any


class Remade:
    """Made anew where it arrives: what was compiled, and the functions made for it, stay behind.

    For classes that say all they are in their arguments and do not change after they are made.
    """

    _made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        made._made_with = (args, kwargs)
        return made

    def __reduce__(self) -> Any:
        return _make, (type(self), *self._made_with)


def _make(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return cls(*args, **kwargs)
