"""Expressions as a graph of shared, canonical terms.

A :class:`Term` is an operation and its arguments. Within one :class:`Arena` two equal terms are the
same object, so a sub-expression that the source writes twice is one node of the graph and
comparing two terms is comparing two pointers.
"""

from __future__ import annotations

from typing import Any

__all__ = ["COMMUTATIVE", "Arena", "Ref", "Term", "show", "walk"]

# Exactly commutative in floating point. Neither is associative: grouping is part of the rounding.
COMMUTATIVE = frozenset({"add", "mul", "eq", "maximum", "minimum"})


class Ref:
    """A Python object inside a term, compared by identity."""

    __slots__ = ("name", "value")

    def __init__(self, value: Any, called: str | None = None) -> None:
        self.value = value
        name = called or getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
        self.name = str(name or type(value).__name__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return self.name


class Term:
    """One operation. Made by :meth:`Arena.term` only.

    Attributes:
        op: The name of the operation; ``const``, ``input``, ``self``, ``attr``, ``hole``, ``py`` and
            ``dtype`` are leaves.
        args: Terms, and for leaves plain values.
    """

    __slots__ = ("args", "op")

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op = op
        self.args = args

    def __repr__(self) -> str:
        return show(self)


def _key(value: Any) -> Any:
    if isinstance(value, Term):
        return id(value)
    if isinstance(value, tuple):
        return tuple(_key(item) for item in value)
    # True == 1 == 1.0 for a dict, and three different constants here.
    return (type(value), value)


class Arena:
    """The terms of one function (or of all templates)."""

    def __init__(self) -> None:
        self._terms: dict[Any, Term] = {}

    def term(self, op: str, *args: Any) -> Term:
        """The one term with that operation and those arguments."""
        key = (op, tuple(_key(arg) for arg in args))
        found = self._terms.get(key)
        if found is None:
            found = self._terms[key] = Term(op, args)
        return found

    def const(self, value: Any) -> Term:
        """A constant; 2.0 and 2 are one, as torch computes the same with either."""
        if type(value) is float and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        return self.term("const", value)


def walk(term: Term) -> list[Term]:
    """Every distinct term below ``term`` and itself, parents first."""
    seen: dict[int, Term] = {}
    stack: list[Any] = [term]
    while stack:
        item = stack.pop()
        if isinstance(item, tuple):
            stack.extend(reversed(item))
        elif isinstance(item, Term) and id(item) not in seen:
            seen[id(item)] = item
            stack.extend(reversed(item.args))
    return list(seen.values())


_INFIX = {"add": "+", "mul": "*", "sub": "-", "div": "/", "floordiv": "//", "matmul": "@", "mod": "%"}


def show(value: Any, depth: int = 7) -> str:
    """A term as a line close to the source it came from; deep parts are left out as ``…``."""
    if isinstance(value, tuple):
        return "(" + ", ".join(show(item, depth) for item in value) + ")"
    if not isinstance(value, Term):
        return repr(value)
    op, args = value.op, value.args
    if op in ("input", "hole"):
        return str(args[0])
    if op == "const":
        return "..." if args[0] is Ellipsis else repr(args[0])
    if op == "self":
        return "self"
    if op == "dtype":
        return f"torch.{args[0]}"
    if op == "py":
        return repr(args[0])
    if op == "attr":
        return f"{show(args[0], depth)}.{args[1]}"
    if depth <= 0:
        return "…"
    if op in _INFIX and len(args) == 2:
        return f"({show(args[0], depth - 1)} {_INFIX[op]} {show(args[1], depth - 1)})"
    if op == "tuple":
        return "(" + ", ".join(show(arg, depth - 1) for arg in args) + ")"
    if op == "index":
        return f"{show(args[0], depth - 1)}[{_show_index(args[1], depth - 1)}]"
    if op == "call":
        given = [show(arg, depth - 1) for arg in args[1]]
        given += [f"{name}={show(arg, depth - 1)}" for name, arg in args[2]]
        return f"{show(args[0], depth)}({', '.join(given)})"
    if op == "dtype_of":
        return f"{show(args[0], depth - 1)}.dtype"
    given = [show(arg, depth - 1) for arg in args if not (isinstance(arg, Term) and arg.args == (None,))]
    return f"{op}({', '.join(given)})"


def _show_index(index: Any, depth: int) -> str:
    if isinstance(index, Term) and index.op == "tuple":
        return ", ".join(_show_index(item, depth) for item in index.args)
    if isinstance(index, Term) and index.op == "slice":
        parts = ["" if part.args == (None,) else show(part, depth) for part in index.args]
        return f"{parts[0]}:{parts[1]}" + (f":{parts[2]}" if parts[2] else "")
    return show(index, depth)
