"""The pass between the matrix products: losses of rows, and the gradient in the place of the logits."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from twinkle.ops.causal_lm_loss.row_loss import RowLoss

__all__ = ["row_losses", "scale_"]

# Columns that one thread reads at a time: 16 bytes of 16-bit numbers.
_LANE = 8
BLOCK = 16384
WARPS = 32
# Below every logit, and far enough from the end of float32 that differences stay finite.
LOWEST = tl.constexpr(-1e38)


@triton.jit
def _columns(start, BLOCK: tl.constexpr, LANE: tl.constexpr):
    # [threads, LANE]: a reduction over the second axis stays within a thread.
    return start + tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]


@triton.jit
def _read(line, bias, at, vocab, BIAS: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr):
    keep: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if MASK:
        x = tl.load(line + at, mask=at < vocab, other=0.0, eviction_policy=keep).to(tl.float32)
        if BIAS:
            x += tl.load(bias + at, mask=at < vocab, other=0.0).to(tl.float32)
    else:
        x = tl.load(line + at, eviction_policy=keep).to(tl.float32)
        if BIAS:
            x += tl.load(bias + at).to(tl.float32)
    return x


@triton.jit
def _tanh(x):
    # exp is at hand, and two of it are cheaper than the library's tanh.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _more(
    line,
    bias,
    at,
    vocab,
    high,
    total,
    plain,
    pre,
    post,
    slope,
    TANH: tl.constexpr,
    SMOOTH: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Add columns to the running maximum and sum that each thread has of its own."""
    x = _read(line, bias, at, vocab, BIAS, MASK, True)
    if TANH:
        x = _tanh(x * pre) * post
    if MASK:
        if SMOOTH:
            plain += tl.where(at < vocab, x, 0.0)
        # A finite bound, so that no difference of two of them is no number.
        x = tl.where(at < vocab, x, high[:, None])
        higher = tl.maximum(high, tl.max(x, 1))
        powers = tl.where(at < vocab, tl.exp2((x - higher[:, None]) * slope), 0.0)
    else:
        if SMOOTH:
            plain += x
        higher = tl.maximum(high, tl.max(x, 1))
        # One multiplication and addition an element.
        powers = tl.exp2(x * slope - (higher * slope)[:, None])
    total = total * tl.exp2((high - higher) * slope) + tl.sum(powers, 1)
    return higher, total, plain


@triton.jit
def _overwrite(
    line,
    bias,
    at,
    vocab,
    lse,
    pre,
    post,
    slope,
    smoothing,
    factor,
    TANH: tl.constexpr,
    SMOOTH: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
):
    """The gradient in the place of the logits, but for the column of the label."""
    x = _read(line, bias, at, vocab, BIAS, MASK, False)
    if TANH:
        t = _tanh(x * pre)
        gradient = tl.exp2(t * (post * slope) - lse)
    else:
        gradient = tl.exp2(x * slope - lse)
    if SMOOTH:
        gradient -= smoothing / vocab
    gradient *= factor
    if TANH:
        gradient *= 1.0 - t * t
    if MASK:
        tl.store(line + at, gradient.to(line.dtype.element_ty), mask=at < vocab)
    else:
        tl.store(line + at, gradient.to(line.dtype.element_ty))


