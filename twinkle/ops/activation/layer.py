"""The activation that the embedded kernels export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from twinkle.ops.activation.reference import VARIANTS
from twinkle.ops.activation.triton_backend import activation
from twinkle.ops.backends import function_for, layer_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    from twinkle.ops.activation.reference import ActivationVariant

__all__ = ["Activation", "ActivationFunction"]


class Activation(nn.Module):
    """For a GELU that is written out with ``tanh`` and a third power."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return activation(input, variant=VARIANTS[0])

    @staticmethod
    def for_variant(variant: ActivationVariant, facts: Mapping[str, Any]) -> type[nn.Module] | str | None:
        """The layer for another variant."""
        return layer_for("activation", variant, facts)


class ActivationFunction(nn.Module):
    """An activation as a kernel for any function that writes one out: see `for_variant`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return activation(x, variant=VARIANTS[0])

    @staticmethod
    def for_variant(
        variant: ActivationVariant, facts: Mapping[str, Any], original: Callable[..., Any]
    ) -> Callable[..., Any] | None:
        """The function for another variant with the arguments of ``original``; None where there is none."""
        return function_for("activation", variant, facts, original)
