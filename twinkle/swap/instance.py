"""Wrappers of ``forward`` in an instance (accelerate's hooks, a user's own), and swapping beneath them.

Such a wrapper stands in ``module.__dict__["forward"]`` and holds the bound method it found, in
``_old_forward``, in a closure or the like. The wrapper stays the very object it is; what it holds
is bound to another function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

from torch import nn

__all__ = ["describe", "has_wrapper", "reachable", "rebind"]

_Set = Callable[[Any], None]


def has_wrapper(module: nn.Module) -> bool:
    """Whether a ``forward`` of its own stands in the instance."""
    return "forward" in module.__dict__


def describe(module: nn.Module) -> str:
    """The name of the instance's own ``forward``, for messages."""
    forward = module.__dict__["forward"]
    while isinstance(forward, (functools.partial, MethodType)):
        forward = forward.func if isinstance(forward, functools.partial) else forward.__func__
    name = getattr(forward, "__qualname__", type(forward).__qualname__)
    return f"{getattr(forward, '__module__', None)}.{name}"


def reachable(module: nn.Module, functions: Sequence[Any]) -> bool:
    """Whether the instance's ``forward`` calls one of ``functions`` by a reference that can be changed."""
    return any(calls for calls, _, _ in _places(module, functions))


def rebind(module: nn.Module, functions: Sequence[Any], replacement: Any) -> None:
    """Bind every reference to one of ``functions`` on this module to ``replacement``."""
    if "forward" not in module.__dict__ and MethodType not in map(type, module.__dict__.values()):
        return  # as nearly every module
    for _, _, put in list(_places(module, functions)):
        put(MethodType(replacement, module))


def _places(module: nn.Module, functions: Sequence[Any]) -> Iterator[tuple[bool, MethodType, _Set]]:
    """The places of bound methods of the module: (a call runs through it, the method, how to replace it)."""
    state = module.__dict__

    def wanted(value: object) -> bool:
        return (
            isinstance(value, MethodType)
            and value.__self__ is module
            and any(value.__func__ is function for function in functions)
        )

    names: set[str] = set()
    if "forward" in state and not wanted(state["forward"]):
        yield from _inside(state["forward"], wanted, names, set(), 0)
    for key, value in list(state.items()):
        if wanted(value):
            yield key == "forward" or key in names, value, functools.partial(state.__setitem__, key)


def _inside(
    wrapper: Any, wanted: Callable[[object], bool], names: set[str], seen: set[int], depth: int
) -> Iterator[tuple[bool, MethodType, _Set]]:
    """The places inside a wrapper; ``names`` collects the attribute names that its code mentions."""
    if depth > 8 or id(wrapper) in seen:
        return
    seen.add(id(wrapper))
    if isinstance(wrapper, MethodType):
        yield from _inside(wrapper.__func__, wanted, names, seen, depth + 1)
    elif isinstance(wrapper, functools.partial):
        yield from _inside(wrapper.func, wanted, names, seen, depth + 1)
        yield from _in_partial(wrapper, wanted, names, seen, depth)
    elif isinstance(wrapper, FunctionType):
        names.update(_names(wrapper.__code__))
        for cell in wrapper.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            if wanted(value):
                yield True, value, functools.partial(setattr, cell, "cell_contents")
            elif _is_callable_wrapper(value):
                yield from _inside(value, wanted, names, seen, depth + 1)
        yield from _in_defaults(wrapper, wanted)
    elif _is_callable_wrapper(wrapper):
        names.update(_names(getattr(type(wrapper).__call__, "__code__", None)))
        for key, value in list(vars(wrapper).items()):
            if wanted(value):
                yield True, value, functools.partial(setattr, wrapper, key)
            elif isinstance(value, (FunctionType, functools.partial)):
                yield from _inside(value, wanted, names, seen, depth + 1)
    wrapped: Any = getattr(wrapper, "__wrapped__", None)
    if wanted(wrapped):
        # Only for show: signatures are read through it.
        yield False, wrapped, functools.partial(setattr, wrapper, "__wrapped__")


def _in_partial(
    wrapper: functools.partial[Any],
    wanted: Callable[[object], bool],
    names: set[str],
    seen: set[int],
    depth: int,
) -> Iterator[tuple[bool, MethodType, _Set]]:
    def put(index: int, method: Any) -> None:
        args = (*wrapper.args[:index], method, *wrapper.args[index + 1 :])
        wrapper.__setstate__((wrapper.func, args, wrapper.keywords, wrapper.__dict__))  # type: ignore[attr-defined]

    for index, value in enumerate(wrapper.args):
        if wanted(value):
            yield True, value, functools.partial(put, index)
    for key, value in list(wrapper.keywords.items()):
        if wanted(value):
            yield True, value, functools.partial(wrapper.keywords.__setitem__, key)


def _in_defaults(
    function: FunctionType, wanted: Callable[[object], bool]
) -> Iterator[tuple[bool, MethodType, _Set]]:
    def put(index: int, method: Any) -> None:
        given = function.__defaults__ or ()
        function.__defaults__ = (*given[:index], method, *given[index + 1 :])

    for index, value in enumerate(function.__defaults__ or ()):
        if wanted(value):
            yield True, value, functools.partial(put, index)
    for key, value in list((function.__kwdefaults__ or {}).items()):
        if wanted(value):
            yield True, value, functools.partial((function.__kwdefaults__ or {}).__setitem__, key)


def _is_callable_wrapper(value: object) -> bool:
    """Whether a value may be a wrapper: callable, and no class, module of the model, or builtin."""
    if isinstance(value, (FunctionType, functools.partial, MethodType)):
        return True
    return (
        callable(value)
        and not isinstance(value, (type, nn.Module))
        and hasattr(value, "__dict__")
        and type(value).__module__ != "builtins"
    )


def _names(code: Any) -> set[str]:
    found: set[str] = set()
    if code is not None:
        found.update(code.co_names)
        for constant in code.co_consts:
            if hasattr(constant, "co_names"):
                found |= _names(constant)
            elif isinstance(constant, str):
                found.add(constant)
    return found
