"""The LayerNorm that the embedded kernels export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from twinkle.ops.backends import function_for, layer_for
from twinkle.ops.layer_norm.reference import VARIANTS, LayerNormVariant
from twinkle.ops.layer_norm.triton_backend import layer_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["LayerNorm", "LayerNormFunction"]

_FUSED = next(variant for variant in VARIANTS if variant.name == "fused")


class LayerNorm(nn.Module):
    """For ``torch.nn.LayerNorm``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        """``[..., hidden]`` to the same."""
        return layer_norm(
            input, self.weight, self.bias, self.eps, variant=_FUSED, normalized_shape=self.normalized_shape
        )

    @staticmethod
    def for_variant(variant: LayerNormVariant, facts: Mapping[str, Any]) -> type[nn.Module] | str | None:
        """The layer for another variant and other names, or why there is none."""
        return layer_for("layer_norm", variant, facts)


class LayerNormFunction(nn.Module):
    """A LayerNorm as a kernel for any function that is one: see `for_variant`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """``[..., hidden]`` to the same."""
        return layer_norm(x, weight, bias, eps, variant=_FUSED)

    @staticmethod
    def for_variant(
        variant: LayerNormVariant, facts: Mapping[str, Any], original: Callable[..., Any]
    ) -> Callable[..., Any] | None:
        """The function for another variant with the arguments of ``original``; None where there is none."""
        return function_for("layer_norm", variant, facts, original)
