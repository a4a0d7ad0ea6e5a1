"""The gated MLP: ``down(activation(gate(x)) · up(x))`` (Shazeer 2020, "GLU Variants").

The activation, the projections and their biases belong to the instance; the variant says how they are
laid out and what lies between them.
"""

# mypy: disable-error-code="union-attr, operator, misc, attr-defined, index"
# Which optional arguments are given follows from the variant: an assert would be a step of the computation.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from torch import Tensor

    Layer = Callable[[Tensor], Tensor]

__all__ = ["VARIANTS", "GatedMLPVariant", "gated_mlp"]


@dataclass(frozen=True)
class GatedMLPVariant:
    """What lies between the projections of a gated MLP.

    Attributes:
        name: A short name.
        projections: ``separate`` gate and up, or ``fused``: one projection, split in halves.
        gate_half: Which half of a fused projection is the gate.
        split: How a fused projection is split: ``chunk`` in halves, or ``view`` as ``[..., 2, size]``.
        cast: ``float32``: activation and product in float32, rounded back to the dtype of the gate;
            ``down_weight``: the product is cast to the dtype of the down projection's weight where that
            is a tensor of another dtype and not int8; ``none``.
        clamp: ``inputs``: gate from above and up from both sides before the activation;
            ``activated``: the activated gate from above instead; ``none``.
        dropout: A dropout before the down projection.
        norm: A norm before the down projection.
        scaled: Factors on the gate before the activation and on the output.
    """

    name: str
    projections: Literal["separate", "fused"] = "separate"
    gate_half: Literal[0, 1] = 0
    split: Literal["chunk", "view"] = "chunk"
    cast: Literal["none", "float32", "down_weight"] = "none"
    clamp: Literal["none", "inputs", "activated"] = "none"
    dropout: bool = False
    norm: bool = False
    scaled: bool = False


def gated_mlp(
    x: Tensor,
    gate: Layer,
    up: Layer,
    down: Layer,
    activation: Layer,
    *,
    variant: GatedMLPVariant,
    gate_up: Layer | None = None,
    dropout: Layer | None = None,
    norm: Layer | None = None,
    limit: float | None = None,
    gate_scale: float = 1.0,
    output_scale: float = 1.0,
) -> Tensor:
    """The definition.

    Args:
        x: ``[..., hidden]``.
        gate: ``[..., hidden] -> [..., intermediate]``, as ``up``; unused by a fused variant.
        up: See ``gate``.
        down: ``[..., intermediate] -> [..., hidden]``.
        activation: Elementwise.
        variant: What lies between them.
        gate_up: ``[..., hidden] -> [..., 2 · intermediate]`` of a fused variant.
        dropout: Of a variant with dropout.
        norm: Of a variant with a norm.
        limit: Of a clamped variant.
        gate_scale: Of a scaled variant.
        output_scale: Of a scaled variant.

    Returns:
        ``[..., hidden]``.
    """
    if variant.projections == "separate":
        g = gate(x)
        u = up(x)
    elif variant.split == "view":
        both = gate_up(x)
        batch, length, _ = both.shape
        both = both.view(batch, length, 2, -1)
        g = both[..., variant.gate_half, :]
        u = both[..., 1 - variant.gate_half, :]
    else:
        halves = gate_up(x).chunk(2, dim=-1)
        g = halves[variant.gate_half]
        u = halves[1 - variant.gate_half]
    if variant.clamp == "inputs":
        g = g.clamp(max=limit)
        u = u.clamp(min=-limit, max=limit)
    if variant.clamp == "activated":
        h = activation(g).clamp(max=limit) * u.clamp(min=-limit, max=limit)
    elif variant.cast == "float32":
        h = (activation(g.float()) * u.float()).to(g.dtype)
    elif variant.scaled:
        h = activation(g * gate_scale) * u
    else:
        h = activation(g) * u
    if variant.norm:
        h = norm(h)
    if variant.dropout:
        h = dropout(h)
    if variant.cast == "down_weight" and (
        isinstance(down.weight, torch.Tensor)
        and h.dtype != down.weight.dtype
        and down.weight.dtype != torch.int8
    ):
        h = h.to(down.weight.dtype)
    if variant.scaled:
        return down(h) * output_scale
    return down(h)


VARIANTS: tuple[GatedMLPVariant, ...] = (
    GatedMLPVariant("separate"),
    GatedMLPVariant("separate_dropout", dropout=True),
    GatedMLPVariant("t5", dropout=True, cast="down_weight"),
    GatedMLPVariant("float32", cast="float32"),
    GatedMLPVariant("normed", norm=True),
    GatedMLPVariant("scaled", scaled=True),
    GatedMLPVariant("clamped", clamp="inputs"),
    GatedMLPVariant("clamped_activated", clamp="activated"),
    GatedMLPVariant("fused", projections="fused"),
    GatedMLPVariant("fused_up_first", projections="fused", gate_half=1),
    GatedMLPVariant("fused_dropout", projections="fused", dropout=True),
    GatedMLPVariant("fused_up_first_dropout", projections="fused", gate_half=1, dropout=True),
    GatedMLPVariant("fused_view", projections="fused", split="view"),
)
"""Every variant that is recognised."""
