"""LayerNorm on the GPU, alone or after a residual add: one pass each way, whatever the layer is written as.

Bytes a row of ``n`` elements: forward ``2n`` (``4n`` after an add, ``3n`` where nobody wants the sum),
backward ``3n`` (``4n`` where something reaches the sum directly), and eight for its mean and its inverse
deviation, which forward keeps: with them the two sums of backward wait for nothing but the row. Everything is
computed in float32 and rounded once; the sum is rounded to its dtype before it is normalised, as the
definition rounds it. The gradients of weight and bias are one partial sum a program and one
reduction, in an order that depends on the shape and the device alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel", "input_wide_kernel", "reduce_two_kernel", "sums_wide_kernel"]


@triton.jit
def _affine(n, w, b, at, here, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    if WEIGHT:
        n = n * tl.load(w + at, mask=here, other=0.0).to(tl.float32)
    if BIAS:
        n = n + tl.load(b + at, mask=here, other=0.0).to(tl.float32)
    return n


@triton.jit
def _columns(col, per, ACROSS: tl.constexpr):
    """Where channels lie from the first one of a row: side by side, or across, ``per`` elements apart."""
    return col.to(tl.int64) * per if ACROSS else col


@triton.jit
def _rows(row, own, batch, width, per, stride, ACROSS: tl.constexpr):
    """Where rows begin: ``stride`` elements apart, or side by side in ``[batch, width, per]``."""
    return batch.to(tl.int64) * width * per + own if ACROSS else row * stride


@triton.jit
def _load(x, r, y, x_at, r_at, ok, x_row, r_row, scale, SCALED: tl.constexpr, ADD: tl.constexpr):
    """The row in float32; a sum rounded to the dtype of ``y``, which may be wider than that of an addend."""
    h = tl.load(x + x_row + x_at, mask=ok, other=0.0).to(tl.float32)
    if SCALED:
        h = (h * scale).to(x.dtype.element_ty).to(tl.float32)
    if ADD:
        h = (tl.load(r + r_row + r_at, mask=ok, other=0.0).to(tl.float32) + h).to(y.dtype.element_ty)
        h = h.to(tl.float32)
    return h


@triton.jit
def forward_kernel(
    x,
    r,
    w,
    b,
    total,
    y,
    stats,
    rows,
    width,
    x_stride,
    r_stride,
    per,
    eps,
    scale,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    STATS: tl.constexpr,
    EVEN: tl.constexpr,
    X_ACROSS: tl.constexpr,
    R_ACROSS: tl.constexpr,
):
    """``ROWS`` rows: the sum with ``r``, if there is one, and its norm. The sum is laid out as ``r``.

    A program has rows of one batch of ``per`` rows, which lie side by side where ``x`` or ``r`` is channels
    first; else all rows are one batch.
    """
    own, batch = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(1)
    inside = own < per
    row, col = batch.to(tl.int64) * per + own, tl.arange(0, BLOCK)[None, :]
    x_row = _rows(row, own, batch, width, per, x_stride, X_ACROSS)
    r_row = _rows(row, own, batch, width, per, r_stride, R_ACROSS)
    if ONE_PASS:
        here = col < width
        ok = inside if EVEN else inside & here
        x_at, r_at = _columns(col, per, X_ACROSS), _columns(col, per, R_ACROSS)
        h = _load(x, r, y, x_at, r_at, ok, x_row, r_row, scale, SCALED, ADD)
        if KEEP:
            tl.store(total + r_row + r_at, h.to(total.dtype.element_ty), mask=ok)
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
            h = _load(x, r, y, start + col, start + col, inside & here, x_row, r_row, scale, SCALED, ADD)
            if KEEP:
                tl.store(total + r_row + start + col, h.to(total.dtype.element_ty), mask=inside & here)
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
            h = _load(x, r, y, at, at, inside & here, x_row, r_row, scale, SCALED, ADD)
            n = _affine((h - mean) * root, w, b, at, here, WEIGHT, BIAS)
            tl.store(y + row * width + at, n.to(y.dtype.element_ty), mask=inside & here)
    if STATS:
        tl.store(stats + row, mean, mask=inside)
        tl.store(stats + rows + row, root, mask=inside)


@triton.jit
def backward_kernel(
    dy,
    dh,
    x,
    w,
    stats,
    dx,
    dr,
    partial,
    rows,
    width,
    dy_stride,
    dh_stride,
    x_stride,
    per,
    scale,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHT: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    X_ACROSS: tl.constexpr,
):
    """Gradients of rows that are held in registers, and a program's part of those of weight and bias.

    The rows of an iteration are of one batch of ``per``, as in forward.
    """
    col = tl.arange(0, BLOCK)[None, :]
    here = col < width
    if WEIGHT:
        s = tl.load(w + col, mask=here, other=0.0).to(tl.float32)
    if WEIGHT_GRAD:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIAS_GRAD:
        db = tl.zeros([ROWS, BLOCK], tl.float32)
    inverse_width = 1.0 / width
    tiles = tl.cdiv(per, ROWS)
    for tile in tl.range(tl.program_id(0), tiles * (rows // per), tl.num_programs(0), num_stages=STAGES):
        batch = tile // tiles
        own = (tile - batch * tiles) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        row, inside = batch.to(tl.int64) * per + own, own < per
        ok = inside if EVEN else inside & here
        at = _rows(row, own, batch, width, per, x_stride, X_ACROSS) + _columns(col, per, X_ACROSS)
        h = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        root = tl.load(stats + rows + row, mask=inside, other=0.0)
        n = (h - tl.load(stats + row, mask=inside, other=0.0)) * root
        if WEIGHT_GRAD:
            dw += g * n
        if BIAS_GRAD:
            db += g
        if INPUT_GRAD:
            scaled = g * s if WEIGHT else g
            level = tl.sum(scaled, axis=1, keep_dims=True) * inverse_width
            dot = tl.sum(scaled * n, axis=1, keep_dims=True) * inverse_width
            d = (scaled - level - n * dot) * root
            if ADD:
                d += tl.load(dh + row * dh_stride + col, mask=ok, other=0.0).to(tl.float32)
            if SPLIT:
                tl.store(dr + row * width + col, d.to(dr.dtype.element_ty), mask=ok)
            if SCALED:
                d = d * scale
            tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)
    # The place of this program in partial, whose shape is [programs, sums, width].
    to = partial + tl.program_id(0) * ((WEIGHT_GRAD + BIAS_GRAD) * width) + col
    if WEIGHT_GRAD:
        tl.store(to, tl.sum(dw, axis=0, keep_dims=True), mask=here)
        to += width
    if BIAS_GRAD:
        tl.store(to, tl.sum(db, axis=0, keep_dims=True), mask=here)


@triton.jit
def input_wide_kernel(
    dy,
    dh,
    x,
    w,
    stats,
    dx,
    dr,
    rows,
    width,
    dy_stride,
    dh_stride,
    x_stride,
    scale,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    """The gradient of a row that is read twice."""
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
        if ADD:
            d += tl.load(dh + row * dh_stride + col, mask=ok, other=0.0).to(tl.float32)
        if SPLIT:
            tl.store(dr + row * width + col, d.to(dr.dtype.element_ty), mask=ok)
        if SCALED:
            d = d * scale
        tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def sums_wide_kernel(
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
    """A program's part of the gradients of weight and bias, for columns of rows that are read twice."""
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
def reduce_two_kernel(partial, dw, db, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of all programs, in their order, made the gradients of weight and bias."""
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
