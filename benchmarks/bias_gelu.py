"""A candidate that `fused_places.py` measures: the bias of a linear layer and its GELU as one triton kernel.

The product is computed without its bias. Forward reads what it made and writes the activated value: two
elements moved for each. Backward reads both gradients' factors, writes the gradient of the product, and sums
that of the bias in the same pass: each program adds the rows of one block of columns, and a second kernel
adds these sums in their order.

It is not in the package: `docs/decisions/0025-what-pays-beside-a-matrix-product.md` says what was measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from twinkle.ops.launch import multiprocessors
from twinkle.ops.rms_norm.triton import reduce_partial

__all__ = ["bias_gelu"]

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_PEAK = tl.constexpr(0.3989422804014327)  # of the normal distribution


@triton.jit
def _forward_kernel(h, b, y, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    ok = (row < rows) & (column < width)
    at = row.to(tl.int64) * width + column
    x = tl.load(h + at, mask=ok, other=0.0).to(tl.float32)
    x += tl.load(b + column, mask=column < width, other=0.0).to(tl.float32)
    # As the product with a bias rounds it.
    x = x.to(h.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (0.5 * x * (1.0 + tl.erf(x * _ROOT_HALF))).to(y.dtype.element_ty), mask=ok)


@triton.jit
def _backward_kernel(dy, h, b, dh, partial, rows, width, each, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``each`` rows of a block of columns."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < width
    bias = tl.load(b + column, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        ok = (row < last) & inside
        at = row.to(tl.int64) * width + column
        x = tl.load(h + at, mask=ok, other=0.0).to(tl.float32) + bias
        x = x.to(h.dtype.element_ty).to(tl.float32)
        g = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
        slope = 0.5 * (1.0 + tl.erf(x * _ROOT_HALF)) + x * _PEAK * tl.exp(-0.5 * x * x)
        d = (g * slope).to(dh.dtype.element_ty)
        tl.store(dh + at, d, mask=ok)
        # As autograd does, of the rounded gradient.
        sums += tl.where(ok, d.to(tl.float32), 0.0)
    total = tl.sum(sums, axis=0, keep_dims=True)
    tl.store(partial + tl.program_id(0) * width + column, total, mask=inside)


class _BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(h)
        width = h.shape[-1]
        rows = h.numel() // width
        grid = (triton.cdiv(rows, 8), triton.cdiv(width, 512))
        _forward_kernel[grid](h, b, y, rows, width, ROWS=8, BLOCK=512, num_warps=8)
        ctx.save_for_backward(h, b)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, b = ctx.saved_tensors
        width = h.shape[-1]
        rows = h.numel() // width
        block, tall = 256, 8
        # Four programs for each multiprocessor: few sums for the second stage, and none waits.
        wanted = max(1, 4 * multiprocessors(h.device) // triton.cdiv(width, block))
        each = triton.cdiv(triton.cdiv(rows, wanted), tall) * tall
        blocks = triton.cdiv(rows, each)
        dh = torch.empty_like(h)
        partial = torch.empty(blocks, width, dtype=torch.float32, device=h.device)
        grid = (blocks, triton.cdiv(width, block))
        _backward_kernel[grid](
            dy.contiguous(), h, b, dh, partial, rows, width, each, ROWS=tall, BLOCK=block, num_warps=8
        )
        db = torch.empty_like(b)
        reduce_partial(partial, db)
        return dh, db


def bias_gelu(h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``F.gelu(h + b)``, with the gradient of ``b`` from the kernel of backward.

    Args:
        h: ``[..., width]``, contiguous: a product without its bias.
        b: ``[width]``.
    """
    found: torch.Tensor = _BiasGELU.apply(h, b)
    return found
