"""What tells the code of a LayerNorm, and what its instances may leave out."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.ops.layer_norm.reference import LayerNormVariant

__all__ = ["core", "may_be_none", "spellings"]


def core(code: Any) -> bool:
    """A root of the mean of squares of what a mean was subtracted from; or torch's own ``layer_norm``."""
    found: bool = code.centred
    return found


def spellings(variant: LayerNormVariant) -> tuple[dict[str, Any], ...]:
    """The normalised shape is not there where it is that of the input's last dimension."""
    return ({}, {"normalized_shape": None}) if variant.written == "fused" else ({},)


def may_be_none(variant: LayerNormVariant) -> tuple[str, ...]:
    """The roles whose attribute may hold None."""
    given = variant.written == "fused" and variant.affine_place == "fused"
    if not given or (variant.weight_cast and not variant.nullable):
        return ()
    if variant.one_plus:
        return ("bias",)
    return ("weight", "bias", "eps") if variant.name == "fused" else ("weight", "bias")
