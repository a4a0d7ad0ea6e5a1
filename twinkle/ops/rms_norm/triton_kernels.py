"""RMSNorm on the GPU, alone or after a residual add; every rounding of the definition, one pass each way.

Bytes a row of ``n`` elements: forward reads and writes it once (``2n``; after an add ``4n``), backward
``3n`` (``4n``). The inverse root is computed again in backward, which has the row in registers anyway.
The gradient of the weight is one partial sum a program and one reduction, in an order that depends on
the shape and the device alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "backward_kernel",
    "backward_wide_kernel",
    "forward_kernel",
    "mean_square",
    "normalised",
    "reduce_kernel",
    "scale_of",
    "weight_wide_kernel",
]


@triton.jit
def _root(mean, eps, COMPUTE: tl.constexpr, X: tl.constexpr):
    if COMPUTE == "input":
        mean = mean.to(X).to(tl.float32)
        return tl.rsqrt((mean + eps).to(X).to(tl.float32)).to(X).to(tl.float32)
    root = tl.rsqrt(mean + eps)
    if COMPUTE == "statistics":
        root = root.to(X).to(tl.float32)
    return root


@triton.jit
def _divisor(mean, eps, COMPUTE: tl.constexpr, X: tl.constexpr):
    if COMPUTE == "input":
        mean = mean.to(X).to(tl.float32)
        return tl.sqrt_rn((mean + eps).to(X).to(tl.float32)).to(X).to(tl.float32)
    return tl.sqrt_rn(mean + eps)


@triton.jit
def _rounded(value, COMPUTE: tl.constexpr, X: tl.constexpr):
    if COMPUTE == "input":
        value = value.to(X).to(tl.float32)
    return value


@triton.jit
def _measured(
    h,
    squares,
    width,
    eps,
    number,
    STAT: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
    X: tl.constexpr,
):
    """The row over what the variant measures it by, in float32, rounded to X where it computes in that."""
    if STAT == "norm":
        root = squares
    elif STAT == "sum":
        root = _rounded(_rounded(squares, COMPUTE, X) / number, COMPUTE, X)
    else:
        root = _rounded(squares / width, COMPUTE, X)
    if EPS == "mean":
        root = _rounded(root + eps, COMPUTE, X)
    if not DIVIDE:
        return _rounded(h * _rounded(tl.rsqrt(root), COMPUTE, X), COMPUTE, X)
    root = _rounded(tl.sqrt_rn(root), COMPUTE, X)
    if FACTOR == "multiply":
        root = _rounded(root * number, COMPUTE, X)
    elif FACTOR == "divide":
        root = _rounded(root / number, COMPUTE, X)
    if EPS == "root":
        root = _rounded(root + eps, COMPUTE, X)
    elif EPS == "least":
        least = _rounded(eps + tl.zeros_like(root), COMPUTE, X)
        root = tl.where(root < least, least, root)  # and so a NaN stays one
    return _rounded(tl.div_rn(h, tl.broadcast_to(root, h.shape)), COMPUTE, X)


@triton.jit
def _slope(squares, width, eps, number, STAT: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr):
    """The inverse of a row's divisor ``r``, and how ``r`` changes with it: ``r'(q) / (q r)``, ``q = |h|``."""
    length = tl.sqrt_rn(squares)
    if STAT == "norm":
        factor = 1.0
        if FACTOR == "multiply":
            factor = number
        elif FACTOR == "divide":
            factor = 1.0 / number
    else:
        factor = 1.0 / tl.sqrt_rn(width + 0.0)
    root = length * factor
    divisor = root + eps if EPS == "root" else tl.where(root < eps, eps, root)
    slope = factor / (length * divisor)
    if EPS == "least":
        slope = tl.where(root < eps, 0.0, slope)
    if STAT == "norm":
        slope = tl.where(length == 0.0, 0.0, slope)
    else:
        # torch has no gradient there: that of the root of 0 is infinite.
        slope = tl.where(length == 0.0, float("nan"), slope)
    return 1.0 / divisor, slope


@triton.jit
def scale_of(w, ONE_PLUS: tl.constexpr, S: tl.constexpr):
    """The factor on the normalised row, in float32."""
    w = w.to(tl.float32)
    if ONE_PLUS:
        w = (1.0 + w).to(S).to(tl.float32)
    return w


@triton.jit
def normalised(h, mean, eps, COMPUTE: tl.constexpr, DIVIDE: tl.constexpr, X: tl.constexpr, N: tl.constexpr):
    """The row before the weight, rounded as the variant says, in float32."""
    if DIVIDE:
        n = tl.div_rn(h, tl.broadcast_to(_divisor(mean, eps, COMPUTE, X), h.shape))
    else:
        n = h * _root(mean, eps, COMPUTE, X)
    return n.to(N).to(tl.float32)


@triton.jit
def mean_square(h, width, COMPUTE: tl.constexpr, X: tl.constexpr):
    """Mean of squares of float32 rows that are 0 outside; the last axis is kept."""
    square = h * h
    if COMPUTE == "input":
        square = square.to(X).to(tl.float32)
    return tl.sum(square, axis=1, keep_dims=True) / width


@triton.jit
def _measure(h, width, STAT: tl.constexpr, EPS: tl.constexpr, COMPUTE: tl.constexpr, X: tl.constexpr):
    """What rows that are 0 outside are measured by: their mean of squares, or the sum for other measures."""
    if STAT == "mean" and EPS == "mean":
        return mean_square(h, width, COMPUTE, X)
    square = h * h
    if STAT != "norm":
        square = _rounded(square, COMPUTE, X)
    return tl.sum(square, axis=1, keep_dims=True)


@triton.jit
def _normal(
    h,
    measure,
    width,
    eps,
    number,
    STAT: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    GAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
    X: tl.constexpr,
    N: tl.constexpr,
):
    """The row before the weight, rounded as the variant says, in float32."""
    if STAT == "mean" and EPS == "mean":
        return normalised(h, measure, eps, COMPUTE, DIVIDE, X, N)
    n = _measured(h, measure, width, eps, number, STAT, EPS, FACTOR, COMPUTE, DIVIDE, X)
    if GAIN == "result":
        n = n * number
    n = n.to(N)
    if GAIN == "rounded":
        n = (n.to(tl.float32) * number).to(N)
    return n.to(tl.float32)


@triton.jit
def _weighed(n, w, number, GAIN: tl.constexpr, ONE_PLUS: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """The row times its weight."""
    n = (n * scale_of(w, ONE_PLUS, S)).to(P)
    if GAIN == "weighted":
        n = (n.to(tl.float32) * number).to(P)
    return n


@triton.jit
def _load(x, r, at, ok, x_row, scale, SCALED: tl.constexpr, X: tl.constexpr, r_row, ADD: tl.constexpr):
    h = tl.load(x + x_row + at, mask=ok, other=0.0).to(tl.float32)
    if SCALED:
        h = (h * scale).to(X).to(tl.float32)
    if ADD:
        h = (tl.load(r + r_row + at, mask=ok, other=0.0).to(tl.float32) + h).to(X).to(tl.float32)
    return h


@triton.jit
def forward_kernel(
    x,
    r,
    w,
    total,
    y,
    rows,
    width,
    x_stride,
    r_stride,
    eps,
    scale,
    number,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHT: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
    X: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    STAT: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    GAIN: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``ROWS`` rows: the sum with ``r``, if there is one, and its norm."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    col = tl.arange(0, BLOCK)[None, :]
    if ONE_PASS:
        ok = inside if EVEN else inside & (col < width)
        h = _load(x, r, col, ok, row * x_stride, scale, SCALED, X, row * r_stride, ADD)
        if ADD:
            tl.store(total + row * width + col, h.to(total.dtype.element_ty), mask=ok)
        measure = _measure(h, width, STAT, EPS, COMPUTE, X)
        n = _normal(h, measure, width, eps, number, STAT, EPS, FACTOR, GAIN, COMPUTE, DIVIDE, X, N)
        if WEIGHT:
            n = _weighed(n, tl.load(w + col, mask=col < width, other=0.0), number, GAIN, ONE_PLUS, S, P)
        tl.store(y + row * width + col, n.to(y.dtype.element_ty), mask=ok)
    else:
        measure = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, width, BLOCK):
            at = start + col
            ok = inside & (at < width)
            h = _load(x, r, at, ok, row * x_stride, scale, SCALED, X, row * r_stride, ADD)
            if ADD:
                tl.store(total + row * width + at, h.to(total.dtype.element_ty), mask=ok)
            measure += _measure(h, width, STAT, EPS, COMPUTE, X)
        for start in range(0, width, BLOCK):
            at = start + col
            ok = inside & (at < width)
            h = _load(x, r, at, ok, row * x_stride, scale, SCALED, X, row * r_stride, ADD)
            n = _normal(h, measure, width, eps, number, STAT, EPS, FACTOR, GAIN, COMPUTE, DIVIDE, X, N)
            if WEIGHT:
                n = _weighed(n, tl.load(w + at, mask=at < width, other=0.0), number, GAIN, ONE_PLUS, S, P)
            tl.store(y + row * width + at, n.to(y.dtype.element_ty), mask=ok)


@triton.jit
def backward_kernel(
    dy,
    dh,
    x,
    w,
    dx,
    dr,
    partial,
    rows,
    width,
    dy_stride,
    dh_stride,
    x_stride,
    eps,
    scale,
    number,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    S: tl.constexpr,
    STAT: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    GAIN: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of rows that are held in registers, and a partial sum a program of that of the weight."""
    col = tl.arange(0, BLOCK)[None, :]
    here = col < width
    if WEIGHT:
        s = scale_of(tl.load(w + col, mask=here, other=0.0), ONE_PLUS, S)
    if WEIGHT_GRAD:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    inverse_width = 1.0 / number if STAT == "sum" else 1.0 / width
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        ok = row < rows if EVEN else (row < rows) & here
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        if ADD:
            more = tl.load(dh + row * dh_stride + col, mask=ok, other=0.0).to(tl.float32)
        if GAIN != "none":
            g = g * number
        scaled = g * s if WEIGHT else g
        # Neither sum waits for the other: the chain from load to store is what a program spends its time on.
        square = tl.sum(h * h, axis=1, keep_dims=True) * inverse_width
        dot = tl.sum(scaled * h, axis=1, keep_dims=True) * inverse_width
        if EPS == "mean":
            root = tl.rsqrt(square + eps)
            root = tl.where(row < rows, root, 0.0)  # no row: 0 / 0 with eps = 0 would reach the weight
            n = h * root
            d = (scaled - n * (dot * root)) * root
        else:
            root, slope = _slope(square * width, width, eps, number, STAT, EPS, FACTOR)
            root = tl.where(row < rows, root, 0.0)
            n = h * root
            d = (scaled - h * (dot * width * slope)) * root
        if WEIGHT_GRAD:
            dw += g * n
        if ADD:
            d += more
        if SCALED:
            tl.store(dr + row * width + col, d.to(dr.dtype.element_ty), mask=ok)
            d = d.to(dr.dtype.element_ty).to(tl.float32) * scale
        tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)
    if WEIGHT_GRAD:
        tl.store(partial + tl.program_id(0) * width + col, tl.sum(dw, axis=0, keep_dims=True), mask=here)


