"""Elementwise activations on the GPU in one pass each way.

Bytes an element: forward reads one and writes one, backward reads two and writes one. Written out by torch's
operators, a GELU by ``tanh`` moves eighteen forward. Forward rounds where they do; backward rounds once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from twinkle.ops.gated_mlp.triton import activated, slope
from twinkle.ops.launch import Launcher, cdiv, on_device, tl_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["backward", "forward"]

_BLOCK = 1024


@triton.jit
def _tanh(x):
    # Only 1 + tanh is used, whose error this is.
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _rounded(x, R: tl.constexpr):
    return x.to(R).to(tl.float32)


@triton.jit
def _written_out(x, KIND: tl.constexpr, R: tl.constexpr):
    """In float32, rounded to ``R`` after each of torch's operators."""
    half = _rounded(x * 0.5, R)
    if KIND == "gelu_tanh_cubed":
        cube = _rounded(_rounded(x * x, R) * x, R)
        inner = _rounded(x + _rounded(0.044715 * cube, R), R)
        bent = _rounded(_tanh(_rounded(0.7978845608028654 * inner, R)), R)
        y = half * _rounded(1.0 + bent, R)
    elif KIND == "gelu_tanh_factored":
        factor = _rounded(1.0 + _rounded(_rounded(0.044715 * x, R) * x, R), R)
        bent = _rounded(_tanh(_rounded(_rounded(x * 0.7978845608, R) * factor, R)), R)
        y = half * _rounded(1.0 + bent, R)
    elif KIND == "gelu_erf":
        bent = _rounded(tl.erf(_rounded(x * 0.7071067811865475, R)), R)
        y = half * _rounded(1.0 + bent, R)
    elif KIND == "quick_gelu":
        y = x * _rounded(tl.sigmoid(_rounded(x * 1.702, R)), R)
    else:
        y = activated(x, KIND, R)
    return y


@triton.jit
def _forward(x, y, count, BLOCK: tl.constexpr, KIND: tl.constexpr, R: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    h = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + at, _written_out(h, KIND, R).to(y.dtype.element_ty), mask=ok)


@triton.jit
def _backward(dy, x, dx, count, BLOCK: tl.constexpr, KIND: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    h = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
    if KIND == "gelu_tanh_cubed" or KIND == "gelu_tanh_factored":
        d *= slope(h, "gelu_tanh")
    elif KIND == "gelu_erf":
        d *= slope(h, "gelu")
    else:
        d *= slope(h, KIND)
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=ok)


_launch_forward, _launch_backward = Launcher(_forward), Launcher(_backward)


def forward(x: Tensor, y: Tensor, kind: str) -> None:
    """Launch the forward.

    Args:
        x: Contiguous.
        y: As ``x``; written.
        kind: The name of a variant, or of an activation of ``gated_mlp``.
    """
    count = x.numel()
    if count == 0:
        return
    with on_device(x):
        _launch_forward(
            (cdiv(count, _BLOCK),),
            (x, y),
            (count,),
            BLOCK=_BLOCK,
            KIND=kind,
            R=tl_dtype(x.dtype),
            num_warps=4,
        )


def backward(dy: Tensor, x: Tensor, dx: Tensor, kind: str) -> None:
    """Launch the backward.

    Args:
        dy: Contiguous.
        x: As in forward.
        dx: As ``x``; written.
        kind: As in forward.
    """
    count = x.numel()
    if count == 0:
        return
    with on_device(x):
        _launch_backward((cdiv(count, _BLOCK),), (dy, x, dx), (count,), BLOCK=_BLOCK, KIND=kind, num_warps=4)
