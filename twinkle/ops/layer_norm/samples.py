"""Sample calls of LayerNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.ops.cases import SHAPES, Case, Instance, implementation, random, seeded, strided
from twinkle.ops.layer_norm import reference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

    from twinkle.ops.layer_norm.reference import LayerNormVariant

__all__ = ["cases", "inputs", "variants"]

_UNKNOWN_WIDTH = 128


def variants() -> tuple[LayerNormVariant, ...]:
    """Every variant of the definition."""
    return reference.VARIANTS


def inputs(instance: Instance) -> dict[str, Any] | None:
    """``x`` for a norm: as wide as its weight, or as it says; None for a weight of each head."""
    weight, shape = instance.part("weight"), instance.facts.get("normalized_shape")
    if isinstance(weight, torch.Tensor) and weight.dim() != 1:
        return None
    width = shape[-1] if isinstance(shape, tuple) else _UNKNOWN_WIDTH
    width = weight.shape[-1] if isinstance(weight, torch.Tensor) else width
    return {"x": instance.tokens(width, scale=3)}


class Norm(nn.Module):
    """A norm by its definition."""

    def __init__(
        self, variant: LayerNormVariant, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.variant = variant
        self.normalized_shape = (width,)
        if variant.affine != "none":
            self.weight = nn.Parameter(torch.rand(width, device=device).add_(0.5).to(dtype))
        if variant.affine == "both":
            self.bias = nn.Parameter(torch.rand(width, device=device).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        return reference.layer_norm(
            x, weight, bias, 1e-6, variant=self.variant, normalized_shape=self.normalized_shape
        )


def cases(
    variant: LayerNormVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, on random inputs."""
    facts: dict[str, Any] = {"x": "x", "eps": 1e-6}
    if variant.affine != "none":
        facts["weight"] = "weight"
    if variant.affine == "both":
        facts["bias"] = "bias"
    if variant.written == "fused":
        facts["normalized_shape"] = "normalized_shape"
    # Torch's function wants the weight in the dtype that it computes in.
    kept = torch.float32 if variant.written == "fused" and variant.compute == "float32" else dtype
    kernel: Any = implementation("layer_norm", backend).layer_class(variant, facts).forward
    generator = seeded(device)
    for shape, (lead, width) in SHAPES.items():
        x = random((*lead, width), dtype, generator, scale=3)
        args = (strided(x) if shape == "strided" else x,)
        yield Case(shape, Norm.forward, kernel, args, Norm(variant, width, kept, device), facts)
