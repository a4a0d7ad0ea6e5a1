"""Make what a source found into what the rest of Twinkle takes: a layer class or a callable.

Imported at first load, never at interpreter start.
"""

from __future__ import annotations

from typing import Any

import torch

from twinkle.errors import SourceError

__all__ = ["finish"]


def finish(found: Any, *, kind: str, described: str, where: str | None) -> object:
    """The implementation itself.

    For a function an ``nn.Module`` class stands for the ``forward`` of one instance of it, which
    is made here; any other callable is taken as it is.

    Raises:
        SourceError: It is no layer class, or no callable.
    """
    is_module_class = isinstance(found, type) and issubclass(found, torch.nn.Module)
    if kind == "layer":
        if is_module_class:
            return found
        is_instance = isinstance(found, torch.nn.Module)
        raise SourceError(
            f"{described} is not a layer class",
            where=where,
            found=f"an instance of {type(found).__name__}" if is_instance else _what(found),
            expected="a subclass of torch.nn.Module",
        )
    if is_module_class:
        return _forward_of(found, described=described, where=where)
    if isinstance(found, type) and issubclass(found, torch.autograd.Function):
        raise SourceError(
            f"{described} is an autograd.Function, which is not called itself",
            where=where,
            found=_what(found),
            expected=f"a function that returns {found.__name__}.apply(…)",
        )
    if callable(found):
        return found
    raise SourceError(f"{described} is not callable", where=where, found=_what(found), expected="a function")


def _forward_of(cls: type[torch.nn.Module], *, described: str, where: str | None) -> object:
    try:
        return cls().forward
    except Exception as error:
        raise SourceError(
            f"{described}: {cls.__name__}() raised, and a function kernel is made without arguments",
            where=where,
            found=f"{type(error).__name__}: {error}",
            expected="an nn.Module class with forward and no __init__",
        ) from error


def _what(found: object) -> str:
    if isinstance(found, type):
        return f"class {found.__qualname__}"
    return f"{type(found).__name__} {getattr(found, '__qualname__', repr(found))}"
