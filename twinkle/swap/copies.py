"""Copies and pickles of a swapped module, by what its class says of its state."""

from __future__ import annotations

import copyreg
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Maker", "reduced_as"]


class Maker:
    """What makes a module again from its parts: in this process a swapped one, in a pickle ``make`` itself.

    Args:
        make: Makes one of the original class.
        dress: Called here with what ``make`` gives.
    """

    def __init__(self, make: Callable[..., Any], dress: Callable[[Any], Any]) -> None:
        self.make = make
        self.dress = dress

    def __call__(self, *args: Any) -> Any:
        """The module, with its kernels."""
        return self.dress(self.make(*args))

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (self.make,)


def reduced_as(value: Any, cls: type, plain: Any) -> Any:
    """What ``__reduce_ex__`` gave for an instance of ``cls``, for one of the class ``plain`` instead."""
    if isinstance(value, str):
        return value
    make, arguments, *rest = value
    arguments = tuple(plain if argument is cls else argument for argument in arguments)
    if make is cls:
        make = plain
    name = getattr(make, "__name__", "")
    # Pickle's own opcodes for these two insist on the class that the object has.
    if name == "__newobj__":
        if plain.__new__ is object.__new__ and len(arguments) == 1:
            make, arguments = copyreg._reconstructor, (plain, object, None)  # type: ignore[attr-defined]
        else:
            make = plain.__new__
    elif name == "__newobj_ex__":
        make, arguments = functools.partial(plain.__new__, plain, *arguments[1], **arguments[2]), ()
    return (make, arguments, *rest)
