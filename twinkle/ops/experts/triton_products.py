"""Products of groups of rows on the GPU: with a matrix a group, and of two sets of rows group by group.

The host knows how many rows there are, not whose they are: each program finds its group itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from twinkle.ops.launch import Launcher, cdiv, on_device, power_of_2, shared_memory

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["outer", "rows"]


@triton.jit
def _rows(
    a,
    index,
    w,
    offsets,
    out,
    width,
    columns,
    experts,
    a_row,
    w_expert,
    w_row,
    w_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across = tl.cdiv(columns, BN)
    tile = tl.program_id(0) // across
    column = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    # Which expert's tile this is: nobody on the host knows how many rows each has.
    each = tl.arange(0, EXPERTS)
    first = tl.load(offsets + each, mask=each < experts, other=0)
    last = tl.load(offsets + each + 1, mask=each < experts, other=0)
    ends = tl.cumsum((last - first + BM - 1) // BM, 0)
    expert = tl.sum((ends <= tile).to(tl.int32))
    if expert < experts:
        begin = tl.sum(tl.where(each == expert, ends - (last - first + BM - 1) // BM, 0))
        start = tl.load(offsets + expert) + (tile - begin) * BM
        stop = tl.load(offsets + expert + 1)
        row = start + tl.arange(0, BM)
        inside = row < stop
        source = row
        if GATHER:
            source = tl.load(index + row, mask=inside, other=0)
        depth = tl.arange(0, BK)
        here = column < columns
        a_at = a + source.to(tl.int64)[:, None] * a_row + depth[None, :]
        w_at = (
            w
            + expert.to(tl.int64) * w_expert
            + depth.to(tl.int64)[:, None] * w_row
            + column.to(tl.int64)[None, :] * w_column
        )
        total = tl.zeros([BM, BN], tl.float32)
        for k in range(0, width, BK):
            if EVEN:
                left = tl.load(a_at, mask=inside[:, None], other=0.0)
                right = tl.load(w_at, mask=here[None, :], other=0.0)
            else:
                left = tl.load(a_at, mask=inside[:, None] & (k + depth < width)[None, :], other=0.0)
                right = tl.load(w_at, mask=here[None, :] & (k + depth < width)[:, None], other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            a_at += BK
            w_at += BK * w_row
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside[:, None] & here[None, :])


@triton.jit
def _outer(
    a,
    b,
    a_index,
    b_index,
    offsets,
    out,
    m,
    n,
    a_row,
    b_row,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across = tl.cdiv(n, BN)
    down = tl.cdiv(m, BM)
    expert = tl.program_id(0) // (across * down)
    tile = tl.program_id(0) % (across * down)
    i = (tile // across) * BM + tl.arange(0, BM)
    j = (tile % across) * BN + tl.arange(0, BN)
    start = tl.load(offsets + expert)
    stop = tl.load(offsets + expert + 1)
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(start, stop, BK):
        row = k + tl.arange(0, BK)
        inside = row < stop
        a_from = row
        b_from = row
        if GATHER_A:
            a_from = tl.load(a_index + row, mask=inside, other=0)
        if GATHER_B:
            b_from = tl.load(b_index + row, mask=inside, other=0)
        left = tl.load(
            a + a_from.to(tl.int64)[:, None] * a_row + i[None, :],
            mask=inside[:, None] & (i < m)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + b_from.to(tl.int64)[:, None] * b_row + j[None, :],
            mask=inside[:, None] & (j < n)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    at = (expert.to(tl.int64) * m + i[:, None]) * n + j[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(i < m)[:, None] & (j < n)[None, :])


_launch_rows, _launch_outer = Launcher(_rows), Launcher(_outer)


def _precision(dtype: torch.dtype) -> str:
    # Where the user lets torch's own products round float32 to tf32, so may these.
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _tile(tensor: Tensor, typical: int) -> dict[str, Any]:
    """Block sizes for groups of about ``typical`` rows."""
    if tensor.device.type != "cuda":
        return {"BM": 32, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 1}
    if tensor.dtype == torch.float32:
        high = 64 if typical > 32 else 32
        return {"BM": high, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    high = min(128, max(16, power_of_2(typical)))
    size = {"BM": high, "BN": 256 if high == 128 else 128, "BK": 64, "num_warps": 8 if high >= 64 else 4}
    stages = shared_memory(tensor.device) // ((size["BM"] + size["BN"]) * size["BK"] * 2)
    if stages < 2:
        return {**size, "BN": 128, "BK": 32, "num_stages": 2}
    return {**size, "num_stages": min(4, stages)}


def rows(a: Tensor, w: Tensor, offsets: Tensor, count: int, index: Tensor | None = None) -> Tensor:
    """Each row times the matrix of its expert.

    Args:
        a: ``[rows, width]``, or ``[tokens, width]`` with an index; channels adjacent.
        w: ``[experts, width, columns]``, any strides.
        offsets: ``[experts + 1]`` int32, where each expert's rows begin.
        count: How many rows.
        index: ``[rows]``, the row of ``a`` of each.

    Returns:
        ``[rows, columns]``.
    """
    experts, width, columns = w.shape
    out = torch.empty((count, columns), dtype=a.dtype, device=a.device)
    size = _tile(a, cdiv(count, experts))
    tiles = count // size["BM"] + min(experts, count)
    with on_device(a):
        _launch_rows(
            (tiles * cdiv(columns, size["BN"]),),
            (a, offsets if index is None else index, w, offsets, out),
            (width, columns, experts, a.stride(0), *w.stride()),
            EXPERTS=power_of_2(experts),
            GATHER=index is not None,
            EVEN=width % size["BK"] == 0,
            PRECISION=_precision(a.dtype),
            **size,
        )
    return out


def outer(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_index: Tensor | None = None,
    b_index: Tensor | None = None,
) -> Tensor:
    """``aᵀ b`` over the rows of each expert.

    Args:
        a: ``[rows, m]``, or ``[tokens, m]`` with an index; channels adjacent.
        b: ``[rows, n]``, as ``a``.
        offsets: ``[experts + 1]`` int32.
        a_index: ``[rows]``, the row of ``a`` of each.
        b_index: ``[rows]``, the row of ``b`` of each.

    Returns:
        ``[experts, m, n]``, zeros for an expert without rows.
    """
    experts, m, n = offsets.numel() - 1, a.shape[1], b.shape[1]
    out = torch.empty((experts, m, n), dtype=a.dtype, device=a.device)
    size = _tile(a, 128)
    with on_device(a):
        _launch_outer(
            (experts * cdiv(m, size["BM"]) * cdiv(n, size["BN"]),),
            (
                a,
                b,
                offsets if a_index is None else a_index,
                offsets if b_index is None else b_index,
                offsets,
                out,
            ),
            (m, n, a.stride(0), b.stride(0)),
            GATHER_A=a_index is not None,
            GATHER_B=b_index is not None,
            PRECISION=_precision(a.dtype),
            **size,
        )
    return out
