"""The functions beside the classes of a model that are an op, wherever their module has them from."""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from twinkle import op_names
from twinkle.hooks.first_use import standing
from twinkle.match.structure import recognise, recognitions
from twinkle.match.symbolic.source import function_of_callable
from twinkle.match.words import words_of
from twinkle.ops.catalog import find_op
from twinkle.runtime import runtime
from twinkle.swap.placed import placed_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from twinkle.match.recognition import Recognition

__all__ = ["RecognisedFunction", "forwards_of", "functions_of", "is_in_layers", "methods_led_to"]


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

    @property
    def of_layers(self) -> bool:
        """Whether its op is mostly a layer: a norm, an activation, a gated product."""
        return find_op(str(self.recognition.op)).kind == "layer"

    @property
    def is_method(self) -> bool:
        """Whether it is a method of a class that is such an op."""
        return self.of_layers and "." in self.name


class _Scan:
    """What was found in a module, and what stood there then.

    Code is read anew where other functions or classes stand under its names: a module that goes on (a
    notebook defines a function in a later cell, or again) has what it came to have. Nothing is held.
    """

    def __init__(self, namespace: Any, found: tuple[RecognisedFunction, ...], version: int) -> None:
        self.found = found
        self.version = version
        self._standing = {name: ref(value) for name, value in _code_in(namespace)}

    def holds(self, namespace: Any) -> bool:
        """Whether the same functions and classes stand there."""
        count = 0
        for name, value in _code_in(namespace):
            known = self._standing.get(name)
            if known is None or known() is not value:
                return False
            count += 1
        return count == len(self._standing)


class _Found:
    """The recognised functions of modules."""

    def __init__(self) -> None:
        self.by_module: dict[str, _Scan] = {}


def functions_of(name: str) -> tuple[RecognisedFunction, ...]:
    """The recognised functions that the classes of a module may call.

    They are the functions that the module defines or has from another one, those that its code takes from a
    module by name (``rope.apply(x)``), and the methods of its classes.

    Args:
        name: The name of the module.
    """
    namespace = sys.modules.get(name)
    if namespace is None or name.partition(".")[0] == "torch":
        return ()
    known = runtime.of(_Found).by_module
    scan = known.get(name)
    if scan is None or not scan.holds(namespace):
        found = tuple(_recognised(namespace, name))
        before = -1 if scan is None else scan.version
        same = scan is not None and scan.found == found
        scan = known[name] = _Scan(namespace, found, before if same else before + 1)
    return scan.found


def version_of(name: str) -> int:
    """How often :func:`functions_of` a module has found other functions than before; -1 if never asked."""
    scan = runtime.of(_Found).by_module.get(name)
    return -1 if scan is None else scan.version


def _code_in(namespace: Any) -> Iterator[tuple[str, Any]]:
    """The functions and classes under the names of a module."""
    for name, value in list(vars(namespace).items()):
        if isinstance(value, FunctionType | type):
            yield name, value


def is_in_layers(found: RecognisedFunction, modules: Iterable[str]) -> bool:
    """Whether layers that a kernel may compute as a whole call a function: to theirs it is a part.

    Args:
        found: The function.
        modules: Where the layers are looked for, by name, beside those that were recognised before.
    """
    original = found.original
    if any(_is_layer_of(one, original) for one in recognitions()):
        return True
    for module in dict.fromkeys([*modules, found.module]):
        namespace = sys.modules.get(module)
        names = {name for name, value in _code_in(namespace) if _plain(value) is original}
        names.add(found.name.rpartition(".")[2])
        for _, cls in _code_in(namespace):
            if not isinstance(cls, type) or getattr(cls, "__module__", None) != module:
                continue
            calls = any(not names.isdisjoint(method.__code__.co_names) for _, method in _methods(cls))
            if calls and hasattr(cls, "forward") and _is_layer_of(recognise(cls), original):
                return True
    return False


def methods_led_to(
    found: Iterable[RecognisedFunction], classes: Iterable[type]
) -> tuple[RecognisedFunction, ...]:
    """The methods among recognised functions that the forwards of some layers lead to.

    Args:
        found: The functions.
        classes: The classes of the layers.
    """
    methods = [one for one in found if one.is_method]
    if not methods:
        return ()
    reached = {function for cls in classes for function in words_of(standing(cls), cls).functions}
    return tuple(one for one in methods if one.original in reached)


def _is_layer_of(recognition: Recognition, function: Any) -> bool:
    """Whether a class is a layer that a kernel may compute as a whole, with a function in it."""
    return (
        recognition.op is not None and bool(find_op(recognition.op).layers) and recognition.rests_on(function)
    )


def _plain(value: Any) -> Any:
    """A function as it stood before a kernel took its place."""
    placed = placed_as(value) if isinstance(value, FunctionType) and hasattr(value, "__code__") else None
    return value if placed is None else placed.original


def forwards_of(classes: Iterable[type]) -> Iterator[RecognisedFunction]:
    """The forwards of layers that are such a function: a rotation as a layer of its own.

    Args:
        classes: The classes of the layers.
    """
    for cls in dict.fromkeys(classes):
        forward = vars(cls).get("forward")
        if isinstance(forward, FunctionType) and not cls.__module__.startswith("torch."):
            recognition = recognise(cls)
            alone = recognition.op is not None and find_op(recognition.op).kind == "function"
            named = getattr(sys.modules.get(cls.__module__), cls.__qualname__.partition(".")[0], None)
            if alone and named is not None:
                name = f"{cls.__qualname__}.forward"
                yield RecognisedFunction(cls.__module__, name, forward, recognition, takes_self=True)


def _recognised(namespace: Any, name: str) -> Iterator[RecognisedFunction]:
    for module, attribute, there in _candidates(namespace, name):
        value = _plain(there)
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
    return any(not names.isdisjoint(find_op(op).calls) for op in op_names.FUNCTION_OPS)


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
