"""Rotary position embedding on the GPU: two tensors in one launch, the tables read once a token.

Bytes: each element is read and written once, forward and backward. Nothing is written in place. Products
and sums are rounded where torch rounds them: results and gradients equal the definition's bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from twinkle.ops.launch import Launcher, cdiv, on_device, power_of_2, tl_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "COMPLEX",
    "HALF",
    "INTERLEAVED",
    "MATRIX",
    "PROGRAMS",
    "TO_HALF",
    "pair_of_tables",
    "turn",
    "turned",
]

PROGRAMS = 512
"""Programs that keep a GPU busy: with fewer the heads are shared out as well, and each reads the tables
anew. Of 4x512 tokens and 16 heads that lie one after the other, 8 programs had the pairs of 8 channels,
on 132 processors."""
HALF, INTERLEAVED, TO_HALF, COMPLEX, MATRIX = range(5)
"""Pairs are (i, i + d/2), (2i, 2i + 1), or the latter read and the former written.

Or the latter, as a complex number that is multiplied with another one, or as a vector times a matrix.
"""


@triton.jit
def turned_and_scaled(x1, x2, c1, s1, c2, s2, g1, g2, C: tl.constexpr):
    """As `turned`, with each product times the factor of its channel."""
    y1 = _scaled(x1, c1, g1, C) - _scaled(x2, s1, g1, C)
    y2 = _scaled(x2, c2, g2, C) + _scaled(x1, s2, g2, C)
    return y1.to(C), y2.to(C)


@triton.jit
def _scaled(x, table, factor, C: tl.constexpr):
    product = (x * table).to(C).to(tl.float32)
    return (product * factor).to(C).to(tl.float32)


@triton.jit
def turned(x1, x2, c1, s1, c2, s2, C: tl.constexpr):
    """Both channels of each pair, float32 values rounded to ``C`` after each step."""
    y1 = (x1 * c1).to(C).to(tl.float32) - (x2 * s1).to(C).to(tl.float32)
    y2 = (x2 * c2).to(C).to(tl.float32) + (x1 * s2).to(C).to(tl.float32)
    return y1.to(C), y2.to(C)


@triton.jit
def turned_back(y1, y2, c1, s1, c2, s2, C: tl.constexpr, B: tl.constexpr):
    """The gradients of `turned`: products rounded to ``C`` and ``B``, sums to ``B``."""
    x1 = (y1 * c1).to(C).to(B).to(tl.float32) + (y2 * s2).to(C).to(B).to(tl.float32)
    x2 = (y2 * c2).to(C).to(B).to(tl.float32) - (y1 * s1).to(C).to(B).to(tl.float32)
    return x1.to(B), x2.to(B)


@triton.jit
def multiplied(a, b, c, d, A: tl.constexpr):
    """The product of a + bi and c + di, computed in ``A``, as compilers for GPUs contract it.

    The second product of each part is rounded, and the first one is not: a fused multiply-add.
    """
    a = a.to(A)
    b = b.to(A)
    return tl.fma(a, c, -(b * d)).to(tl.float32), tl.fma(a, d, b * c).to(tl.float32)


@triton.jit
def pair_of_tables(
    table,
    i,
    ok,
    half,
    PAIRS: tl.constexpr,
    ONE: tl.constexpr,
    A: tl.constexpr = tl.float32,
    STEP: tl.constexpr = 1,
):
    """The entries for both channels of the pairs ``i``, columns ``STEP`` apart, in the dtype ``A``."""
    if ONE:
        first = tl.load(table + i * STEP, mask=ok, other=0.0).to(A)
        return first, first
    elif PAIRS == 1:
        first = tl.load(table + 2 * i * STEP, mask=ok, other=0.0).to(A)
        return first, tl.load(table + (2 * i + 1) * STEP, mask=ok, other=0.0).to(A)
    else:
        first = tl.load(table + i * STEP, mask=ok, other=0.0).to(A)
        return first, tl.load(table + (half + i) * STEP, mask=ok, other=0.0).to(A)


@triton.jit
def _load_pairs(
    x, row_ok, i, half, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ADJACENT: tl.constexpr
):
    """Both channels of pairs, ``[T, H, W]`` each, of rows that begin at ``x``.

    Adjacent ones are read and written side by side: two bytes that are written with a gap beside them
    cost the memory a whole sector, read and written.
    """
    if ADJACENT:
        j = tl.arange(0, 2 * W)[None, None, :]
        both = tl.load(x + j, mask=row_ok & (j < 2 * half), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [T, H, W, 2]))
        return first, second
    else:
        ok = row_ok & (i < half)
        first = tl.load(x + i, mask=ok, other=0.0).to(tl.float32)
        return first, tl.load(x + half + i, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _store_pairs(
    y,
    row_ok,
    i,
    half,
    first,
    second,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ADJACENT: tl.constexpr,
):
    first = first.to(y.dtype.element_ty)
    second = second.to(y.dtype.element_ty)
    if ADJACENT:
        j = tl.arange(0, 2 * W)[None, None, :]
        both = tl.reshape(tl.join(first, second), [T, H, 2 * W])
        tl.store(y + j, both, mask=row_ok & (j < 2 * half))
    else:
        ok = row_ok & (i < half)
        tl.store(y + i, first, mask=ok)
        tl.store(y + half + i, second, mask=ok)


@triton.jit
def _heads(
    x,
    y,
    t,
    token_ok,
    x_t,
    x_h,
    y_t,
    y_h,
    heads,
    c1,
    s1,
    c2,
    s2,
    g1,
    g2,
    half,
    start,
    rest_start,
    rest,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALED: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    BACK: tl.constexpr,
):
    adjacent: tl.constexpr = PAIRS == 1 or PAIRS > 2
    i = tl.arange(0, W)[None, None, :]
    part = tl.cdiv(tl.cdiv(heads, tl.num_programs(1)), H) * H
    first = tl.program_id(1) * part
    last = tl.minimum(heads, first + part)
    for first_head in range(first, last, H):
        h = first_head + tl.arange(0, H)[None, :, None].to(tl.int64)
        row_ok = token_ok & (h < last)
        x_at = x + t * x_t + h * x_h
        y_at = y + t * y_t + h * y_h
        a, b = _load_pairs(x_at + start, row_ok, i, half, T, H, W, adjacent or (PAIRS == 2 and not BACK))
        if PAIRS == 3:
            # Back, the table is conjugated, which its sines are here.
            a, b = multiplied(a, b, c1, s1, A)
        elif SCALED and not BACK:
            a, b = turned_and_scaled(a, b, c1, s1, c2, s2, g1, g2, C)
        elif BACK:
            if SCALED:
                a = (a * g1).to(C).to(tl.float32)
                b = (b * g2).to(C).to(tl.float32)
            a, b = turned_back(a, b, c1, s1, c2, s2, C, B)
        else:
            a, b = turned(a, b, c1, s1, c2, s2, C)
        _store_pairs(y_at + start, row_ok, i, half, a, b, T, H, W, adjacent or (PAIRS == 2 and BACK))
        if REST > 0:
            j = tl.arange(0, REST)[None, None, :]
            through = row_ok & (j < rest)
            kept = tl.load(x_at + rest_start + j, mask=through)
            tl.store(y_at + rest_start + j, kept.to(y.dtype.element_ty), mask=through)


@triton.jit
def _turn(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    scale,
    tokens,
    q_heads,
    k_heads,
    half,
    start,
    rest_start,
    rest,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    qo_b,
    qo_h,
    qo_t,
    ko_b,
    ko_h,
    ko_t,
    c_b,
    c_t,
    s_b,
    s_t,
    g_b,
    g_t,
    T: tl.constexpr,
    QH: tl.constexpr,
    KH: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    PAIRS: tl.constexpr,
    ONE: tl.constexpr,
    INVERSE: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    TWO: tl.constexpr,
    BACK: tl.constexpr,
):
    blocks = tl.cdiv(tokens, T)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * T + tl.arange(0, T)[:, None, None].to(tl.int64)
    token_ok = t < tokens
    i = tl.arange(0, W)[None, None, :]
    ok = token_ok & (i < half)
    sin += SHIFT
    if PAIRS == 4:
        c1, s2 = pair_of_tables(cos + batch * c_b + t * c_t, i, ok, half, 1, False, A, STEP)
        s1, c2 = pair_of_tables(sin + batch * s_b + t * s_t, i, ok, half, 1, False, A, STEP)
        s1 = -s1
    else:
        c1, c2 = pair_of_tables(cos + batch * c_b + t * c_t, i, ok, half, PAIRS, ONE, A, STEP)
        s1, s2 = pair_of_tables(sin + batch * s_b + t * s_t, i, ok, half, PAIRS, ONE, A, STEP)
    g1 = c1
    g2 = c2
    if SCALED:
        g1, g2 = pair_of_tables(scale + batch * g_b + t * g_t, i, ok, half, PAIRS, False)
    if INVERSE or (PAIRS == 3 and BACK):
        s1 = -s1
        s2 = -s2
    _heads(
        q + batch * q_b,
        q_out + batch * qo_b,
        t,
        token_ok,
        q_t,
        q_h,
        qo_t,
        qo_h,
        q_heads,
        c1,
        s1,
        c2,
        s2,
        g1,
        g2,
        half,
        start,
        rest_start,
        rest,
        T,
        QH,
        W,
        REST,
        PAIRS,
        SCALED,
        A,
        C,
        B,
        BACK,
    )
    if TWO:
        _heads(
            k + batch * k_b,
            k_out + batch * ko_b,
            t,
            token_ok,
            k_t,
            k_h,
            ko_t,
            ko_h,
            k_heads,
            c1,
            s1,
            c2,
            s2,
            g1,
            g2,
            half,
            start,
            rest_start,
            rest,
            T,
            KH,
            W,
            REST,
            PAIRS,
            SCALED,
            A,
            C,
            B,
            BACK,
        )


_launch_turn = Launcher(_turn)


def turn(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    pairs: int,
    one: bool,
    inverse: bool,
    half: int,
    start: int,
    compute: torch.dtype,
    sums: torch.dtype,
    scale: Tensor | None = None,
    back: bool = False,
) -> None:
    """Launch the rotation of one or two tensors.

    Args:
        q: ``[batch, heads, tokens, channels]``, channels adjacent, any other strides.
        k: As ``q`` with its own number of heads, or None.
        q_out: Written; as ``q``.
        k_out: Written; as ``k``.
        cos: ``[batch, tokens, width]``; strides of 0 repeat it, and columns may be any distance apart.
            Of `MATRIX`, the first columns of the matrices, two entries each, and ``sin`` the second.
        sin: As ``cos``, and its columns as far apart.
        pairs: `HALF`, `INTERLEAVED`, `TO_HALF`, `COMPLEX` or `MATRIX`.
        one: The tables hold one entry a pair, not one a channel.
        inverse: Turn the other way round.
        half: How many pairs.
        start: The first channel that is turned; the others are copied.
        compute: The dtype that products are rounded to; of `COMPLEX`, the one that they are computed in.
        sums: In backward, the dtype that gradients are rounded to.
        scale: ``[batch, tokens, width]``, columns adjacent: what each channel's products are multiplied with.
        back: Compute the gradients.
    """
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return
    two = k is not None
    factor = cos if scale is None else scale
    # Parts of complex numbers, columns of matrices: every launch would miss the known ones for its address.
    interlaced = (
        cos.stride() == sin.stride()
        and cos.stride(-1) == 2
        and sin.data_ptr() == cos.data_ptr() + cos.element_size()
    )
    if interlaced:
        sin = cos
    second, second_out = (k, k_out) if k is not None and k_out is not None else (q, q_out)
    batch, heads, tokens, channels = q.shape
    width = power_of_2(half)
    rest = channels - 2 * half
    # A program reads what lies together: all heads of a token, or many tokens of one head after the other.
    tokens_outer = q.stride(2) >= q.stride(1)
    most = max(1, 4096 // width) if not back else max(1, 2048 // width)
    if tokens_outer:
        q_block = min(power_of_2(heads), most)
        k_block = min(power_of_2(second.shape[1]), most)
        token_block = 1
    else:
        q_block = k_block = 1
        token_block = min(power_of_2(tokens), max(1, 2048 // max(width, power_of_2(rest) // 2)))
    programs, groups = batch * cdiv(tokens, token_block), 1
    if not tokens_outer and programs < PROGRAMS:
        groups = min(max(heads, second.shape[1]), cdiv(PROGRAMS, programs))
    elements = width * max(q_block, k_block) * token_block
    with on_device(q):
        _launch_turn(
            (programs, groups),
            (q, second, q_out, second_out, cos, sin, factor),
            (
                tokens,
                heads,
                second.shape[1],
                half,
                start,
                2 * half if start == 0 else 0,
                rest,
                *q.stride()[:3],
                *second.stride()[:3],
                *q_out.stride()[:3],
                *second_out.stride()[:3],
                *cos.stride()[:2],
                *sin.stride()[:2],
                *factor.stride()[:2],
            ),
            T=token_block,
            QH=q_block,
            KH=k_block,
            W=width,
            REST=power_of_2(rest) if rest else 0,
            PAIRS=pairs,
            ONE=one,
            INVERSE=inverse,
            STEP=cos.stride(-1),
            SHIFT=int(interlaced),
            SCALED=scale is not None,
            A=tl_dtype(compute if pairs == COMPLEX else torch.float32),
            C=tl_dtype(torch.float32 if pairs == COMPLEX else compute),
            B=tl_dtype(sums),
            TWO=two,
            BACK=back,
            num_warps=max(1, min(8, elements // 512)),
            enable_fp_fusion=False,
        )
