"""The work behind the loss: chunks of rows, whose logits become their own gradient in place.

Three matrix products a chunk of rows, and between them one pass that turns logits into losses and, in
the same memory, into the gradient of the logits::

    logits = hidden[chunk] @ weight.T          # [rows, vocab], the only buffer of that width
    losses, logits <- row_losses(logits)       # the gradient takes the place of the logits
    grad_hidden[chunk] = logits @ weight
    grad_weight += logits.T @ hidden[chunk]    # in float32
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from twinkle.ops import machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

    from twinkle.ops.causal_lm_loss.row_loss import RowLoss

__all__ = [
    "LEAST_SPLIT",
    "Wanted",
    "chunk_rows",
    "gpu_memory",
    "in_chunks",
    "plain_row_losses",
    "products",
    "uses_triton",
]

_MIB = 1 << 20
_ALIGNED, LEAST_SPLIT = 64, 4096
"""Tokens that a vocabulary is cut at, for matrix products of aligned sides; only a large one is."""


@dataclass(frozen=True)
class Wanted:
    """Which gradients are computed along with the losses."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


def chunk_rows(rows: int, vocab: int, width: int, itemsize: int, *, gpu: bool) -> int:
    """How many rows a chunk has.

    On a GPU what 2 GiB of logits hold (less on a small one), and twice as many rows as the hidden states
    are wide where that is more: such logits take as much as the weight and its gradient. With each chunk
    the float32 sum of the weight's gradient is read and written, which takes as long as the products of
    some 200 rows. As many more rows as the hidden states are wide are still one chunk: that needs no such
    sum, half of which takes the memory of these logits. On a CPU 512 rows, up to 256 MiB, for the same
    reasons.

    Args:
        rows: All rows there are.
        vocab: Columns of the logits.
        width: Of the hidden states.
        itemsize: Bytes of one logit.
        gpu: Whether it is for a GPU.
    """
    row_bytes = max(1, vocab * itemsize)
    if gpu:
        memory = gpu_memory()
        most = max(min(2048 * _MIB, memory // 32) // row_bytes, min(2 * width, memory // 16 // row_bytes))
        # Matrix products take longer a row between powers of two (2816 rows than 2048, on an H200).
        most = 1 << (max(128, most).bit_length() - 1)
        step, alone = 128, most + width if itemsize == 2 else most
    else:
        most = max(min(512, 256 * _MIB // row_bytes), min(2048, 16 * _MIB // row_bytes))
        step = 16
        most = alone = max(step, most // step * step)
    if rows <= alone:
        return max(1, rows)
    chunks = -(-rows // most)
    return min(most, -(-rows // (chunks * step)) * step)


@functools.cache
def gpu_memory() -> int:
    """Bytes of the smallest GPU there is: all of a job's ranks choose the same."""
    sizes = [torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())]
    return min(sizes, default=64 << 30)


def in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor | None,
    row_loss: RowLoss,
    wanted: Wanted,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses of all rows, and gradients of ``sum(scale * losses)``.

    Args:
        hidden: ``[rows, hidden]``.
        weight: ``[vocab, hidden]``, of the same dtype.
        bias: ``[vocab]`` or None.
        labels: ``[rows]``, shifted already.
        scale: ``[]`` or ``[rows]``: what the gradient of each row is multiplied by; None for one.
        row_loss: What the loss of a row is.
        wanted: Which gradients are needed.

    Returns:
        Losses ``[rows]`` in float32 (float64 for float64), and the gradients that are wanted.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dtype = precise if _widens(hidden) else hidden.dtype
    losses = hidden.new_zeros(rows, dtype=precise)
    grad_hidden = hidden.new_empty(hidden.shape) if wanted.hidden else None
    grad_bias = weight.new_zeros(vocab, dtype=precise) if wanted.bias else None
    size = chunk_rows(rows, vocab, hidden.shape[1], dtype.itemsize, gpu=hidden.is_cuda)
    sums = _WeightSum(weight, one_chunk=rows <= size) if wanted.weight else None
    kernel = _row_kernel(hidden, row_loss)
    # Rows on whole cache lines: matrix products and the pass between them want aligned rows.
    buffer = hidden.new_empty((min(size, rows), -(-vocab // 64) * 64), dtype=dtype)
    # oneDNN's bfloat16 products on AMX multiply what lies behind a row by zero, and NaN times zero is NaN.
    buffer[:, vocab:] = 0
    buffer = buffer[:, :vocab]
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        part, logits = hidden[start:stop].to(dtype), buffer[: stop - start]
        for first, last, block in _blocks(weight, dtype):
            torch.mm(part, block.t(), out=logits[:, first:last])
        factor = scale if scale is None or scale.dim() == 0 else scale[start:stop]
        kernel(logits, bias, labels[start:stop], losses[start:stop], factor, row_loss, bool(wanted))
        if grad_hidden is not None:
            _products_of_rows(grad_hidden[start:stop], logits, weight)
        if sums is not None:
            sums.add(logits, part)
        if grad_bias is not None:
            grad_bias += torch.sum(logits, 0, dtype=precise)
    del buffer
    return (
        losses,
        grad_hidden,
        sums.result() if sums is not None else None,
        grad_bias.to(weight.dtype if bias is None else bias.dtype) if grad_bias is not None else None,
    )


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """The weight in ``dtype``: whole where it has it, else some rows at a time."""
    vocab, width = weight.shape
    if weight.dtype == dtype:
        for first, last in products(vocab, dtype, gpu=weight.is_cuda):
            yield first, last, weight[first:last]
        return
    step = max(256, 4 * _MIB // max(1, width))
    for first in range(0, vocab, max(1, step)):
        last = min(first + step, vocab)
        yield first, last, weight[first:last].to(dtype)


def products(vocab: int, dtype: torch.dtype, *, gpu: bool) -> list[tuple[int, int]]:
    """The columns of logits that one matrix product each is made of, what is left over first.

    cuBLAS chooses its slow kernels where a side of the matrices is no multiple of 16 bytes, however their
    rows are aligned: with Whisper's 51865 tokens.

    Args:
        vocab: Columns there are.
        dtype: Of both matrices.
        gpu: Whether it is for a GPU.

    Returns:
        The first column of each, and the one behind its last.
    """
    whole = vocab // _ALIGNED * _ALIGNED
    if not gpu or dtype.itemsize != 2 or whole == vocab or whole < LEAST_SPLIT:
        return [(0, vocab)]
    return [(whole, vocab), (0, whole)]


def _products_of_rows(out: Tensor, logits: Tensor, weight: Tensor) -> None:
    """``out = logits @ weight``."""
    total = out if weight.dtype == logits.dtype else logits.new_zeros(out.shape)
    empty = True
    for first, last, block in _blocks(weight, logits.dtype):
        if empty:
            torch.mm(logits[:, first:last], block, out=total)
        else:
            total.addmm_(logits[:, first:last], block)
        empty = False
    if total is not out:
        out.copy_(total)


def _widens(hidden: Tensor) -> bool:
    """Whether products are computed in float32 though the tensors have 16 bits."""
    half = hidden.device.type == "cpu" and hidden.element_size() == 2
    return half and not machine.multiplies(hidden.dtype)


class _WeightSum:
    """``sum of logits.T @ hidden`` over the chunks, in float32, given out in the weight's dtype.

    The lower half of the float32 sum lies in the memory of the result, the upper half in a buffer of
    the same size: at the end the lower half shrinks in place, so that sum and result together take
    no more than the sum alone.
    """

    def __init__(self, weight: Tensor, *, one_chunk: bool) -> None:
        self._vocab, self._width = weight.shape
        self._empty = True
        self._half = self._vocab
        self._result = weight.new_empty(weight.shape)
        self._parts = [self._result]
        if weight.element_size() >= 4 or one_chunk:
            return
        if self._result.numel() == 0 or self._vocab < 2:
            self._parts = [weight.new_empty(weight.shape, dtype=torch.float32)]
            return
        self._half = self._vocab // 2 // 64 * 64 or self._vocab // 2
        low = self._result[: 2 * self._half].view(-1).view(torch.float32).view(self._half, self._width)
        high = weight.new_empty((self._vocab - self._half, self._width), dtype=torch.float32)
        self._parts = [low, high]

    def add(self, logits: Tensor, hidden: Tensor) -> None:
        column = 0
        for part in self._parts:
            rows = part.shape[0]
            columns = logits[:, column : column + rows].t()
            for first, last in products(rows, logits.dtype, gpu=logits.is_cuda):
                _accumulate(part[first:last], columns[first:last], hidden, first=self._empty)
            column += rows
        self._empty = False

    def result(self) -> Tensor:
        if self._empty:
            return self._result.zero_()
        if self._parts[0].dtype == self._result.dtype:
            return self._result
        if len(self._parts) == 1:
            return self._result.copy_(self._parts[0])
        low, high = self._parts
        # Rows [n, 2n) of the sum lie where rows [2n, 4n) of the result go, so each copy reads what none
        # before it has overwritten; the first few have no room beside them.
        ready = min(self._half, max(1, self._half // 64))
        self._result[:ready] = low[:ready].to(self._result.dtype)
        while ready < self._half:
            stop = min(2 * ready, self._half)
            self._result[ready:stop] = low[ready:stop]
            ready = stop
        self._result[self._half :] = high
        return self._result


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """``total (+)= left @ right``; ``total`` may be wider than the two."""
    if total.dtype == right.dtype:
        if first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)
    elif right.is_cuda and _wide_products():
        if first:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif first:
        for rows in range(0, total.shape[0], 4096):
            total[rows : rows + 4096] = left[rows : rows + 4096] @ right
    else:
        total += left @ right


@functools.cache
def _wide_products() -> bool:
    """Whether a product of 16-bit matrices can be added to a float32 matrix (torch 2.8, not on ROCm)."""
    try:
        torch._C._dispatch_find_schema_or_throw("aten::addmm", "dtype_out")
    except RuntimeError:
        return False
    return torch.version.hip is None


def _row_kernel(hidden: Tensor, row_loss: RowLoss) -> Any:
    # The kernel takes the largest logit for the largest power: not so where the factor is negative.
    upright = row_loss.tanh or row_loss.pre >= 0
    if upright and hidden.dtype != torch.float64 and uses_triton(hidden):
        from twinkle.ops.causal_lm_loss.triton import row_losses

        return row_losses
    return plain_row_losses


def uses_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernel runs on it: on a GPU, or anywhere under Triton's interpreter."""
    return (tensor.is_cuda or (tensor.device.type == "cpu" and _interpreting())) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except Exception:
        # A broken installation must not take the plain path with it.
        return False
    return True


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def plain_row_losses(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    scale: Tensor | None,
    row_loss: RowLoss,
    gradient: bool,
) -> None:
    """The definition of the step: write ``losses``, and over ``logits`` their gradient."""
    rows, vocab = logits.shape
    # A few rows at a time: what they need beside the logits stays in the cache.
    step = max(1, (1 << 19) // max(1, vocab)) if logits.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        factor = scale if scale is None or scale.dim() == 0 else scale[part]
        _few_row_losses(logits[part], bias, labels[part], losses[part], factor, row_loss, gradient)


def _few_row_losses(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    scale: Tensor | None,
    row_loss: RowLoss,
    gradient: bool,
) -> None:
    values = logits.to(losses.dtype)
    if bias is not None:
        values = values.add_(bias) if values is logits else values + bias
    if row_loss.pre != 1:
        values = values * row_loss.pre
    tanh = values.tanh() if row_loss.tanh else None
    if tanh is not None:
        values = tanh * row_loss.post
    counts = labels != row_loss.ignore_index
    targets = labels.where(counts, labels.new_zeros(())).unsqueeze(1)
    picked = values.gather(1, targets).squeeze(1)
    smooth, vocab = row_loss.label_smoothing, values.shape[1]
    if gradient:
        # The largest share is one over the sum that `softmax` divided by.
        shares = values.softmax(1)
        lse = values.amax(1) - shares.amax(1).log()
    else:
        lse = values.logsumexp(1)
    loss = lse - (1 - smooth) * picked
    if smooth:
        loss -= smooth * values.mean(1)
    losses.copy_(loss.where(counts, loss.new_zeros(())))
    if not gradient:
        return
    if smooth:
        shares -= smooth / vocab
    shares.scatter_add_(1, targets, shares.new_full(targets.shape, smooth - 1))
    factor = losses.new_full((), row_loss.pre * (row_loss.post if row_loss.tanh else 1.0))
    if scale is not None:
        factor = factor * scale
    if tanh is not None:
        shares *= tanh.square_().neg_().add_(1)
    # The scale of a batch without a label is infinite.
    torch.mul(shares, factor.where(counts, factor.new_zeros(())).unsqueeze(1), out=logits)
