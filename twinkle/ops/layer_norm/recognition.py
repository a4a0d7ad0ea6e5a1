"""What tells the code of a LayerNorm, and what its instances may leave out."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.layer_norm.reference import LayerNormVariant

__all__ = ["core", "may_be_none"]


def core(code: Any) -> bool:
    """A root of the mean of squares of what a mean was subtracted from; or torch's own ``layer_norm``."""
    found: bool = code.centred
    return found


def may_be_none(variant: LayerNormVariant) -> tuple[str, ...]:
    """The roles whose attribute may hold None."""
    tensors = ("weight", "bias") if variant.written == "fused" else ()
    return (*tensors, "eps") if variant.name == "fused" else tensors
