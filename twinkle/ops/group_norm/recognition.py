"""What tells the code of a GroupNorm, and what its instances may leave out."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.group_norm.reference import GroupNormVariant

__all__ = ["core", "may_be_none"]


def core(code: Any) -> bool:
    """Torch's own ``group_norm``, and little else."""
    found: bool = code.size < 30 and ("group_norm" in code.ops or "call" in code.ops) and not code.layer_calls
    return found


def may_be_none(variant: GroupNormVariant) -> tuple[str, ...]:
    """The roles whose attribute may hold None."""
    return ("weight", "bias")
