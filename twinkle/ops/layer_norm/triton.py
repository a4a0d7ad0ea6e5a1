"""LayerNorm on the GPU: one pass each way, whatever the layer is written as.

Bytes a row of ``n`` elements: forward ``2n``, backward ``3n``, and eight for its mean and its inverse
deviation, which forward keeps: with them the two sums of backward wait for nothing but the row. Everything
is computed in float32 and rounded once. The gradients of weight and bias are one partial sum a program and
one reduction, in an order that depends on the shape and the device alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from twinkle.ops.launch import Launcher, cdiv, multiprocessors, on_device, power_of_2, shared_memory
from twinkle.ops.layout import base_of
from twinkle.ops.rms_norm.triton import reduce_partial

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["backward", "forward"]

_ONE_PASS = 16384  # Widest row that forward holds in registers; wider ones are read twice.
_IN_LOOP = 8192  # Widest row of which backward holds the sums for weight and bias as well.


@triton.jit
def _affine(n, w, b, at, here, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    if WEIGHT:
        n = n * tl.load(w + at, mask=here, other=0.0).to(tl.float32)
    if BIAS:
        n = n + tl.load(b + at, mask=here, other=0.0).to(tl.float32)
    return n


@triton.jit
def _forward(
    x,
    w,
    b,
    y,
    stats,
    rows,
    width,
    x_stride,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    STATS: tl.constexpr,
    EVEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    col = tl.arange(0, BLOCK)[None, :]
    if ONE_PASS:
        here = col < width
        ok = inside if EVEN else inside & here
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        mean = tl.sum(h, axis=1, keep_dims=True) / width
        h = h - mean
        kept = h if EVEN else tl.where(here, h, 0.0)
        root = tl.rsqrt(tl.sum(kept * kept, axis=1, keep_dims=True) / width + eps)
        n = _affine(h * root, w, b, col, here, WEIGHT, BIAS)
        tl.store(y + row * width + col, n.to(y.dtype.element_ty), mask=ok)
    else:
        mean = tl.zeros([ROWS, 1], tl.float32)
        squares = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, width, BLOCK):
            here = start + col < width
            count = tl.minimum(width - start, BLOCK).to(tl.float32)
            h = tl.load(x + row * x_stride + start + col, mask=inside & here, other=0.0).to(tl.float32)
            own = tl.sum(h, axis=1, keep_dims=True) / count
            h = tl.where(here, h - own, 0.0)
            # Two means and two sums of squares about them, made one (Chan et al. 1979).
            off = own - mean
            share = count / (start + count)
            squares += tl.sum(h * h, axis=1, keep_dims=True) + off * off * (start * share)
            mean += off * share
        root = tl.rsqrt(squares / width + eps)
        for start in range(0, width, BLOCK):
            at = start + col
            here = at < width
            h = tl.load(x + row * x_stride + at, mask=inside & here, other=0.0).to(tl.float32)
            n = _affine((h - mean) * root, w, b, at, here, WEIGHT, BIAS)
            tl.store(y + row * width + at, n.to(y.dtype.element_ty), mask=inside & here)
    if STATS:
        tl.store(stats + row, mean, mask=inside)
        tl.store(stats + rows + row, root, mask=inside)


@triton.jit
def _backward(
    dy,
    x,
    w,
    stats,
    dx,
    partial,
    rows,
    width,
    dy_stride,
    x_stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    col = tl.arange(0, BLOCK)[None, :]
    here = col < width
    if WEIGHT:
        s = tl.load(w + col, mask=here, other=0.0).to(tl.float32)
    if WEIGHT_GRAD:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIAS_GRAD:
        db = tl.zeros([ROWS, BLOCK], tl.float32)
    inverse_width = 1.0 / width
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        ok = row < rows if EVEN else (row < rows) & here
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        mean = tl.load(stats + row, mask=row < rows, other=0.0)
        root = tl.load(stats + rows + row, mask=row < rows, other=0.0)
        n = (h - mean) * root
        if WEIGHT_GRAD:
            dw += g * n
        if BIAS_GRAD:
            db += g
        if INPUT_GRAD:
            scaled = g * s if WEIGHT else g
            level = tl.sum(scaled, axis=1, keep_dims=True) * inverse_width
            dot = tl.sum(scaled * n, axis=1, keep_dims=True) * inverse_width
            d = (scaled - level - n * dot) * root
            tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)
    # The place of this program in partial, whose shape is [programs, sums, width].
    to = partial + tl.program_id(0) * ((WEIGHT_GRAD + BIAS_GRAD) * width) + col
    if WEIGHT_GRAD:
        tl.store(to, tl.sum(dw, axis=0, keep_dims=True), mask=here)
        to += width
    if BIAS_GRAD:
        tl.store(to, tl.sum(db, axis=0, keep_dims=True), mask=here)


@triton.jit
def _input_wide(
    dy, x, w, stats, dx, rows, width, dy_stride, x_stride, BLOCK: tl.constexpr, WEIGHT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(stats + row)
    root = tl.load(stats + rows + row)
    levels = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        ok = col < width
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT:
            g *= tl.load(w + col, mask=ok, other=0.0).to(tl.float32)
        levels += g
        products += g * (h - mean)
    level = tl.sum(levels) / width
    dot = tl.sum(products) * root / width
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        ok = col < width
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT:
            g *= tl.load(w + col, mask=ok, other=0.0).to(tl.float32)
        d = (g - level - (h - mean) * root * dot) * root
        tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def _sums_wide(
    dy,
    x,
    stats,
    partial,
    rows,
    width,
    dy_stride,
    x_stride,
    BLOCK: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = col < width
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.zeros([1], tl.int64) + first
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT_GRAD:
            h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
            dw += g * ((h - tl.load(stats + row)) * tl.load(stats + rows + row))
        if BIAS_GRAD:
            db += g
    to = partial + tl.program_id(0) * ((WEIGHT_GRAD + BIAS_GRAD) * width) + col
    if WEIGHT_GRAD:
        tl.store(to, dw, mask=ok)
        to += width
    if BIAS_GRAD:
        tl.store(to, db, mask=ok)


@triton.jit
def _reduce_two(partial, dw, db, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    which = tl.program_id(1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        ok = (row < count) & (col < width)
        total += tl.load(partial + (2 * row + which) * width + col, mask=ok, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    if which == 0:
        tl.store(dw + col, total.to(dw.dtype.element_ty), mask=col < width)
    else:
        tl.store(db + col, total.to(db.dtype.element_ty), mask=col < width)


_launch_forward, _launch_backward = Launcher(_forward), Launcher(_backward)
_launch_input, _launch_sums = Launcher(_input_wide), Launcher(_sums_wide)
_launch_reduce = Launcher(_reduce_two)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, stats: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward.

    Args:
        x: ``[..., width]``.
        weight: ``[width]`` or None.
        bias: ``[width]`` or None.
        eps: Added to the variance.
        stats: Whether backward will follow.

    Returns:
        The normalised rows, contiguous as torch's are, in the dtype of ``x``; and as ``[2, rows]`` in float32
        their means and inverse deviations, or None.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    kept = torch.empty((2, rows), dtype=torch.float32, device=x.device) if stats else None
    if rows == 0:
        return y, kept
    x_rows, x_stride = base_of(x)
    block = power_of_2(width)
    one_pass = block <= _ONE_PASS
    block = block if one_pass else 8192
    height = max(1, min(2048 // block, power_of_2(rows)))
    with on_device(x):
        _launch_forward(
            (cdiv(rows, height),),
            (
                x_rows,
                x_rows if weight is None else weight,
                x_rows if bias is None else bias,
                y,
                y if kept is None else kept,
            ),
            (rows, width, x_stride, float(eps)),
            BLOCK=block,
            ROWS=height,
            ONE_PASS=one_pass,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            STATS=stats,
            EVEN=block == width,
            num_warps=max(1, min(16, block * height // 512)),
        )
    return y, kept


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    *,
    input_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward.

    Args:
        dy: ``[..., width]``, of the normalised rows.
        x: As in forward.
        weight: As in forward.
        bias: As in forward.
        stats: ``[2, rows]``, as forward returned it.
        input_grad: Whether the gradient of ``x`` is wanted.
        weight_grad: Whether that of the weight is.
        bias_grad: Whether that of the bias is.

    Returns:
        Gradients of ``x``, weight and bias; None for one that is not wanted.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if input_grad else None
    dw = torch.empty_like(weight) if weight is not None and weight_grad else None
    db = torch.empty_like(bias) if bias is not None and bias_grad else None
    if x.numel() == 0:
        return dx, None if dw is None else dw.zero_(), None if db is None else db.zero_()
    width = x.shape[-1]
    rows = x.numel() // width
    x_rows, x_stride = base_of(x)
    dy_rows, dy_stride = base_of(dy)
    sums = (dw is not None) + (db is not None)
    numbers = (rows, width, dy_stride, x_stride)
    w = x_rows if weight is None else weight
    block = power_of_2(width)
    flags = {"WEIGHT_GRAD": dw is not None, "BIAS_GRAD": db is not None}
    with on_device(x):
        if block <= _IN_LOOP:
            # As for rms_norm: two programs on a multiprocessor with three or four rows under way in each.
            height = max(1, min(4096 // block, power_of_2(rows)))
            programs = min(cdiv(rows, height), multiprocessors(x.device) * 2)
            partial = _partial(programs, sums, width, x.device)
            stages = 4 if block * x.element_size() > 8192 else 3
            moved = block * height * (x.element_size() + dy.element_size())
            _launch_backward(
                (programs,),
                (dy_rows, x_rows, w, stats, x_rows if dx is None else dx, partial),
                numbers,
                BLOCK=block,
                ROWS=height,
                WEIGHT=weight is not None,
                INPUT_GRAD=dx is not None,
                **flags,
                EVEN=block == width,
                STAGES=max(1, min(stages, shared_memory(x.device) // moved)),
                num_warps=4 if 256 < block < 4096 else 8 if block < 8192 else 16,
            )
        else:
            if dx is not None:
                _launch_input(
                    (rows,),
                    (dy_rows, x_rows, w, stats, dx),
                    numbers,
                    BLOCK=8192,
                    WEIGHT=weight is not None,
                    num_warps=16,
                )
            if sums:
                columns = cdiv(width, 2048)
                programs = min(rows, max(1, multiprocessors(x.device) * 8 // columns))
                partial = _partial(programs, sums, width, x.device)
                _launch_sums(
                    (programs, columns),
                    (dy_rows, x_rows, stats, partial),
                    numbers,
                    BLOCK=2048,
                    **flags,
                    STAGES=2,
                    num_warps=4,
                )
        if dw is not None and db is not None:
            columns = 32 if block <= _IN_LOOP else 128
            _launch_reduce(
                (cdiv(width, columns), 2),
                (partial, dw, db),
                (programs, width),
                ROWS=64,
                BLOCK=columns,
                num_warps=4,
            )
        elif dw is not None or db is not None:
            reduce_partial(partial, dw if dw is not None else db)
    return dx, dw, db


def _partial(programs: int, sums: int, width: int, device: torch.device) -> Tensor:
    """Room for the sums of each program; ``[programs, sums * width]``."""
    return torch.empty((programs, sums * width) if sums else 1, dtype=torch.float32, device=device)
