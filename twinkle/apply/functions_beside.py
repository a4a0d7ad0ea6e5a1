"""The functions beside the classes of a model that are an op, wherever their module has them from."""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from twinkle import op_names
from twinkle.match.structure import recognise
from twinkle.match.symbolic.source import function_of_callable
from twinkle.ops.catalog import find_op
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from twinkle.match.recognition import Recognition

__all__ = ["RecognisedFunction", "forwards_of", "functions_of"]


class RecognisedFunction(NamedTuple):
    """A function that is an op.

    Attributes:
        module: The name of the module that defines it.
        name: Of the function in it; ``Class.method`` for a method.
        original: The function.
        recognition: Which op, and how.
        takes_self: It is a method, which kernels for functions do not stand in for.
    """

    module: str
    name: str
    original: Callable[..., Any]
    recognition: Recognition
    takes_self: bool = False


class _Found:
    """The recognised functions of modules."""

    def __init__(self) -> None:
        self.by_module: dict[str, tuple[Any, list[RecognisedFunction]]] = {}


def functions_of(name: str) -> list[RecognisedFunction]:
    """The recognised functions that the classes of a module may call; worked out once.

    They are the functions that the module defines or has from another one, those that its code takes from a
    module by name (``rope.apply(x)``), and the methods of its classes.

    Args:
        name: The name of the module.
    """
    namespace = sys.modules.get(name)
    if namespace is None or name.partition(".")[0] == "torch":
        return []
    known = runtime.of(_Found).by_module
    found = known.get(name)
    if found is None or found[0] is not namespace:
        found = known[name] = (namespace, list(_recognised(namespace, name)))
    return found[1]


def forwards_of(classes: Iterable[type]) -> Iterator[RecognisedFunction]:
    """The forwards of layers that are such a function: a rotation as a layer of its own.

    Args:
        classes: The classes of the layers.
    """
    for cls in dict.fromkeys(classes):
        forward = vars(cls).get("forward")
        if isinstance(forward, FunctionType) and not cls.__module__.startswith("torch."):
            recognition = recognise(cls)
            named = getattr(sys.modules.get(cls.__module__), cls.__qualname__.partition(".")[0], None)
            if recognition.op in op_names.FUNCTION_OPS and named is not None:
                name = f"{cls.__qualname__}.forward"
                yield RecognisedFunction(cls.__module__, name, forward, recognition, takes_self=True)


def _recognised(namespace: Any, name: str) -> Iterator[RecognisedFunction]:
    for module, attribute, value in _candidates(namespace, name):
        recognition = recognise(value)
        if recognition.op in op_names.FUNCTION_OPS:
            # `kernels` puts a module in the place of the functions it decorates.
            original = function_of_callable(value) or value
            owner, _, called = attribute.rpartition(".")
            held = vars(getattr(namespace, owner.partition(".")[0], None) or type).get(called)
            takes_self = bool(owner) and not isinstance(held, staticmethod)
            yield RecognisedFunction(module, attribute, original, recognition, takes_self)


def _candidates(namespace: Any, name: str) -> Iterator[tuple[str, str, Any]]:
    """Callables with the module and the name that they have there."""
    methods: list[FunctionType] = []
    for attribute, value in list(vars(namespace).items()):
        if isinstance(value, type):
            if getattr(value, "__module__", None) == name and "<" not in value.__qualname__:
                for called, method in _methods(value):
                    methods.append(method)
                    if _may_be_an_op(method):
                        yield name, f"{value.__qualname__}.{called}", method
        elif callable(value):
            function = function_of_callable(value)
            home = name if function is None else function.__module__
            if home == name:
                yield name, attribute, value
            elif isinstance(value, FunctionType):
                yield from _at_home(value)
    for function in [
        *methods,
        *(value for value in vars(namespace).values() if isinstance(value, FunctionType)),
    ]:
        yield from _from_modules(namespace, function)


def _methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for name, value in list(vars(cls).items()):
        function = value.__func__ if isinstance(value, staticmethod) else value
        if isinstance(function, FunctionType):
            yield name, function


def _may_be_an_op(method: FunctionType) -> bool:
    """Whether a method is worth reading: it is no ``forward``, and its code names what an op has to call."""
    name = method.__name__
    if name == "forward" or name.startswith("__"):
        return False
    names = frozenset(method.__code__.co_names)
    return any(not names.isdisjoint(find_op(op).words) for op in op_names.FUNCTION_OPS)


def _at_home(function: FunctionType) -> Iterator[tuple[str, str, Any]]:
    """A function where it is defined, if its module has it under its name."""
    home = sys.modules.get(function.__module__)
    if (
        home is not None
        and function.__module__.partition(".")[0] != "torch"
        and vars(home).get(function.__name__) is function
    ):
        yield function.__module__, function.__name__, function


def _from_modules(namespace: Any, function: FunctionType) -> Iterator[tuple[str, str, Any]]:
    """The functions that code takes from modules by name."""
    names = function.__code__.co_names
    for module in (vars(namespace).get(name) for name in names):
        if isinstance(module, ModuleType) and module.__name__.partition(".")[0] != "torch":
            for value in (vars(module).get(name) for name in names):
                if isinstance(value, FunctionType):
                    yield from _at_home(value)
