"""Sample calls of mixture of experts kernels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.ops.cases import Case, Instance, implementation, random, seeded, strided
from twinkle.ops.experts import reference
from twinkle.ops.gated_mlp.activation import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

    from twinkle.ops.experts.reference import ExpertsVariant

__all__ = ["cases", "inputs", "variants"]

_LIMIT, _ALPHA = 0.4, 1.7
# Tokens, experts, experts a token, width and width within. Not fewer tokens: of two or three routing weights
# the gradients are off by chance.
_SHAPES = {
    "plain": (40, 4, 2, 64, 48),
    "one expert": (20, 1, 1, 32, 48),
    "ragged": (61, 3, 1, 20, 12),
    "wide": (12, 2, 2, 32, 1500),
    "strided": (20, 4, 2, 64, 48),
    "slots without expert": (20, 4, 2, 32, 48),
}


def variants() -> tuple[ExpertsVariant, ...]:
    """Every variant of the definition."""
    return reference.VARIANTS


def inputs(instance: Instance) -> dict[str, Any] | None:
    """Tokens, their experts and weights: two experts a token, or the only one."""
    down = instance.part("down")
    if not isinstance(down, torch.Tensor) or down.dim() != 3:
        return None
    experts, tokens, width = down.shape[0], math.prod(instance.lead), _width(down, instance.variant)
    return _inputs(tokens, experts, min(2, experts), width, instance.dtype, instance.generator)


def _width(down: Tensor, variant: ExpertsVariant) -> int:
    return int(down.shape[2] if variant.transposed else down.shape[1])


def _inputs(
    tokens: int, experts: int, k: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    liking = torch.rand(tokens, experts, generator=generator, device=generator.device)
    weights, indices = liking.topk(k)
    x = random((tokens, width), dtype, generator)
    return {"x": x, "indices": indices, "weights": weights.to(dtype)}


class Experts(nn.Module):
    """Experts by their definition."""

    def __init__(
        self,
        variant: ExpertsVariant,
        activation: str,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.variant, self.activation = variant, activation
        self.number, width, inner = sizes

        def parameter(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(random((self.number, *shape), dtype, generator, scale=scale))

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return parameter(
                *((columns, rows) if variant.transposed else (rows, columns)), scale=columns**-0.5
            )

        self.gate_up, self.down = matrix(2 * inner, width), matrix(width, inner)
        if variant.bias:
            self.gate_up_bias, self.down_bias = parameter(2 * inner), parameter(width)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """``[tokens, width]`` to the same."""
        return reference.experts(
            x,
            indices,
            weights,
            self.gate_up,
            self.down,
            self.number,
            ACTIVATIONS[self.activation],
            variant=self.variant,
            gate_up_bias=getattr(self, "gate_up_bias", None),
            down_bias=getattr(self, "down_bias", None),
            limit=_LIMIT,
            alpha=_ALPHA,
        )


def cases(
    variant: ExpertsVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape with a silu; and every activation, for the variant that most families have.

    One shape for a variant without padding, which is computed as the one with it.
    """
    generator = seeded(device)
    calls = [(shape, "silu", *sizes) for shape, sizes in _SHAPES.items()]
    if variant.name == "plain":
        calls += [(name, name, *_SHAPES["ragged"]) for name in ACTIVATIONS if name != "silu"]
    if variant.name.endswith("_unpadded"):
        calls = calls[:1]
    for shape, activation, tokens, number, k, width, inner in calls:
        if shape == "slots without expert" and not variant.padding:
            continue
        module = Experts(variant, activation, (number, width, inner), dtype, generator)
        names = ("x", "indices", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
        facts: dict[str, Any] = {name: name for name in names[: 7 if variant.bias else 5]}
        facts |= {"num_experts": number, "activation": activation}
        if variant.gating in ("clamped", "clamped_activated", "swish"):
            facts["limit"] = _LIMIT
        if variant.gating == "swish":
            facts["alpha"] = _ALPHA
        kernel: Any = implementation("experts", backend).layer_class(variant, facts).forward
        given = _inputs(tokens, number, k, width, dtype, generator)
        if shape == "slots without expert":
            given["indices"][::3, 1] = number
        if shape == "strided":
            given = {name: strided(value) for name, value in given.items()}
        yield Case(shape, Experts.forward, kernel, tuple(given.values()), module, facts)
