"""The autograd nodes of a head and of the loss without logits, and what flows from the one to the other.

The gradient of the loss with respect to logits is deferred logits again. It has the gradients of hidden
states, weight and bias with it, which the loss was computed with. Autograd takes it back through the steps
between head and loss, whose backward below autograd is recognised (``twinkle.deferred.operations``). If it
arrives at the head as it left the loss, the gradients that it has with it are the result. Whatever else is
done with it computes it.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch

from twinkle.deferred.frames import leave_to_python
from twinkle.deferred.logits import DeferredLogits
from twinkle.deferred.steps import Node
from twinkle.ops.causal_lm_loss.op import (
    gradients_of_each_row,
    loss_of_all_rows,
    loss_of_each_row,
    scaled_gradients,
)
from twinkle.ops.failures import Failures
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.deferred.head import Head

__all__ = ["DeferredHead", "FusedLoss", "LossGradient", "LossOptions"]

_Gradients = list["Tensor | None"]


class LossOptions(NamedTuple):
    """What ``F.cross_entropy`` is told.

    Attributes:
        ignore_index: Labels of this value do not count.
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: From 0 to 1.
    """

    ignore_index: int
    reduction: str
    label_smoothing: float


class DeferredHead(torch.autograd.Function):
    """``hidden @ weight.T + bias``, not computed yet."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
    ) -> DeferredLogits:
        """Deferred logits ``[..., vocab]``.

        Args:
            ctx: Of autograd.
            hidden: ``[..., hidden]``.
            weight: ``[vocab, hidden]``, of the same dtype.
            bias: ``[vocab]`` or None.
            head: Of the three.
        """
        root = Node(head, tuple(hidden.shape[:-1]), weight.dtype)
        # As the plain head does, so that autograd finds the same changes in place.
        ctx.save_for_backward(
            hidden if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        ctx.set_materialize_grads(False)
        ctx.root = weakref.ref(root)
        return DeferredLogits.make(root, torch.empty(root.shape, dtype=root.dtype, device="meta"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        if grad is None:
            return (None,) * 4
        hidden, weight = ctx.saved_tensors
        root = ctx.root()
        if root is not None:
            # What it has with it are constants: not for a gradient that is to be differentiated again.
            ours = isinstance(grad, DeferredLogits) and grad.gradient is not None and grad.node is root
            if ours and not torch.is_grad_enabled():
                carried = grad.gradient.take(ctx.needs_input_grad[:3])
                if carried is not None:
                    return (*carried, None)
        wanted = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if wanted[0] else None,
            rows.t() @ hidden.reshape(-1, hidden.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
            None,
        )


class FusedLoss(torch.autograd.Function):
    """``F.cross_entropy`` of deferred logits ``[rows, vocab]``, a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: DeferredLogits,
        target: Tensor,
        options: LossOptions,
        factors: tuple[float, float, bool],
        bias: Tensor | None,
        most_rows: int | None,
        grad: bool,
    ) -> Tensor:
        """The loss, in the dtype of the logits: ``[]``, or ``[rows]`` for ``none``.

        Args:
            ctx: Of autograd.
            logits: Not computed yet.
            target: Class numbers, ``[rows]``.
            options: Of the loss.
            factors: ``pre``, ``post`` and ``tanh`` of ``post * tanh(pre * x)``.
            bias: ``[vocab]`` of the logits ``x``, that of the head and what was added after it; or None.
            most_rows: How many labels count at most; None if that is not known.
            grad: Whether gradients are recorded.
        """
        node = logits.node
        operands = (*node.head.operands(node.rows)[:2], bias)
        wanted = node.head.wants if grad and ctx.needs_input_grad[0] else (False,) * 3
        numbers = (*factors, options.ignore_index, options.label_smoothing)
        ctx.set_materialize_grads(False)
        ctx.logits, ctx.version, ctx.options, ctx.numbers, ctx.wanted = logits, None, options, numbers, wanted
        ctx.added = bias is not node.head.bias
        if not logits.is_inference():
            ctx.version = logits._version
        if options.reduction == "none":
            ctx.save_for_backward(target, bias if ctx.added else None)
            return loss_of_each_row(*operands, target, *numbers).to(logits.dtype)
        divisor = None
        if options.reduction == "sum":
            divisor = torch.ones((), dtype=torch.float32, device=target.device)
        loss, *gradients = loss_of_all_rows(*operands, target, divisor, most_rows, *numbers, *wanted)
        ctx.save_for_backward(target, *gradients)
        return loss.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of the logits, deferred."""
        rest = (None,) * 6
        if grad is None:
            return None, *rest
        target, *saved = ctx.saved_tensors
        logits = ctx.logits
        if torch.is_grad_enabled() or _is_transformed(grad):
            if logits._version != ctx.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace "
                    "operation: the logits of a loss that is to be differentiated twice"
                )
            return gradient_of_logits(logits, target, grad, ctx.options), *rest
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.logits = None
        node: Node = logits.node
        gradients: _Gradients = [None, None, None]
        if ctx.options.reduction != "none":
            gradients = scaled_gradients(ctx.wanted, saved[1:], grad * saved[0])
        elif any(ctx.wanted):
            operands = node.head.operands(node.rows)
            if ctx.added:
                operands = (*operands[:2], saved[0])
            try:
                found = gradients_of_each_row(grad, *operands, target, *ctx.numbers, *ctx.wanted)
            except Exception as error:
                runtime.of(Failures).tell("causal_lm_loss", error)
                with torch.no_grad():
                    return gradient_of_logits(logits, target, grad, ctx.options), *rest
            gradients = [g if wanted else None for g, wanted in zip(found, ctx.wanted, strict=True)]
        values = None if logits.is_deferred or logits._version != ctx.version else logits.shared()
        loss = LossGradient(node, target, grad, ctx.options, gradients, ctx.wanted, values)
        return loss.at(node), *rest


def _is_transformed(grad: Tensor) -> bool:
    """Whether a gradient belongs to a batch of them (``is_grads_batched``), or to a transform."""
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return bool(batched or torch._C._are_functorch_transforms_active())


class LossGradient:
    """The gradient of a loss with respect to the logits that it was computed of, and what comes of it.

    Args:
        leaf: These logits.
        target: Their labels, ``[rows]``.
        grad: The gradient of the loss, ``[]`` or ``[rows]``.
        options: Of the loss.
        gradients: Of rows of hidden states ``[rows, hidden]``, weight and bias.
        wanted: Which of them were computed.
        values: The logits, where they have been computed.
    """

    is_nothing = False

    def __init__(
        self,
        leaf: Node,
        target: Tensor,
        grad: Tensor,
        options: LossOptions,
        gradients: _Gradients,
        wanted: tuple[bool, bool, bool],
        values: Tensor | None = None,
    ) -> None:
        self.leaf = leaf
        self.target = target
        self.grad = grad
        self.options = options
        self._gradients: _Gradients | None = gradients
        self._wanted = wanted
        self._values = values
        self._version = None if values is None or values.is_inference() else values._version

    def at(self, node: Node) -> DeferredLogits:
        """The gradient with respect to the logits at a node, on the way from the loss to the head."""
        node = node.of_gradient
        like = torch.empty(node.shape, dtype=node.dtype, device="meta")
        return DeferredLogits.make(node, like, gradient=self, compute=functools.partial(self.compute, node))

    def nothing(self) -> LossGradient:
        """Zeros in the place of it."""
        return _Nothing(self.leaf, self.target, self.grad, self.options, [None] * 3, (False,) * 3)

    def compute(self, node: Node) -> Tensor:
        """The values at a node."""
        with torch.no_grad(), torch.autocast(self.grad.device.type, enabled=False):
            values = self._values
            if values is None or values.is_inference() or values._version != self._version:
                values = self.leaf.compute()
            found = gradient_of_logits(values, self.target, self.grad, self.options)
            current = self.leaf
            while current is not node:
                found = current.back(found)
                assert current.previous is not None
                current = current.previous
            return found

    def take(self, needed: tuple[bool, ...]) -> _Gradients | None:
        """The gradients of all hidden states, of the weight and the bias; None where they are not there.

        They are given away: autograd accumulates in place what nobody else has.
        """
        gradients, self._gradients = self._gradients, None
        if gradients is None or any(n and not w for n, w in zip(needed, self._wanted, strict=True)):
            return None
        hidden = gradients[0]
        return [None if hidden is None else self.leaf.rows_back(hidden), *gradients[1:]]


class _Nothing(LossGradient):
    is_nothing = True

    def compute(self, node: Node) -> Tensor:
        return torch.zeros(node.shape, dtype=node.dtype, device=self.grad.device)


def gradient_of_logits(logits: Tensor, target: Tensor, grad: Tensor, options: LossOptions) -> Tensor:
    """The gradient of ``F.cross_entropy``, by its definition: operations that autograd differentiates.

    Args:
        logits: ``[rows, vocab]``.
        target: Class numbers, ``[rows]``.
        grad: The gradient of the loss, ``[]`` or ``[rows]``.
        options: Of the loss.
    """
    counts = target != options.ignore_index
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    each = grad.to(precise)
    if options.reduction == "mean":
        each = each / counts.sum()
    # Without a label the quotient is infinite.
    each = torch.where(counts, each, each.new_zeros(()))
    smooth = options.label_smoothing
    shares = torch.softmax(logits, -1, dtype=precise) - smooth / logits.shape[-1]
    classes = torch.where(counts, target, target.new_zeros(())).unsqueeze(1)
    shares = shares.scatter_add(1, classes, shares.new_full(classes.shape, smooth - 1))
    return (shares * each.unsqueeze(1)).to(logits.dtype)


leave_to_python(within=(DeferredHead.forward, DeferredHead.backward, FusedLoss.forward, FusedLoss.backward))
