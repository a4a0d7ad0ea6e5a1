"""Launches of the kernels for norms of queries and keys and their rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from twinkle.ops.launch import Launcher, multiprocessors, on_device, power_of_2, shared_memory, tl_dtype
from twinkle.ops.qk_norm_rotary.triton_kernels import backward_kernel, forward_kernel
from twinkle.ops.rms_norm.triton import constants_of, reduce_partial

if TYPE_CHECKING:
    from torch import Tensor

    from twinkle.ops.rms_norm.reference import RMSNormVariant

__all__ = ["backward", "forward"]

_launch_forward, _launch_backward = Launcher(forward_kernel), Launcher(backward_kernel)


def _warps(elements: int, per_warp: int) -> int:
    return max(1, min(8, elements // per_warp))


def _numbers(
    q: Tensor,
    k: Tensor,
    q_eps: float,
    k_eps: float,
    q_heads: Tensor,
    k_heads: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[float, ...]:
    """Sizes and strides, as both kernels take them; ``heads`` are ``[batch, heads, tokens, head_dim]``."""
    _, heads, tokens, head_dim = q_heads.shape
    return (
        tokens,
        heads,
        k_heads.shape[1],
        head_dim // 2,
        float(q_eps),
        float(k_eps),
        q.stride(0),
        k.stride(0),
        *q_heads.stride()[:3],
        *k_heads.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
    )


def forward(
    q: Tensor,
    k: Tensor,
    qw: Tensor | None,
    kw: Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    *,
    over_all: bool,
    norm: RMSNormVariant,
    between: torch.dtype,
    compute: torch.dtype,
    one: bool,
) -> None:
    """Launch the forward.

    Args:
        q: ``[batch · tokens, heads · head_dim]``, channels adjacent.
        k: As ``q``.
        qw: ``[head_dim]`` or ``[heads · head_dim]``, or None, as ``kw``.
        kw: See ``qw``.
        q_eps: Of the norm of the queries.
        k_eps: Of the norm of the keys.
        cos: ``[batch, tokens, width]``; strides of 0 repeat it.
        sin: As ``cos``.
        q_out: Written; ``[batch, heads, tokens, head_dim]``.
        k_out: Written; as ``q_out``.
        over_all: The norm is over all heads.
        norm: Where the norm rounds.
        between: The dtype of the norm's result.
        compute: The dtype that the products of the rotation are rounded to.
        one: The tables hold one entry a pair.
    """
    batch, heads, tokens, head_dim = q_out.shape
    if q.numel() + k.numel() == 0:
        return
    k_heads = k_out.shape[1]
    half, blocks = head_dim // 2, (power_of_2(heads), power_of_2(k_heads))
    width = power_of_2(half)
    with on_device(q):
        _launch_forward(
            (batch * tokens,),
            (q, k, q if qw is None else qw, k if kw is None else kw, q_out, k_out, cos, sin),
            _numbers(q, k, q_eps, k_eps, q_out, k_out, cos, sin),
            QH=blocks[0],
            KH=blocks[1],
            D=width,
            WEIGHT=qw is not None,
            ALL=over_all,
            **constants_of(norm, q.dtype, None if qw is None else qw.dtype),
            Z=tl_dtype(between),
            C=tl_dtype(compute),
            ONE=one,
            num_warps=_warps(blocks[0] * width, 512),
            enable_fp_fusion=False,
        )


def backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    qw: Tensor | None,
    kw: Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: Tensor,
    sin: Tensor,
    dq: Tensor,
    dk: Tensor,
    *,
    over_all: bool,
    norm: RMSNormVariant,
    one: bool,
    weight_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward.

    Args:
        dq_out: ``[batch, heads, tokens, head_dim]``, channels adjacent, any other strides.
        dk_out: As ``dq_out``.
        q: As in forward.
        k: As in forward.
        qw: As in forward.
        kw: As in forward.
        q_eps: As in forward.
        k_eps: As in forward.
        cos: As in forward.
        sin: As in forward.
        dq: Written; ``[batch · tokens, heads · head_dim]``, contiguous.
        dk: Written; as ``dq``.
        over_all: As in forward.
        norm: As in forward.
        one: As in forward.
        weight_grad: Whether gradients of the weights are wanted.

    Returns:
        The gradients of the weights, or None.
    """
    batch, heads, tokens, head_dim = dq_out.shape
    wanted = weight_grad and qw is not None and kw is not None
    sums: Tensor | None = None
    dqw = dkw = None
    if wanted and qw is not None and kw is not None:
        sums = torch.empty(qw.numel() + kw.numel(), dtype=qw.dtype, device=q.device)
        dqw, dkw = sums[: qw.numel()], sums[qw.numel() :]
    if q.numel() + k.numel() == 0:
        if sums is not None:
            sums.zero_()
        return dqw, dkw
    k_heads, rows = dk_out.shape[1], batch * tokens
    half, blocks = head_dim // 2, (power_of_2(heads), power_of_2(k_heads))
    width = power_of_2(half)
    # H200, a share of the copy bandwidth by programs on a multiprocessor: 32 + 8 heads of 128 62, 78, 64 and
    # 73 % for one to four (two stages instead of three 68 %), 16 + 8 heads 53, 72, 76, 59 % (two warps 48 %),
    # 4 + 1 heads of 256 39 % for two and 45 % for four with one warp, 27 % with four.
    elements = blocks[0] * width
    warps = 4 if elements >= 1024 else 1
    programs = min(rows, multiprocessors(q.device) * (2 if elements > 1024 else 3 if elements == 1024 else 4))
    moved = 4 * (blocks[0] + blocks[1]) * width * q.element_size()
    stages = max(1, min(3, shared_memory(q.device) // moved))
    constants = constants_of(norm, q.dtype, None if qw is None else qw.dtype)
    partial = q
    if sums is not None:
        partial = torch.empty((programs, sums.numel()), dtype=torch.float32, device=q.device)
    with on_device(q):
        _launch_backward(
            (programs,),
            (
                q,
                k,
                q if qw is None else qw,
                k if kw is None else kw,
                dq_out,
                dk_out,
                dq,
                dk,
                cos,
                sin,
                partial,
            ),
            (rows, *_numbers(q, k, q_eps, k_eps, dq_out, dk_out, cos, sin)),
            QH=blocks[0],
            KH=blocks[1],
            D=width,
            WEIGHT=qw is not None,
            WEIGHT_GRAD=wanted,
            ALL=over_all,
            ONE_PLUS=constants["ONE_PLUS"],
            S=constants["S"],
            ONE=one,
            STAGES=stages,
            num_warps=warps,
            enable_fp_fusion=False,
        )
        if sums is not None:
            reduce_partial(partial, sums)
    return dqw, dkw
