"""Launches of the kernels for LayerNorm, alone or after a residual add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.launch import Launcher, cdiv, multiprocessors, on_device, power_of_2, shared_memory
from twinkle.ops.layer_norm.triton_backend import across
from twinkle.ops.layer_norm.triton_kernels import (
    backward_kernel,
    forward_kernel,
    input_wide_kernel,
    reduce_two_kernel,
    sums_wide_kernel,
)
from twinkle.ops.layout import base_of
from twinkle.ops.rms_norm.triton import reduce_partial

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["backward", "forward"]

_ONE_PASS = 16384  # Widest row that forward holds in registers; wider ones are read twice.
_IN_LOOP = 8192  # Widest row of which backward holds the sums for weight and bias as well.

_launch_forward, _launch_backward = Launcher(forward_kernel), Launcher(backward_kernel)
_launch_input, _launch_sums = Launcher(input_wide_kernel), Launcher(sums_wide_kernel)
_launch_reduce = Launcher(reduce_two_kernel)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    stats: bool = True,
    residual: Tensor | None = None,
    scale: float | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward.

    Args:
        x: ``[..., width]``; contiguous where there is a ``residual``.
        weight: ``[width]`` or None.
        bias: ``[width]`` or None.
        eps: Added to the variance.
        stats: Whether backward will follow.
        residual: ``[..., width]``; ``residual + x`` is normalised, in the wider of the two dtypes.
        scale: On ``x`` before the sum.
        total: ``[..., width]``, laid out as ``residual``: the sum is written to it.

    Returns:
        The normalised rows, contiguous as torch's are, in the dtype of ``x`` or of the sum; and as
        ``[2, rows]`` in float32 their means and inverse deviations, or None.
    """
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    kept = torch.empty((2, rows), dtype=torch.float32, device=x.device) if stats else None
    if rows == 0:
        return y, kept
    if residual is None:
        x_rows, x_stride, per = _place(x)
        r_rows, r_stride = x_rows, x_stride
    else:  # what is added to it is contiguous
        (x_rows, x_stride), (r_rows, r_stride, per) = base_of(x), _place(residual)
    block = power_of_2(width)
    one_pass = block <= _ONE_PASS
    block = block if one_pass else 8192
    if per:
        height, warps = _rows_across(block, per, 8)
        grid: tuple[int, ...] = (cdiv(per, height), rows // per)
    else:
        height = max(1, min(2048 // block, power_of_2(rows)))
        grid, warps = (cdiv(rows, height),), max(1, min(16, block * height // 512))
    with on_device(x):
        _launch_forward(
            grid,
            (
                x_rows,
                r_rows,
                x_rows if weight is None else weight,
                x_rows if bias is None else bias,
                y if total is None else total,
                y,
                y if kept is None else kept,
            ),
            (
                rows,
                width,
                x_stride,
                r_stride,
                per or rows,
                float(eps),
                1.0 if scale is None else float(scale),
            ),
            BLOCK=block,
            ROWS=height,
            ONE_PASS=one_pass,
            ADD=residual is not None,
            SCALED=scale is not None,
            KEEP=total is not None,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            STATS=stats,
            EVEN=block == width,
            X_ACROSS=per is not None and residual is None,
            R_ACROSS=per is not None,
            num_warps=warps,
        )
    return y, kept


def _rows_across(block: int, per: int, least: int) -> tuple[int, int]:
    """Rows at a time of what lies channels first, and warps for them.

    The more rows lie side by side, the less of what is read is wasted; but with more than ``least`` wide rows
    registers go to memory, which takes ten times as long. Measured on an H200 with 96 to 1280 channels.
    """
    if block <= 1024:
        return min(64, 1024 * least // block, power_of_2(per)), 4 if block >= 512 else 8
    aligned = per % 16 == 0  # rows that are read several in one
    return min(least if aligned else least // 2, power_of_2(per)), 8 if aligned else 4


def _place(tensor: Tensor) -> tuple[Tensor, int, int | None]:
    """As :func:`base_of`, and the rows of a batch where the kernel takes the tensor channels first."""
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1], None
    per = across(tensor)
    return (*base_of(tensor), None) if per is None else (tensor, 1, per)


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
    dh: Tensor | None = None,
    scale: float | None = None,
    dx_dtype: torch.dtype | None = None,
    dr: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward.

    Args:
        dy: ``[..., width]``, of the normalised rows.
        x: As in forward; after an add, the sum.
        weight: As in forward.
        bias: As in forward.
        stats: ``[2, rows]``, as forward returned it.
        input_grad: Whether the gradient of ``x`` is wanted.
        weight_grad: Whether that of the weight is.
        bias_grad: Whether that of the bias is.
        dh: ``[..., width]``, what reaches the sum directly.
        scale: On the addend.
        dx_dtype: Of the addend, where it is not that of ``x``.
        dr: ``[..., width]``, contiguous: the gradient of the residual is written to it, where it is not that
            of the addend.

    Returns:
        Gradients of ``x`` (after an add, of the addend), weight and bias; None for one that is not wanted.
    """
    dx = torch.empty(x.shape, dtype=dx_dtype or x.dtype, device=x.device) if input_grad else None
    dw = torch.empty_like(weight) if weight is not None and weight_grad else None
    db = torch.empty_like(bias) if bias is not None and bias_grad else None
    if x.numel() == 0:
        return dx, None if dw is None else dw.zero_(), None if db is None else db.zero_()
    width = x.shape[-1]
    rows = x.numel() // width
    x_rows, x_stride, per = _place(x)
    dy_rows, dy_stride = base_of(dy)
    dh_rows, dh_stride = (dy_rows, dy_stride) if dh is None else base_of(dh)
    sums = (dw is not None) + (db is not None)
    numbers = (rows, width, dy_stride, dh_stride, x_stride, 1.0 if scale is None else float(scale))
    added = {"ADD": dh is not None, "SCALED": scale is not None, "SPLIT": dr is not None}
    w = x_rows if weight is None else weight
    dr_rows = x_rows if dr is None else dr
    block = power_of_2(width)
    flags = {"WEIGHT_GRAD": dw is not None, "BIAS_GRAD": db is not None}
    with on_device(x):
        if block <= _IN_LOOP:
            # As for rms_norm: two programs on a multiprocessor with three or four rows under way in each.
            height = max(1, min(4096 // block, power_of_2(rows)))
            warps = 4 if 256 < block < 4096 else 8 if block < 8192 else 16
            if per:
                height, warps = _rows_across(block, per, 4)
            tiles = cdiv(per, height) * (rows // per) if per else cdiv(rows, height)
            programs = min(tiles, multiprocessors(x.device) * 2)
            partial = _partial(programs, sums, width, x.device)
            stages = 4 if block * x.element_size() > 8192 else 3
            moved = block * height * (x.element_size() + dy.element_size() * (1 if dh is None else 2))
            _launch_backward(
                (programs,),
                (dy_rows, dh_rows, x_rows, w, stats, x_rows if dx is None else dx, dr_rows, partial),
                (*numbers[:-1], per or rows, numbers[-1]),
                BLOCK=block,
                ROWS=height,
                **added,
                WEIGHT=weight is not None,
                INPUT_GRAD=dx is not None,
                **flags,
                EVEN=block == width,
                STAGES=max(1, min(stages, shared_memory(x.device) // moved)),
                X_ACROSS=per is not None,
                num_warps=warps,
            )
        else:
            if dx is not None:
                _launch_input(
                    (rows,),
                    (dy_rows, dh_rows, x_rows, w, stats, dx, dr_rows),
                    numbers,
                    BLOCK=8192,
                    **added,
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
                    (rows, width, dy_stride, x_stride),
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
