"""Sample calls of linear layers with a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.ops.cases import Case, implementation, random, seeded
from twinkle.ops.linear_bias import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    import torch
    from torch import Tensor

    from twinkle.ops.linear_bias.reference import LinearVariant

__all__ = ["cases", "variants"]

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "plain": ((4, 1024), 256),
    "ragged": ((3, 1777), 200),
    "wide": ((210,), 5000),
}
"""Leading dimensions and width of results that are large enough for the kernel."""


def variants() -> tuple[LinearVariant, ...]:
    """Every variant of the definition."""
    return reference.VARIANTS


def _defined(variant: LinearVariant) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear_bias(x, weight, bias, variant=variant)

    return call


def _implemented(variant: LinearVariant, backend: str) -> Callable[..., Any]:
    function: Any = getattr(implementation("linear_bias", backend), variant.name)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made: Tensor = function(bias, x, weight) if variant.name == "addmm" else function(x, weight, bias)
        return made

    return call


def cases(
    variant: LinearVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, on random inputs."""
    generator = seeded(device)
    for shape, (lead, width) in SHAPES.items():
        x = random((*lead, 16), dtype, generator)
        weight, bias = random((width, 16), dtype, generator), random((width,), dtype, generator)
        if variant.name == "addmm":
            x, weight = x.view(-1, 16), weight.t().contiguous()
        yield Case(shape, _defined(variant), _implemented(variant, backend), (x, weight, bias))
