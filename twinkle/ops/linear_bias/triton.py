"""The sum of the rows of a matrix on the GPU, deterministic and in float32.

Each program sums a part of the rows of some columns, a second launch the parts. The matrix is read once: the
50 MB of 32768 x 768 take 12 us at 4.1 TB/s, where torch's own reduction takes 42 on an H200.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from twinkle.ops.launch import Launcher, cdiv, multiprocessors, on_device

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DIVISOR", "Tiling", "sum_rows"]

DIVISOR = 8
"""Of widths and strides, so that what lies side by side is read at once."""


class Tiling(NamedTuple):
    """How a matrix is shared out.

    Attributes:
        rows: That a program reads at a time.
        columns: The same: 128 are 256 bytes of a row in half precision.
        programs: For each multiprocessor.
        warps: Of a program.
    """

    rows: int = 32
    columns: int = 128
    programs: int = 4
    warps: int = 4


_TILING = Tiling()


# Of sizes none is special: what is recorded first of another size must not be compiled anew.
@triton.jit(do_not_specialize=["rows", "each", "width", "stride"])
def _partial(dy, sums, rows, each, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    width, stride = tl.multiple_of(width, 8), tl.multiple_of(stride, 8)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    there = column < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = part.to(tl.int64) * each
    for begin in range(0, each, ROWS):
        row = first + begin + tl.arange(0, ROWS)
        at = row[:, None] * stride + column[None, :]
        total += tl.load(dy + at, mask=(row < rows)[:, None] & there[None, :], other=0.0).to(tl.float32)
    tl.store(sums + part * width + column, tl.sum(total, axis=0), mask=there)


@triton.jit(do_not_specialize=["parts", "width"])
def _total(sums, out, parts, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    width = tl.multiple_of(width, 8)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, parts, ROWS):
        part = begin + tl.arange(0, ROWS)
        at = part[:, None] * width + column[None, :]
        total += tl.load(sums + at, mask=(part < parts)[:, None] & there[None, :], other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=there)


_launch_partial, _launch_total = Launcher(_partial), Launcher(_total)


def sum_rows(dy: Tensor, dtype: torch.dtype, tiling: Tiling = _TILING) -> Tensor:
    """The sum of the rows.

    Args:
        dy: ``[rows, width]``, neighbours in a row side by side in memory; width and stride are multiples of
            `DIVISOR`.
        dtype: Of the result.
        tiling: How it is shared out.

    Returns:
        ``[width]``.
    """
    rows, width = dy.shape
    blocks = cdiv(width, tiling.columns)
    wanted = max(1, tiling.programs * multiprocessors(dy.device) // blocks)
    each = cdiv(cdiv(rows, wanted), tiling.rows) * tiling.rows
    parts = cdiv(rows, each)
    sums = torch.empty((parts, width), dtype=torch.float32, device=dy.device)
    out = torch.empty(width, dtype=dtype, device=dy.device)
    sizes = {"ROWS": tiling.rows, "COLUMNS": tiling.columns, "num_warps": tiling.warps}
    with on_device(dy):
        _launch_partial((blocks, parts), (dy, sums), (rows, each, width, dy.stride(0)), **sizes)
        _launch_total((cdiv(width, 32),), (sums, out), (parts, width), ROWS=64, COLUMNS=32, num_warps=4)
    return out
