"""Mixture of experts on the GPU: what lies between the products, in one pass each.

Rows are the slots ``[tokens · k]`` sorted by expert; rows behind the last expert belong to slots without
one, are never written, and never read. Every sum runs in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from twinkle.ops.gated_mlp.triton import activated, slope
from twinkle.ops.launch import Launcher, cdiv, on_device, power_of_2, tl_dtype

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.ops.experts.gating import Gating

__all__ = ["combine", "gate", "gate_backward", "invert", "sum_groups"]


@triton.jit
def _invert(order, rows, count, K, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    slot = tl.load(order + at, mask=ok, other=0).to(tl.int32)
    tl.store(rows + at, slot, mask=ok)
    tl.store(rows + count + at, slot // K, mask=ok)
    tl.store(rows + 2 * count + slot, at, mask=ok)


@triton.jit
def _gate_and_up(
    h, bias, at, expert, col, width, ok, BIAS: tl.constexpr, INTERLEAVED: tl.constexpr, X: tl.constexpr
):
    if INTERLEAVED:
        gate_col = 2 * col
        up_col = 2 * col + 1
    else:
        gate_col = col
        up_col = width + col
    g = tl.load(h + at + gate_col, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(h + at + up_col, mask=ok, other=0.0).to(tl.float32)
    if BIAS:
        g += tl.load(bias + expert * 2 * width + gate_col, mask=ok, other=0.0).to(tl.float32)
        u += tl.load(bias + expert * 2 * width + up_col, mask=ok, other=0.0).to(tl.float32)
        g = g.to(X).to(tl.float32)
        u = u.to(X).to(tl.float32)
    return g, u, gate_col, up_col


@triton.jit
def _limited(g, u, limit, CLAMP: tl.constexpr, X: tl.constexpr):
    if CLAMP == "inputs":
        g = tl.where(g > limit, limit, g).to(X).to(tl.float32)
    if CLAMP != "none":
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)).to(X).to(tl.float32)
    return g, u


@triton.jit
def _gated(g, u, limit, alpha, KIND: tl.constexpr, CLAMP: tl.constexpr, R: tl.constexpr, X: tl.constexpr):
    """Of the limited gate and up: the activated gate, the other factor, their product before it is stored."""
    if KIND == "swish_of_alpha":
        a = (g * tl.sigmoid((g * alpha).to(R).to(tl.float32)).to(R).to(tl.float32)).to(R).to(tl.float32)
        u = (u + 1.0).to(R).to(tl.float32)
    else:
        a = activated(g, KIND, R)
    if CLAMP == "activated":
        a = tl.where(a > limit, limit, a).to(X).to(tl.float32)
    return a, u, a * u


@triton.jit
def _gate(
    h,
    bias,
    ids,
    rows,
    offsets,
    out,
    width,
    experts,
    limit,
    alpha,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    CLAMP: tl.constexpr,
    BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    R: tl.constexpr,
    X: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    if row < tl.load(offsets + experts):
        col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        ok = col < width
        expert = row
        if BIAS:
            expert = tl.load(ids + tl.load(rows + row)).to(tl.int64)
        g, u, _, _ = _gate_and_up(h, bias, row * 2 * width, expert, col, width, ok, BIAS, INTERLEAVED, X)
        g, u = _limited(g, u, limit, CLAMP, X)
        _, _, y = _gated(g, u, limit, alpha, KIND, CLAMP, R, X)
        tl.store(out + row * width + col, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _gate_backward(
    dp,
    h,
    bias,
    ids,
    weights,
    rows,
    offsets,
    dh,
    out,
    dweights,
    width,
    experts,
    limit,
    alpha,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    CLAMP: tl.constexpr,
    BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    R: tl.constexpr,
    X: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row)
    dot = tl.zeros([BLOCK], tl.float32)
    if row < tl.load(offsets + experts):
        weight = tl.load(weights + slot).to(tl.float32)
        expert = row
        if BIAS:
            expert = tl.load(ids + slot).to(tl.int64)
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            ok = col < width
            d = tl.load(dp + row * width + col, mask=ok, other=0.0).to(tl.float32)
            g, u, gate_col, up_col = _gate_and_up(
                h, bias, row * 2 * width, expert, col, width, ok, BIAS, INTERLEAVED, X
            )
            g_free = g <= limit
            u_free = (u <= limit) & (u >= -limit)
            g, u = _limited(g, u, limit, CLAMP, X)
            a, factor, y = _gated(g, u, limit, alpha, KIND, CLAMP, R, X)
            y = y.to(X).to(tl.float32)
            dot += d * y
            tl.store(out + row * width + col, (y * weight).to(out.dtype.element_ty), mask=ok)
            d *= weight
            if KIND == "swish_of_alpha":
                s = tl.sigmoid(alpha * g)
                dg = d * factor * (s * (1.0 + alpha * g * (1.0 - s)))
            else:
                dg = d * factor * slope(g, KIND)
            du = d * a
            if CLAMP == "inputs":
                dg = tl.where(g_free, dg, 0.0)
            if CLAMP == "activated":
                dg = tl.where(activated(g, KIND, R) <= limit, dg, 0.0)
            if CLAMP != "none":
                du = tl.where(u_free, du, 0.0)
            tl.store(dh + row * 2 * width + gate_col, dg.to(dh.dtype.element_ty), mask=ok)
            tl.store(dh + row * 2 * width + up_col, du.to(dh.dtype.element_ty), mask=ok)
    tl.store(dweights + slot, tl.sum(dot))


@triton.jit
def _combine(
    y,
    weights,
    bias,
    ids,
    rows,
    offsets,
    out,
    count,
    width,
    experts,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIAS: tl.constexpr,
    X: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(offsets + experts)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        row = tl.load(rows + 2 * count + slot).to(tl.int64)
        ok = col < tl.where(row < valid, width, 0)  # a slot without expert adds nothing
        part = tl.load(y + row * width + col, mask=ok, other=0.0).to(tl.float32)
        if BIAS:
            expert = tl.load(ids + slot).to(tl.int64)
            more = tl.load(bias + expert * width + col, mask=ok, other=0.0)
            part = (part + more.to(tl.float32)).to(X).to(tl.float32)
        if WEIGHTED:
            # Not by 0: the weight of such a slot may be anything.
            part = tl.where(ok, part * tl.load(weights + slot).to(tl.float32), 0.0)
        total += part
    tl.store(out + token * width + col, total.to(out.dtype.element_ty), mask=col < width)


@triton.jit
def _sum_groups(
    x,
    index,
    weights,
    rows,
    offsets,
    out,
    width,
    x_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    stop = tl.load(offsets + expert + 1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.load(offsets + expert), stop, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        source = row
        if GATHER:
            source = tl.load(index + row, mask=row < stop, other=0)
        part = tl.load(
            x + source.to(tl.int64) * x_row + col, mask=(row < stop) & (col < width), other=0.0
        ).to(tl.float32)
        if WEIGHTED:
            slot = tl.load(rows + row, mask=row < stop, other=0)
            part *= tl.load(weights + slot, mask=row < stop, other=0.0).to(tl.float32)
        total += part
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out + expert * width + col, total.to(out.dtype.element_ty), mask=col < width)


_launch_invert, _launch_combine = Launcher(_invert), Launcher(_combine)
_launch_gate, _launch_gate_backward = Launcher(_gate), Launcher(_gate_backward)
_launch_sum_groups = Launcher(_sum_groups)


def invert(order: Tensor, k: int) -> Tensor:
    """From the sorted slots to ``[3, slots]`` int32: each row's slot, its token, and each slot's row.

    Args:
        order: ``[slots]``, the slot of each row.
        k: Slots of a token.
    """
    count = order.numel()
    rows = torch.empty((3, count), dtype=torch.int32, device=order.device)
    with on_device(order):
        _launch_invert((cdiv(count, 1024),), (order, rows), (count, k), BLOCK=1024, num_warps=4)
    return rows


def _gating(gating: Gating, h: Tensor, bias: Tensor | None) -> tuple[tuple[float, float], dict[str, Any]]:
    numbers = (
        0.0 if gating.limit is None else float(gating.limit),
        0.0 if gating.alpha is None else float(gating.alpha),
    )
    return numbers, {
        "KIND": "swish_of_alpha" if gating.alpha is not None else gating.activation,
        "CLAMP": gating.clamp,
        "BIAS": bias is not None,
        "INTERLEAVED": gating.interleaved,
        "R": tl_dtype(torch.float32 if gating.exact else h.dtype),
        "X": tl_dtype(h.dtype),
        "num_warps": 4,
    }


def gate(
    h: Tensor, bias: Tensor | None, ids: Tensor, rows: Tensor, offsets: Tensor, gating: Gating
) -> Tensor:
    """The gated activation of the fused projection.

    Args:
        h: ``[rows, 2 · intermediate]``, contiguous.
        bias: ``[experts, 2 · intermediate]`` or None.
        ids: ``[slots]``, the expert of each slot.
        rows: As :func:`invert` gives it.
        offsets: ``[experts + 1]``.
        gating: How.

    Returns:
        ``[rows, intermediate]``.
    """
    count, width = h.shape[0], h.shape[1] // 2
    out = torch.empty((count, width), dtype=h.dtype, device=h.device)
    block = min(1024, power_of_2(width))
    numbers, constants = _gating(gating, h, bias)
    with on_device(h):
        _launch_gate(
            (count * cdiv(width, block),),
            (h, h if bias is None else bias, ids, rows, offsets, out),
            (width, offsets.numel() - 1, *numbers),
            BLOCK=block,
            **constants,
        )
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
    """The derivative of :func:`gate` and of the routing weights behind it.

    Args:
        dp: ``[rows, intermediate]``, the gradient of the result as if every weight were one.
        h: ``[rows, 2 · intermediate]``, the fused projection.
        bias: ``[experts, 2 · intermediate]`` or None, of the fused projection.
        ids: ``[slots]``, the expert of each slot.
        weights: ``[slots]``, contiguous.
        rows: ``[3, rows]``, as :func:`invert` gives it.
        offsets: ``[experts + 1]``, where the rows of each expert begin.
        gating: The activation and its clamp.

    Returns:
        The gradient of ``h``, the result of :func:`gate` times the weights, the gradient of the weights
        in float32.
    """
    count, width = dp.shape
    dh, out = torch.empty_like(h), torch.empty_like(dp)
    dweights = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)
    numbers, constants = _gating(gating, h, bias)
    with on_device(h):
        _launch_gate_backward(
            (count,),
            (dp, h, h if bias is None else bias, ids, weights, rows, offsets, dh, out, dweights),
            (width, offsets.numel() - 1, *numbers),
            BLOCK=min(1024, power_of_2(width)),
            **constants,
        )
    return dh, out, dweights


def combine(
    y: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    rows: Tensor,
    offsets: Tensor,
    k: int,
) -> Tensor:
    """The weighted sum over the slots of each token, in float32, rounded once.

    Args:
        y: ``[rows, hidden]``, contiguous.
        weights: ``[slots]``, contiguous; None for ones.
        bias: ``[experts, hidden]`` or None.
        ids: ``[slots]``, the expert of each slot.
        rows: As :func:`invert` gives it.
        offsets: ``[experts + 1]``.
        k: Slots of a token.

    Returns:
        ``[tokens, hidden]``.
    """
    count, width = y.shape
    out = torch.empty((count // k, width), dtype=y.dtype, device=y.device)
    block = min(1024, power_of_2(width))
    with on_device(y):
        _launch_combine(
            (count // k * cdiv(width, block),),
            (y, y if weights is None else weights, y if bias is None else bias, ids, rows, offsets, out),
            (count, width, offsets.numel() - 1),
            BLOCK=block,
            K=k,
            WEIGHTED=weights is not None,
            BIAS=bias is not None,
            X=tl_dtype(y.dtype),
            num_warps=4,
        )
    return out


def sum_groups(
    x: Tensor, offsets: Tensor, rows: Tensor, index: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """The sum of the rows of each expert, in float32, rounded once.

    Args:
        x: ``[rows, width]``, or ``[tokens, width]`` with an index; channels adjacent.
        offsets: ``[experts + 1]``.
        rows: As :func:`invert` gives it.
        index: ``[rows]``, the row of ``x`` of each.
        weights: ``[slots]``, contiguous: a factor on each row.

    Returns:
        ``[experts, width]``.
    """
    experts, width = offsets.numel() - 1, x.shape[1]
    out = torch.empty((experts, width), dtype=x.dtype, device=x.device)
    with on_device(x):
        _launch_sum_groups(
            (experts, cdiv(width, 64)),
            (x, rows if index is None else index, x if weights is None else weights, rows, offsets, out),
            (width, x.stride(0)),
            ROWS=32,
            BLOCK=64,
            GATHER=index is not None,
            WEIGHTED=weights is not None,
            num_warps=4,
        )
    return out
