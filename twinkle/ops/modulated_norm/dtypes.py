"""The dtypes that an adaptive norm rounds to on its way."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from twinkle.ops.rms_norm.dtypes import roundings
from twinkle.ops.rms_norm.reference import RMSNormVariant

if TYPE_CHECKING:
    from twinkle.ops.modulated_norm.reference import ModulatedNormVariant

__all__ = ["dtypes_of"]


@functools.lru_cache(maxsize=256)
def dtypes_of(
    variant: ModulatedNormVariant,
    x: torch.dtype,
    weight: torch.dtype | None,
    scale: torch.dtype,
    shift: torch.dtype | None,
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The dtypes of the norm's result, of its product with ``1 + scale``, and of the sum with the shift."""
    normed = torch.float32 if variant.upcast else x
    if isinstance(variant.norm, RMSNormVariant):
        normed = roundings(variant.norm, normed, weight)[3]
    product = torch.promote_types(torch.float32 if variant.widened else normed, scale)
    return normed, product, product if shift is None else torch.promote_types(product, shift)
