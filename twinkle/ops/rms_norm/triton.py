"""Launches of the kernels for RMSNorm, alone or after a residual add."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from twinkle.ops.launch import Launcher, cdiv, multiprocessors, on_device, power_of_2, shared_memory, tl_dtype
from twinkle.ops.layout import base_of, fresh
from twinkle.ops.rms_norm.dtypes import roundings
from twinkle.ops.rms_norm.triton_kernels import (
    backward_kernel,
    backward_wide_kernel,
    forward_kernel,
    reduce_kernel,
    weight_wide_kernel,
)

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.ops.rms_norm.reference import RMSNormVariant

__all__ = ["backward", "constants_of", "forward", "reduce_partial"]

_ONE_PASS = 16384  # Widest row that is held in registers; wider ones are read twice, the second time from L2.

_launch_forward, _launch_backward, _launch_wide = (
    Launcher(forward_kernel),
    Launcher(backward_kernel),
    Launcher(backward_wide_kernel),
)
_launch_weight, _launch_reduce = Launcher(weight_wide_kernel), Launcher(reduce_kernel)


def reduce_partial(partial: Tensor, out: Tensor) -> None:
    """Sum ``[count, width]`` over its rows, in a fixed order, into ``out``."""
    count, width = partial.shape
    _launch_reduce((cdiv(width, 32),), (partial, out), (count, width), ROWS=64, BLOCK=32, num_warps=4)


@functools.lru_cache(maxsize=256)
def constants_of(variant: RMSNormVariant, x: torch.dtype, w: torch.dtype | None) -> dict[str, Any]:
    """The constants of the kernels that say where a variant rounds, for these dtypes of row and weight."""
    normal, scale, product, _ = roundings(variant, x, w)
    return {
        "ONE_PLUS": variant.weight == "one_plus",
        "COMPUTE": variant.compute,
        "DIVIDE": variant.inverse == "divide",
        "X": tl_dtype(x),
        "N": tl_dtype(normal),
        "S": tl_dtype(scale),
        "P": tl_dtype(product),
    }


@functools.lru_cache(maxsize=256)
def _form_of(variant: RMSNormVariant) -> dict[str, Any]:
    """The constants of the kernels that say what a variant divides a row by."""
    factor = {"norm_multiplied": "multiply", "norm_inverse": "multiply", "norm_divided": "divide"}
    return {
        "STAT": variant.statistic,
        "EPS": variant.eps_place,
        "FACTOR": factor.get(variant.scale, "none"),
        "GAIN": variant.scale if variant.scale in ("result", "rounded", "weighted") else "none",
    }


def forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    variant: RMSNormVariant,
    residual: Tensor | None = None,
    scale: float | None = None,
    number: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward.

    Args:
        x: ``[..., width]``.
        weight: ``[width]`` or None.
        eps: Added to the mean of squares.
        variant: Where it rounds.
        residual: ``[..., width]``; ``residual + x`` is normalised.
        scale: On ``x`` before the sum.
        number: The scale of the variant, or the width that it divides a sum by.

    Returns:
        The normalised rows, and the sum or None.
    """
    w_dtype = None if weight is None else weight.dtype
    y, order = fresh(x, roundings(variant, x.dtype, w_dtype)[3])
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
            (rows, width, x_stride, r_stride, float(eps), 1.0 if scale is None else float(scale), number),
            BLOCK=block,
            ROWS=height,
            ONE_PASS=one_pass,
            ADD=residual is not None,
            SCALED=scale is not None,
            WEIGHT=weight is not None,
            **constants_of(variant, x.dtype, w_dtype),
            **_form_of(variant),
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
    number: float = 1.0,
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
        number: As in forward.

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
        "S": constants_of(variant, x.dtype, None if weight is None else weight.dtype)["S"],
        **_form_of(variant),
    }
    factor = 1.0 if scale is None else float(scale)
    tensors = (dy_rows, dh_rows, x_rows, w, dx, dr)
    numbers = (rows, width, *strides, float(eps), factor, number)
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
