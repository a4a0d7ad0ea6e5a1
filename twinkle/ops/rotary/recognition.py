"""What tells the code of a rotary position embedding, and its other spellings."""

from __future__ import annotations

from twinkle.ops.rotary.canonical import canonical

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.rotary.reference import RotaryVariant

__all__ = ["alike", "by_form", "canonical", "core", "possible", "possible_form", "spellings"]


def core(code: Any) -> bool:
    """Pairs of channels of which one is negated or subtracted, and no layer called."""
    if code.size > 300 or code.layer_calls:
        return False
    return "view_as_complex" in code.ops or any(map(_pairs, code.parts))


def _pairs(part: Any) -> bool:
    if part.op == "reshape" and part.args[1].op == "tuple":
        return [size.args for size in part.args[1].args[-3:]] == [(-1,), (1,), (2,)]
    if part.op == "setitem":
        return _has_sign(part.args[2])
    if part.op not in ("cat", "stack") or part.args[0].op != "tuple":
        return False
    items = part.args[0].args
    return len(items) in (2, 4) and any(map(_has_sign, items))


def _has_sign(term: Any) -> bool:
    while term.op == "to":
        term = term.args[0]
    if term.op == "add":
        return any(part.op in ("neg", "mul") and _negated(part) for part in term.args)
    return term.op in ("neg", "sub")


def _negated(term: Any) -> bool:
    return term.op == "neg" or any(factor.op == "neg" for factor in term.args)


def by_form(variant: RotaryVariant) -> bool:
    """Whether a variant is recognised by its canonical form: its tables are what any code makes of them."""
    return variant.broadcast == "given"


def possible_form(variant: RotaryVariant, parts: Any) -> bool:
    """Whether a canonical form with these parts can be a variant: it is cheaper to ask than to compare."""
    names = {part.op for part in parts}
    if (variant.pairs == "complex") is not ("view_as_complex" in names):
        return False
    if (variant.part == "first") is not ("partly" in names):
        return False
    if (variant.compute != "input" or variant.cast != "none") and "to" not in names:
        return False
    if variant.pairs in ("complex", "matrix"):
        return variant.pairs == "complex" or "join" not in names
    # With a table of an entry a channel, a rotated copy is joined and then multiplied.
    joined = [part for part in parts if part.op == "join"]
    full = any(item.op == "neg" or item.op == "part" for part in joined for item in part.args[1:])
    kind = "half" if variant.pairs == "half" else "pair"
    return full is (variant.tables == "full") and any(part.args[0] == kind for part in joined)


def possible(variant: RotaryVariant, operations: Any) -> bool:
    """Whether code with these operations can be a variant: it is cheaper to ask than to compare."""
    needed = {
        "view_as_complex": variant.pairs == "complex",
        "comprehension": variant.sections,
        "repeat_interleave": variant.tables in ("repeated", "first_half_repeated"),
        "sum": variant.pairs == "matrix",
        "to": variant.compute != "input" or variant.cast != "none",
    }
    return not any(wanted and operation not in operations for operation, wanted in needed.items())


def alike() -> tuple[str, ...]:
    """The tensors that are turned."""
    return ("q", "k", "v")


def spellings(variant: RotaryVariant) -> tuple[dict[str, Any], ...]:
    """Arguments of the definition that change how it is written, not its result."""
    if variant.tables in ("full", "half"):
        return ({"slice_last": False},)
    return ({"slice_last": False}, {"slice_last": True})
