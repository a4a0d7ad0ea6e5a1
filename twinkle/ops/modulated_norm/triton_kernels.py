"""Adaptive norms on the GPU: a norm of either kind, scale and shift of a group of rows or of each row.

Bytes a row of ``n`` elements: forward ``2n``, backward ``3n``, and the condition once a group. With a
condition of each row, scale and shift are read as well, and their gradients written. Where one is of a group,
all gradients but that of the input follow from two sums over its rows, of ``dy`` and of ``dy`` times the
normalised row: one partial sum a program and one reduction, in an order that depends on the shape and the
device alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twinkle.ops.rms_norm.triton_kernels import mean_square, normalised, scale_of

__all__ = ["backward_kernel", "condition_kernel", "forward_kernel"]


@triton.jit
def _one_plus(scale, at, ok):
    """``1 + scale``, rounded to the dtype of the scale, in float32."""
    s = tl.load(scale + at, mask=ok, other=0.0).to(tl.float32)
    return (1.0 + s).to(scale.dtype.element_ty).to(tl.float32)


@triton.jit
def forward_kernel(
    x,
    w,
    b,
    scale,
    shift,
    y,
    stats,
    rows,
    width,
    span,
    x_stride,
    s_stride,
    t_stride,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RMS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
    X: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    NORMED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    SHIFT: tl.constexpr,
    STATS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``ROWS`` rows; ``span`` of them after each other have one scale and one shift."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    col = tl.arange(0, BLOCK)[None, :]
    here = col < width
    ok = inside if EVEN else inside & here
    group = row // span
    h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
    if RMS:
        mean = tl.zeros([ROWS, 1], tl.float32)
        square = mean_square(h, width, COMPUTE, X)
        root = tl.rsqrt(square + eps)
        n = normalised(h, square, eps, COMPUTE, DIVIDE, X, N)
        if WEIGHT:
            n = n * scale_of(tl.load(w + col, mask=here, other=0.0), ONE_PLUS, S)
            n = n.to(P).to(tl.float32)
    else:
        mean = tl.sum(h, axis=1, keep_dims=True) / width
        h = h - mean
        kept = h if EVEN else tl.where(here, h, 0.0)
        root = tl.rsqrt(tl.sum(kept * kept, axis=1, keep_dims=True) / width + eps)
        n = h * root
        if WEIGHT:
            n = n * tl.load(w + col, mask=here, other=0.0).to(tl.float32)
        if BIAS:
            n = n + tl.load(b + col, mask=here, other=0.0).to(tl.float32)
    n = n.to(NORMED).to(tl.float32)
    n = (n * _one_plus(scale, group * s_stride + col, ok)).to(PRODUCT).to(tl.float32)
    if SHIFT:
        n = n + tl.load(shift + group * t_stride + col, mask=ok, other=0.0).to(tl.float32)
        n = n.to(SUM).to(tl.float32)
    tl.store(y + row * width + col, n.to(y.dtype.element_ty), mask=ok)
    if STATS:
        tl.store(stats + row, mean, mask=inside)
        tl.store(stats + rows + row, root, mask=inside)


@triton.jit
def backward_kernel(
    dy,
    x,
    w,
    b,
    scale,
    stats,
    dx,
    ds,
    dt,
    partial,
    rows,
    width,
    span,
    parts,
    dy_stride,
    x_stride,
    s_stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKEN: tl.constexpr,
    RMS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    S: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
    SHIFT_GRAD: tl.constexpr,
    SUMS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of rows, and a program's part of two sums over the ``span`` rows that it shares."""
    group = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    begin = group * span
    end = tl.minimum(begin + span, rows)
    col = tl.arange(0, BLOCK)[None, :]
    here = col < width
    inverse_width = 1.0 / width
    if WEIGHT:
        f = scale_of(tl.load(w + col, mask=here, other=0.0), ONE_PLUS, S)
    if not TOKEN:
        s = _one_plus(scale, group.to(tl.int64) * s_stride + col, here)
    if SUMS:
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        levels = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(begin + part * ROWS, end, parts * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        ok = row < end if EVEN else (row < end) & here
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        mean = tl.load(stats + row, mask=row < end, other=0.0)
        root = tl.load(stats + rows + row, mask=row < end, other=0.0)
        n = (h - mean) * root
        if TOKEN:
            s = _one_plus(scale, row * s_stride + col, ok)
            if SCALE_GRAD:
                v = n
                if WEIGHT:
                    v = v * f
                if BIAS:
                    v = v + tl.load(b + col, mask=here, other=0.0).to(tl.float32)
                tl.store(ds + row * width + col, (g * v).to(ds.dtype.element_ty), mask=ok)
            if SHIFT_GRAD:
                tl.store(dt + row * width + col, g.to(dt.dtype.element_ty), mask=ok)
        d = g * s
        if SUMS:
            if TOKEN:
                products += d * n
                levels += d
            else:
                products += g * n
                levels += g
        if INPUT_GRAD:
            if WEIGHT:
                d = d * f
            dot = tl.sum(d * n, axis=1, keep_dims=True) * inverse_width
            if RMS:
                d = (d - n * dot) * root
            else:
                d = (d - tl.sum(d, axis=1, keep_dims=True) * inverse_width - n * dot) * root
            tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)
    if SUMS:
        to = partial + tl.program_id(0).to(tl.int64) * (2 * width) + col
        tl.store(to, tl.sum(products, axis=0, keep_dims=True), mask=here)
        tl.store(to + width, tl.sum(levels, axis=0, keep_dims=True), mask=here)


@triton.jit
def condition_kernel(
    partial,
    w,
    b,
    scale,
    ds,
    dt,
    sums,
    parts,
    width,
    s_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    S: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
    SHIFT_GRAD: tl.constexpr,
    KEEP: tl.constexpr,
):
    """The parts of a group's programs, in their order, made its gradients and its part of the weight's."""
    group = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = col < width
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    levels = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)[:, None]
        ok = (part < parts) & here
        at = partial + (group * parts + part) * (2 * width) + col
        products += tl.load(at, mask=ok, other=0.0)
        levels += tl.load(at + width, mask=ok, other=0.0)
    product = tl.sum(products, axis=0, keep_dims=True)
    level = tl.sum(levels, axis=0, keep_dims=True)
    if SCALE_GRAD:
        v = product
        if WEIGHT:
            v = v * scale_of(tl.load(w + col, mask=here, other=0.0), ONE_PLUS, S)
        if BIAS:
            v = v + level * tl.load(b + col, mask=here, other=0.0).to(tl.float32)
        tl.store(ds + group * width + col, v.to(ds.dtype.element_ty), mask=here)
    if SHIFT_GRAD:
        tl.store(dt + group * width + col, level.to(dt.dtype.element_ty), mask=here)
    if KEEP:
        s = _one_plus(scale, group * s_stride + col, here)
        tl.store(sums + group * (2 * width) + col, product * s, mask=here)
        tl.store(sums + group * (2 * width) + width + col, level * s, mask=here)
