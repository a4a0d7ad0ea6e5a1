"""Norms of queries and keys and their rotation on the GPU: one pass each way, one launch for both tensors.

Bytes: forward reads and writes each element once; backward reads the projections and the gradients and
writes once. The norms are computed again in backward, from rows that are in registers there anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from twinkle.ops.launch import Launcher, multiprocessors, on_device, power_of_2, shared_memory, tl_dtype
from twinkle.ops.rms_norm.triton import normalised, reduce_partial, scale_of
from twinkle.ops.rotary.triton import pair_of_tables, turned, turned_back

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["backward", "forward"]


@triton.jit
def _mean(a, b, width, ALL: tl.constexpr):
    """Mean of the products' sum over both channels of the pairs; over all heads if so."""
    total = tl.sum(a + b, axis=1, keep_dims=True)
    if ALL:
        total = tl.sum(total, axis=0, keep_dims=True)
    return total / width


@triton.jit
def _scales(
    w, h, i, ok, half, WEIGHT: tl.constexpr, ALL: tl.constexpr, ONE_PLUS: tl.constexpr, S: tl.constexpr
):
    if WEIGHT:
        at = i + (h * 2 * half if ALL else h * 0)
        first = scale_of(tl.load(w + at, mask=ok, other=0.0), ONE_PLUS, S)
        return first, scale_of(tl.load(w + at + half, mask=ok, other=0.0), ONE_PLUS, S)
    else:
        return tl.full([1, 1], 1.0, tl.float32), tl.full([1, 1], 1.0, tl.float32)


