"""Sample calls of adaptive norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.ops.cases import SHAPES, Case, implementation, random, seeded, strided
from twinkle.ops.layer_norm.reference import VARIANTS as LAYER_NORMS
from twinkle.ops.layer_norm.reference import LayerNormVariant
from twinkle.ops.modulated_norm import reference, triton_backend
from twinkle.ops.modulated_norm.triton_backend import variant_of
from twinkle.ops.rms_norm.reference import VARIANTS as RMS_NORMS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    import torch
    from torch import Tensor

    from twinkle.ops.modulated_norm.reference import ModulatedNormVariant

__all__ = ["cases", "variants"]


def variants() -> tuple[ModulatedNormVariant, ...]:
    """Every norm that has a kernel before a modulation, and two with the casts to float32 around it."""
    found = [*map(variant_of, LAYER_NORMS), *map(variant_of, RMS_NORMS)]
    found += [variant_of(LAYER_NORMS[0], upcast=True), variant_of(LAYER_NORMS[0], widened=True)]
    return tuple(variant for variant in found if triton_backend.supports(variant) is None)


def _bound(function: Callable[..., Any], variant: ModulatedNormVariant) -> Callable[..., Any]:
    def call(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None
    ) -> Tensor:
        y: Tensor = function(x, weight, 1e-6, scale, shift, variant=variant, bias=bias)
        return y

    return call


def cases(
    variant: ModulatedNormVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, on random inputs: conditions of a sample, a token, of all, without a shift."""
    generator = seeded(device)
    for shape, (lead, width) in SHAPES.items():
        x = random((*lead, width), dtype, generator)
        of = {"ragged": lead, "one row": ()}.get(shape, (lead[0], *[1] * (len(lead) - 1)))
        scale, shift = (random((*of, width), dtype, generator) for _ in range(2))
        weight = random((width,), dtype, generator).abs() + 0.5
        if shape == "strided" and isinstance(variant.norm, LayerNormVariant):
            x, scale = strided(x), strided(scale)
        norm, bias = variant.norm, None
        bare = (norm.affine if isinstance(norm, LayerNormVariant) else norm.weight) == "none"
        if isinstance(norm, LayerNormVariant) and norm.affine == "both":
            bias = random((width,), dtype, generator)
        yield Case(
            shape,
            _bound(reference.modulated_norm, variant),
            _bound(implementation("modulated_norm", backend).modulated_norm, variant),
            (x, None if bare else weight, bias, scale, None if shape == "wide" else shift),
        )
