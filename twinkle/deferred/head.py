"""What deferred logits stand on: the head's weight as it was, and the logits of any rows."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["Head", "LabelCount", "apply_steps"]

# What has been done to the logits since the head: ("mul", 0.5), ("div", 30.0), ("tanh", None), ("to", dtype).
Step = tuple[str, "float | torch.dtype | None"]


def apply_steps(logits: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """The steps as the program would have done them, roundings included."""
    for name, value in steps:
        if name == "to":
            logits = logits.to(value)
        elif name == "tanh":
            logits = torch.tanh(logits)
        else:
            logits = logits * value if name == "mul" else logits / value
    return logits


class LabelCount:
    """How many labels count, asked for at the start of a forward.

    The answer has long arrived when the loss wants it, so asking does not wait for the device to finish
    the forward.

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
        """How many of ``targets``, these labels or fewer of them, count at most; None if unknown."""
        if targets.numel() != self.size or ignore_index != self.ignore_index or not targets.is_cuda:
            return None
        self._done.synchronize()
        return int(self._host)


class Head:
    """Weight and bias of one call of a head.

    Logits belong to the weight they were computed with. Where an optimizer is about to change it while
    logits are still deferred, a copy of the weight is kept for them.

    Attributes:
        weight: ``[vocab, hidden]``.
        bias: ``[vocab]`` or None.
        counted: How many labels of the call count, or None.
        grad: Whether gradients were recorded at the call.
        autocast: The dtype that autocast gave the call, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> None:
        self.grad = torch.is_grad_enabled()
        self.weight = weight if self.grad else weight.detach()
        self.bias = bias if self.grad or bias is None else bias.detach()
        device = hidden.device.type
        on = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        self.autocast = torch.get_autocast_dtype(device) if on else None
        self.counted: LabelCount | None = None
        self._given = weight
        self._frozen = False
        self._hidden = hidden
        self._versions = self._now()
        _watch(self)

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits as they come out of the head."""
        return self.weight.dtype if self.autocast is None else self.autocast

    def detached(self) -> Head:
        """The same without gradients."""
        twin = object.__new__(Head)
        twin.__dict__.update(self.__dict__)
        twin.grad, twin.weight = False, self.weight.detach()
        twin.bias = None if self.bias is None else self.bias.detach()
        _live.add(twin)
        return twin

    def check(self) -> None:
        """Raise if the logits can no longer be computed.

        Raises:
            RuntimeError: Weight or hidden states were changed, or freed, behind our back.
        """
        if self._frozen:
            return
        if self._now() != self._versions:
            raise RuntimeError(
                "deferred logits are read after the head's weight or its input was changed in place; read "
                "them before, or keep outputs.logits.clone(); with TWINKLE_DISABLE=causal_lm_loss they are "
                "computed at once"
            )
        if self.weight.untyped_storage().size() == 0 and self.weight.numel():
            raise RuntimeError(
                "deferred logits are read after the sharded weight of the head was freed; read them inside "
                "the step, or set TWINKLE_DISABLE=causal_lm_loss"
            )

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias in the dtype of the call."""
        self.check()
        if self.autocast is None:
            return hidden, self.weight, self.bias
        bias = None if self.bias is None else self.bias.to(self.autocast)
        return hidden.to(self.autocast), self.weight.to(self.autocast), bias

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits, with gradients where the call recorded them, whatever holds now."""
        inference = torch.is_inference_mode_enabled() and not self.weight.is_inference()
        with (
            torch.inference_mode(False if inference else torch.is_inference_mode_enabled()),
            torch.set_grad_enabled(self.grad),
            torch.autocast(hidden.device.type, enabled=False),
        ):
            return F.linear(*self.operands(hidden))

    def freeze(self, copies: dict[Any, Tensor]) -> None:
        """Keep the weight as it is now."""
        if self._frozen or self._now() != self._versions:
            return
        self.weight = _copy(self.weight, copies)
        self.bias = None if self.bias is None else _copy(self.bias, copies)
        self._frozen = True

    def _now(self) -> tuple[int | None, ...]:
        tensors = (self._given, self.bias, self._hidden)
        return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


def _copy(tensor: Tensor, copies: dict[Any, Tensor]) -> Tensor:
    key = (tensor.data_ptr(), tensor.shape)
    if key not in copies:
        copies[key] = tensor.detach().clone()
    return copies[key]


_live: weakref.WeakSet[Head] = weakref.WeakSet()
_hooked = False


def _watch(head: Head) -> None:
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True
    _live.add(head)


def _before_step(optimizer: Any, *_: object) -> None:
    waiting = list(_live)
    if not waiting:
        return
    changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    copies: dict[Any, Tensor] = {}
    for head in waiting:
        if id(head._given) in changed or any(id(t) in changed for t in (head.weight, head.bias)):
            head.freeze(copies)
