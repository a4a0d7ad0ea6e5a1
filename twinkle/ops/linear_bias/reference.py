"""A linear layer, as torch computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VARIANTS", "LinearVariant", "linear_bias"]


@dataclass(frozen=True)
class LinearVariant:
    """How the layer is written.

    Attributes:
        name: The function of torch that it calls.
    """

    name: str


def linear_bias(x: Tensor, weight: Tensor, bias: Tensor, *, variant: LinearVariant) -> Tensor:
    """The definition.

    Args:
        x: ``[..., inputs]``; ``[rows, inputs]`` for ``addmm``.
        weight: ``[outputs, inputs]``; ``[inputs, outputs]`` for ``addmm``.
        bias: ``[outputs]``.
        variant: How it is written.

    Returns:
        ``[..., outputs]``.
    """
    if variant.name == "addmm":
        return torch.addmm(bias, x, weight)
    return F.linear(x, weight, bias)


VARIANTS = (LinearVariant("linear"), LinearVariant("addmm"))
"""Both: ``nn.Linear`` calls the first, ``Conv1D`` of transformers the second."""
