"""Copies and pickles of a swapped module, by what its class says of its state."""

from __future__ import annotations

import copy
import copyreg
import functools
from typing import Any

__all__ = ["clone", "reduced_as"]


def clone(module: Any, reduce: Any, memo: dict[int, Any] | None) -> Any:
    """Copy a module as ``copy.copy`` does, or with a memo as ``copy.deepcopy``.

    Args:
        module: The module.
        reduce: Its ``__reduce_ex__``, as its original class has it.
        memo: Of a deep copy; None for a shallow one.
    """

    def through(value: Any) -> Any:
        return value if memo is None else copy.deepcopy(value, memo)

    if "parametrizations" in module._modules:
        # torch refuses to reduce parametrized modules, and copies them like this itself.
        value: Any = (copyreg.__newobj__, (type(module),), dict(module.__dict__))  # type: ignore[attr-defined]
    else:
        value = reduce(4)
    if isinstance(value, str):
        return module
    parts: list[Any] = [*value, None, None, None, None]
    make, arguments, state, items, pairs, setter = parts[:6]
    twin = make(*through(arguments))
    if memo is not None:
        memo[id(module)] = twin
    if state is not None:
        state = through(state)
        if setter is not None:
            setter(twin, state)
        elif hasattr(twin, "__setstate__"):
            twin.__setstate__(state)
        else:
            state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            twin.__dict__.update(state or {})
            for name, slot in (slots or {}).items():
                setattr(twin, name, slot)
    for item in items or ():
        twin.append(through(item))
    for key, item in pairs or ():
        twin[through(key)] = through(item)
    return twin


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
