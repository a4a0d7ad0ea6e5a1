"""The head of deferred logits: its weight as it was at the call, and the logits of any rows."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from torch import Tensor

__all__ = ["Head", "LabelCount", "LiveHeads"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class LabelCount:
    """How many labels are not ignored, counted on the GPU at the start of a forward.

    The number has reached the host when the loss needs it, so that reading it does not wait for the device
    to finish the forward.

    Args:
        labels: On a GPU.
        ignore_index: Labels of this value do not count.
    """

    def __init__(self, labels: Tensor, ignore_index: int = -100) -> None:
        self.size = labels.numel()
        self.ignore_index = ignore_index
        with torch.no_grad(), torch.cuda.device(labels.device):
            number = (labels != ignore_index).sum()
            self._host = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def bound(self, targets: Tensor, ignore_index: int) -> int | None:
        """The most labels of ``targets`` that can count, or None if that is not known.

        Args:
            targets: These labels, or some of them replaced by ``ignore_index``.
            ignore_index: Labels of this value do not count.
        """
        if targets.numel() != self.size or ignore_index != self.ignore_index or not targets.is_cuda:
            return None
        self._done.synchronize()
        return int(self._host)


class Head:
    """Hidden states, weight and bias of one call of a head, as they were then.

    Logits belong to the weight they were computed with. A copy of it is kept where it may be about to
    change while somebody can still ask for logits: at the start of the head's backward, and before the
    step of an optimizer. What was changed unseen is noticed by a sample of one element of each row.

    Args:
        hidden: ``[..., hidden]``.
        weight: ``[vocab, hidden]``, of the same dtype.
        bias: ``[vocab]`` or None.
        given: The weight that optimizers know; None where ``weight`` is a copy that nobody else has.
        counted: How many labels of the call count, or None.
        fresh: Whether the forward that made it is still running, in which no weight changes.

    Attributes:
        wants: Which of the three require a gradient.
        readers: Whatever can still ask for logits, by ``id``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        given: Tensor | None,
        counted: LabelCount | None = None,
        fresh: bool = False,
    ) -> None:
        # Aliases: `param.data = other` leaves them what they are.
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.wants = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        self.counted = counted
        self.fresh = fresh
        self.readers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._given = (given, bias) if given is not None else ()
        self._frozen = given is None
        self._versions = self._now()
        self._samples = [_sample(tensor) for tensor in self._tensors()]
        runtime.of(LiveHeads).heads.add(self)

    def operands(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows of hidden states, ``[..., hidden]``, with the weight and bias of the call.

        Raises:
            RuntimeError: As :meth:`check`.
        """
        self.check()
        return rows, self.weight, self.bias

    def logits(self, rows: Tensor) -> Tensor:
        """The logits of rows of hidden states, without gradients; for weights that are checked."""
        # In inference mode as well they are to serve a backward that comes after it.
        inference = torch.is_inference_mode_enabled() and self.weight.is_inference()
        device = rows.device.type
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast(device, enabled=False):
            return F.linear(rows, self.weight, self.bias)

    def freeze(self, but: Any = None) -> None:
        """Keep copies of weight and bias as they are, where others than ``but`` may still ask for logits."""
        waiting = any(r is not but and r.is_deferred for r in list(self.readers.values()))
        if self._frozen or not waiting or self._now() != self._versions:
            return
        twin = next((other for other in runtime.of(LiveHeads).heads if self._as_kept_by(other)), None)
        source = self if twin is None else twin
        with torch.inference_mode(False), torch.no_grad():
            kept = [t if twin else t.clone() for t in (source.weight, source.bias) if t is not None]
        self.weight, self.bias = kept[0], kept[1] if len(kept) > 1 else None
        self._frozen = True

    def belongs_to(self, parameters: Iterable[Tensor]) -> bool:
        """Whether weight or bias are among parameters."""
        known = {id(parameter) for parameter in parameters}
        return any(id(given) in known for given in self._given)

    def _as_kept_by(self, other: Head) -> bool:
        """Whether another head has copies of the same numbers."""
        if other is self or not other._frozen or list(map(id, other._given)) != list(map(id, self._given)):
            return False
        return all(map(_same, self._samples[1:], other._samples[1:]))

    def check(self) -> None:
        """Raise where the numbers of the call are no longer at hand.

        Raises:
            RuntimeError: Weight or hidden states were changed or freed.
        """
        if self.fresh:
            return
        if not self._frozen and any(t.untyped_storage().size() == 0 and t.numel() for t in self._tensors()):
            raise RuntimeError(_gone("the head's weight was freed (a sharded one)"))
        if not self._frozen and self._now() != self._versions:
            raise RuntimeError(_gone("the head's weight or its input was changed in place"))
        if not all(_same(a, _sample(b)) for a, b in zip(self._samples, self._tensors(), strict=True)):
            raise RuntimeError(
                _gone("the head's weight or its input was changed in place (by way of `.data`)")
            )

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def _now(self) -> list[int | None]:
        return [None if t.is_inference() else t._version for t in self._tensors()]


def _gone(reason: str) -> str:
    return (
        f"deferred logits are read after {reason}; read them before, or keep outputs.logits.clone() + 0; "
        "with TWINKLE_DISABLE=causal_lm_loss they are computed at once"
    )


def _sample(tensor: Tensor) -> Tensor:
    """One element of each row, of varying columns."""
    if tensor.dim() < 2 or not tensor.is_contiguous():
        return tensor.detach().clone() if tensor.dim() < 2 else tensor.detach().select(-1, 0).clone()
    return tensor.detach().view(-1)[:: max(1, tensor.shape[-1] - 1)].clone()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two samples are the same bits: NaN is NaN."""
    kind = _INTEGERS[one.element_size()]
    return bool(torch.equal(one.view(kind), other.view(kind)))


class LiveHeads:
    """The heads of logits that may still be deferred, and the hook that optimizers call before a step."""

    def __init__(self) -> None:
        self.heads: weakref.WeakSet[Head] = weakref.WeakSet()
        self._hook = register_optimizer_step_pre_hook(self.before_step)

    def close(self) -> None:
        """Take the hook out, unless heads are left that still need it to keep their weights."""
        if not self.heads:
            self._hook.remove()

    def before_step(self, optimizer: Any, *_: object) -> None:
        """Keep the weights that the optimizer is about to change for the logits that need them."""
        waiting = list(self.heads)
        if not waiting:
            return
        changed = [p for group in optimizer.param_groups for p in group["params"]]
        for head in waiting:
            if head.belongs_to(changed):
                head.freeze()
