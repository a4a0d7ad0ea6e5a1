"""The Python text of a term that only reads, moves and combines what a call is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from twinkle.match.symbolic.terms import Term
from twinkle.match.symbolic.torch_signatures import BOUND

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EINOPS_MODULE", "TORCH", "text_of"]

TORCH, EINOPS_MODULE = "_tw_torch", "_tw_einops"
"""The names of torch and of einops in the text."""
_METHODS = frozenset(
    {
        "abs",
        "chunk",
        "clamp",
        "cos",
        "exp",
        "flatten",
        "repeat_interleave",
        "sin",
        "split",
        "squeeze",
        "tensor_split",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
    }
)
_SHAPED = frozenset({"reshape", "permute", "expand", "repeat"})
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "eq": "==", "lt": "<"}
_BUILTINS = {
    enumerate: "enumerate",
    len: "len",
    range: "range",
    int: "int",
    isinstance: "isinstance",
    torch.Tensor: f"{TORCH}.Tensor",
}


class _NoText(Exception):
    pass


def text_of(term: Term) -> str | None:
    """An expression over the parameters (``self`` is one of them) that computes a term as the code does.

    Returns:
        The text, or None where the term holds something that is not known to be free of effects.
    """
    try:
        return _text(term)
    except _NoText:
        return None


def _text(term: Any) -> str:
    if not isinstance(term, Term):
        raise _NoText
    writer = _WRITERS.get(term.op)
    if writer is not None:
        return writer(term)
    args = term.args
    if term.op in _INFIX:
        return f"({_text(args[0])} {_INFIX[term.op]} {_text(args[1])})"
    if term.op in _SHAPED and len(args) == 2:
        return f"{_text(args[0])}.{term.op}({_text(args[1])})"
    if term.op in _METHODS and len(args) == 1 + len(BOUND[term.op]):
        given = ", ".join(map(_text, args[1:]))
        return f"{_text(args[0])}.{term.op}({given})"
    if term.op == "ones_like" and len(args) == 3:
        dtype, device = map(_text, args[1:])
        return f"{TORCH}.ones_like({_text(args[0])}, dtype={dtype}, device={device})"
    if term.op in ("cat", "complex", "polar", "stack") and len(args) == 2:
        return f"{TORCH}.{term.op}({_text(args[0])}, {_text(args[1])})"
    raise _NoText


def _input(term: Term) -> str:
    return str(term.args[0])


def _const(term: Term) -> str:
    value = term.args[0]
    if value is not None and not isinstance(value, bool | int | float | str):
        raise _NoText
    return f"float({str(value)!r})" if isinstance(value, float) else repr(value)


def _py(term: Term) -> str:
    value = term.args[0].value
    name = _BUILTINS.get(value) if isinstance(value, type) or callable(value) else None
    if name is None:
        raise _NoText
    return name


def _attr(term: Term) -> str:
    return f"{_text(term.args[0])}.{term.args[1]}"


def _tuple(term: Term) -> str:
    return "(" + "".join(f"{_text(item)}, " for item in term.args) + ")"


def _list(term: Term) -> str:
    return "[" + ", ".join(map(_text, term.args)) + "]"


def _index(term: Term) -> str:
    index = term.args[1]
    if index.op == "tuple":
        inside = "".join(f"{_slice(item)}, " for item in index.args)
        return f"{_text(term.args[0])}[{inside.rstrip()}]"
    return f"{_text(term.args[0])}[{_slice(index)}]"


def _slice(item: Term) -> str:
    if item.op == "const" and item.args[0] is Ellipsis:
        return "..."
    if item.op != "slice":
        return _text(item)
    start, stop, step = ("" if part.args == (None,) else _text(part) for part in item.args)
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _call(term: Term) -> str:
    callee, args, named = term.args
    if callee.op != "py" or named:
        raise _NoText
    return f"{_text(callee)}({', '.join(map(_text, args))})"


def _of_einops(term: Term) -> str:
    name, x, pattern, sizes = term.args
    named = "".join(f", {axis}={_text(size)}" for axis, size in sizes)
    return f"{EINOPS_MODULE}.{name}({_text(x)}, {_text(pattern)}{named})"


def _comprehension(term: Term) -> str:
    over, item = term.args
    levels = [part.args[0] for part in _each(item) if part.args[1] is over]
    if not levels:
        raise _NoText
    return f"[{_text(item)} for {_name(levels[0])} in {_text(over)}]"


def _each(value: Any) -> list[Term]:
    if isinstance(value, tuple):
        return [found for item in value for found in _each(item)]
    if not isinstance(value, Term):
        return []
    return [value] if value.op == "each" else _each(value.args)


def _name(level: int) -> str:
    return f"_tw_each{level}"


_WRITERS: dict[str, Callable[[Term], str]] = {
    "input": _input,
    "self": lambda term: "self",
    "const": _const,
    "py": _py,
    "attr": _attr,
    "dtype": lambda term: f"{TORCH}.{term.args[0]}",
    "tuple": _tuple,
    "list": _list,
    "star": lambda term: f"*{_text(term.args[0])}",
    "index": _index,
    "shape": lambda term: f"{_text(term.args[0])}.shape",
    "dtype_of": lambda term: f"{_text(term.args[0])}.dtype",
    "ndim": lambda term: f"{_text(term.args[0])}.ndim",
    "to": lambda term: f"{_text(term.args[0])}.to({_text(term.args[1])})",
    "call": _call,
    "einops": _of_einops,
    "comprehension": _comprehension,
    "each": lambda term: _name(term.args[0]),
    "if": lambda term: f"({_text(term.args[1])} if {_text(term.args[0])} else {_text(term.args[2])})",
    "or": lambda term: "(" + " or ".join(map(_text, term.args)) + ")",
    "and": lambda term: "(" + " and ".join(map(_text, term.args)) + ")",
    "neg": lambda term: f"(-{_text(term.args[0])})",  # of a tensor or of a number
    "not": lambda term: f"(not {_text(term.args[0])})",
    "is": lambda term: f"({_text(term.args[0])} is {_text(term.args[1])})",
}