@triton.jit
def backward_wide_kernel(
    dy,
    dh,
    x,
    w,
    dx,
    dr,
    roots,
    rows,
    width,
    dy_stride,
    dh_stride,
    x_stride,
    eps,
    scale,
    number,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHT: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    S: tl.constexpr,
    STAT: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    GAIN: tl.constexpr,
):
    """Gradients of one row that is read twice."""
    inverse_width = 1.0 / number if STAT == "sum" else 1.0 / width
    gain = 1.0
    if GAIN != "none":
        gain = number
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        ok = col < width
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT:
            g *= scale_of(tl.load(w + col, mask=ok, other=0.0), ONE_PLUS, S)
        squares += h * h
        products += g * h
    if EPS == "mean":
        root = tl.rsqrt(tl.sum(squares) * inverse_width + eps)
        dot = tl.sum(products) * root * inverse_width * root
    else:
        root, slope = _slope(tl.sum(squares), width, eps, number, STAT, EPS, FACTOR)
        dot = tl.sum(products) * slope
    root = root * gain
    tl.store(roots + row, root)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        ok = col < width
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT:
            g *= scale_of(tl.load(w + col, mask=ok, other=0.0), ONE_PLUS, S)
        d = (g - h * dot) * root
        if ADD:
            d += tl.load(dh + row * dh_stride + col, mask=ok, other=0.0).to(tl.float32)
        if SCALED:
            tl.store(dr + row * width + col, d.to(dr.dtype.element_ty), mask=ok)
            d = d.to(dr.dtype.element_ty).to(tl.float32) * scale
        tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def weight_wide_kernel(
    dy, x, roots, partial, rows, width, dy_stride, x_stride, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Partial sums of the weight's gradient over rows whose roots are known."""
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = col < width
    dw = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.zeros([1], tl.int64) + first
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        dw += g * (h * tl.load(roots + row))
    tl.store(partial + tl.program_id(0) * width + col, dw, mask=ok)


@triton.jit
def reduce_kernel(partial, out, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of partial sums over the programs, in a fixed order."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + row * width + col, mask=(row < count) & (col < width), other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out + col, total.to(out.dtype.element_ty), mask=col < width)
