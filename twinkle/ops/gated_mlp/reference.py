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
        projections: ``separate`` gate and up, or ``fused``: one projection, split in halves. ``optional``:
            as separate, and no product where the layer has no up. ``none``: the input has both halves.
            ``given``: gate and up are two inputs.
        gate_half: Which half of a fused projection is the gate; ``flag``: a flag of the layer says whether
            it is the last one.
        split: How a fused projection is split: ``chunk`` in halves, or ``view`` as ``[..., 2, size]``.
        cast: ``float32``: activation and product in float32, rounded back to the dtype of the gate;
            ``down_weight``: the product is cast to the dtype of the down projection's weight where that
            is a tensor of another dtype and not int8; ``none``.
        clamp: ``inputs``: gate from above and up from both sides before the activation;
            ``activated``: the activated gate from above instead; ``none``.
        dropout: A dropout before the down projection.
        norm: A norm before the down projection.
        scaled: Factors on the gate before the activation and on the output.
        down: Whether there is a down projection.
        factor: A number or a tensor that the product is multiplied with.
        last_dropout: A dropout behind all.
        order: Which comes first, where there are a norm and a dropout.
    """

    name: str
    projections: Literal["separate", "fused", "optional", "none", "given"] = "separate"
    gate_half: Literal[0, 1, "flag"] = 0
    split: Literal["chunk", "view"] = "chunk"
    cast: Literal["none", "float32", "down_weight"] = "none"
    clamp: Literal["none", "inputs", "activated"] = "none"
    dropout: bool = False
    norm: bool = False
    scaled: bool = False
    down: bool = True
    factor: bool = False
    last_dropout: bool = False
    order: Literal["norm_first", "dropout_first"] = "norm_first"


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
    factor: Tensor | float = 1.0,
    last_dropout: Layer | None = None,
    gate_last: bool = False,
    chunk_dim: int = -1,
    other: Tensor | None = None,
) -> Tensor:
    """The definition.

    Args:
        x: ``[..., hidden]``; the gate itself where it is given.
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
        factor: Of a variant with a factor.
        last_dropout: Of a variant with one.
        gate_last: Of a variant with a flag.
        chunk_dim: Of a variant with a flag.
        other: What is multiplied with the activated gate, as ``x``, where both are given.

    Returns:
        ``[..., hidden]``.
    """
    if variant.gate_half == "flag":
        first, second = gate_up(x).chunk(2, dim=chunk_dim)
        h = first * activation(second) if gate_last else activation(first) * second
        return _behind(h, down, variant, dropout, norm, last_dropout)
    if variant.projections == "optional":
        h = activation(gate(x))
        if up is not None:
            h = h * up(x)
        return down(h)
    g, u = (x, other) if variant.projections == "given" else _gate_and_up(x, gate, up, gate_up, variant)
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
    if variant.factor:
        h = h * factor
    if variant.cast != "down_weight":
        y = _behind(h, down, variant, dropout, norm, last_dropout)
        return y * output_scale if variant.scaled else y
    if variant.dropout:
        h = dropout(h)
    if variant.cast == "down_weight" and (
        isinstance(down.weight, torch.Tensor)
        and h.dtype != down.weight.dtype
        and down.weight.dtype != torch.int8
    ):
        h = h.to(down.weight.dtype)
    return down(h)


def _gate_and_up(
    x: Tensor, gate: Layer, up: Layer, gate_up: Layer | None, variant: GatedMLPVariant
) -> tuple[Tensor, Tensor]:
    """The two factors of the product."""
    if variant.projections == "separate":
        return gate(x), up(x)
    if variant.split == "view":
        both = gate_up(x)
        batch, length, _ = both.shape
        both = both.view(batch, length, 2, -1)
        return both[..., variant.gate_half, :], both[..., 1 - variant.gate_half, :]
    halves = x.chunk(2, dim=-1) if variant.projections == "none" else gate_up(x).chunk(2, dim=-1)
    return halves[variant.gate_half], halves[1 - variant.gate_half]


def _behind(
    h: Tensor,
    down: Layer,
    variant: GatedMLPVariant,
    dropout: Layer | None,
    norm: Layer | None,
    last_dropout: Layer | None,
) -> Tensor:
    """What lies behind the product."""
    if variant.norm and variant.order == "norm_first":
        h = norm(h)
    if variant.dropout:
        h = dropout(h)
    if variant.norm and variant.order == "dropout_first":
        h = norm(h)
    if variant.down:
        h = down(h)
    return last_dropout(h) if variant.last_dropout else h


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
    GatedMLPVariant("optional", projections="optional"),
    GatedMLPVariant("separate_last_dropout", last_dropout=True),
    GatedMLPVariant("separate_dropouts", dropout=True, last_dropout=True),
    GatedMLPVariant("fused_last_dropout", projections="fused", last_dropout=True),
    GatedMLPVariant("fused_up_first_last_dropout", projections="fused", gate_half=1, last_dropout=True),
    GatedMLPVariant("fused_dropouts", projections="fused", dropout=True, last_dropout=True),
    GatedMLPVariant(
        "fused_up_first_dropouts", projections="fused", gate_half=1, dropout=True, last_dropout=True
    ),
    GatedMLPVariant(
        "separate_dropouts_norm", dropout=True, norm=True, last_dropout=True, order="dropout_first"
    ),
    GatedMLPVariant(
        "flag_dropouts_norm",
        projections="fused",
        gate_half="flag",
        dropout=True,
        norm=True,
        last_dropout=True,
        order="dropout_first",
    ),
    GatedMLPVariant("activation", projections="none", down=False),
    GatedMLPVariant("activation_up_first", projections="none", gate_half=1, down=False),
    GatedMLPVariant("separate_no_down", down=False),
    GatedMLPVariant("fused_no_down", projections="fused", down=False),
    GatedMLPVariant("fused_up_first_no_down", projections="fused", gate_half=1, down=False),
    GatedMLPVariant("fused_up_first_factor", projections="fused", gate_half=1, down=False, factor=True),
    GatedMLPVariant("given", projections="given", down=False),
    GatedMLPVariant("given_float32", projections="given", down=False, cast="float32"),
)
"""Every variant that is recognised."""
