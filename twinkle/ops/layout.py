"""Where the rows of a tensor lie in memory, and new tensors that are laid out as torch's own results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["base_of", "channels_first", "fresh", "like", "memory_order", "rows_of"]


def rows_of(tensor: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
    """``tensor`` as ``[rows, width]`` with adjacent channels; a view where there is one.

    Args:
        tensor: ``[..., width]``.
        order: The order of the leading dimensions in memory, for a tensor that is not contiguous.
    """
    if tensor.dim() == 2 and order is None and tensor.stride(1) == 1:
        return tensor
    width = tensor.shape[-1]
    if order is not None:
        tensor = tensor.permute(order)
    rows = tensor.reshape(tensor.numel() // width if width else 0, width)
    return rows if rows.stride(-1) == 1 or width == 1 else rows.contiguous()


def base_of(tensor: Tensor, order: tuple[int, ...] | None = None) -> tuple[Tensor, int]:
    """A tensor whose memory begins where the first row does, and the elements from one row to the next.

    As :func:`rows_of`, without making a view of what is contiguous: a view takes longer than the numbers.

    Args:
        tensor: ``[..., width]``.
        order: As for :func:`rows_of`.
    """
    if order is None and tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    rows = rows_of(tensor, order)
    return rows, rows.stride(0)


def channels_first(tensor: Tensor) -> int | None:
    """The rows of a batch, for a tensor that lies in memory as ``[batches, width, rows]``; else None.

    What a convolution made lies so once ``transpose`` or ``permute`` turned it, and each sum that begins so.

    Args:
        tensor: ``[..., width]``.
    """
    width = tensor.shape[-1] if tensor.dim() > 1 else 1
    per = tensor.stride(-1) if width > 1 else 1
    if per == 1 or tensor.numel() == 0:
        return None
    # From the innermost dimension: up to ``per`` rows side by side, then batches end to end.
    apart, batched = 1, False
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if not batched and apart == per:
            apart, batched = per * width, True
        if size != 1 and stride != apart:
            return None
        apart *= size
    return per if batched or apart == per else None


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a dense tensor from outermost to innermost in memory, the last one kept last.

    None for a contiguous one, and for one whose channels are not innermost.
    """
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    last = tensor.dim() - 1
    order = (*sorted(range(last), key=lambda d: -strides[d]), last)
    return order if tensor.permute(order).is_contiguous() else None


def fresh(tensor: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, tuple[int, ...] | None]:
    """An empty tensor with the strides that elementwise torch gives; dense, with adjacent channels.

    Returns:
        The tensor, and the order of its dimensions in memory; see :func:`memory_order`.
    """
    out = torch.empty_like(tensor, dtype=dtype)
    if out.is_contiguous():
        return out, None
    order = memory_order(out)
    if order is None:
        out = torch.empty(tensor.shape, dtype=out.dtype, device=out.device)
    return out, order


def like(tensor: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
    """As :func:`fresh`, with the same memory as ``[rows, width]`` between the two."""
    out, order = fresh(tensor, dtype)
    return out, rows_of(out, order), order
