"""Sample calls of GroupNorm with and without the SiLU that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.cases import Case, implementation, random, seeded, strided
from twinkle.ops.group_norm import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from torch import Tensor

    from twinkle.ops.group_norm.reference import GroupNormVariant

__all__ = ["cases", "variants"]

# Shape and groups.
_SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "plain": ((2, 64, 8, 8), 8),
    "one place": ((3, 32, 1), 4),
    "ragged": ((2, 36, 7, 9), 12),
    "wide": ((1, 6, 50, 60), 2),
    "channels last": ((2, 48, 6, 5), 4),
    "strided": ((2, 32, 4, 16), 8),
}


def variants() -> tuple[GroupNormVariant, ...]:
    """Every variant of the definition."""
    return reference.VARIANTS


def _bound(function: Callable[..., Any], groups: int, variant: GroupNormVariant) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return function(x, groups, weight, bias, 1e-5, variant=variant)

    return call


def cases(
    variant: GroupNormVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, on random inputs."""
    generator = seeded(device)
    kernel = implementation("group_norm", backend).group_norm
    for name, (shape, groups) in _SHAPES.items():
        x = random(shape, dtype, generator, scale=2)
        if name == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif name == "strided":
            x = strided(x)
        weight, bias = (random(shape[1:2], dtype, generator) for _ in range(2))
        yield Case(
            name,
            _bound(reference.group_norm, groups, variant),
            _bound(kernel, groups, variant),
            (x, weight, bias),
        )
