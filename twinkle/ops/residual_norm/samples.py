"""Sample calls of residual-norm kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.ops.cases import SHAPES, Case, implementation, random, seeded, strided
from twinkle.ops.layer_norm.reference import VARIANTS as LAYER_NORMS
from twinkle.ops.layer_norm.reference import LayerNormVariant
from twinkle.ops.residual_norm import reference, triton_backend
from twinkle.ops.residual_norm.reference import ResidualNormVariant
from twinkle.ops.rms_norm.reference import VARIANTS as NORMS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    import torch
    from torch import Tensor

__all__ = ["cases", "variants"]

_SCALE = 0.22


def variants() -> tuple[ResidualNormVariant, ...]:
    """Every norm that has a kernel behind a sum, and one behind a scaled sum."""
    plain = [ResidualNormVariant(f"rms_norm_{norm.name}", norm) for norm in NORMS]
    scaled = [ResidualNormVariant(f"rms_norm_{norm.name}_scaled", norm, True) for norm in NORMS[:2]]
    layers = [ResidualNormVariant(f"layer_norm_{norm.name}", norm) for norm in LAYER_NORMS]
    return tuple(
        variant for variant in (*plain, *scaled, *layers) if triton_backend.supports(variant) is None
    )


def _bound(function: Callable[..., Any], variant: ResidualNormVariant) -> Callable[..., Any]:
    def call(
        x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, y = function(x, residual, weight, 1e-6, variant=variant, bias=bias, scale=_SCALE)
        return h, y

    return call


def cases(
    variant: ResidualNormVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, on random inputs."""
    generator = seeded(device)
    for shape, (lead, width) in SHAPES.items():
        x, residual = (random((*lead, width), dtype, generator) for _ in range(2))
        weight = random((width,), dtype, generator).abs() + 0.5
        if shape == "strided":
            x, residual = strided(x), strided(residual)
        norm, bias = variant.norm, None
        bare = (norm.affine if isinstance(norm, LayerNormVariant) else norm.weight) == "none"
        if isinstance(norm, LayerNormVariant) and norm.affine == "both":
            bias = random((width,), dtype, generator)
        yield Case(
            shape,
            _bound(reference.residual_norm, variant),
            _bound(implementation("residual_norm", backend).residual_norm, variant),
            (x, residual, None if bare else weight, bias),
        )
