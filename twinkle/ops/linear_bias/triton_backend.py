"""Linear layers whose bias gets its gradient from a kernel; the matrix products stay torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.ops.launch import EAGER, dispatch_path, lazy_module

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from torch import Tensor

    from twinkle.ops.linear_bias.reference import LinearVariant

__all__ = ["LEAST", "MOST", "NARROW", "addmm", "linear", "supports"]

LEAST = 1 << 20
"""Elements of a result below which torch sums: two launches take a GPU as long as its one then."""
NARROW, MOST = 1024, 1 << 25
"""Columns, and elements where there are more columns: above both torch's sum is as fast, or faster. On an
H200 it takes 0.87 times as long for 32768 x 3072, and 1.79 times as long for 32768 x 768."""

_kernels = lazy_module("twinkle.ops.linear_bias.triton")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_FLATTENED = (2, 3)
"""Dimensions of which torch makes two for one product with the bias in it."""


def supports(
    variant: LinearVariant, device: str | None = None, facts: Mapping[str, Any] | None = None
) -> str | None:
    """Why there is no kernel for a variant, or None: there is one for each."""
    return None


class _Bias(torch.autograd.Function):
    """A result that was computed with a bias, as far as autograd is concerned without."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        return dy, _gradient(dy, ctx.dtype) if ctx.needs_input_grad[1] else None


def _gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a bias of some dtype, where ``dy`` is that of ``[rows, outputs]``."""
    kernels = _kernels()
    plain = (
        dy.stride(1) == 1
        and not dy.stride(0) % kernels.DIVISOR
        and not dy.shape[1] % kernels.DIVISOR
        and not dy.data_ptr() & 15
        and dispatch_path(dy) is EAGER
        and not torch.is_grad_enabled()
    )
    made: Tensor = kernels.sum_rows(dy, dtype) if plain else dy.sum(0).to(dtype)
    return made


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    theirs: Callable[..., Tensor] = F.linear,
) -> Tensor:
    """``torch.nn.functional.linear``, with a kernel for the gradient of the bias.

    That gradient is summed in float32 and rounded once. Calls that do not want it, small and wide ones, those
    that are not contiguous, and everything that :func:`twinkle.ops.launch.dispatch_path` keeps from a kernel
    go to torch's function.

    Args:
        input: ``[..., inputs]``.
        weight: ``[outputs, inputs]``.
        bias: ``[outputs]`` or None.
        theirs: Torch's function.

    Returns:
        ``[..., outputs]``.
    """
    if (
        bias is None
        or not _wants(bias, weight)
        or input.dim() not in _FLATTENED
        or not input.is_contiguous()
        or not _pays(input.numel() // max(1, input.shape[-1]), weight.shape[0])
        or dispatch_path(input, bias) is not EAGER
    ):
        return theirs(input, weight, bias)
    # Not a view: what is written to a result is written to what autograd has noted of it.
    y = _with_bias(bias, input.view(-1, input.shape[-1]), weight.t())
    return y.view(*input.shape[:-1], y.shape[-1])


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, theirs: Callable[..., Tensor] = torch.addmm, **kwargs: Any
) -> Tensor:
    """``torch.addmm`` of a bias, with a kernel for its gradient; see :func:`linear`.

    Args:
        input: ``[outputs]``; anything else goes to torch's function.
        mat1: ``[rows, inputs]``.
        mat2: ``[inputs, outputs]``.
        theirs: Torch's function.
        kwargs: With any the call goes to it.

    Returns:
        ``[rows, outputs]``.
    """
    if (
        kwargs
        or not _wants(input, mat2)
        or mat1.dim() != 2
        or input.shape[0] != mat2.shape[1]
        or not _pays(mat1.shape[0], mat2.shape[1])
        or dispatch_path(mat1, input) is not EAGER
    ):
        return theirs(input, mat1, mat2, **kwargs)
    return _with_bias(input, mat1, mat2)


def _wants(bias: Tensor, weight: Tensor) -> bool:
    plain = bias.dim() == 1 and weight.dim() == 2 and type(weight) in _PLAIN
    return plain and bias.requires_grad and torch.is_grad_enabled()


def _pays(rows: int, width: int) -> bool:
    return rows * width >= LEAST and (width <= NARROW or rows * width <= MOST)


def _with_bias(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = _Bias.apply(_addmm(bias.detach(), x, weight), bias)
    return made


_addmm: Callable[..., Tensor] = torch.addmm
"""Torch's own, also where a thread has another in its place."""
