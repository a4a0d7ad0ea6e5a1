"""Sample calls of RMSNorm kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.ops.cases import SHAPES, Case, Instance, implementation, random, seeded, strided
from twinkle.ops.rms_norm import reference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

    from twinkle.ops.rms_norm.reference import RMSNormVariant

__all__ = ["cases", "inputs", "variants"]

_UNKNOWN_WIDTH = 128


def variants() -> tuple[RMSNormVariant, ...]:
    """Every variant of the definition."""
    return reference.VARIANTS


def inputs(instance: Instance) -> dict[str, Any] | None:
    """``x`` for a norm: as wide as its weight, or as it says."""
    weight, shape = instance.part("weight"), instance.part("normalized_shape") or (_UNKNOWN_WIDTH,)
    width = weight.shape[-1] if isinstance(weight, torch.Tensor) else shape[-1]
    return {"x": instance.tokens(width, scale=3)}


class Norm(nn.Module):
    """A norm by its definition."""

    def __init__(self, variant: RMSNormVariant, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.variant = variant
        self.normalized_shape = (width,)
        if variant.weight != "none":
            self.weight = nn.Parameter(torch.rand(width, device=device).add_(0.5).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        weight = getattr(self, "weight", None)
        return reference.rms_norm(
            x, weight, 1e-6, variant=self.variant, normalized_shape=self.normalized_shape
        )


def cases(
    variant: RMSNormVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, and a weight in float32 beside inputs in half precision."""
    facts: dict[str, Any] = {"x": "x", "eps": 1e-6}
    if variant.weight != "none":
        facts["weight"] = "weight"
    if variant.compute in ("fused", "fused_float32"):
        facts["normalized_shape"] = "normalized_shape"
    kernel: Any = implementation("rms_norm", backend).layer_class(variant, facts).forward
    generator = seeded(device)
    shapes = dict(SHAPES)
    if dtype != torch.float32 and variant.weight != "none" and variant.compute != "fused":
        shapes["float32 weight"] = SHAPES["plain"]
    for shape, (lead, width) in shapes.items():
        kept = torch.float32 if shape == "float32 weight" else dtype
        module = Norm(variant, width, kept, device)
        x = random((*lead, width), dtype, generator, scale=3)
        args = (strided(x) if shape == "strided" else x,)
        yield Case(shape, Norm.forward, kernel, args, module, facts)
