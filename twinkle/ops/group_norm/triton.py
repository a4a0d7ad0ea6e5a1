"""Launches of the kernels for GroupNorm, alone or with the SiLU that follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.group_norm.triton_kernels import backward_kernel, forward_kernel
from twinkle.ops.launch import Launcher, cdiv, multiprocessors, on_device, power_of_2
from twinkle.ops.layer_norm.triton_kernels import reduce_two_kernel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["backward", "forward", "strides_of"]

_launch_forward, _launch_backward = Launcher(forward_kernel), Launcher(backward_kernel)
_launch_reduce = Launcher(reduce_two_kernel)


def strides_of(x: Tensor) -> tuple[int, int, int] | None:
    """Elements from a sample, a channel and a place to the next; None where the places have no one stride.

    Args:
        x: ``[samples, channels, ...]``.
    """
    samples, channels = x.shape[:2]
    places = x.numel() // max(1, samples * channels)
    if x.is_contiguous():
        return channels * places, places, 1
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return channels * places, 1, channels
    return None


def _tile(channels: int, places: int, adjacent: bool, programs: int, device: torch.device) -> tuple[int, ...]:
    """Channels and places that a program looks at at once, and its warps: more where programs are few."""
    few = programs < 2 * multiprocessors(device)
    size = 8192 if few else 4096
    if adjacent:
        block = min(power_of_2(places), 2048)
        height = max(1, min(size // block, power_of_2(channels)))
    else:
        height = min(power_of_2(channels), 64)
        block = max(1, min(size // height, power_of_2(places)))
    return height, block, max(1, min(16 if few else 8, height * block // 256))


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    *,
    stats: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward.

    Args:
        x: ``[samples, channels, ...]``, contiguous or with adjacent channels; see :func:`strides_of`.
        groups: Of channels.
        weight: ``[channels]`` or None.
        bias: ``[channels]`` or None.
        eps: Added to the variance.
        activation: What follows: ``silu``, ``swish`` (which rounds the sigmoid) or ``none``.
        stats: Whether backward will follow.

    Returns:
        The result, contiguous as torch's is on a GPU; and as ``[2, samples * groups]`` in float32 the means
        and inverse deviations, or None.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    samples, channels = x.shape[:2]
    programs = samples * groups
    kept = torch.empty((2, programs), dtype=torch.float32, device=x.device) if stats else None
    if x.numel() == 0:
        return y, kept
    places = x.numel() // (samples * channels)
    strides = strides_of(x)
    assert strides is not None
    height, block, warps = _tile(channels // groups, places, strides[2] == 1, programs, x.device)
    with on_device(x):
        _launch_forward(
            (programs,),
            (x, x if weight is None else weight, x if bias is None else bias, y, y if kept is None else kept),
            (groups, channels // groups, places, *strides, float(eps)),
            CH=height,
            BLOCK=block,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            ACTIVATION=activation,
            STATS=stats,
            num_warps=warps,
        )
    return y, kept


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    groups: int,
    activation: str,
    *,
    input_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward.

    Args:
        dy: ``[samples, channels, ...]``.
        x: As in forward.
        weight: As in forward.
        bias: As in forward.
        stats: ``[2, samples * groups]``, as forward returned it.
        groups: As in forward.
        activation: As in forward.
        input_grad: Whether the gradient of ``x`` is wanted.
        weight_grad: Whether that of the weight is.
        bias_grad: Whether that of the bias is.

    Returns:
        Gradients of ``x`` (laid out as ``x``), weight and bias; None for one that is not wanted.
    """
    dx = torch.empty_like(x) if input_grad else None
    dw = torch.empty_like(weight) if weight is not None and weight_grad else None
    db = torch.empty_like(bias) if bias is not None and bias_grad else None
    if x.numel() == 0:
        return dx, None if dw is None else dw.zero_(), None if db is None else db.zero_()
    samples, channels = x.shape[:2]
    places = x.numel() // (samples * channels)
    strides, dy_strides = strides_of(x), strides_of(dy)
    assert strides is not None
    if dy_strides is None:
        dy = dy.contiguous()
        dy_strides = strides_of(dy)
        assert dy_strides is not None
    programs = samples * groups
    sums = dw is not None or db is not None
    partial = torch.empty((samples, 2, channels) if sums else 1, dtype=torch.float32, device=x.device)
    height, block, warps = _tile(channels // groups, places, strides[2] == 1, programs, x.device)
    with on_device(x):
        _launch_backward(
            (programs,),
            (
                dy,
                x,
                x if weight is None else weight,
                x if bias is None else bias,
                stats,
                x if dx is None else dx,
                partial,
            ),
            (groups, channels // groups, places, *dy_strides, *strides),
            CH=height,
            BLOCK=block,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            ACTIVATION=activation,
            SUMS=sums,
            INPUT_GRAD=input_grad,
            num_warps=warps,
        )
        if sums:
            spare = dw if db is None else db
            _launch_reduce(
                (cdiv(channels, 32), 2),
                (partial, spare if dw is None else dw, torch.empty_like(spare) if db is None else db),
                (samples, channels),
                ROWS=16,
                BLOCK=32,
                num_warps=4,
            )
    return dx, dw, db
