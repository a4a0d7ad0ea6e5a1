"""The rotary position embedding that the embedded kernels export, as a function and as a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from twinkle.ops import backends
from twinkle.ops.rotary.triton_backend import rotary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    from twinkle.ops.rotary.reference import RotaryVariant

__all__ = ["ApplyRotaryPosEmb", "apply_rotary_pos_emb"]


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, ...]:
    """The function of most models: half-split pairs, full tables; see ``triton_backend.rotary``."""
    return rotary(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]


class ApplyRotaryPosEmb(nn.Module):
    """`apply_rotary_pos_emb` as a kernel for any function that rotates: see `for_variant`."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, ...]:
        """As the function."""
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    @staticmethod
    def for_variant(
        variant: RotaryVariant, facts: Mapping[str, Any], original: Callable[..., Any]
    ) -> Callable[..., Any] | None:
        """The function for another variant with the arguments of ``original``; None where there is none."""
        return backends.function_for("rotary", variant, facts, original)
