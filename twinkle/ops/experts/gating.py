"""The gated activation of the experts' fused projection, in plain torch with its derivative."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from twinkle.ops.gated_mlp.activation import ACTIVATIONS

if TYPE_CHECKING:
    from torch import Tensor

    from twinkle.ops.experts.reference import ExpertsVariant

__all__ = ["Gating", "gate", "gate_backward", "gating_of"]


class Gating(NamedTuple):
    """How gate and up make one.

    Attributes:
        activation: One of ``ACTIVATIONS``; unused where there is an ``alpha``.
        clamp: ``inputs``: the gate from above and up from both sides before; ``activated``: the activated
            gate instead; ``none``.
        limit: Of the clamp.
        alpha: ``(up + 1) · gate · sigmoid(alpha · gate)``.
        exact: In float32 throughout, rounded once.
        interleaved: Gate and up take turns instead of halves.
    """

    activation: str
    clamp: str = "none"
    limit: float | None = None
    alpha: float | None = None
    exact: bool = False
    interleaved: bool = False


def gating_of(variant: ExpertsVariant, activation: str, limit: float | None, alpha: float) -> Gating:
    """The gating of a variant."""
    clamps = {"clamped": "inputs", "swish": "inputs", "clamped_activated": "activated"}
    clamp = clamps.get(variant.gating, "none")
    swish = variant.gating == "swish"
    return Gating(
        "silu" if swish else activation,
        clamp,
        limit if clamp != "none" else None,
        alpha if swish else None,
        variant.gating == "float32",
        variant.interleaved,
    )


def gate(h: Tensor, gating: Gating) -> Tensor:
    """``[rows, 2 · intermediate]`` to ``[rows, intermediate]``."""
    g, u = _parts(h, gating)
    if gating.exact:
        return (ACTIVATIONS[gating.activation](g.float()) * u.float()).to(h.dtype)
    g, u = _limited(g, u, gating)
    if gating.alpha is not None:
        return (u + 1) * (g * torch.sigmoid(g * gating.alpha))
    a = ACTIVATIONS[gating.activation](g)
    return (a.clamp(max=gating.limit) if gating.clamp == "activated" else a) * u


def gate_backward(d: Tensor, h: Tensor, gating: Gating) -> Tensor:
    """The gradient of ``h``, from that of the result, without autograd."""
    g, u = _parts(h, gating)
    dh = torch.empty_like(h)
    dg, du = _parts(dh, gating)
    if gating.exact:
        d, g, u = d.float(), g.float(), u.float()
    gate_free = up_free = None
    limit = 0.0 if gating.limit is None else gating.limit
    if gating.clamp != "none":
        up_free = (u <= limit) & (u >= -limit)
        gate_free = g <= limit if gating.clamp == "inputs" else None
        g, u = _limited(g, u, gating)
    if gating.alpha is not None:
        s = torch.sigmoid(g * gating.alpha)
        a = g * s
        u = u + 1
        slope = d * u * (s * (1 + gating.alpha * g * (1 - s)))
    else:
        a = ACTIVATIONS[gating.activation](g)
        if gating.clamp == "activated":
            gate_free = a <= limit
            a = a.clamp(max=limit)
        slope = _through(d * u, g, gating.activation)
    dg.copy_(slope if gate_free is None else slope.where(gate_free, 0))
    a = d * a
    du.copy_(a if up_free is None else a.where(up_free, 0))
    return dh


def _parts(h: Tensor, gating: Gating) -> tuple[Tensor, Tensor]:
    if gating.interleaved:
        return h[..., ::2], h[..., 1::2]
    g, u = h.chunk(2, dim=-1)
    return g, u


def _limited(g: Tensor, u: Tensor, gating: Gating) -> tuple[Tensor, Tensor]:
    if gating.clamp == "none":
        return g, u
    assert gating.limit is not None
    if gating.clamp == "inputs":
        g = g.clamp(max=gating.limit)
    return g, u.clamp(min=-gating.limit, max=gating.limit)


def _through(d: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of an activation's input."""
    aten = torch.ops.aten
    if activation == "silu":
        return aten.silu_backward(d, x)
    if activation in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(d, x, approximate="none" if activation == "gelu" else "tanh")
    if activation == "relu":
        return aten.threshold_backward(d, x, 0)
    if activation == "relu2":
        return d * 2 * x.clamp(min=0)
    if activation == "sigmoid":
        return aten.sigmoid_backward(d, torch.sigmoid(x))
    if activation in ("quick_gelu", "swish"):
        alpha = 1.702 if activation == "quick_gelu" else 1.0
        s = torch.sigmoid(alpha * x)
        return d * (s * (1 + alpha * x * (1 - s)))
    if activation != "identity":
        raise ValueError(f"nobody wrote down the gradient of {activation}")
    return d
