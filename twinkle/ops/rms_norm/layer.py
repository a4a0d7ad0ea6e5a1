"""The RMSNorm layers that the embedded kernels export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from twinkle.ops.backends import function_for, layer_for
from twinkle.ops.rms_norm.reference import VARIANTS, RMSNormVariant
from twinkle.ops.rms_norm.triton_backend import rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

__all__ = ["GemmaRMSNorm", "RMSNorm", "RMSNormFunction"]

_VARIANTS = {variant.name: variant for variant in VARIANTS}
_LLAMA, _GEMMA = _VARIANTS["llama"], _VARIANTS["gemma"]


class RMSNorm(nn.Module):
    """For layers that call their weight ``weight`` and their eps ``variance_epsilon``, as Llama's."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., hidden]`` to the same."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, variant=_LLAMA)

    @staticmethod
    def for_variant(variant: RMSNormVariant, facts: Mapping[str, Any]) -> type[nn.Module] | str | None:
        """The layer for another variant and other names, or None where there is no kernel for it."""
        return layer_for("rms_norm", variant, facts)


class GemmaRMSNorm(nn.Module):
    """``1 + w`` in float32, rounded at the end; eps is called ``eps``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to the same."""
        return rms_norm(x, self.weight, self.eps, variant=_GEMMA)


class RMSNormFunction(nn.Module):
    """An RMSNorm as a kernel for any function that is one: see `for_variant`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``[..., hidden]`` to the same."""
        return rms_norm(x, weight, eps, variant=_LLAMA)

    @staticmethod
    def for_variant(
        variant: RMSNormVariant, facts: Mapping[str, Any], original: Callable[..., Any]
    ) -> Callable[..., Any] | None:
        """The function for another variant with the arguments of ``original``; None where there is none."""
        return function_for("rms_norm", variant, facts, original)