@triton.jit
def _row_losses(
    logits,
    row_stride,
    bias,
    labels,
    losses,
    scale,
    pre,
    post,
    smoothing,
    ignore_index,
    vocab,
    TANH: tl.constexpr,
    SMOOTH: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    whole = vocab // BLOCK * BLOCK
    row = tl.program_id(0)
    label = tl.load(labels + row)
    line = logits + row.to(tl.int64) * row_stride
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                at = _columns(start, BLOCK, LANE)
                empty = tl.zeros([BLOCK // LANE, LANE], line.dtype.element_ty)
                tl.store(line + at, empty, mask=at < vocab)
    else:
        # A label outside the vocabulary gives a loss that is no number, not one from another row.
        known = (label >= 0) & (label < vocab)
        target = tl.load(line + label, mask=known, other=float("nan")).to(tl.float32)
        if BIAS:
            target += tl.load(bias + label, mask=known, other=0.0).to(tl.float32)
        # Powers of two in the place of e: `slope` takes a logit there, and is not negative.
        if TANH:
            target_tanh = _tanh(target * pre)
            target = target_tanh * post
            natural = 1.0
        else:
            target_tanh = target
            natural = pre
        slope = natural * 1.4426950408889634

        high = tl.full([BLOCK // LANE], LOWEST, tl.float32)
        total = tl.zeros([BLOCK // LANE], tl.float32)
        # Summed up last: triton 3.6 fails on a sum of sums that goes through two loops.
        plain = tl.zeros([BLOCK // LANE, LANE], tl.float32)
        for start in range(0, whole, BLOCK):
            at = _columns(start, BLOCK, LANE)
            high, total, plain = _more(
                line, bias, at, vocab, high, total, plain, pre, post, slope, TANH, SMOOTH, BIAS, False
            )
        if whole < vocab:
            at = _columns(whole, BLOCK, LANE)
            high, total, plain = _more(
                line, bias, at, vocab, high, total, plain, pre, post, slope, TANH, SMOOTH, BIAS, True
            )
        top = tl.max(high, 0)
        beyond = tl.log2(tl.sum(total * tl.exp2((high - top) * slope), 0))
        # Differences of logits, not of what they were multiplied with: a sure target has a loss of zero.
        loss = beyond * 0.6931471805599453 + (1.0 - smoothing) * natural * (top - target)
        if SMOOTH:
            loss += smoothing * natural * (top - tl.sum(tl.sum(plain, 1), 0) / vocab)
        tl.store(losses + row, loss)
        # Of base two, as everything under `exp2`.
        lse = top * slope + beyond

        if GRADIENT:
            factor = pre
            if TANH:
                factor = pre * post
            if SCALE == 1:
                factor *= tl.load(scale).to(tl.float32)
            elif SCALE == 2:
                factor *= tl.load(scale + row).to(tl.float32)
            # Every thread must have read the target before one overwrites it.
            tl.debug_barrier()
            # From the end: what was read last is still in the cache.
            if whole < vocab:
                at = _columns(whole, BLOCK, LANE)
                _overwrite(
                    line, bias, at, vocab, lse, pre, post, slope, smoothing, factor, TANH, SMOOTH, BIAS, True
                )
            for start in range(0, whole, BLOCK):
                at = _columns(start, BLOCK, LANE)
                _overwrite(
                    line, bias, at, vocab, lse, pre, post, slope, smoothing, factor, TANH, SMOOTH, BIAS, False
                )
            tl.debug_barrier()
            gradient = tl.exp2(target * slope - lse) - (1.0 - smoothing)
            if SMOOTH:
                gradient -= smoothing / vocab
            gradient *= factor
            if TANH:
                gradient *= 1.0 - target_tanh * target_tanh
            tl.store(line + label, gradient.to(line.dtype.element_ty), mask=known)


@triton.jit
def _scale(values, factor, size, BLOCK: tl.constexpr):
    # Mostly the factor is one, and then nothing is read but that.
    number = tl.load(factor).to(tl.float32)
    if number != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, size, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            scaled = tl.load(values + at, mask=at < size).to(tl.float32) * number
            tl.store(values + at, scaled.to(values.dtype.element_ty), mask=at < size)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """``values *= factor`` for a factor on the device; where it is one, without reading the values."""
    if values.numel():
        with _on_device(values):
            blocks = triton.cdiv(values.numel(), 4096)
            _scale[(min(blocks, 2048),)](values, factor, values.numel(), BLOCK=4096)
    return values


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
    with _on_device(logits):
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


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    # Triton launches on the current device, which need not be that of the tensors.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
