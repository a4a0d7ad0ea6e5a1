"""GroupNorm and the activation that is its next step: ``act((x - mean) / sqrt(var + eps) · w + b)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from typing import Literal

    from torch import Tensor

__all__ = ["VARIANTS", "GroupNormVariant", "group_norm"]


@dataclass(frozen=True)
class GroupNormVariant:
    """What follows the norm.

    Attributes:
        name: A short name.
        activation: ``silu``; ``swish``: `h * torch.sigmoid(h)`, which rounds the sigmoid; or ``none``.
    """

    name: str
    activation: Literal["silu", "swish", "none"] = "none"


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    variant: GroupNormVariant,
) -> Tensor:
    """The definition.

    Args:
        x: ``[samples, channels, ...]``.
        groups: Of channels.
        weight: ``[channels]`` or None.
        bias: ``[channels]`` or None.
        eps: Added to the variance.
        variant: What follows.

    Returns:
        As ``x``.
    """
    h = F.group_norm(x, groups, weight, bias, eps)
    if variant.activation == "swish":
        return h * torch.sigmoid(h)
    return F.silu(h) if variant.activation == "silu" else h


VARIANTS = (GroupNormVariant("silu", "silu"), GroupNormVariant("swish", "swish"), GroupNormVariant("plain"))
"""Every variant."""
