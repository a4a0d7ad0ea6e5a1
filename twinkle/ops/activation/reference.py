"""Elementwise activations as programs write them out, each operator of torch with a rounding of its own.

An activation that torch has a function for (`F.gelu`, `F.silu`) is one kernel already and no variant here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VARIANTS", "ActivationVariant", "activation"]


@dataclass(frozen=True)
class ActivationVariant:
    """Which activation, and how it is written.

    Attributes:
        name: A short name: that of the kernel.
    """

    name: str


def activation(x: Tensor, *, variant: ActivationVariant, root: float | None = None) -> Tensor:
    """The definition.

    Args:
        x: Of any shape.
        variant: Which one.
        root: The root of 2 / pi, where it is written as a number.

    Returns:
        Of the shape and dtype of ``x``.
    """
    if variant.name == "gelu_tanh_cubed":
        factor = math.sqrt(2.0 / math.pi) if root is None else root
        inner = factor * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))
    if variant.name == "gelu_tanh_factored":
        return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
    if variant.name == "gelu_erf":
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    if variant.name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return torch.square(torch.relu(x))


VARIANTS = (
    ActivationVariant("gelu_tanh_cubed"),
    ActivationVariant("quick_gelu"),
    ActivationVariant("gelu_tanh_factored"),
    ActivationVariant("gelu_erf"),
    ActivationVariant("relu2"),
)
"""Every variant that is recognised."""
