"""Mixture of experts with 3-D parameters: every token through its top-k experts, weighted and summed.

``y[t] = Σ_k weights[t, k] · down_e(gating(gate_up_e(x[t])))`` with ``e = indices[t, k]``; expert by expert,
each over the tokens routed to it.
"""

# mypy: disable-error-code="union-attr, operator, misc, attr-defined, index"
# Which optional arguments are given follows from the variant: an assert would be a step of the computation.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from torch import Tensor

__all__ = ["VARIANTS", "ExpertsVariant", "experts"]


@dataclass(frozen=True)
class ExpertsVariant:
    """How the experts lay out their parameters and gate.

    Attributes:
        name: A short name.
        transposed: Parameters are ``[experts, in, out]`` instead of ``[experts, out, in]``.
        bias: Both projections have one.
        gating: ``activation``: ``act(gate) · up``; ``float32``: in float32, rounded to the gate's dtype;
            ``clamped``: both clamped first; ``clamped_activated``: the activated gate clamped;
            ``swish``: clamped, ``(up + 1) · gate · sigmoid(alpha · gate)``.
        interleaved: Gate and up take turns in the fused projection instead of halves.
        float32: All arithmetic and the sum in float32.
        norm: A norm behind the down projection.
        padding: Index ``num_experts`` marks a slot without expert, and the one-hot has room for it.
    """

    name: str
    transposed: bool = False
    bias: bool = False
    gating: Literal["activation", "float32", "clamped", "clamped_activated", "swish"] = "activation"
    interleaved: bool = False
    float32: bool = False
    norm: bool = False
    padding: bool = True


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    num_experts: int,
    activation: Callable[[Tensor], Tensor] = F.silu,
    *,
    variant: ExpertsVariant,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    limit: float | None = None,
    alpha: float = 1.702,
) -> Tensor:
    """The definition.

    Args:
        x: ``[tokens, hidden]``.
        indices: ``[tokens, k]``, the experts of each token.
        weights: ``[tokens, k]``.
        gate_up: ``[experts, 2 · intermediate, hidden]``, or with the last two exchanged.
        down: ``[experts, hidden, intermediate]``, or with the last two exchanged.
        num_experts: How many there are.
        activation: Of the gate.
        variant: How they are laid out.
        gate_up_bias: ``[experts, 2 · intermediate]``.
        down_bias: ``[experts, hidden]``.
        norm: Of a variant with a norm.
        limit: Of a clamped variant.
        alpha: Of the ``swish`` gating.

    Returns:
        ``[tokens, hidden]``.
    """
    total = torch.zeros_like(x, dtype=torch.float32) if variant.float32 else torch.zeros_like(x)
    classes = num_experts + 1 if variant.padding else num_experts
    with torch.no_grad():
        mask = F.one_hot(indices, num_classes=classes).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert in hit:
        expert = expert[0]
        if expert == num_experts:
            continue
        slot, token = torch.where(mask[expert])
        h = x[token]
        if variant.float32:
            h = h.float() @ gate_up[expert].float() + gate_up_bias[expert].float()
        elif variant.bias:
            h = h @ gate_up[expert] + gate_up_bias[expert]
        elif variant.transposed:
            h = h @ gate_up[expert]
        else:
            h = F.linear(h, gate_up[expert])
        if variant.interleaved:
            gate, up = h[..., ::2], h[..., 1::2]
        else:
            gate, up = h.chunk(2, dim=-1)
        h = _gated(gate, up, activation, limit, alpha, variant)
        if variant.float32:
            h = h.float() @ down[expert].float() + down_bias[expert].float()
        elif variant.bias:
            h = h @ down[expert] + down_bias[expert]
        elif variant.transposed:
            h = h @ down[expert]
        else:
            h = F.linear(h, down[expert])
        if variant.norm:
            h = norm(h)
        if variant.float32:
            h = h * weights[token, slot, None].float()
            total.index_add_(0, token, h)
        else:
            h = h * weights[token, slot, None]
            total.index_add_(0, token, h.to(total.dtype))
    if variant.float32:
        return total.to(x.dtype)
    return total


def _gated(
    gate: Tensor,
    up: Tensor,
    activation: Callable[[Tensor], Tensor],
    limit: float | None,
    alpha: float,
    variant: ExpertsVariant,
) -> Tensor:
    if variant.gating == "float32":
        return (activation(gate.float()) * up.float()).to(gate.dtype)
    if variant.gating == "clamped_activated":
        return activation(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)
    if variant.gating == "activation":
        return activation(gate) * up
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    if variant.gating == "swish":
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return activation(gate) * up


_PADDED = (
    ExpertsVariant("plain"),
    ExpertsVariant("transposed", transposed=True),
    ExpertsVariant("float32_gating", gating="float32"),
    ExpertsVariant("clamped", gating="clamped"),
    ExpertsVariant("clamped_activated", gating="clamped_activated"),
    ExpertsVariant("swish", gating="swish"),
    ExpertsVariant("normed", norm=True),
)
VARIANTS: tuple[ExpertsVariant, ...] = (
    *_PADDED,
    ExpertsVariant("gpt_oss", transposed=True, bias=True, gating="swish", interleaved=True, padding=False),
    ExpertsVariant("float32_swish", transposed=True, bias=True, gating="swish", float32=True, padding=False),
    # transformers before 5.18 has no room for a slot without expert.
    *(replace(variant, name=f"{variant.name}_unpadded", padding=False) for variant in _PADDED),
)
"""Every variant that is recognised."""
