"""Mixture of experts on the CPU in plain torch: the steps of ``triton.py``, products slice by slice.

What is gained over a loop of autograd: no gradient as large as all experts for each of them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from twinkle.ops.experts import gating as gates

if TYPE_CHECKING:
    from torch import Tensor

    from twinkle.ops.experts.gating import Gating

__all__ = ["combine", "gate", "gate_backward", "invert", "outer", "rows", "sum_groups"]


def invert(order: Tensor, k: int) -> Tensor:
    """As ``triton.invert``."""
    rows = torch.empty((3, order.numel()), dtype=torch.int32)
    rows[0] = order
    rows[1] = order // k
    rows[2, order] = torch.arange(order.numel(), dtype=torch.int32)
    return rows


def rows(a: Tensor, w: Tensor, offsets: Tensor, count: int, index: Tensor | None = None) -> Tensor:
    """As ``triton_products.rows``."""
    if index is not None:
        a = a.index_select(0, index)
    out = a.new_empty((count, w.shape[2]))
    for expert, start, stop in _groups(offsets):
        if start < stop:
            torch.mm(a[start:stop], w[expert], out=out[start:stop])
    return out


def outer(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_index: Tensor | None = None,
    b_index: Tensor | None = None,
) -> Tensor:
    """As ``triton_products.outer``."""
    a = a if a_index is None else a.index_select(0, a_index)
    b = b if b_index is None else b.index_select(0, b_index)
    # Zeros first would touch the largest tensors of a training step twice.
    out = a.new_empty((offsets.numel() - 1, a.shape[1], b.shape[1]))
    for expert, start, stop in _groups(offsets):
        if start < stop:
            torch.mm(a[start:stop].t(), b[start:stop], out=out[expert])
        else:
            out[expert].zero_()
    return out


def gate(
    h: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor, offsets: Tensor, gating: Gating
) -> Tensor:
    """As ``triton.gate``."""
    out = h.new_empty((h.shape[0], h.shape[1] // 2))
    valid = int(offsets[-1])
    out[:valid] = gates.gate(_biased(h[:valid], bias, ids, rows), gating)
    return out


def gate_backward(
    dp: Tensor,
    h: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    rows: Tensor,
    offsets: Tensor,
    gating: Gating,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``triton.gate_backward``."""
    valid = int(offsets[-1])
    slots = rows[0, :valid]
    h, dp = _biased(h[:valid], bias, ids, rows), dp[:valid]
    a = gates.gate(h, gating)
    weight = weights.index_select(0, slots)[:, None]
    dweights = weights.new_zeros(weights.shape, dtype=_wide(dp))
    dweights[slots] = torch.linalg.vecdot(dp.to(dweights.dtype), a.to(dweights.dtype))
    return gates.gate_backward((dp * weight).to(h.dtype), h, gating), (a * weight).to(h.dtype), dweights


def combine(
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    rows: Tensor,
    offsets: Tensor,
    k: int,
) -> Tensor:
    """As ``triton.combine``."""
    valid = int(offsets[-1])
    slots = rows[0, :valid]
    out = torch.zeros((y.shape[0] // k, y.shape[1]), dtype=_wide(y))
    part = y[:valid]
    if bias is not None:
        part = part + bias.index_select(0, ids.index_select(0, slots))
    if weights is not None:
        part = part * weights.index_select(0, slots)[:, None].to(out.dtype)
    return out.index_add_(0, rows[1, :valid], part.to(out.dtype)).to(y.dtype)


def sum_groups(
    x: Tensor, offsets: Tensor, rows: Tensor, index: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """As ``triton.sum_groups``."""
    out = x.new_zeros((offsets.numel() - 1, x.shape[1]), dtype=_wide(x))
    for expert, start, stop in _groups(offsets):
        part = x[start:stop] if index is None else x.index_select(0, index[start:stop])
        part = part.to(out.dtype)
        if weights is not None:
            part = part * weights.index_select(0, rows[0, start:stop])[:, None]
        out[expert] = part.sum(0)
    return out.to(x.dtype)


def _groups(offsets: Tensor) -> list[tuple[int, int, int]]:
    return [(expert, start, stop) for expert, (start, stop) in enumerate(pairwise(offsets.tolist()))]


def _biased(h: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor) -> Tensor:
    if bias is None:
        return h
    return h + bias.index_select(0, ids.index_select(0, rows[0, : h.shape[0]]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
