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

    from twinkle.ops.layer_norm.reference import LayerNormForm

__all__ = ["cases", "forms", "inputs"]

_UNKNOWN_WIDTH = 128


def forms() -> tuple[LayerNormForm, ...]:
    """Every form of the definition."""
    return reference.FORMS


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

    def __init__(self, form: LayerNormForm, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.form = form
        self.normalized_shape = (width,)
        if form.affine != "none":
            self.weight = nn.Parameter(torch.rand(width, device=device).add_(0.5).to(dtype))
        if form.affine == "both":
            self.bias = nn.Parameter(torch.rand(width, device=device).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        return reference.layer_norm(
            x, weight, bias, 1e-6, form=self.form, normalized_shape=self.normalized_shape
        )


def cases(
    form: LayerNormForm, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, on random inputs."""
    facts: dict[str, Any] = {"x": "x", "eps": 1e-6}
    if form.affine != "none":
        facts["weight"] = "weight"
    if form.affine == "both":
        facts["bias"] = "bias"
    if form.written == "fused":
        facts["normalized_shape"] = "normalized_shape"
    # Torch's function wants the weight in the dtype that it computes in.
    kept = torch.float32 if form.written == "fused" and form.compute == "float32" else dtype
    kernel: Any = implementation("layer_norm", backend).layer_class(form, facts).forward
    generator = seeded(device)
    for shape, (lead, width) in SHAPES.items():
        x = random((*lead, width), dtype, generator, scale=3)
        args = (strided(x) if shape == "strided" else x,)
        yield Case(shape, Norm.forward, kernel, args, Norm(form, width, kept, device), facts)
