"""``activation(gate) · up`` on the GPU in one pass each way.

Bytes an element: forward reads two and writes one, backward reads three and writes two (three with the
product, for a caller that did not keep it). Forward rounds where torch does; backward rounds once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from twinkle.ops.launch import Launcher, cdiv, on_device, tl_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ACTIVATIONS", "activated", "backward", "forward", "slope"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "quick_gelu", "identity", "swish")

_BLOCK = 1024


@triton.jit
def _gelu_tanh_gate(x):
    # tanh(z) = 2 sigmoid(2z) - 1, so gelu is x · sigmoid(2z).
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activated(x, KIND: tl.constexpr, R: tl.constexpr):
    """In float32, rounded to ``R`` between the steps that torch takes one by one."""
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))
    elif KIND == "gelu_tanh":
        y = x * _gelu_tanh_gate(x)
    elif KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "relu2":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = y * y
    elif KIND == "sigmoid":
        y = tl.sigmoid(x)
    elif KIND == "quick_gelu":
        y = x * tl.sigmoid((x * 1.702).to(R).to(tl.float32)).to(R).to(tl.float32)
    elif KIND == "swish":
        y = x * tl.sigmoid(x).to(R).to(tl.float32)
    else:
        y = x
    return y.to(R).to(tl.float32)


@triton.jit
def slope(x, KIND: tl.constexpr):
    """The derivative of the activation, in float32."""
    if KIND == "silu" or KIND == "swish":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        s = _gelu_tanh_gate(x)
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "relu":
        y = tl.where(x > 0.0, 1.0, 0.0)
    elif KIND == "relu2":
        y = 2.0 * tl.where(x > 0.0, x, 0.0)
    elif KIND == "sigmoid":
        s = tl.sigmoid(x)
        y = s * (1.0 - s)
    elif KIND == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        y = s * (1.0 + 1.702 * x * (1.0 - s))
    else:
        y = x * 0.0 + 1.0
    return y


@triton.jit
def _forward(
    gate,
    up,
    out,
    width,
    gate_stride,
    up_stride,
    out_stride,
    limit,
    scale,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    CLAMP: tl.constexpr,
    SCALED: tl.constexpr,
    R: tl.constexpr,
    X: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = col < width
    g = tl.load(gate + row * gate_stride + col, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=ok, other=0.0).to(tl.float32)
    if CLAMP == "inputs":
        g = tl.where(g > limit, limit, g).to(X).to(tl.float32)
    if SCALED:
        g = (g * scale).to(X).to(tl.float32)
    a = activated(g, KIND, R)
    if CLAMP != "none":
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)).to(X).to(tl.float32)
    if CLAMP == "activated":
        a = tl.where(a > limit, limit, a).to(X).to(tl.float32)
    tl.store(out + row * out_stride + col, (a * u).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _backward(
    dout,
    gate,
    up,
    dgate,
    dup,
    out,
    width,
    dout_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    limit,
    scale,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    CLAMP: tl.constexpr,
    SCALED: tl.constexpr,
    R: tl.constexpr,
    X: tl.constexpr,
    AGAIN: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = col < width
    d = tl.load(dout + row * dout_stride + col, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=ok, other=0.0).to(tl.float32)
    g_free = g <= limit
    u_free = (u <= limit) & (u >= -limit)
    if CLAMP == "inputs":
        g = tl.where(g > limit, limit, g).to(X).to(tl.float32)
    if SCALED:
        g = (g * scale).to(X).to(tl.float32)
    a = activated(g, KIND, R)
    if CLAMP != "none":
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)).to(X).to(tl.float32)
    if CLAMP == "activated":
        g_free = a <= limit
        a = tl.where(a > limit, limit, a).to(X).to(tl.float32)
    if AGAIN:
        tl.store(out + row * width + col, (a * u).to(out.dtype.element_ty), mask=ok)
    du = d * a
    dg = d * u * slope(g, KIND)
    if CLAMP != "none":
        du = tl.where(u_free, du, 0.0)
        dg = tl.where(g_free, dg, 0.0)
    if SCALED:
        dg = dg * scale
    tl.store(dgate + row * dgate_stride + col, dg.to(dgate.dtype.element_ty), mask=ok)
    tl.store(dup + row * dup_stride + col, du.to(dup.dtype.element_ty), mask=ok)


_launch_forward, _launch_backward = Launcher(_forward), Launcher(_backward)


def _shape(*tensors: Tensor) -> tuple[int, int]:
    """Rows and width: one long row where all are contiguous, so that no block is cut at the end of a row."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            rows, width = tensor.shape
            return rows, width
    return 1, tensors[0].numel()


def forward(
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    activation: str,
    clamp: str = "none",
    limit: float | None = None,
    scale: float | None = None,
    exact: bool = False,
) -> None:
    """Launch the forward.

    Args:
        gate: ``[rows, width]``, channels adjacent; of any shape when all tensors are contiguous.
        up: As ``gate``.
        out: Written; as ``gate``.
        activation: One of `ACTIVATIONS`.
        clamp: ``none``, ``inputs`` or ``activated``.
        limit: Of the clamp.
        scale: On the gate.
        exact: Nothing is rounded before the end.
    """
    if gate.numel() == 0:
        return
    rows, width = _shape(gate, up, out)
    with on_device(gate):
        _launch_forward(
            (rows * cdiv(width, _BLOCK),),
            (gate, up, out),
            (
                width,
                gate.stride(0),
                up.stride(0),
                out.stride(0),
                0.0 if limit is None else float(limit),
                1.0 if scale is None else float(scale),
            ),
            BLOCK=_BLOCK,
            KIND=activation,
            CLAMP=clamp,
            SCALED=scale is not None,
            R=tl_dtype(torch.float32 if exact else gate.dtype),
            X=tl_dtype(gate.dtype),
            num_warps=4,
        )


def backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor,
    dup: Tensor,
    activation: str,
    clamp: str = "none",
    limit: float | None = None,
    scale: float | None = None,
    exact: bool = False,
    *,
    out: Tensor | None = None,
) -> None:
    """Launch the backward.

    Args:
        dout: ``[rows, width]``, channels adjacent; of any shape when all tensors are contiguous.
        gate: As in forward.
        up: As in forward.
        dgate: Written.
        dup: Written.
        activation: As in forward.
        clamp: As in forward.
        limit: As in forward.
        scale: As in forward.
        exact: As in forward.
        out: ``[rows, width]``, contiguous: the result of forward is written to it again.
    """
    if gate.numel() == 0:
        return
    rows, width = _shape(dout, gate, up, dgate, dup)
    with on_device(gate):
        _launch_backward(
            (rows * cdiv(width, _BLOCK),),
            (dout, gate, up, dgate, dup, dgate if out is None else out),
            (
                width,
                dout.stride(0),
                gate.stride(0),
                up.stride(0),
                dgate.stride(0),
                dup.stride(0),
                0.0 if limit is None else float(limit),
                1.0 if scale is None else float(scale),
            ),
            BLOCK=_BLOCK,
            KIND=activation,
            CLAMP=clamp,
            SCALED=scale is not None,
            R=tl_dtype(torch.float32 if exact else gate.dtype),
            X=tl_dtype(gate.dtype),
            AGAIN=out is not None,
            num_warps=4,
        )
