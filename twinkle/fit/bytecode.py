"""Which attributes of ``self`` a function reads, from its bytecode (the source may be gone)."""

from __future__ import annotations

import dis
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Reads", "function_of_member", "reads_of", "stored_names"]

_MAY_BE_ABSENT = ("hasattr", "getattr")


class Reads:
    """The attributes of ``self`` that one or several functions read and assign.

    Attributes:
        needed: Names read as ``self.name``.
        stored: Names assigned as ``self.name = …``.
        optional: Names read by ``getattr(self, "name", …)`` or ``hasattr``: they may be absent.
    """

    __slots__ = ("needed", "optional", "stored")

    def __init__(self) -> None:
        self.needed: set[str] = set()
        self.stored: set[str] = set()
        self.optional: set[str] = set()

    def add(self, other: Reads) -> None:
        """Add the attributes that another function reads and assigns."""
        self.needed |= other.needed
        self.stored |= other.stored
        self.optional |= other.optional


def function_of_member(member: object) -> FunctionType | None:
    """The function behind a member of a class, without its decorators; ``None`` where none gets ``self``.

    That is the getter of a property, and what ``__wrapped__`` leads to.
    """
    if isinstance(member, property):
        member = member.fget
    seen = 0
    while callable(wrapped := getattr(member, "__wrapped__", None)) and seen < 20:
        member, seen = wrapped, seen + 1
    return member if isinstance(member, FunctionType) else None


def reads_of(function: Callable[..., object] | FunctionType) -> Reads:
    """The attributes of its first argument that a function reads and assigns."""
    result = Reads()
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType) or code.co_argcount == 0:
        return result
    _scan(code, code.co_varnames[0], result)
    return result


def stored_names(function: FunctionType) -> set[str]:
    """Names a constructor gives to ``self``, by assignment or by a ``register_*`` call."""
    found = reads_of(function).stored
    for code in _nested(function.__code__):
        if {"register_buffer", "register_parameter", "add_module", "register_module", "setattr"} & set(
            code.co_names
        ):
            found |= {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    return found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _scan(code: CodeType, name: str, result: Reads) -> None:
    # An `except AttributeError` says that absence was thought of; nothing here is then a demand.
    lenient = "AttributeError" in code.co_names
    before: list[dis.Instruction] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in _NOISE:
            continue
        previous = before[-1] if before else None
        if previous is not None and _leaves_on_top(previous, name):
            if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                (result.optional if lenient else result.needed).add(instruction.argval)
            elif instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
                result.stored.add(instruction.argval)
            elif (
                instruction.opname == "LOAD_CONST"
                and isinstance(instruction.argval, str)
                and len(before) > 1
                and before[-2].opname in ("LOAD_GLOBAL", "LOAD_NAME")
                and before[-2].argval in _MAY_BE_ABSENT
            ):
                result.optional.add(instruction.argval)
        before = [*before[-1:], instruction]
    for constant in code.co_consts:
        # A nested function or a comprehension that closes over the same variable.
        if isinstance(constant, CodeType) and name in constant.co_freevars:
            _scan(constant, name, result)


_NOISE = ("CACHE", "PRECALL", "PUSH_NULL", "NOP", "EXTENDED_ARG", "RESUME", "COPY_FREE_VARS")
_LOADS = ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_CLASSDEREF")


def _leaves_on_top(instruction: dis.Instruction, name: str) -> bool:
    if instruction.opname in _LOADS:
        return bool(instruction.argval == name)
    # Python 3.13 loads two variables at once; the second is on top of the stack.
    if instruction.opname.startswith(
        ("LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST", "STORE_FAST_LOAD_FAST")
    ):
        return isinstance(instruction.argval, tuple) and instruction.argval[-1] == name
    return False