@triton.jit
def _one_forward(
    x,
    w,
    y,
    c1,
    s1,
    c2,
    s2,
    y_h,
    heads,
    half,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    WEIGHT: tl.constexpr,
    ALL: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
    X: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    Z: tl.constexpr,
    C: tl.constexpr,
):
    h = tl.arange(0, H)[:, None]
    i = tl.arange(0, D)[None, :]
    ok = (h < heads) & (i < half)
    at = h * (2 * half) + i
    a = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x + at + half, mask=ok, other=0.0).to(tl.float32)
    mean = _mean(a * a, b * b, 2 * half * heads if ALL else 2 * half, ALL)
    a = normalised(a, mean, eps, COMPUTE, DIVIDE, X, N)
    b = normalised(b, mean, eps, COMPUTE, DIVIDE, X, N)
    if WEIGHT:
        u, v = _scales(w, h, i, ok, half, WEIGHT, ALL, ONE_PLUS, S)
        a = (a * u).to(P)
        b = (b * v).to(P)
    a, b = turned(a.to(Z).to(tl.float32), b.to(Z).to(tl.float32), c1, s1, c2, s2, C)
    out = y + h.to(tl.int64) * y_h + i
    tl.store(out, a.to(y.dtype.element_ty), mask=ok)
    tl.store(out + half, b.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _forward(
    q,
    k,
    qw,
    kw,
    qy,
    ky,
    cos,
    sin,
    tokens,
    q_heads,
    k_heads,
    half,
    q_eps,
    k_eps,
    q_row,
    k_row,
    qy_b,
    qy_h,
    qy_t,
    ky_b,
    ky_h,
    ky_t,
    c_b,
    c_t,
    s_b,
    s_t,
    QH: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    WEIGHT: tl.constexpr,
    ALL: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DIVIDE: tl.constexpr,
    X: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    Z: tl.constexpr,
    C: tl.constexpr,
    ONE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    token = row % tokens
    i = tl.arange(0, D)[None, :]
    c1, c2 = pair_of_tables(cos + batch * c_b + token * c_t, i, i < half, half, 0, ONE)
    s1, s2 = pair_of_tables(sin + batch * s_b + token * s_t, i, i < half, half, 0, ONE)
    _one_forward(
        q + row * q_row,
        qw,
        qy + batch * qy_b + token * qy_t,
        c1,
        s1,
        c2,
        s2,
        qy_h,
        q_heads,
        half,
        q_eps,
        QH,
        D,
        WEIGHT,
        ALL,
        ONE_PLUS,
        COMPUTE,
        DIVIDE,
        X,
        N,
        S,
        P,
        Z,
        C,
    )
    _one_forward(
        k + row * k_row,
        kw,
        ky + batch * ky_b + token * ky_t,
        c1,
        s1,
        c2,
        s2,
        ky_h,
        k_heads,
        half,
        k_eps,
        KH,
        D,
        WEIGHT,
        ALL,
        ONE_PLUS,
        COMPUTE,
        DIVIDE,
        X,
        N,
        S,
        P,
        Z,
        C,
    )


@triton.jit
def _one_backward(
    x,
    u,
    v,
    dy,
    dx,
    c1,
    s1,
    c2,
    s2,
    dy_h,
    heads,
    half,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    ALL: tl.constexpr,
):
    h = tl.arange(0, H)[:, None]
    i = tl.arange(0, D)[None, :]
    ok = (h < heads) & (i < half)
    at = h * (2 * half) + i
    gradient = dy + h.to(tl.int64) * dy_h + i
    a = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x + at + half, mask=ok, other=0.0).to(tl.float32)
    f = tl.load(gradient, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(gradient + half, mask=ok, other=0.0).to(tl.float32)
    # In float32 to the end: nearer to the exact gradient than autograd's own roundings in between.
    f, g = turned_back(f, g, c1, s1, c2, s2, tl.float32, tl.float32)
    width = 2 * half * heads if ALL else 2 * half
    # Neither mean waits for the other.
    square = _mean(a * a, b * b, width, ALL)
    dot = _mean(f * u * a, g * v * b, width, ALL)
    root = tl.rsqrt(square + eps)
    root = tl.where(h < heads, root, 0.0)
    dot = dot * root
    a = a * root
    b = b * root
    dw1 = f * a
    dw2 = g * b
    f = f * u
    g = g * v
    tl.store(dx + at, ((f - a * dot) * root).to(dx.dtype.element_ty), mask=ok)
    tl.store(dx + at + half, ((g - b * dot) * root).to(dx.dtype.element_ty), mask=ok)
    return dw1, dw2


@triton.jit
def _store_sums(partial, first, second, heads, half, i, here, H: tl.constexpr, ALL: tl.constexpr):
    if ALL:
        h = tl.arange(0, H)[:, None]
        at = partial + h * (2 * half) + i
        ok = here & (h < heads)
        tl.store(at, first, mask=ok)
        tl.store(at + half, second, mask=ok)
    else:
        at = partial + i
        tl.store(at, tl.sum(first, axis=0, keep_dims=True), mask=here)
        tl.store(at + half, tl.sum(second, axis=0, keep_dims=True), mask=here)


@triton.jit
def _backward(
    q,
    k,
    qw,
    kw,
    dqy,
    dky,
    dq,
    dk,
    cos,
    sin,
    partial,
    rows,
    tokens,
    q_heads,
    k_heads,
    half,
    q_eps,
    k_eps,
    q_row,
    k_row,
    qy_b,
    qy_h,
    qy_t,
    ky_b,
    ky_h,
    ky_t,
    c_b,
    c_t,
    s_b,
    s_t,
    QH: tl.constexpr,
    KH: tl.constexpr,
    D: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    ALL: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    S: tl.constexpr,
    ONE: tl.constexpr,
    STAGES: tl.constexpr,
):
    i = tl.arange(0, D)[None, :]
    here = i < half
    qh = tl.arange(0, QH)[:, None]
    kh = tl.arange(0, KH)[:, None]
    qu, qv = _scales(qw, qh, i, here & (qh < q_heads), half, WEIGHT, ALL, ONE_PLUS, S)
    ku, kv = _scales(kw, kh, i, here & (kh < k_heads), half, WEIGHT, ALL, ONE_PLUS, S)
    if WEIGHT_GRAD:
        # Sums of each head: adding the heads up in every round would cross the warps each time.
        q1 = tl.zeros([QH, D], tl.float32)
        q2 = tl.zeros([QH, D], tl.float32)
        k1 = tl.zeros([KH, D], tl.float32)
        k2 = tl.zeros([KH, D], tl.float32)
    for row32 in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        wide = tl.zeros([1, 1], tl.int64)
        row = wide + row32
        batch = wide + row32 // tokens
        token = wide + row32 % tokens
        c1, c2 = pair_of_tables(cos + batch * c_b + token * c_t, i, here, half, 0, ONE)
        s1, s2 = pair_of_tables(sin + batch * s_b + token * s_t, i, here, half, 0, ONE)
        a, b = _one_backward(
            q + row * q_row,
            qu,
            qv,
            dqy + batch * qy_b + token * qy_t,
            dq + row * (2 * half * q_heads),
            c1,
            s1,
            c2,
            s2,
            qy_h,
            q_heads,
            half,
            q_eps,
            QH,
            D,
            ALL,
        )
        if WEIGHT_GRAD:
            q1 += a
            q2 += b
        a, b = _one_backward(
            k + row * k_row,
            ku,
            kv,
            dky + batch * ky_b + token * ky_t,
            dk + row * (2 * half * k_heads),
            c1,
            s1,
            c2,
            s2,
            ky_h,
            k_heads,
            half,
            k_eps,
            KH,
            D,
            ALL,
        )
        if WEIGHT_GRAD:
            k1 += a
            k2 += b
    if WEIGHT_GRAD:
        # Side by side in one row, for one reduction.
        q_width = 2 * half * q_heads if ALL else 2 * half
        k_width = 2 * half * k_heads if ALL else 2 * half
        here_on = partial + tl.program_id(0) * (q_width + k_width)
        _store_sums(here_on, q1, q2, q_heads, half, i, here, QH, ALL)
        _store_sums(here_on + q_width, k1, k2, k_heads, half, i, here, KH, ALL)


_launch_forward, _launch_backward = Launcher(_forward), Launcher(_backward)


def _warps(elements: int, per_warp: int) -> int:
    return max(1, min(8, elements // per_warp))


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
    norm: dict[str, Any],
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
        norm: Constants of the norm: ONE_PLUS, COMPUTE, DIVIDE and the dtypes X, N, S, P.
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
            (
                tokens,
                heads,
                k_heads,
                half,
                float(q_eps),
                float(k_eps),
                q.stride(0),
                k.stride(0),
                *q_out.stride()[:3],
                *k_out.stride()[:3],
                *cos.stride()[:2],
                *sin.stride()[:2],
            ),
            QH=blocks[0],
            KH=blocks[1],
            D=width,
            WEIGHT=qw is not None,
            ALL=over_all,
            **norm,
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
    one_plus: bool,
    scale: torch.dtype,
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
        one_plus: The factor is ``1 + w``.
        scale: The dtype that ``1 + w`` is rounded to.
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
            (
                rows,
                tokens,
                heads,
                k_heads,
                half,
                float(q_eps),
                float(k_eps),
                q.stride(0),
                k.stride(0),
                *dq_out.stride()[:3],
                *dk_out.stride()[:3],
                *cos.stride()[:2],
                *sin.stride()[:2],
            ),
            QH=blocks[0],
            KH=blocks[1],
            D=width,
            WEIGHT=qw is not None,
            WEIGHT_GRAD=wanted,
            ALL=over_all,
            ONE_PLUS=one_plus,
            S=tl_dtype(scale),
            ONE=one,
            STAGES=stages,
            num_warps=warps,
            enable_fp_fusion=False,
        )
        if sums is not None:
            reduce_partial(partial, sums)
    return dqw, dkw
