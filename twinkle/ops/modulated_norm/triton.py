"""Launches of the kernels for adaptive norms."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from twinkle.ops.launch import Launcher, cdiv, multiprocessors, on_device, power_of_2, shared_memory, tl_dtype
from twinkle.ops.layer_norm.triton_kernels import reduce_two_kernel
from twinkle.ops.layout import base_of
from twinkle.ops.modulated_norm.dtypes import dtypes_of
from twinkle.ops.modulated_norm.triton_kernels import backward_kernel, condition_kernel, forward_kernel
from twinkle.ops.rms_norm.reference import RMSNormVariant
from twinkle.ops.rms_norm.triton import constants_of

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.ops.modulated_norm.reference import ModulatedNormVariant

__all__ = ["backward", "forward"]

_launch_forward, _launch_backward = Launcher(forward_kernel), Launcher(backward_kernel)
_launch_condition, _launch_reduce = Launcher(condition_kernel), Launcher(reduce_two_kernel)


@functools.lru_cache(maxsize=256)
def _norm_constants(variant: ModulatedNormVariant, x: torch.dtype, w: torch.dtype | None) -> dict[str, Any]:
    given = torch.float32 if variant.upcast else x
    if isinstance(variant.norm, RMSNormVariant):
        return {"RMS": True, **constants_of(variant.norm, given, w)}
    wide = tl_dtype(torch.float32)
    rest = {
        "ONE_PLUS": False,
        "COMPUTE": "float32",
        "DIVIDE": False,
        "X": wide,
        "N": wide,
        "S": wide,
        "P": wide,
    }
    return {"RMS": False, **rest}


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor | None,
    variant: ModulatedNormVariant,
    dtype: torch.dtype | None = None,
    *,
    stats: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward.

    Args:
        x: ``[..., width]``.
        weight: ``[width]`` or None.
        bias: ``[width]`` or None.
        eps: Of the norm.
        scale: ``[groups…, 1…, width]``: the leading dimensions of ``x``, the last of them 1.
        shift: As ``scale``, or None.
        variant: Which norm.
        dtype: Of the result; None is what torch promotes to.
        stats: Whether backward will follow.

    Returns:
        The result, contiguous, and as ``[2, rows]`` in float32 the means (0 for an RMSNorm) and inverse
        roots of its rows, or None.
    """
    w_dtype = None if weight is None else weight.dtype
    normed, product, total = dtypes_of(
        variant, x.dtype, w_dtype, scale.dtype, None if shift is None else shift.dtype
    )
    y = torch.empty(x.shape, dtype=dtype or total, device=x.device)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    kept = torch.empty((2, rows), dtype=torch.float32, device=x.device) if stats else None
    if rows == 0:
        return y, kept
    x_rows, x_stride = base_of(x)
    s_rows, s_stride = base_of(scale)
    t_rows, t_stride = (s_rows, s_stride) if shift is None else base_of(shift)
    block = power_of_2(width)
    height = max(1, min(2048 // block, power_of_2(rows)))
    with on_device(x):
        _launch_forward(
            (cdiv(rows, height),),
            (
                x_rows,
                x_rows if weight is None else weight,
                x_rows if bias is None else bias,
                s_rows,
                t_rows,
                y,
                y if kept is None else kept,
            ),
            (rows, width, rows // (scale.numel() // width), x_stride, s_stride, t_stride, float(eps)),
            BLOCK=block,
            ROWS=height,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            **_norm_constants(variant, x.dtype, w_dtype),
            NORMED=tl_dtype(normed),
            PRODUCT=tl_dtype(product),
            SUM=tl_dtype(total),
            SHIFT=shift is not None,
            STATS=stats,
            EVEN=block == width,
            num_warps=max(1, min(16, block * height // 512)),
            # A product and a sum are two roundings in torch.
            enable_fp_fusion=False,
        )
    return y, kept


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    variant: ModulatedNormVariant,
    *,
    shift_dtype: torch.dtype | None,
    input_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = True,
    scale_grad: bool = True,
    shift_grad: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward.

    Args:
        dy: ``[..., width]``.
        x: As in forward.
        weight: As in forward.
        bias: As in forward.
        scale: As in forward.
        stats: ``[2, rows]``, as forward returned it.
        variant: As in forward.
        shift_dtype: The dtype of the shift, which has as many elements as ``scale``; None for none.
        input_grad: Whether the gradient of ``x`` is wanted.
        weight_grad: Whether that of the weight is.
        bias_grad: Whether that of the bias is.
        scale_grad: Whether that of the scale is.
        shift_grad: Whether that of the shift is.

    Returns:
        Gradients of ``x``, weight, bias, scale and shift; None for one that is not wanted.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if input_grad else None
    dw = torch.empty_like(weight) if weight is not None and weight_grad else None
    db = torch.empty_like(bias) if bias is not None and bias_grad else None
    ds = torch.empty(scale.shape, dtype=scale.dtype, device=x.device) if scale_grad else None
    wanted = shift_dtype is not None and shift_grad
    dt = torch.empty(scale.shape, dtype=shift_dtype, device=x.device) if wanted else None
    if x.numel() == 0:
        made = (dx, dw, db, ds, dt)
        return tuple(None if one is None else one.zero_() for one in made)  # type: ignore[return-value]
    width = x.shape[-1]
    rows = x.numel() // width
    groups = scale.numel() // width
    token = groups == rows
    own = dw is not None or db is not None
    sums = own or (not token and (ds is not None or dt is not None))
    x_rows, x_stride = base_of(x)
    dy_rows, dy_stride = base_of(dy)
    s_rows, s_stride = base_of(scale)
    block = power_of_2(width)
    span = rows if token else rows // groups
    height = max(1, min(4096 // block, power_of_2(span)))
    # As for layer_norm: two programs on a multiprocessor, over all groups.
    parts = min(cdiv(span, height), max(1, cdiv(multiprocessors(x.device) * 2, rows // span)))
    programs = (rows // span) * parts
    partial = torch.empty((programs, 2, width) if sums else 1, dtype=torch.float32, device=x.device)
    w = x_rows if weight is None else weight
    b = x_rows if bias is None else bias
    constants = _norm_constants(variant, x.dtype, None if weight is None else weight.dtype)
    norm = {
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "ONE_PLUS": constants["ONE_PLUS"],
        "S": constants["S"],
    }
    flags = {"SCALE_GRAD": ds is not None, "SHIFT_GRAD": dt is not None}
    moved = block * height * (x.element_size() + dy.element_size() + (scale.element_size() if token else 0))
    stages = 4 if block * x.element_size() > 8192 else 3
    spare = x_rows
    with on_device(x):
        _launch_backward(
            (programs,),
            (
                dy_rows,
                x_rows,
                w,
                b,
                s_rows,
                stats,
                spare if dx is None else dx,
                spare if ds is None else ds,
                spare if dt is None else dt,
                partial,
            ),
            (rows, width, span, parts, dy_stride, x_stride, s_stride),
            BLOCK=block,
            ROWS=height,
            TOKEN=token,
            RMS=constants["RMS"],
            **norm,
            INPUT_GRAD=dx is not None,
            **flags,
            SUMS=sums,
            EVEN=block == width,
            STAGES=max(1, min(stages, shared_memory(x.device) // moved)),
            num_warps=4 if 256 < block < 4096 else 8 if block < 8192 else 16,
        )
        if sums and not token:
            kept = torch.empty((groups, 2, width) if own else 1, dtype=torch.float32, device=x.device)
            columns = 32 if groups < 16 else 128
            _launch_condition(
                (groups, cdiv(width, columns)),
                (partial, w, b, s_rows, spare if ds is None else ds, spare if dt is None else dt, kept),
                (parts, width, s_stride),
                ROWS=max(1, min(64, power_of_2(parts))),
                BLOCK=columns,
                **norm,
                **flags,
                KEEP=own,
                num_warps=4,
            )
            partial, programs = kept, groups
        if own:
            to_dw = torch.empty_like(db) if dw is None else dw
            _launch_reduce(
                (cdiv(width, 32), 2),
                (partial, to_dw, torch.empty_like(to_dw) if db is None else db),
                (programs, width),
                ROWS=64,
                BLOCK=32,
                num_warps=4,
            )
    return dx, dw, db, ds, dt
