"""The head of deferred logits: its weight as it was at the call, and the logits of any rows."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from twinkle.deferred.weights import Operands, Weights, same_bits
from twinkle.ops.cuda_graphs import is_capturing

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

__all__ = ["Head", "LabelCount", "LabelCounts", "LabelMemory"]

_NO_MEMORY = (RuntimeError, MemoryError, OSError)
_IN_VAIN, _SELDOM = 2, 8
"""Counts in a row that were not worth it; from then on one of so many calls is counted, and none waited
for."""


class LabelCount:
    """How many labels are not ignored, counted on the GPU at the start of a forward.

    The number has reached the host when the loss needs it, so that reading it does not wait for the device
    to finish the forward.

    Args:
        labels: On a GPU.
        ignore_index: Labels of this value do not count.
        copies: Whether all targets of losses in the forward are made of these labels; else it is asked
            whether they have the same memory, unchanged.

    Attributes:
        known: The number, once somebody has waited for it.
    """

    def __init__(self, labels: Tensor, ignore_index: int = -100, *, copies: bool = True) -> None:
        self.size = labels.numel()
        self.ignore_index = ignore_index
        self._memory = None if copies else LabelMemory.of(labels)
        with torch.no_grad(), torch.cuda.device(labels.device):
            number = (labels != ignore_index).sum()
            self._host = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        self.known: int | None = None

    def bound(self, targets: Tensor, ignore_index: int) -> int | None:
        """The most labels of ``targets`` that can count, or None if that is not known.

        Args:
            targets: These labels, or some of them, some of those replaced by ``ignore_index``.
            ignore_index: Labels of this value do not count.
        """
        if targets.numel() > self.size or ignore_index != self.ignore_index or not targets.is_cuda:
            return None
        if self._memory is not None and not self._memory.holds(targets):
            return None
        return self.number()

    def number(self) -> int:
        """How many are not ignored, waited for."""
        if self.known is None:
            self._done.synchronize()
            self.known = int(self._host)
        return self.known


class LabelCounts:
    """Whether it is worth waiting for how many labels of a model count, from those of its calls before.

    Where nearly all of them did, leaving the others out would save less than the host loses: it waits until
    the device has come to the forward, which has nothing to do afterwards until more is issued.

    Args:
        least: Logits of labels that do not count which are worth it.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self._last: tuple[LabelCount, int] | None = None
        self._calls = 0
        self._in_vain = 0

    def will_wait(self) -> bool:
        """Whether the next call waits for its count, by those of the calls so far."""
        self._note_last()
        return self._in_vain < _IN_VAIN

    def of(self, labels: Tensor, vocab: int, ignore_index: int, *, copies: bool) -> LabelCount | None:
        """Count the labels of a call that are not ignored; None where the call is not to wait for it.

        Args:
            labels: On a GPU.
            vocab: Logits of one label.
            ignore_index: See :class:`LabelCount`.
            copies: See :class:`LabelCount`.
        """
        waits = self.will_wait()
        self._calls += 1
        if not waits and self._calls % _SELDOM:
            return None
        count = LabelCount(labels, ignore_index, copies=copies)
        self._last = count, vocab
        return count if waits else None

    def _note_last(self) -> None:
        """Note whether the last count was worth it: at the very next call, so that two runs decide alike."""
        if self._last is None:
            return
        count, vocab = self._last
        if count.known is None and is_capturing():
            return  # nothing that is recorded can wait
        self._last = None
        pays = (count.size - count.number()) * vocab >= self.least
        self._in_vain = 0 if pays else self._in_vain + 1


class LabelMemory(NamedTuple):
    """The memory of labels, and how often it was written to.

    Attributes:
        start: The first byte.
        stop: Behind the last one.
        version: None in inference mode, where nobody counts.
        dense: Whether nothing lies between them.
    """

    start: int
    stop: int
    version: int | None
    dense: bool

    @classmethod
    def of(cls, labels: Tensor) -> LabelMemory:
        """That of labels, as it is now."""
        start, size = labels.data_ptr(), labels.numel() * labels.element_size()
        version = None if labels.is_inference() else labels._version
        return cls(start, start + size, version, labels.is_contiguous())

    def holds(self, targets: Tensor) -> bool:
        """Whether targets are some of the labels."""
        other = LabelMemory.of(targets)
        inside = self.start <= other.start and other.stop <= self.stop
        return inside and self.dense and other.dense and self.version == other.version


