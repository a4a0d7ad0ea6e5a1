"""The gated MLP that the embedded kernels export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from twinkle.ops.backends import function_for, layer_for
from twinkle.ops.gated_mlp.activation import gated_activation
from twinkle.ops.gated_mlp.triton_backend import gated_mlp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    from twinkle.ops.gated_mlp.reference import GatedMLPVariant

__all__ = ["GatedMLP", "GatedProduct"]


class GatedMLP(nn.Module):
    """For layers with ``gate_proj``, ``up_proj``, ``down_proj`` and a silu, as Llama's."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to the same."""
        return gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj, "silu")

    @staticmethod
    def for_variant(variant: GatedMLPVariant, facts: Mapping[str, Any]) -> type[nn.Module] | str | None:
        """The layer for another variant and other names, or why there is none."""
        return layer_for("gated_mlp", variant, facts)


class GatedProduct(nn.Module):
    """``activation(gate) · up`` as a kernel for any function that is that: see `for_variant`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """``[..., intermediate]`` to the same."""
        return gated_activation(gate, up)

    @staticmethod
    def for_variant(
        variant: GatedMLPVariant, facts: Mapping[str, Any], original: Callable[..., Any]
    ) -> Callable[..., Any] | None:
        """The function for another variant with the arguments of ``original``; None where there is none."""
        return function_for("gated_mlp", variant, facts, original)
