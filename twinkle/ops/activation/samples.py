"""Sample calls of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from twinkle.ops.activation import reference
from twinkle.ops.cases import SHAPES, Case, Instance, implementation, random, seeded, strided

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    import torch
    from torch import Tensor

    from twinkle.ops.activation.reference import ActivationVariant

__all__ = ["cases", "inputs", "variants"]

_UNKNOWN_WIDTH = 128


def variants() -> tuple[ActivationVariant, ...]:
    """Every variant of the definition."""
    return reference.VARIANTS


def inputs(instance: Instance) -> dict[str, Any]:
    """``x`` for an activation: any width will do."""
    return {"x": instance.tokens(_UNKNOWN_WIDTH, scale=3)}


class Plain(nn.Module):
    """An activation by its definition."""

    def __init__(self, variant: ActivationVariant) -> None:
        super().__init__()
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return reference.activation(x, variant=self.variant)


def cases(
    variant: ActivationVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape, on random inputs."""
    facts = {"x": "x"}
    kernel: Any = implementation("activation", backend).layer_class(variant, facts).forward
    generator = seeded(device)
    for shape, (lead, width) in SHAPES.items():
        x = random((*lead, width), dtype, generator, scale=2)
        args = (strided(x) if shape == "strided" else x,)
        yield Case(shape, Plain.forward, kernel, args, Plain(variant), facts)
