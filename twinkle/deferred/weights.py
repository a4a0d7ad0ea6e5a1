"""What logits are computed with, and the copies of it that nobody changes."""

from __future__ import annotations

import mmap
import weakref
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakIdKeyDictionary

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Operands", "Weights", "same_bits"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LARGE = 8 << 20
"""Bytes from which on the pages of a copy cost more than its numbers."""


class Weights:
    """Weight and bias of a head, without gradients.

    Args:
        parameter: The weight, ``[vocab, hidden]``.
        bias: ``[vocab]`` or None.
    """

    def __init__(self, parameter: Tensor, bias: Tensor | None) -> None:
        self.parameter = parameter
        self.weight = parameter.detach()
        self.bias = None if bias is None else bias.detach()

    def copy(self, private: tuple[bool, bool, bool]) -> Weights:
        """One with memory of its own; the memory of an earlier one where the numbers are the same.

        The outputs of many calls, held all at once, have one copy between them. Two are made first: a loop
        holds the output of its last step until it has the next, and comparing waits for a GPU.
        """
        kept = runtime.of(_Kept)
        known = kept.of(self.parameter)
        if len(known) > 1 and self.has_bits_of(known[-1]):
            return known[-1]
        made = Weights(
            self.weight if private[1] else _copy(self.weight),
            self.bias if self.bias is None or private[2] else self.bias.clone(),
        )
        kept.add(self.parameter, made)
        return made

    def has_bits_of(self, other: Weights) -> bool:
        """Whether the numbers of two are the same."""
        if self.bias is None or other.bias is None:
            return self.bias is other.bias and same_bits(self.weight, other.weight)
        return same_bits(self.weight, other.weight) and same_bits(self.bias, other.bias)


class Operands:
    """What logits are computed with: hidden states ``[..., hidden]`` and the weights of a head.

    Args:
        hidden: Without gradients.
        weights: Of the head.
    """

    def __init__(self, hidden: Tensor, weights: Weights) -> None:
        self.hidden = hidden
        self.weights = weights

    def copy(self, private: tuple[bool, bool, bool]) -> Operands:
        """One that nobody else changes."""
        with torch.inference_mode(False), torch.no_grad():
            return Operands(self.hidden if private[0] else self.hidden.clone(), self.weights.copy(private))

    def tensors(self) -> list[Tensor]:
        """All of them that there are."""
        return [t for t in (self.hidden, self.weights.weight, self.weights.bias) if t is not None]


class _Kept:
    """The copies of each weight that are alive, the oldest first."""

    def __init__(self) -> None:
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def of(self, parameter: Tensor) -> list[Weights]:
        """The copies of one weight."""
        kept: weakref.WeakValueDictionary[int, Weights] | None = self._of.get(parameter)
        return [] if kept is None else list(kept.values())

    def add(self, parameter: Tensor, made: Weights) -> None:
        """Know a copy of a weight, as long as somebody holds it."""
        self._of.setdefault(parameter, weakref.WeakValueDictionary())[id(made)] = made


def _copy(tensor: Tensor) -> Tensor:
    """A copy; a large one on a CPU in pages of 2 MiB, which halves its time: 27 → 15 ms for 62 MiB."""
    size = tensor.numel() * tensor.element_size()
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if not tensor.is_cpu or size < _LARGE or advice is None or not tensor.is_contiguous():
        return tensor.clone()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:
        return tensor.clone()  # a kernel without them
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bits: NaN is NaN."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    kind = _INTEGERS[one.element_size()]
    return bool(torch.equal(one.view(kind), other.view(kind)))
