"""The pass between the matrix products: losses of rows, and the gradient in the place of the logits."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torch import Tensor

    from twinkle.ops.causal_lm_loss.chunks import RowLoss

__all__ = ["row_losses"]

# Columns that one thread reads at a time: 16 bytes of 16-bit numbers.
_LANE = 8


@triton.jit
def _columns(start, BLOCK: tl.constexpr, LANE: tl.constexpr):
    # [threads, LANE]: a reduction over the second axis stays within a thread.
    return start + tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]


@triton.jit
def _transform(x, pre, post, TANH: tl.constexpr):
    if TANH:
        # tanh, as exp is at hand; the gradient wants it as well.
        t = 1.0 - 2.0 / (tl.exp(2.0 * pre * x) + 1.0)
        return t * post, t
    else:
        return x * pre, x


@triton.jit
def _row_losses(
    logits, row_stride, bias, labels, losses, scale, pre, post, smoothing, ignore_index, vocab,
    TANH: tl.constexpr, SMOOTH: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    label = tl.load(labels + row)
    line = logits + row.to(tl.int64) * row_stride
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                at = _columns(start, BLOCK, LANE)
                tl.store(line + at, tl.zeros([BLOCK // LANE, LANE], line.dtype.element_ty), mask=at < vocab)
        return

    # A label outside the vocabulary gives a loss that is no number, not one read from another row.
    known = (label >= 0) & (label < vocab)
    target = tl.load(line + label, mask=known, other=float("nan")).to(tl.float32)
    if BIAS:
        target += tl.load(bias + label, mask=known, other=0.0).to(tl.float32)
    target, _ = _transform(target, pre, post, TANH)

    # Softmax in one pass; each thread has a running maximum and sum of its own.
    high = tl.full([BLOCK // LANE], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)
    plain = tl.zeros([BLOCK // LANE], tl.float32)
    for start in range(0, vocab, BLOCK):
        at = _columns(start, BLOCK, LANE)
        x = tl.load(line + at, mask=at < vocab, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if BIAS:
            x += tl.load(bias + at, mask=at < vocab, other=0.0).to(tl.float32)
        z, _ = _transform(x, pre, post, TANH)
        if SMOOTH:
            plain += tl.sum(tl.where(at < vocab, z, 0.0), 1)
        z = tl.where(at < vocab, z, -float("inf"))
        higher = tl.maximum(high, tl.max(z, 1))
        # Where a thread has seen no column yet both are -inf, and their difference would be no number.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(high - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        high = higher
    top = tl.max(high, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    lse = top + tl.log(tl.sum(total * tl.exp(high - top), 0))
    loss = lse - (1.0 - smoothing) * target
    if SMOOTH:
        loss -= smoothing * tl.sum(plain, 0) / vocab
    tl.store(losses + row, loss)

    if GRADIENT:
        factor = 1.0
        if SCALE == 1:
            factor = tl.load(scale).to(tl.float32)
        elif SCALE == 2:
            factor = tl.load(scale + row).to(tl.float32)
        # Every thread must have read the target before one overwrites it.
        tl.debug_barrier()
        blocks = tl.cdiv(vocab, BLOCK)
        for index in range(0, blocks):
            # From the end: what was read last is still in the cache.
            at = _columns((blocks - 1 - index) * BLOCK, BLOCK, LANE)
            x = tl.load(line + at, mask=at < vocab, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if BIAS:
                x += tl.load(bias + at, mask=at < vocab, other=0.0).to(tl.float32)
            z, t = _transform(x, pre, post, TANH)
            gradient = tl.exp(z - lse)
            if SMOOTH:
                gradient -= smoothing / vocab
            gradient = tl.where(at == label, gradient - (1.0 - smoothing), gradient)
            if TANH:
                gradient *= (1.0 - t * t) * (pre * post)
            else:
                gradient *= pre
            tl.store(line + at, (gradient * factor).to(line.dtype.element_ty), mask=at < vocab)


def row_losses(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    scale: Tensor | None,
    row_loss: RowLoss,
    gradient: bool,
) -> None:
    """Write ``losses``, and over ``logits`` their gradient where it is wanted.

    Args:
        logits: ``[rows, vocab]``, rows contiguous. In place.
        bias: ``[vocab]``, added first, or None.
        labels: ``[rows]``.
        losses: ``[rows]``, float32.
        scale: ``[]`` or ``[rows]``, on the gradient, or None.
        row_loss: What the loss of a row is.
        gradient: Whether the gradient is wanted.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    block = min(BLOCK, max(_LANE * 32, triton.next_power_of_2(vocab)))
    # Triton launches on the current device, which need not be that of the tensors.
    where = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with where:
        _row_losses[(rows,)](
            logits,
            logits.stride(0),
            bias if bias is not None else logits,
            labels,
            losses,
            scale if scale is not None else losses,
            row_loss.pre,
            row_loss.post,
            row_loss.label_smoothing,
            row_loss.ignore_index,
            vocab,
            TANH=row_loss.tanh,
            SMOOTH=row_loss.label_smoothing != 0,
            BIAS=bias is not None,
            SCALE=0 if scale is None else 1 if scale.dim() == 0 else 2,
            GRADIENT=gradient,
            BLOCK=block,
            LANE=_LANE,
            num_warps=max(1, min(WARPS, block // (_LANE * 32))),
        )


BLOCK = 8192
WARPS = 16
