"""Sample calls of gated MLP kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from twinkle.ops.cases import Case, Instance, implementation, random, seeded, strided
from twinkle.ops.gated_mlp import reference
from twinkle.ops.gated_mlp.activation import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

    from twinkle.ops.gated_mlp.reference import GatedMLPVariant

__all__ = ["cases", "inputs", "variants"]


def variants() -> tuple[GatedMLPVariant, ...]:
    """Every variant of the definition."""
    return reference.VARIANTS


def inputs(instance: Instance) -> dict[str, Any] | None:
    """``x`` for an MLP: as wide as its down projection's output."""
    if instance.variant.projections == "none":
        return {"x": instance.tokens(64)}  # any even width
    if instance.variant.projections == "given":
        return {"x": instance.tokens(64), "other": instance.tokens(64)}
    widths = [getattr(instance.part(role), "in_features", None) for role in ("gate_up", "gate")]
    width = next((found for found in widths if isinstance(found, int)), None)
    return {"x": instance.tokens(width)} if width is not None else None


# Leading dimensions, width and width within.
_SHAPES = {
    "plain": ((2, 48), 64, 160),
    "one row": ((1, 1), 32, 96),
    "ragged": ((3, 7), 20, 100),
    "wide": ((1, 3), 32, 5000),
    "strided": ((2, 5), 64, 96),
}
_LAYERS = ("gate", "up", "gate_up", "dropout", "norm", "down", "last_dropout")
_LIMIT, _GATE_SCALE, _OUTPUT_SCALE = 0.4, 1.3, 0.7


class MLP(nn.Module):
    """A gated MLP by its definition."""

    def __init__(
        self,
        variant: GatedMLPVariant,
        activation: str,
        width: int,
        inner: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.variant, self.activation = variant, activation
        if variant.projections in ("none", "given"):
            pass
        elif variant.projections == "fused":
            self.gate_up = nn.Linear(width, 2 * inner, device=device, dtype=dtype)
        else:
            self.gate = nn.Linear(width, inner, device=device, dtype=dtype)
            self.up = nn.Linear(width, inner, device=device, dtype=dtype)
        if variant.norm:
            self.norm = nn.LayerNorm(inner, device=device, dtype=dtype)
        if variant.dropout:
            self.dropout = nn.Dropout(0.0)
        if variant.last_dropout:
            self.last_dropout = nn.Dropout(0.0)
        if variant.factor:
            self.factor = nn.Parameter(torch.linspace(0.5, 1.5, inner, device=device, dtype=dtype))
        if variant.down:
            self.down = nn.Linear(inner, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """``[..., width]`` to the same."""
        layers = {name: getattr(self, name, None) for name in _LAYERS}
        return reference.gated_mlp(
            x,
            other=other,
            activation=ACTIVATIONS[self.activation],
            variant=self.variant,
            limit=_LIMIT,
            gate_scale=_GATE_SCALE,
            output_scale=_OUTPUT_SCALE,
            factor=getattr(self, "factor", 1.0),
            **layers,  # type: ignore[arg-type]
        )


def cases(
    variant: GatedMLPVariant, dtype: torch.dtype, device: torch.device, backend: str = "triton_backend"
) -> Iterator[Case]:
    """A call of each shape with a silu; and every activation, for the variant that most families have."""
    generator = seeded(device)
    calls = [(shape, "silu", *sizes) for shape, sizes in _SHAPES.items()]
    if variant.name == "separate":
        calls += [(name, name, *_SHAPES["ragged"]) for name in ACTIVATIONS if name != "silu"]
    for shape, activation, lead, width, inner in calls:
        module = MLP(variant, activation, width, inner, dtype, device)
        facts: dict[str, Any] = {"x": "x", "activation": activation}
        facts |= {name: name for name in _LAYERS if hasattr(module, name)}
        if variant.factor:
            facts["factor"] = "factor"
        if variant.gate_half == "flag":
            facts |= {"gate_last": False, "chunk_dim": -1}
        if variant.clamp != "none":
            facts["limit"] = _LIMIT
        if variant.scaled:
            facts |= {"gate_scale": _GATE_SCALE, "output_scale": _OUTPUT_SCALE}
        kernel: Any = implementation("gated_mlp", backend).layer_class(variant, facts).forward
        given = variant.projections == "given"
        if given:
            facts["other"] = "other"
        x = random((*lead, width if variant.projections != "none" else 2 * inner), dtype, generator)
        args: tuple[Tensor, ...] = (strided(x) if shape == "strided" else x,)
        if given:
            args = (*args, random((*lead, width), dtype, generator))
        yield Case(shape, MLP.forward, kernel, args, module, facts)
