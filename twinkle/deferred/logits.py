"""Deferred logits: a tensor without memory, which is computed when something reads its values.

What lies between a head and its loss (a cast, a view, a shift of rows, a factor, a tanh soft cap) is
recorded, and ``F.cross_entropy`` computes loss and gradients from the hidden states in chunks. Any other
operation computes the logits, once, by the operations of the program.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_map

from twinkle.deferred.head import Head, apply_pointwise

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from twinkle.deferred.head import PointwiseOp

__all__ = ["DeferredLogits"]

_plain = torch._C.DisableTorchFunctionSubclass


class DeferredLogits(torch.Tensor):
    """``pointwise(hidden @ weight.T + bias)``, not computed yet.

    Args:
        head: Weight and bias of the call.
        hidden: ``[..., hidden]``.
        pointwise: What is done to the logits after the head, in order.
    """

    _head: Head
    _hidden: Tensor
    _pointwise: tuple[PointwiseOp, ...]
    _real: Tensor | None
    _hooks: list[Any]
    # Those that share memory once computed; from which of them, and how, these are a view.
    _family: list[weakref.ref[DeferredLogits]]
    _origin: tuple[DeferredLogits, Callable[[Any], Any]] | None

    def __new__(cls, head: Head, hidden: Tensor, pointwise: tuple[PointwiseOp, ...] = ()) -> DeferredLogits:
        """A tensor of the logits' shape, dtype and device, without memory."""
        dtype = next((value for name, value in reversed(pointwise) if name == "to"), head.dtype)
        if not head.grad and hidden.requires_grad:
            hidden = hidden.detach()
        shape = (*hidden.shape[:-1], head.weight.shape[0])
        made: DeferredLogits = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=hidden.device
        )
        made._head, made._hidden, made._pointwise = head, hidden, pointwise
        made._real, made._hooks, made._origin = None, [], None
        made._family = [weakref.ref(made)]
        return made

    def __init__(self, *args: object) -> None:
        pass

    @property
    def is_deferred(self) -> bool:
        """Whether the logits have not been computed."""
        return self._real is None

    def materialize(self) -> Tensor:
        """The logits; computed at the first call."""
        if self._real is None:
            # A view of logits that are there already is a view of them.
            if self._origin is not None and self._origin[0]._real is not None:
                self._settle_as(self._origin[1](self._origin[0]._real))
            else:
                inference = torch.is_inference_mode_enabled() and not self._hidden.is_inference()
                with (
                    torch.inference_mode(torch.is_inference_mode_enabled() and not inference),
                    torch.set_grad_enabled(self._head.grad),
                    torch.autocast(self._hidden.device.type, enabled=False),
                ):
                    self._settle_as(apply_pointwise(self._head.logits(self._hidden), self._pointwise))
        assert self._real is not None
        return self._real

    def _settle_as(self, real: Tensor) -> None:
        self._real = real
        for hook in self._hooks:
            hook.attach(real)
        del self._head, self._hidden

    def derive(
        self, hidden: Tensor, pointwise: tuple[PointwiseOp, ...], view: Callable[[Any], Any] | None = None
    ) -> DeferredLogits:
        """Other deferred logits of the same head.

        Args:
            hidden: Their hidden states, ``[..., hidden]``.
            pointwise: What is done to them after the head.
            view: Makes them of these once computed, where the two share memory.
        """
        return self.adopt(DeferredLogits(self._head, hidden, pointwise), view)

    def adopt(self, made: DeferredLogits, view: Callable[[Any], Any] | None) -> DeferredLogits:
        """Record that ``made``, once computed, is a view of these.

        Args:
            made: Other deferred logits.
            view: Makes them of these; None where the two share no memory.
        """
        if view is not None:
            made._origin = (self, view)
            made._family = self._family
            self._family.append(weakref.ref(made))
        return made

    def relatives(self) -> list[DeferredLogits]:
        """All deferred logits that share memory with these, oldest first."""
        return [member for ref in self._family if (member := ref()) is not None]

    def share_memory_now(self) -> None:
        """Compute all relatives so that a change to one is seen in the others."""
        for member in self.relatives():
            if member._origin is None:
                member.materialize()
            else:
                before, view = member._origin
                member._settle_again(view(before.materialize()))

    def _settle_again(self, real: Tensor) -> None:
        if self._real is None:
            self._settle_as(real)
        self._real = real

    @property
    def records_grad(self) -> bool:
        """Whether the logits require a gradient."""
        if self._real is not None:
            return bool(self._real.requires_grad)
        parts = (self._hidden, self._head.weight, self._head.bias)
        return self._head.grad and any(part is not None and part.requires_grad for part in parts)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Not at the top: the handlers make objects of this class.
        from twinkle.deferred.functions import HANDLERS, METADATA, changes_in_place

        kwargs = kwargs or {}
        if func in METADATA:
            with _plain():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        handler = HANDLERS.get(func)
        if handler is not None and isinstance(first, DeferredLogits) and first._real is None:
            given = handler(*args, **kwargs)
            if given is not NotImplemented:
                return given
        in_place = changes_in_place(func, kwargs)
        if in_place:
            target = kwargs.get("out", first)
            if isinstance(target, DeferredLogits):
                target.share_memory_now()
        result = func(*tree_map(_real_of, args), **tree_map(_real_of, kwargs))
        if in_place and isinstance(first, DeferredLogits) and result is first._real:
            return first
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached from C++ alone: everything Python calls comes through __torch_function__.
        return func(*tree_map(_real_of, args), **tree_map(_real_of, kwargs or {}))


def _real_of(value: Any) -> Any:
    return value.materialize() if isinstance(value, DeferredLogits) else value