class Head:
    """Hidden states, weight and bias of one call of a head, as they were then.

    Before the forward that made them returns they are copied for the logits that are still deferred, so
    that whatever the program does with its tensors changes no logits. The copies belong to these logits:
    they are freed once the last of them is computed or gone, those that a loss refers to until its backward
    begins among them.

    Args:
        hidden: ``[..., hidden]``.
        weight: ``[vocab, hidden]``, of the same dtype.
        bias: ``[vocab]`` or None.
        private: Which of the three nobody else has: they need no copy.
        counted: How many labels of the call count, or None.
        fresh: Whether the forward that made it is still running, in which no weight changes.

    Attributes:
        wants: Which of the three require a gradient.
        readers: Whatever can still ask for logits, by ``id``.
        call: The head and its hidden states, of a call whose logits are taken apart; else None.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        private: tuple[bool, bool, bool] = (False, False, False),
        counted: LabelCount | None = None,
        fresh: bool = False,
    ) -> None:
        self.wants = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        self.counted = counted
        self.fresh = fresh
        self.call: tuple[Any, Tensor] | None = None
        self.readers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        # Aliases: `param.data = other` leaves them what they are.
        self._given = Operands(hidden.detach(), Weights(weight, bias))
        self._private = private
        self._versions = self._now()
        self._copies: Callable[[], Operands | None] = _nothing

    @property
    def hidden(self) -> Tensor:
        """Hidden states of the call, ``[..., hidden]``."""
        return self._operands().hidden

    @property
    def weight(self) -> Tensor:
        """The weight of the call, ``[vocab, hidden]``."""
        return self._operands().weights.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the call, ``[vocab]`` or None."""
        return self._operands().weights.bias

    def operands(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows of hidden states, ``[..., hidden]``, with the weight and bias of the call.

        Raises:
            RuntimeError: As :meth:`check`.
        """
        self.check()
        return rows, self.weight, self.bias

    def logits(self, rows: Tensor) -> Tensor:
        """The logits of rows of hidden states, without gradients; for weights that are checked."""
        weight = self.weight
        # In inference mode as well they are to serve a backward that comes after it.
        inference = torch.is_inference_mode_enabled() and weight.is_inference()
        device = rows.device.type
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast(device, enabled=False):
            return F.linear(rows, weight, self.bias)

    def keep(self) -> None:
        """Copy what others may change for the logits that are still deferred.

        Without memory for a copy they are computed at once.
        """
        waiting = [reader for reader in list(self.readers.values()) if reader.is_deferred]
        if not waiting or all(self._private):
            return
        try:
            copies = self._given.copy(self._private)
        except _NO_MEMORY:
            for reader in waiting:
                with contextlib.suppress(*_NO_MEMORY):
                    reader.shared()
            return
        self._copies = weakref.ref(copies)
        for reader in waiting:
            reader.kept = copies

    def copies(self) -> object:
        """What logits hold on to while they are deferred, or None where there is no copy."""
        return self._copies()

    def has_current_weight(self) -> bool:
        """Whether the memory that the head's backward will read still has the numbers of the call."""
        copies = self._copies()
        if copies is None or self._private[1]:
            return True
        given = self._given.weights.weight
        return given.untyped_storage().size() > 0 and same_bits(given, copies.weights.weight)

    def check(self) -> None:
        """Raise where the numbers of the call are no longer at hand.

        Raises:
            RuntimeError: Weight or hidden states were changed or freed, and there is no copy.
        """
        if self.fresh or self._copies() is not None:
            return
        freed = any(t.untyped_storage().size() == 0 and t.numel() for t in self._given.tensors())
        if freed or self._now() != self._versions:
            raise RuntimeError(
                "deferred logits are computed after the head's weight or its input was "
                f"{'freed (a sharded one)' if freed else 'changed in place'}, and there was no memory for a "
                "copy; with TWINKLE_DISABLE=causal_lm_loss logits are computed at once"
            )

    def _operands(self) -> Operands:
        return self._copies() or self._given

    def _now(self) -> list[int | None]:
        return [None if t.is_inference() else t._version for t in self._given.tensors()]


def _nothing() -> None:
    return None
