"""Residual add and norm in one: ``h = residual + x``, ``y = norm(h)``; both are needed afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle.ops.layer_norm.reference import LayerNormVariant, layer_norm
from twinkle.ops.rms_norm.reference import RMSNormVariant, rms_norm

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ResidualNormVariant", "residual_norm"]


@dataclass(frozen=True)
class ResidualNormVariant:
    """Which norm follows the sum.

    Attributes:
        name: The op and the variant of the norm.
        norm: The variant of the norm.
        scaled: The addend is multiplied by a number first.
    """

    name: str
    norm: RMSNormVariant | LayerNormVariant
    scaled: bool = False


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    variant: ResidualNormVariant,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition.

    Args:
        x: ``[..., hidden]``, what a sublayer returned.
        residual: ``[..., hidden]``.
        weight: ``[hidden]`` or None, of the norm.
        eps: Of the norm.
        variant: Which norm.
        bias: ``[hidden]`` or None, of a layer norm.
        scale: Of a scaled variant.

    Returns:
        The sum and the normalised sum.
    """
    h = residual + (x * scale if variant.scaled else x)
    if isinstance(variant.norm, LayerNormVariant):
        return h, layer_norm(h, weight, bias, eps, variant=variant.norm, normalized_shape=(h.shape[-1],))
    return h, rms_norm(h, weight, eps, variant=variant.norm, normalized_shape=(h.shape[-1],))
