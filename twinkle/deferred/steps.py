"""What was done to logits since their head, one step at a time, there and back.

A step treats rows alone (a view, a slice) or numbers alone (a cast, a factor). So the logits after some
steps are those of some rows of hidden states, and what autograd does in the backward of a step is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from twinkle.deferred.head import Head

__all__ = [
    "Added",
    "Index",
    "Node",
    "Number",
    "PointwiseOp",
    "Reshape",
    "Select",
    "Slice",
    "Step",
    "apply_pointwise",
]

PointwiseOp = tuple[str, "float | torch.dtype | Tensor | None"]
"""One thing done to the logits since the head: ("mul", 0.5), ("div", 30.0), ("tanh", None), ("to", dtype),
("add", [vocab]), ("softmax", None), ("log_softmax", None)."""

_aten = torch.ops.aten
_RESHAPES = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
)


def apply_pointwise(logits: Tensor, ops: tuple[PointwiseOp, ...]) -> Tensor:
    """The logits after pointwise operations, which round as in the program."""
    for name, value in ops:
        if name == "to":
            logits = logits.to(value)
        elif name in ("mul", "div"):
            logits = logits * value if name == "mul" else logits / value
        elif name == "tanh":
            logits = torch.tanh(logits)
        elif name == "add":
            logits = logits + value
        else:
            logits = getattr(torch, name)(logits, -1)
    return logits


class Step:
    """One thing done to logits."""

    pointwise: tuple[PointwiseOp, ...] = ()
    keeps_gradient = False
    """Whether the gradient before it is the one after it, so that its backward is no operation."""

    def rows(self, rows: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` of the logits after the step, of those before it."""
        return rows

    def back(self, grad: Tensor, before: tuple[int, ...]) -> Tensor:
        """The gradient before the step of the gradient after it, for tensors of rows.

        Args:
            grad: ``[..., width]``.
            before: Shape before the step, without the last dimension.
        """
        return grad

    def undone_by(self, node: Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an operation on the gradient after the step, ``args[0]``, gives the one before it."""
        return False


class Reshape(Step):
    """Another shape of the same rows.

    Args:
        lead: Without the last dimension.
    """

    def __init__(self, lead: tuple[int, ...]) -> None:
        self.lead = lead

    def rows(self, rows: Tensor) -> Tensor:
        """As said at :class:`Step`."""
        return rows.reshape(*self.lead, rows.shape[-1])

    def back(self, grad: Tensor, before: tuple[int, ...]) -> Tensor:
        """As said at :class:`Step`."""
        return grad.reshape(*before, grad.shape[-1])

    def undone_by(self, node: Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """As said at :class:`Step`."""
        if func not in _RESHAPES:
            return False
        assert node.previous is not None
        found = func(torch.empty(node.shape, device="meta"), *args[1:], **kwargs)
        return bool(found.shape == node.previous.shape)


class Slice(Step):
    """Some rows along a dimension.

    Args:
        dim: From 0.
        start: And the rest as in Python.
        stop: Not included.
        step: Above 0.
    """

    def __init__(self, dim: int, start: int | None, stop: int | None, step: int) -> None:
        self.dim = dim
        self.part = slice(start, stop, step)

    def rows(self, rows: Tensor) -> Tensor:
        """As said at :class:`Step`."""
        part = self.part
        return _aten.slice.Tensor(rows, self.dim, part.start, part.stop, part.step)

    def back(self, grad: Tensor, before: tuple[int, ...]) -> Tensor:
        """As said at :class:`Step`."""
        first, last, step = self.part.indices(before[self.dim])
        return _aten.slice_backward(grad, [*before, grad.shape[-1]], self.dim, first, last, step)

    def undone_by(self, node: Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """As said at :class:`Step`."""
        if func is not _aten.slice_backward.default or kwargs:
            return False
        assert node.previous is not None
        sizes, dim, start, stop, step = args[1:]
        size = sizes[dim]
        same = range(*slice(start, stop, step).indices(size)) == range(*self.part.indices(size))
        return tuple(sizes) == node.previous.shape and dim == self.dim and same


class Select(Step):
    """One row along a dimension, which is left out.

    Args:
        dim: From 0.
        index: Of the row.
    """

    def __init__(self, dim: int, index: int) -> None:
        self.dim, self.index = dim, index

    def rows(self, rows: Tensor) -> Tensor:
        """As said at :class:`Step`."""
        return rows.select(self.dim, self.index)

    def back(self, grad: Tensor, before: tuple[int, ...]) -> Tensor:
        """As said at :class:`Step`."""
        return _aten.select_backward(grad, [*before, grad.shape[-1]], self.dim, self.index)

    def undone_by(self, node: Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """As said at :class:`Step`."""
        assert node.previous is not None
        given = (list(node.previous.shape), self.dim, self.index)
        return func is _aten.select_backward.default and (list(args[1]), *args[2:]) == given and not kwargs


class Index(Step):
    """The rows that tensors name.

    Args:
        indices: For each of the first dimensions a tensor or None.
    """

    def __init__(self, indices: list[Tensor | None]) -> None:
        self.indices = indices

    def rows(self, rows: Tensor) -> Tensor:
        """As said at :class:`Step`."""
        return _aten.index.Tensor(rows, self.indices)

    def back(self, grad: Tensor, before: tuple[int, ...]) -> Tensor:
        """As said at :class:`Step`."""
        zeros = grad.new_zeros(*before, grad.shape[-1])
        return _aten.index_put_(zeros, self.indices, grad, True)

    def names(self, indices: list[Tensor | None]) -> bool:
        """Whether these are the same tensors."""
        pairs = zip(indices, self.indices, strict=False)
        same = all(a is b or (a is not None and b is not None and a.is_set_to(b)) for a, b in pairs)
        return same and len(indices) == len(self.indices)


class Added(Step):
    """A tensor without a gradient, of the same dtype, is added to each row.

    Args:
        value: ``[vocab]``; nobody else changes it.
    """

    keeps_gradient = True

    def __init__(self, value: Tensor) -> None:
        self.pointwise = (("add", value),)


class Number(Step):
    """Something done to each number, or to each row of numbers.

    Args:
        name: Of a :data:`PointwiseOp`.
        value: Its value.
    """

    def __init__(self, name: str, value: float | torch.dtype | None) -> None:
        self.name, self.value = name, value
        self.pointwise = ((name, value),)

    def undone_by(self, node: Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """As said at :class:`Step`."""
        assert node.previous is not None
        if self.name == "to":
            same_device = kwargs.get("device") in (None, node.head.hidden.device)
            return func is _aten._to_copy.default and kwargs["dtype"] == node.previous.dtype and same_device
        if self.name in ("mul", "div"):
            wanted = _aten.mul.Tensor if self.name == "mul" else _aten.div.Tensor
            return func is wanted and args[1:] == (self.value,)
        tanh = self.name == "tanh" and func is _aten.tanh_backward.default
        return tanh and getattr(args[1], "node", None) is node


class Node:
    """Logits after some steps.

    Args:
        head: Of the logits.
        lead: Their shape without the last dimension.
        dtype: Theirs.
        previous: What they were before the last step; None for those that come out of the head.
        step: The last step.
        rows: Their hidden states, where these have a memory of their own.
    """

    def __init__(
        self,
        head: Head,
        lead: tuple[int, ...],
        dtype: torch.dtype,
        previous: Node | None = None,
        step: Step | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.head = head
        self.shape = torch.Size((*lead, head.weight.shape[0]))
        self.dtype = dtype
        self.previous = previous
        self.step = step
        self.pointwise: tuple[PointwiseOp, ...] = ()
        if previous is not None and step is not None:
            self.pointwise = (*previous.pointwise, *step.pointwise)
        self._rows = rows

    @property
    def rows(self) -> Tensor:
        """Their hidden states, ``[..., hidden]``."""
        if self._rows is not None:
            return self._rows
        # Not kept: what is a view now is one of a copy later.
        if self.previous is None or self.step is None:
            return self.head.hidden
        rows = self.previous.rows
        with torch.inference_mode(rows.is_inference()), torch.no_grad():
            return self.step.rows(rows)

    @property
    def of_gradient(self) -> Node:
        """The first node whose logits have the same gradient as these."""
        node = self
        while node.previous is not None and node.step is not None and node.step.keeps_gradient:
            node = node.previous
        return node

    def compute(self, rows: Tensor | None = None) -> Tensor:
        """Their values, without gradients.

        Args:
            rows: Those of some of the rows, of a head that is checked; else of all.
        """
        if rows is None:
            self.head.check()
        logits = self.head.logits(self.rows if rows is None else rows)
        # In the modes that hold for the logits themselves.
        with (
            torch.inference_mode(logits.is_inference()),
            torch.no_grad(),
            torch.autocast(logits.device.type, enabled=False),
        ):
            return apply_pointwise(logits, self.pointwise)

    def back(self, grad: Tensor) -> Tensor:
        """The gradient before the last step of the one after it, both computed."""
        step, previous = self.step, self.previous
        assert step is not None
        assert previous is not None
        if not isinstance(step, Number):
            return step.back(grad, tuple(previous.shape[:-1]))
        if step.name == "to":
            return grad.to(previous.dtype)
        if step.name == "tanh":
            return _aten.tanh_backward(grad, self.compute())
        factor: Any = step.value
        return grad * factor if step.name == "mul" else grad / factor

    def rows_back(self, grad: Tensor) -> Tensor:
        """The gradient of all hidden states of the one of :attr:`rows`."""
        node: Node = self
        while node.previous is not None and node.step is not None:
            grad = node.step.back(grad, tuple(node.previous.shape[:-1]))
            node = node.previous
        return grad
