"""The GroupNorm that the embedded kernels export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from twinkle.ops.backends import layer_for
from twinkle.ops.group_norm.reference import VARIANTS
from twinkle.ops.group_norm.triton_backend import group_norm

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor

    from twinkle.ops.group_norm.reference import GroupNormVariant

__all__ = ["GroupNorm"]

_PLAIN = next(variant for variant in VARIANTS if variant.name == "plain")


class GroupNorm(nn.Module):
    """For ``torch.nn.GroupNorm``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        """``[samples, channels, ...]`` to the same."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, variant=_PLAIN)

    @staticmethod
    def for_variant(variant: GroupNormVariant, facts: Mapping[str, Any]) -> type[nn.Module] | str | None:
        """The layer for another variant and other names, or why there is none."""
        return layer_for("group_norm", variant, facts)
