"""The dtypes that a variant of RMSNorm rounds to on its way."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from twinkle.ops.rms_norm.reference import RMSNormVariant

__all__ = ["result_dtype", "roundings"]


@functools.lru_cache(maxsize=256)
def roundings(
    variant: RMSNormVariant, x: torch.dtype, w: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
    """The dtypes of the normalised row, of ``1 + w``, of their product and of the result."""
    inside = variant.weight_place == "fused"
    normal = x if variant.compute in ("statistics", "input") else torch.float32
    if variant.cast == "before_weight" and not inside:
        normal = x
    if variant.cast == "half_weight" and w in (torch.float16, torch.bfloat16):
        normal = w
    scale = torch.float32
    product = normal
    if w is not None and variant.weight != "none":
        if variant.weight_cast != "float32":
            scale = w
        if not inside:
            product = torch.promote_types(normal, w if variant.weight_cast == "none" else torch.float32)
    once = variant.cast == "after_weight" or inside or (w is None and variant.nullable == "cast")
    out = x if once else product
    return normal, scale, product, out


def result_dtype(x: Tensor, weight: Tensor | None, variant: RMSNormVariant) -> torch.dtype:
    """The dtype of the result."""
    return roundings(variant, x.dtype, None if weight is None else weight.dtype)[3]
