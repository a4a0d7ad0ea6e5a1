"""Adapting what a source found to a layer class without ``__init__`` or to a callable.

Imported at first load, never at interpreter start.
"""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from twinkle.errors import KernelError, SourceError
from twinkle.runtime import runtime
from twinkle.sources.constructors import Made, made_in_init

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["adapt_layer", "explain_lacking", "finish"]


class _Adapted:
    """The classes that were made here, each with the kernel class that it was made from."""

    def __init__(self) -> None:
        self.originals: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def finish(
    found: Any,
    *,
    kind: str,
    described: str,
    where: str | None,
    attributes: Mapping[str, object] | None = None,
    adapt: bool = False,
) -> object:
    """Adapt what a source found: to a layer class or a callable.

    For a function an ``nn.Module`` class stands for the ``forward`` of one instance of it, which
    is made here; any other callable is taken as it is.

    Args:
        found: What the source has under the name.
        kind: ``"layer"`` or ``"function"``.
        described: The source in words.
        where: Where it was registered.
        attributes: For a layer what its class expects on ``self`` and its target lacks.
        adapt: Make a layer class that has an ``__init__`` into one without.

    Raises:
        SourceError: It is no layer class, or no callable.
        KernelError: The layer cannot be adapted.
    """
    is_module_class = isinstance(found, type) and issubclass(found, torch.nn.Module)
    if kind == "layer":
        if is_module_class:
            if attributes or (adapt and found.__init__ is not torch.nn.Module.__init__):
                return adapt_layer(found, attributes or {}, where=where)
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


def adapt_layer(
    cls: type[torch.nn.Module], attributes: Mapping[str, object], *, where: str | None = None
) -> type[torch.nn.Module]:
    """Make a layer class without ``__init__`` that has ``cls``'s ``forward`` and the given attributes.

    The ``forward`` of a kernel runs on the module it replaces, so ``__init__`` never does. What it
    would have set comes from that module or from ``attributes``. What it sets to a parameter whose
    default is ``None`` is ``None`` (TOML has no such value to give). Of the other members of the
    class those go along that ``forward`` may need.

    Args:
        cls: The kernel class.
        attributes: Values for what ``forward`` reads on ``self`` and its target lacks.
        where: Where it was registered.

    Raises:
        KernelError: ``forward`` needs ``super()``, or an attribute stands for a nested module.
    """
    made = made_in_init(cls)
    _check_attributes(cls, attributes, made, where)
    members: dict[str, Any] = {}
    for klass in reversed(cls.__mro__):
        if klass not in torch.nn.Module.__mro__:
            members.update(vars(klass))
    namespace = _reachable(cls, members, where)
    for name, (how, value) in made.items():
        if how == "default" and value is None and name not in members:
            namespace[name] = None
    for flag in ("can_torch_compile", "has_backward", "kernel_layer_name"):
        if flag in members:
            namespace[flag] = members[flag]
    namespace.update(attributes)
    namespace["__module__"] = cls.__module__
    namespace["__qualname__"] = cls.__qualname__
    namespace["__doc__"] = cls.__doc__
    adapted: type[torch.nn.Module] = type(cls.__name__, (torch.nn.Module,), namespace)
    runtime.of(_Adapted).originals[adapted] = cls
    return adapted


def explain_lacking(cls: type, names: list[str]) -> str | None:
    """A fix for attributes that an adapted layer reads and its target lacks, or ``None``.

    Args:
        cls: A layer class, as a source gave it.
        names: What is missing.
    """
    made = made_in_init(runtime.of(_Adapted).originals.get(cls, cls))
    modules = [name for name in names if made.get(name, ("", None))[0] in ("module", "parameter")]
    if modules:
        texts = [f"self.{name} ({made[name][1]})" for name in modules]
        return (
            f"{cls.__name__}.__init__ makes {', '.join(texts)}, and is never run: nested modules and "
            "parameters have to be the target's own"
        )
    defaults = [f"{name} = {_toml(made[name][1])}" for name in names if made.get(name, ("",))[0] == "default"]
    if defaults:
        return f"{cls.__name__}.__init__ sets by default: attributes = {{ {', '.join(defaults)} }}"
    return None


def _check_attributes(
    cls: type, attributes: Mapping[str, object], made: Mapping[str, Made], where: str | None
) -> None:
    for name, value in attributes.items():
        how, description = made.get(name, ("", None))
        if name in ("forward", "__init__") or name.startswith("__"):
            raise KernelError(
                f"attributes cannot replace {name} of {cls.__name__}",
                where=where,
                found=f"{name} = {value!r}",
            )
        if how == "module" and not isinstance(value, torch.nn.Module):
            raise KernelError(
                f"self.{name} of {cls.__name__} is a nested module, which no attribute can stand for",
                where=where,
                found=f"{name} = {value!r}",
                expected=f"a target that has {name} itself ({description} in {cls.__name__}.__init__)",
                fix=f"remove {name} from attributes",
            )


def _reachable(cls: type, members: Mapping[str, Any], where: str | None) -> dict[str, Any]:
    """The members that ``forward`` needs: itself, what it names, and what those name in turn."""
    taken: dict[str, Any] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        if name in taken or name not in members or name.startswith("__"):
            continue
        taken[name] = members[name]
        for code in _codes(members[name]):
            if "__class__" in code.co_freevars:
                raise KernelError(
                    f"{cls.__name__} cannot be used on another class's module: {name} calls super()",
                    where=where,
                    found=f"super() at {code.co_filename}:{code.co_firstlineno}",
                    expected="a forward that needs no base class but nn.Module",
                )
            waiting.extend(_names(code))
    return taken


def _codes(member: object) -> list[Any]:
    inner: Any = getattr(member, "__func__", member)
    if isinstance(inner, property):
        functions = [inner.fget, inner.fset]
    else:
        functions = [getattr(inner, "__wrapped__", None), inner]
    return [function.__code__ for function in functions if isinstance(function, FunctionType)]


def _names(code: Any) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names.extend(_names(constant))
    return names


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


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value)


def _what(found: object) -> str:
    if isinstance(found, type):
        return f"class {found.__qualname__}"
    return f"{type(found).__name__} {getattr(found, '__qualname__', repr(found))}"
