"""The head of deferred logits: its weight as it was at the call, and the logits of any rows."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from twinkle.runtime import runtime

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

__all__ = ["Head", "LabelCount", "LiveHeads", "PointwiseOp", "apply_pointwise"]

PointwiseOp = tuple[str, "float | torch.dtype | None"]
"""One thing done to the logits since the head: ("mul", 0.5), ("div", 30.0), ("tanh", None), ("to", dtype)."""


def apply_pointwise(logits: Tensor, ops: tuple[PointwiseOp, ...]) -> Tensor:
    """The logits after pointwise operations, which round as in the program."""
    for name, value in ops:
        if name == "to":
            logits = logits.to(value)
        elif name == "tanh":
            logits = torch.tanh(logits)
        else:
            logits = logits * value if name == "mul" else logits / value
    return logits


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
    """Weight and bias of one call of a head.

    Logits belong to the weight they were computed with. Where an optimizer is about to change it while
    logits are still deferred, a copy of the weight is kept for them.

    Attributes:
        given: The weight itself, ``[vocab, hidden]``.
        weight: The same, detached where no gradients are recorded; a copy once the weight was changed.
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
        self.given = weight
        self._frozen = False
        self._hidden = hidden
        self._versions = self._now()
        runtime.of(LiveHeads).heads.add(self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits as they come out of the head."""
        return self.weight.dtype if self.autocast is None else self.autocast

    def detached(self) -> Head:
        """The same head for logits without gradients."""
        twin = object.__new__(Head)
        twin.__dict__.update(self.__dict__)
        twin.grad, twin.weight = False, self.weight.detach()
        twin.bias = None if self.bias is None else self.bias.detach()
        runtime.of(LiveHeads).heads.add(twin)
        return twin

    def check(self) -> None:
        """Raise if the logits can no longer be computed.

        Raises:
            RuntimeError: Weight or hidden states were changed in place, or freed.
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
        """Keep copies of weight and bias as they are now.

        Args:
            copies: Those made so far, which other heads share.
        """
        if self._frozen or self._now() != self._versions:
            return
        self.weight = _copy(self.weight, copies)
        self.bias = None if self.bias is None else _copy(self.bias, copies)
        self._frozen = True

    def _now(self) -> tuple[int | None, ...]:
        tensors = (self.given, self.bias, self._hidden)
        return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


def _copy(tensor: Tensor, copies: dict[Any, Tensor]) -> Tensor:
    key = (tensor.data_ptr(), tensor.shape)
    if key not in copies:
        copies[key] = tensor.detach().clone()
    return copies[key]


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
        changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        copies: dict[Any, Tensor] = {}
        for head in waiting:
            if id(head.given) in changed or any(id(t) in changed for t in (head.weight, head.bias)):
                head.freeze(copies)
