"""What tells the code of a rotary position embedding, and its other spellings."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.rotary.reference import RotaryVariant

__all__ = ["core", "spellings"]


def core(code: Any) -> bool:
    """Pairs of channels of which one is negated or subtracted, and no layer called."""
    if code.size > 300 or code.layer_calls:
        return False
    return "view_as_complex" in code.ops or any(map(_pairs, code.parts))


def _pairs(part: Any) -> bool:
    if part.op not in ("cat", "stack") or part.args[0].op != "tuple":
        return False
    items = part.args[0].args
    return len(items) in (2, 4) and any(item.op in ("neg", "sub") for item in items)


def spellings(variant: RotaryVariant) -> tuple[dict[str, Any], ...]:
    """Arguments of the definition that change how it is written, not its result."""
    if variant.tables in ("full", "half"):
        return ({"slice_last": False},)
    return ({"slice_last": False}, {"slice_last": True})
