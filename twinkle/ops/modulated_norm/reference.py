"""Adaptive norm: ``norm(x) · (1 + scale) + shift``; scale and shift are made of a condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinkle.ops.layer_norm.reference import LayerNormVariant, layer_norm
from twinkle.ops.rms_norm.reference import RMSNormVariant, rms_norm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ModulatedNormVariant", "modulated_norm"]


@dataclass(frozen=True)
class ModulatedNormVariant:
    """Which norm is modulated, and where it becomes float32.

    Attributes:
        name: The op and the variant of the norm, and ``upcast`` or ``widened``.
        norm: The variant of the norm.
        upcast: The norm is given its input in float32.
        widened: Its result is cast to float32.
    """

    name: str
    norm: RMSNormVariant | LayerNormVariant
    upcast: bool = False
    widened: bool = False


def modulated_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor | None,
    *,
    variant: ModulatedNormVariant,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition.

    Args:
        x: ``[..., hidden]``.
        weight: ``[hidden]`` or None, of the norm.
        eps: Of the norm.
        scale: Broadcast to ``x``, such as ``[batch, 1, hidden]`` or ``[batch, tokens, hidden]``.
        shift: As ``scale``, or None.
        variant: Which norm.
        bias: ``[hidden]`` or None, of a layer norm.
        dtype: What the result is cast to; None leaves it in the dtype that torch promotes to.

    Returns:
        ``[..., hidden]``.
    """
    h = x.float() if variant.upcast else x
    if isinstance(variant.norm, LayerNormVariant):
        n = layer_norm(h, weight, bias, eps, variant=variant.norm, normalized_shape=(h.shape[-1],))
    else:
        with_weight = weight is not None
        n = rms_norm(
            h, weight, eps, variant=variant.norm, normalized_shape=(h.shape[-1],), with_weight=with_weight
        )
    if variant.widened:
        n = n.float()
    y = n * (1 + scale)
    if shift is not None:
        y = y + shift
    return y if dtype is None else y.to(dtype)
