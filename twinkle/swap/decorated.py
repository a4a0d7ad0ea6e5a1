"""Functions under decorators: a kernel takes the place of what they decorate, and they stay.

``no_grad``, ``contextmanager``, ``lru_cache`` and the like are no part of what a kernel computes. The
decorated object is made once more around the kernel: the same code with the same cells, but that which holds
what it decorates. What cannot be made so is no function for a kernel, and :func:`undecorated` says why.
"""

from __future__ import annotations

import functools
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.errors import KernelError
from twinkle.match.symbolic.source import function_of_callable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["caches", "redecorated", "undecorated"]

_CACHE: type = functools._lru_cache_wrapper
_C_FUNCTIONS = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)


def undecorated(function: Any, where: str) -> Any:
    """The function that a kernel replaces: the one below all decorators.

    Args:
        function: What stands under a name.
        where: ``module:name``, for messages.

    Raises:
        KernelError: It is none that a kernel can replace, or is decorated by what cannot be kept.
    """
    while True:
        _check(function, where)
        inner = getattr(function, "__wrapped__", None)
        if inner is None or not isinstance(function, (FunctionType, _CACHE)):
            return function
        if isinstance(function, FunctionType) and not _holds(function, inner):
            kind = "functools.singledispatch" if hasattr(function, "registry") else "a decorator"
            raise KernelError(
                f"{where} is made by {kind} that does not keep the function where it can be replaced",
                found=f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}",
                fix="register the kernel with it for a type" if hasattr(function, "registry") else None,
            )
        function = inner


def _check(function: Any, where: str) -> None:
    """Raise where a callable is no function."""
    name = where.rpartition(":")[2]
    kind, fix = type(function).__qualname__, None
    if isinstance(function, (FunctionType, _CACHE, *_C_FUNCTIONS)) or function_of_callable(function):
        if not isinstance(function, MethodType) or _is_apply(function):
            return
        kind = f"a method that is bound to {_named(function.__self__)}"
        fix = f"name the method: {type(function.__self__).__qualname__}.{function.__name__}"
    elif isinstance(function, type):
        kind = "a class"
        layer = issubclass(function, nn.Module)
        fix = f'write [layers.{name}] with target = "{where}"' if layer else f"name a method: {name}.method"
    elif isinstance(function, functools.partial):
        kind, fix = "a functools.partial", f"name the function that it is made of: {_named(function.func)}"
    elif isinstance(function, (torch.jit.ScriptFunction, torch.jit.ScriptModule)):
        kind, fix = "compiled by TorchScript", "replace the function before it is scripted"
    elif isinstance(function, nn.Module):
        kind, fix = f"a layer ({kind})", f"write [layers.{kind}] with its class as target"
    else:
        kind, fix = f"an object of type {type(function).__module__}.{kind}", None
        if isinstance(getattr(type(function), "__call__", None), FunctionType):  # noqa: B004
            fix = f"name the method of its class: {type(function).__qualname__}.__call__"
    raise KernelError(f"{where} is no function", found=kind, expected="a function or a method", fix=fix)


def _is_apply(method: MethodType) -> bool:
    """Whether it is ``SomeFunction.apply``, which stands for a function everywhere."""
    return isinstance(method.__self__, type) and issubclass(method.__self__, torch.autograd.Function)


def _named(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def _holds(function: FunctionType, inner: Any) -> bool:
    """Whether replacing what a decorator's function holds makes it call something else."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return any(_content(cell) is inner for cell in function.__closure__ or ()) or any(
        value is inner for value in defaults
    )


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def redecorated(function: Any, replacement: Callable[..., Any]) -> Any:
    """What stands under a name, around ``replacement`` in the place of the function below all decorators."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None or not isinstance(function, (FunctionType, _CACHE)):
        return replacement
    now = redecorated(inner, replacement)
    made: Any
    if isinstance(function, FunctionType):
        made = _around(function, inner, now)
    else:
        cache: Any = function
        made = functools.lru_cache(**cache.cache_parameters())(now)
        functools.update_wrapper(made, cache)  # with its cache_parameters
    made.__wrapped__ = now
    return made


def _around(function: FunctionType, inner: Any, now: Any) -> FunctionType:
    """A function with the code and the cells of another, but for what it holds of ``inner`` and itself."""
    itself = CellType()

    def swapped(value: Any) -> Any:
        return now if value is inner else value

    def swapped_cell(cell: CellType) -> CellType:
        if _content(cell) is function:
            return itself
        return CellType(now) if _content(cell) is inner else cell

    closure = tuple(map(swapped_cell, function.__closure__ or ()))
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, closure or None)
    functools.update_wrapper(made, function)
    made.__defaults__ = tuple(map(swapped, function.__defaults__)) if function.__defaults__ else None
    named = function.__kwdefaults__
    made.__kwdefaults__ = {name: swapped(value) for name, value in named.items()} if named else None
    vars(made).update({name: swapped(value) for name, value in vars(function).items()})
    itself.cell_contents = made
    return made


def caches(function: Any) -> list[Any]:
    """The ``lru_cache`` objects among the decorators of a function."""
    found = []
    while function is not None:
        found += [function] * isinstance(function, _CACHE)
        function = getattr(function, "__wrapped__", None)
    return found
