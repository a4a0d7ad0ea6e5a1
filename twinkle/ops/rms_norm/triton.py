"""RMSNorm on the GPU, alone or after a residual add; every rounding of the definition, one pass each way.

Bytes a row of ``n`` elements: forward reads and writes it once (``2n``; after an add ``4n``), backward
``3n`` (``4n``). The inverse root is computed again in backward, which has the row in registers anyway.
The gradient of the weight is one partial sum a program and one reduction, in an order that depends on
the shape and the device alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from twinkle.ops.launch import (
    Launcher,
    base_of,
    cdiv,
    fresh,
    multiprocessors,
    on_device,
    power_of_2,
    shared_memory,
    tl_dtype,
)

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.ops.rms_norm.reference import RMSNormVariant

__all__ = ["backward", "forward", "mean_square", "normalised", "reduce_partial", "roundings", "scale_of"]

_ONE_PASS = 16384  # Widest row that is held in registers; wider ones are read twice, the second time from L2.


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
def _load(x, r, at, ok, x_row, scale, SCALED: tl.constexpr, X: tl.constexpr, r_row, ADD: tl.constexpr):
    h = tl.load(x + x_row + at, mask=ok, other=0.0).to(tl.float32)
    if SCALED:
        h = (h * scale).to(X).to(tl.float32)
    if ADD:
        h = (tl.load(r + r_row + at, mask=ok, other=0.0).to(tl.float32) + h).to(X).to(tl.float32)
    return h


@triton.jit
def _forward(
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
    EVEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    col = tl.arange(0, BLOCK)[None, :]
    if ONE_PASS:
        ok = inside if EVEN else inside & (col < width)
        h = _load(x, r, col, ok, row * x_stride, scale, SCALED, X, row * r_stride, ADD)
        if ADD:
            tl.store(total + row * width + col, h.to(total.dtype.element_ty), mask=ok)
        n = normalised(h, mean_square(h, width, COMPUTE, X), eps, COMPUTE, DIVIDE, X, N)
        if WEIGHT:
            s = scale_of(tl.load(w + col, mask=col < width, other=0.0), ONE_PLUS, S)
            n = (n * s).to(P)
        tl.store(y + row * width + col, n.to(y.dtype.element_ty), mask=ok)
    else:
        mean = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, width, BLOCK):
            at = start + col
            ok = inside & (at < width)
            h = _load(x, r, at, ok, row * x_stride, scale, SCALED, X, row * r_stride, ADD)
            if ADD:
                tl.store(total + row * width + at, h.to(total.dtype.element_ty), mask=ok)
            mean += mean_square(h, width, COMPUTE, X)
        for start in range(0, width, BLOCK):
            at = start + col
            ok = inside & (at < width)
            h = _load(x, r, at, ok, row * x_stride, scale, SCALED, X, row * r_stride, ADD)
            n = normalised(h, mean, eps, COMPUTE, DIVIDE, X, N)
            if WEIGHT:
                s = scale_of(tl.load(w + at, mask=at < width, other=0.0), ONE_PLUS, S)
                n = (n * s).to(P)
            tl.store(y + row * width + at, n.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _backward(
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
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    S: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    col = tl.arange(0, BLOCK)[None, :]
    here = col < width
    if WEIGHT:
        s = scale_of(tl.load(w + col, mask=here, other=0.0), ONE_PLUS, S)
    if WEIGHT_GRAD:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    inverse_width = 1.0 / width
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        ok = row < rows if EVEN else (row < rows) & here
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        if ADD:
            more = tl.load(dh + row * dh_stride + col, mask=ok, other=0.0).to(tl.float32)
        scaled = g * s if WEIGHT else g
        # Neither sum waits for the other: the chain from load to store is what a program spends its time on.
        square = tl.sum(h * h, axis=1, keep_dims=True) * inverse_width
        dot = tl.sum(scaled * h, axis=1, keep_dims=True) * inverse_width
        root = tl.rsqrt(square + eps)
        root = tl.where(row < rows, root, 0.0)  # no row: 0 / 0 with eps = 0 would reach the weight
        n = h * root
        if WEIGHT_GRAD:
            dw += g * n
        d = (scaled - n * (dot * root)) * root
        if ADD:
            d += more
        if SCALED:
            tl.store(dr + row * width + col, d.to(dr.dtype.element_ty), mask=ok)
            d = d.to(dr.dtype.element_ty).to(tl.float32) * scale
        tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)
    if WEIGHT_GRAD:
        tl.store(partial + tl.program_id(0) * width + col, tl.sum(dw, axis=0, keep_dims=True), mask=here)


@triton.jit
def _backward_wide(
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
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHT: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    S: tl.constexpr,
):
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
    root = tl.rsqrt(tl.sum(squares) / width + eps)
    dot = tl.sum(products) * root / width
    tl.store(roots + row, root)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        ok = col < width
        h = tl.load(x + row * x_stride + col, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + col, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT:
            g *= scale_of(tl.load(w + col, mask=ok, other=0.0), ONE_PLUS, S)
        d = (g - h * root * dot) * root
        if ADD:
            d += tl.load(dh + row * dh_stride + col, mask=ok, other=0.0).to(tl.float32)
        if SCALED:
            tl.store(dr + row * width + col, d.to(dr.dtype.element_ty), mask=ok)
            d = d.to(dr.dtype.element_ty).to(tl.float32) * scale
        tl.store(dx + row * width + col, d.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def _weight_wide(
    dy, x, roots, partial, rows, width, dy_stride, x_stride, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
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
def _reduce(partial, out, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + row * width + col, mask=(row < count) & (col < width), other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out + col, total.to(out.dtype.element_ty), mask=col < width)


_launch_forward, _launch_backward, _launch_wide = (
    Launcher(_forward),
    Launcher(_backward),
    Launcher(_backward_wide),
)
_launch_weight, _launch_reduce = Launcher(_weight_wide), Launcher(_reduce)


def reduce_partial(partial: Tensor, out: Tensor) -> None:
    """Sum ``[count, width]`` over its rows, in a fixed order, into ``out``."""
    count, width = partial.shape
    _launch_reduce((cdiv(width, 32),), (partial, out), (count, width), ROWS=64, BLOCK=32, num_warps=4)


@functools.lru_cache(maxsize=256)
def roundings(
    variant: RMSNormVariant, x: torch.dtype, w: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
    """The dtypes of the normalised row, of ``1 + w``, of their product and of the result."""
    normal = x if variant.compute in ("statistics", "input") else torch.float32
    if variant.cast == "before_weight" and variant.compute != "fused":
        normal = x
    if variant.cast == "half_weight" and w in (torch.float16, torch.bfloat16):
        normal = w
    scale = torch.float32
    product = normal
    if w is not None and variant.weight != "none" and variant.compute != "fused":
        applied = w if variant.weight_cast == "none" else torch.float32
        if variant.weight_cast != "float32":
            scale = w
        product = torch.promote_types(normal, applied)
    out = x if variant.cast == "after_weight" or variant.compute == "fused" else product
    return normal, scale, product, out


def forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    variant: RMSNormVariant,
    residual: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward.

    Args:
        x: ``[..., width]``.
        weight: ``[width]`` or None.
        eps: Added to the mean of squares.
        variant: Where it rounds.
        residual: ``[..., width]``; ``residual + x`` is normalised.
        scale: On ``x`` before the sum.

    Returns:
        The normalised rows, and the sum or None.
    """
    normal, one_plus, product, out_dtype = roundings(
        variant, x.dtype, None if weight is None else weight.dtype
    )
    y, order = fresh(x, out_dtype)
    width = x.shape[-1]
    total = None if residual is None else torch.empty_like(y, dtype=x.dtype)
    if y.numel() == 0:
        return y, total
    x_rows, x_stride = base_of(x, order)
    r_rows, r_stride = (x_rows, x_stride) if residual is None else base_of(residual, order)
    rows = x.numel() // width
    block = power_of_2(width)
    one_pass = block <= _ONE_PASS
    block = block if one_pass else 8192
    height = max(1, min(2048 // block, power_of_2(rows)))
    with on_device(x):
        w = weight if weight is not None else x_rows
        _launch_forward(
            (cdiv(rows, height),),
            (x_rows, r_rows, w, total if total is not None else y, y),
            (rows, width, x_stride, r_stride, float(eps), 1.0 if scale is None else float(scale)),
            BLOCK=block,
            ROWS=height,
            ONE_PASS=one_pass,
            ADD=residual is not None,
            SCALED=scale is not None,
            WEIGHT=weight is not None,
            ONE_PLUS=variant.weight == "one_plus",
            COMPUTE=variant.compute,
            DIVIDE=variant.inverse == "divide",
            X=tl_dtype(x.dtype),
            N=tl_dtype(normal),
            S=tl_dtype(one_plus),
            P=tl_dtype(product),
            EVEN=block == width,
            num_warps=_warps(block * height),
        )
    return y, total


def _warps(elements: int) -> int:
    return max(1, min(16, elements // 512))


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    variant: RMSNormVariant,
    dh: Tensor | None = None,
    scale: float | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the backward.

    Args:
        dy: ``[..., width]``, of the normalised rows.
        x: ``[..., width]``, what was normalised: the sum, after an add.
        weight: ``[width]`` or None.
        eps: As in forward.
        variant: As in forward.
        dh: ``[..., width]``, what reaches the sum directly.
        scale: On the addend.
        weight_grad: Whether the gradient of the weight is wanted.

    Returns:
        Gradients of the addend (of ``x`` without an add), of the residual (the same tensor unless
        there is a scale) and of the weight.
    """
    dx, order = fresh(x)
    dr = dx if scale is None else torch.empty_like(dx)
    dw = torch.empty_like(weight) if weight is not None and weight_grad else None
    if x.numel() == 0:
        return dx, dr, dw.zero_() if dw is not None else None
    width = x.shape[-1]
    rows = x.numel() // width
    x_rows, x_stride = base_of(x, order)
    dy_rows, dy_stride = base_of(dy, order)
    dh_rows, dh_stride = (dy_rows, dy_stride) if dh is None else base_of(dh, order)
    block = power_of_2(width)
    w = x_rows if weight is None else weight
    strides = (dy_stride, dh_stride, x_stride)
    flags: dict[str, Any] = {
        "ADD": dh is not None,
        "SCALED": scale is not None,
        "WEIGHT": weight is not None,
        "ONE_PLUS": variant.weight == "one_plus",
        "S": tl_dtype(roundings(variant, x.dtype, None if weight is None else weight.dtype)[1]),
    }
    factor = 1.0 if scale is None else float(scale)
    tensors = (dy_rows, dh_rows, x_rows, w, dx, dr)
    numbers = (rows, width, *strides, float(eps), factor)
    with on_device(x):
        if block <= _ONE_PASS // 2:
            height = max(1, min(4096 // block, power_of_2(rows)))
            # Two programs on a multiprocessor with three rows under way in each: fewer do not hide the
            # latency, more are slower (H200, 4096 wide: 86, 69 and 69 % of the copy bandwidth for 2, 4, 8).
            # Rows over 4096 fill a multiprocessor by themselves and want a stage more.
            programs = min(cdiv(rows, height), multiprocessors(x.device) * 2)
            partial = torch.empty(
                (programs, width) if dw is not None else 1, dtype=torch.float32, device=x.device
            )
            stages = 4 if block * x.element_size() > 8192 else 3
            moved = block * height * x.element_size() * (3 if dh is not None else 2)
            _launch_backward(
                (programs,),
                (*tensors, partial),
                numbers,
                BLOCK=block,
                ROWS=height,
                WEIGHT_GRAD=dw is not None,
                EVEN=block == width,
                STAGES=max(1, min(stages, shared_memory(x.device) // moved)),
                **flags,
                num_warps=8 if block <= 256 or block >= 8192 else 4,
            )
        else:
            roots = torch.empty(rows, dtype=torch.float32, device=x.device)
            _launch_wide((rows,), (*tensors, roots), numbers, BLOCK=8192, **flags, num_warps=16)
            if dw is not None:
                columns = cdiv(width, 2048)
                programs = min(rows, max(1, multiprocessors(x.device) * 8 // columns))
                partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
                _launch_weight(
                    (programs, columns),
                    (dy_rows, x_rows, roots, partial),
                    (rows, width, strides[0], strides[2]),
                    BLOCK=2048,
                    STAGES=2,
                    num_warps=4,
                )
        if dw is not None:
            reduce_partial(partial, dw)
    return dx, dr, dw
