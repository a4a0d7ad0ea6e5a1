"""A comparison of the loss without logits with the loss with them, on a few rows and the real head.

A whole step cannot be compared: there is no memory for its logits. So the loss and all gradients are
compared for a few made-up rows and a part of the vocabulary. On a GPU, where our own kernel goes through
the vocabulary block by block, the loss and the gradient of the hidden states are compared for the whole
weight as well. The largest tensors are the logits of 64 rows and a part of the weight: at most 2^25
elements, on a CPU 2^18.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from twinkle.ops.causal_lm_loss.linear_cross_entropy import linear_cross_entropy
from twinkle.proof.cache import proofs
from twinkle.proof.cache_key import cache_key
from twinkle.proof.compare import Verdict, compare
from twinkle.proof.room import NotNow, clean_room
from twinkle.sources.embedded import EmbeddedLayer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["prove_loss"]

_MOST_ROWS = 64
# Elements of the weight whose gradient is compared. On a GPU as many columns as the kernel takes at a time,
# so that it is compiled once for this and for the whole weight, unless they are too large for that.
_PART, _LARGEST_PART, _PART_ON_CPU = 1 << 21, 1 << 25, 1 << 18
_BLOCK = 16384
_COLUMNS = 8192
_SOFTCAP, _SCALE = 30.0, 0.5


def prove_loss(
    weight: Tensor,
    bias: Tensor | None,
    *,
    tokens: int,
    backward: bool,
    dtype: torch.dtype | None = None,
    softcapped: bool = False,
    recall: bool = False,
    traced: bool = False,
) -> Verdict:
    """Compare ``linear_cross_entropy`` with ``F.linear`` and ``F.cross_entropy``.

    Args:
        weight: ``[vocab, hidden]`` of the head.
        bias: ``[vocab]`` or None.
        tokens: Of the call at hand: the comparison takes a small share of them, and no more than 64.
        backward: Compare the gradients of hidden states, weight and bias as well.
        dtype: That weight and bias are cast to, where it is not their own.
        softcapped: Compare with a scale and a soft cap on the logits, and nothing else.
        recall: Take a verdict from an earlier process.
        traced: A compiler's trace asks: see :func:`twinkle.proof.room.reason_against`.

    Returns:
        The verdict; a pending one where no comparison can be made now.
    """
    try:
        with clean_room((weight,), traced=traced):
            given = _made_up(weight, bias, tokens, dtype)
    except NotNow as reason:
        return Verdict.not_yet(reason)
    subject = EmbeddedLayer("causal_lm_loss", SimpleNamespace(name="first use"), {})
    key = cache_key(subject, (*given, softcapped), {}, module=None, backward=backward)
    if recall and key is not None:
        known = proofs().recall(key)
        if known is not None:
            return known
    verdict = _compared(*given, backward, softcapped, traced)
    if key is not None:
        proofs().keep(key, verdict)
    return verdict


def _made_up(
    weight: Tensor, bias: Tensor | None, tokens: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, the weight and bias of the head, without autograd, and labels."""
    dtype = dtype or weight.dtype
    rows = max(4, min(_MOST_ROWS, tokens // (32 if weight.device.type == "cpu" else 128)))
    generator = torch.Generator(weight.device).manual_seed(0)
    hidden = torch.randn(
        rows, weight.shape[1], generator=generator, device=weight.device, dtype=torch.float32
    ).to(dtype)
    labels = torch.randint(weight.shape[0], (rows,), generator=generator, device=weight.device)
    labels[-1] = -100
    return hidden, weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype), labels


def _compared(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    backward: bool,
    softcapped: bool,
    traced: bool,
) -> Verdict:
    """The verdict on a part of the vocabulary, and on a GPU on all of it."""
    on_cpu = weight.device.type == "cpu"
    columns = max(2, (_PART_ON_CPU if on_cpu else _PART) // weight.shape[1])
    if not on_cpu and _BLOCK * weight.shape[1] <= _LARGEST_PART:
        columns = max(columns, _BLOCK)
    with torch.autocast(weight.device.type, enabled=False):
        verdict = _part(hidden, weight, bias, labels, columns, backward, softcapped, traced)
        if verdict.ok and not softcapped and not on_cpu and columns < weight.shape[0]:
            verdict = _worst(verdict, _whole(hidden, weight, bias, labels, backward, traced))
    return verdict


def _whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, backward: bool, traced: bool
) -> Verdict:
    """The verdict on the whole vocabulary, with gradients of the hidden states alone."""

    def original(hidden: Tensor) -> Tensor:
        if hidden.dtype == weight.dtype:
            return _loss(F.linear(hidden, weight, bias), labels)
        loss: Tensor = _FinerLoss.apply(hidden, weight, bias, labels)
        return loss

    def kernel(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias)

    return compare(original, kernel, (hidden,), {}, backward=backward, traced=traced, extent="none")


def _part(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    columns: int,
    backward: bool,
    softcapped: bool,
    traced: bool,
) -> Verdict:
    """The verdict on a part of the vocabulary, with gradients of hidden states, weight and bias."""
    columns = min(weight.shape[0], columns)
    near = torch.where(labels < 0, labels, labels % columns)
    scale, softcap = (_SCALE, _SOFTCAP) if softcapped else (None, None)

    def original(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        if softcapped:
            wide = logits if logits.dtype == torch.float64 else logits.float()
            logits = _SOFTCAP * torch.tanh(wide * (_SCALE / _SOFTCAP))
        return _loss(logits, near)

    def kernel(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(hidden, weight, near, bias=bias, scale=scale, softcap=softcap)

    few = (hidden, weight[:columns], None if bias is None else bias[:columns])
    return compare(original, kernel, few, {}, backward=backward, traced=traced, extent="none")


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


def _worst(first: Verdict, second: Verdict) -> Verdict:
    if not second.ok:
        return second
    a, b = first.errors, second.errors
    worst = tuple(max(pair) if not any(x != x for x in pair) else pair[0] for pair in zip(a, b, strict=True))
    return Verdict(True, second.text, errors=(worst[0], worst[1], worst[2], worst[3]))


class _FinerLoss(torch.autograd.Function):
    """The loss in the higher precision of the hidden states, to which the weight is cast piece by piece."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        logits = torch.cat([hidden @ piece.to(hidden.dtype).T for piece in weight.split(_COLUMNS)], dim=1)
        if bias is not None:
            logits += bias.to(hidden.dtype)
        counted = labels >= 0
        chances = torch.log_softmax(logits, dim=1)
        rows = torch.arange(len(labels), device=labels.device)[counted]
        loss = -chances[rows, labels[counted]].mean()
        gradient = chances.exp_()
        gradient[rows, labels[counted]] -= 1
        gradient *= counted[:, None] / counted.sum()
        ctx.save_for_backward(gradient, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        pieces = zip(gradient.split(_COLUMNS, dim=1), weight.split(_COLUMNS), strict=True)
        return cotangent * sum(part @ piece.to(part.dtype) for part, piece in pieces), None, None, None
