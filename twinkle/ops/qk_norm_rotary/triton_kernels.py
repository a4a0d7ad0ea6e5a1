"""Norms of queries and keys and their rotation on the GPU: one pass each way, one launch for both tensors.

Bytes: forward reads and writes each element once; backward reads the projections and the gradients and
writes once. The norms are computed again in backward, from rows that are in registers there anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twinkle.ops.rms_norm.triton_kernels import normalised, scale_of
from twinkle.ops.rotary.triton import pair_of_tables, turned, turned_back

__all__ = [
    "backward_kernel",
    "forward_kernel",
]


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
def forward_kernel(
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
    """One token of queries and keys: norm and rotation of all its heads."""
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
def backward_kernel(
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
    """Gradients of both, and partial sums of those of the weights, over the tokens of a program."""
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
