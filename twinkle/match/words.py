"""The words of code: what it calls and reads by name, and its operators, found without reading its source.

Reading code takes milliseconds a class, and most classes of a program hold nothing that there is a kernel
for. Code without any word of an op cannot be that op.

Standard library only.
"""

from __future__ import annotations

import sys
from types import CodeType, FunctionType, MethodType, ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["Words", "words_of"]

_MOST = 200
"""The functions that are followed from one; code that leads to more counts as code with every word."""


class Words:
    """What was found in a function and in those it leads to.

    Attributes:
        names: Names that are read or called, keywords, and ``+`` and ``*`` for a sum and a product.
        functions: The functions that it leads to, itself first.
        all: There were too many to follow: any word may be in there.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.functions: dict[FunctionType, None] = {}
        self.all = False

    def have(self, wanted: frozenset[str]) -> bool:
        """Whether one of some words is among them."""
        return self.all or not wanted.isdisjoint(self.names)


def words_of(function: Any, owner: type | None = None, *, follow: bool = True) -> Words:
    """The words of a function, and of what it leads to by name: methods of a class, globals, closures.

    Args:
        function: What is no function of Python has no words.
        owner: The class whose method it is.
        follow: Look into the functions it leads to as well; those of torch are never looked into.
    """
    found = Words()
    todo = [function]
    while todo:
        plain = _plain(todo.pop())
        if plain is None or plain in found.functions:
            continue
        if len(found.functions) == _MOST:
            found.all = True
            break
        found.functions[plain] = None
        names = set[str]()
        for code in _codes(plain.__code__):
            names.update(code.co_names)
            names.update(_keywords(code))
            names.update(_operators(code.co_code))
        found.names |= names
        if follow:
            todo += _leads_to(plain, owner, names)
    return found


def _plain(value: Any) -> FunctionType | None:
    """The function behind a method, a property, a wrapper or a partial; None for none, or one of torch."""
    for _ in range(20):
        kind = type(value)
        if kind in (staticmethod, classmethod, MethodType):
            value = value.__func__
        elif kind is property:
            value = value.fget
        elif kind is FunctionType and "__wrapped__" in value.__dict__:
            value = value.__wrapped__
        elif kind.__module__ in ("functools", "torch.jit._script", "torch.jit", "torch"):
            # A partial, a cache, or a function that TorchScript compiled, which keeps the one it was made of.
            kept = getattr(value, "__dict__", {})
            value = getattr(value, "func", None) or kept.get("__wrapped__") or kept.get("_torchdynamo_inline")
        else:
            break
    if type(value) is not FunctionType or _is_torchs(value.__globals__.get("__name__")):
        return None
    return value


def _is_torchs(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in ("torch", "builtins")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _keywords(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, tuple):
            yield from (word for word in constant if isinstance(word, str))


def _leads_to(function: FunctionType, owner: type | None, names: set[str]) -> Iterator[Any]:
    scope = function.__globals__
    modules = []
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty
            continue
    for name in names:
        if name in scope:
            value = scope[name]
            if isinstance(value, ModuleType):
                modules.append(value)
            else:
                yield value
        if owner is not None:
            # Of every class in its line: the method may go on to that of the class above.
            for base in owner.__mro__:
                if name in vars(base):
                    yield vars(base)[name]
    for module in modules:
        if not _is_torchs(module.__name__):
            for name in names:
                if name in vars(module):
                    yield vars(module)[name]


def _instructions(code: bytes) -> set[bytes]:
    return {code[at : at + 2] for at in range(0, len(code), 2)}


def _of(*texts: str) -> frozenset[bytes]:
    """The instructions of operators, found by what stands in one expression and not in another."""
    other = _instructions(compile("a - b", "", "eval").co_code) | _instructions(
        compile("a -= b", "", "exec").co_code
    )
    found: set[bytes] = set()
    for text in texts:
        found |= _instructions(compile(text, "", "exec").co_code) - other
    return frozenset(found)


_SUM = _of("a + b", "a += b") - _of("a * b", "a *= b")
_PRODUCT = _of("a * b", "a *= b") - _of("a + b", "a += b")


def _operators(code: bytes) -> Iterator[str]:
    found = _instructions(code)
    if found & _SUM:
        yield "+"
    if found & _PRODUCT:
        yield "*"


assert _SUM, sys.version
assert _PRODUCT, sys.version
