"""Deferred logits inside a graph: an object that a compiler traces in the place of the logits.

A tensor subclass cannot be made while a graph is traced; an ordinary object can. It lives from the head
to the end of the model's forward. By then the loss is one operator on the hidden states. Where the frame
around the graph is Python's own, the object then becomes :class:`DeferredLogits`; elsewhere it becomes
logits of the graph, which the compiler leaves out where nothing uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from twinkle.deferred.functions import cross_entropy, of_whole_rows
from twinkle.deferred.steps import apply_pointwise
from twinkle.ops.causal_lm_loss.linear_cross_entropy import as_autocast

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.deferred.steps import PointwiseOp

__all__ = ["TracedLogits"]


class TracedLogits:
    """``pointwise(hidden @ weight.T + bias)``, not computed yet.

    Args:
        hidden: ``[..., hidden]``.
        weight: ``[vocab, hidden]``.
        bias: ``[vocab]`` or None.
        pointwise: What is done to the logits after the head, in order.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, pointwise: tuple[PointwiseOp, ...] = ()
    ) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.pointwise = pointwise

    def materialize(self) -> Tensor:
        """The logits, as operations of the graph."""
        return apply_pointwise(F.linear(self.hidden, self.weight, self.bias), self.pointwise)

    def _then(self, *ops: PointwiseOp) -> TracedLogits:
        return TracedLogits(self.hidden, self.weight, self.bias, (*self.pointwise, *ops))

    def _of(self, hidden: Tensor) -> TracedLogits:
        return TracedLogits(hidden, self.weight, self.bias, self.pointwise)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        for name, value in reversed(self.pointwise):
            if name == "to":
                return value
        kind = self.hidden.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        return self.hidden.device

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits, ``[..., vocab]``."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    def size(self, dim: int | None = None) -> Any:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> Any:
        """As ``Tensor.dim``."""
        return self.hidden.dim()

    def float(self) -> TracedLogits:
        """As ``Tensor.float``."""
        return self._then(("to", torch.float32))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Tensor.to``."""
        if not kwargs and len(args) == 1:
            if isinstance(args[0], torch.dtype) and args[0].is_floating_point:
                return self._then(("to", args[0]))
            if isinstance(args[0], torch.device) and args[0] == self.device:
                return self
        return self.materialize().to(*args, **kwargs)

    def contiguous(self) -> TracedLogits:
        """As ``Tensor.contiguous``."""
        return self

    def view(self, *shape: Any) -> Any:
        """As ``Tensor.view``."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if len(sizes) < 2 or sizes[-1] != self.weight.shape[0]:
            return self.materialize().reshape(sizes)
        return self._of(self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    reshape = view

    def tanh(self) -> TracedLogits:
        """As ``Tensor.tanh``."""
        return self._then(("tanh", None))

    def __getitem__(self, index: Any) -> Any:
        return self._of(self.hidden[index]) if of_whole_rows(self.dim(), index) else self.materialize()[index]

    def __mul__(self, other: Any) -> Any:
        number = isinstance(other, (int, float))
        return self._then(("mul", float(other))) if number else self.materialize() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        number = isinstance(other, (int, float))
        return self._then(("div", float(other))) if number else self.materialize() / other

    def _loss(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        kind = self.device.type
        wide = torch.is_autocast_enabled(kind) and self.dtype != torch.float64
        # The labels are counted in the graph, where nobody can wait for the number.
        operands = as_autocast(self.hidden, self.weight, self.bias)
        dtype = torch.float32 if wide else self.dtype
        return cross_entropy(operands, self.pointwise, dtype, _unknown, target, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.materialize(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tanh and not kwargs:
            return args[0].tanh()
        if func is F.cross_entropy:
            given = args[0] if args else kwargs.get("input")
            if isinstance(given, TracedLogits):
                loss = given._loss(*args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
                if loss is not NotImplemented:
                    return loss
        plain = [a.materialize() if isinstance(a, TracedLogits) else a for a in args]
        named = {k: a.materialize() if isinstance(a, TracedLogits) else a for k, a in kwargs.items()}
        return func(*plain, **named)


def _on_logits(name: str) -> Any:
    def operator(self: TracedLogits, *others: Any) -> Any:
        return getattr(self.materialize(), name)(*others)

    return operator


# Python looks operators up in the class, past `__getattr__`.
_OPERATORS = ("add", "radd", "sub", "rsub", "rtruediv", "pow", "neg", "abs", "matmul", "len", "iter", "bool")
for _name in (*_OPERATORS, "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TracedLogits, f"__{_name}__", _on_logits(f"__{_name}__"))


def _unknown(ignore_index: int) -> int | None:
    return None
