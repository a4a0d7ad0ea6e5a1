"""Deferred logits: a tensor without memory, which is computed when something reads its values.

The tensor is the output of an autograd node (``twinkle.deferred.nodes``), so whatever autograd does with
tensors it does with this one. Below autograd every operation arrives in ``__torch_dispatch__``. What lies
between a head and its loss (a cast, a view, a shift of rows, a factor, a tanh soft cap) is recorded there;
every other operation runs on the values, which are computed once. The gradient of a loss without logits is
such a tensor as well.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from twinkle.deferred.frames import leave_to_python

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from torch import Tensor

    from twinkle.deferred.nodes import LossGradient
    from twinkle.deferred.steps import Node

__all__ = ["DeferredLogits", "Memory"]

_plain = torch._C.DisableTorchFunctionSubclass


class Memory:
    """What logits and their views share once they are computed.

    Args:
        compute: Gives the values, of which all members are views.
        numel: How many they are.
    """

    def __init__(self, compute: Callable[[], Tensor], numel: int) -> None:
        self._compute = compute
        self.numel = numel
        self.base: Tensor | None = None
        # By `id`: what compares tensors compares their numbers.
        self.members: weakref.WeakValueDictionary[int, DeferredLogits] = weakref.WeakValueDictionary()

    def values(self) -> Tensor:
        """The values, computed at the first call."""
        if self.base is None:
            self.base = self._compute().contiguous()
            self.forget_copies()
        return self.base

    def forget_copies(self) -> None:
        """Let go of the head's copies: nothing is computed of them any more."""
        for member in list(self.members.values()):
            member.kept = None


class DeferredLogits(torch.Tensor):
    """Logits, or a gradient of logits, that are not computed yet.

    Attributes:
        node: Which logits: those themselves, or those that this is the gradient of.
        gradient: Of which loss this is the gradient; None for logits.
        memory: What it shares with its views.
        kept: The copies that the head made of its weight for these logits, while they are deferred.
    """

    node: Node
    gradient: LossGradient | None
    memory: Memory
    kept: object
    # How it is made of the values of its memory; what was made of them; of its own rows alone.
    _views: tuple[Callable[[Any], Any], ...]
    _real: Tensor | None
    _part: Tensor | None
    _plain: tuple[Any, Tensor] | None

    @staticmethod
    def make(
        node: Node,
        like: Tensor,
        *,
        gradient: LossGradient | None = None,
        compute: Callable[[], Tensor] | None = None,
        view_of: tuple[DeferredLogits, Callable[[Any], Any]] | None = None,
    ) -> DeferredLogits:
        """A tensor without memory.

        Args:
            node: What it stands for.
            like: Its shape, strides and dtype, on ``meta``.
            gradient: See :class:`DeferredLogits`.
            compute: Its values; those of ``node`` by default.
            view_of: Of what it is a view, and how.
        """
        made: DeferredLogits = torch.Tensor._make_wrapper_subclass(
            DeferredLogits,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=node.head.hidden.device,
        )
        # An extension in C++ that takes its memory raises, in the place of reading what is not there.
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.node, made.gradient, made._real, made._part, made._plain = node, gradient, None, None, None
        made._views = () if view_of is None else (*view_of[0]._views, view_of[1])
        made.memory = Memory(compute or node.compute, like.numel()) if view_of is None else view_of[0].memory
        made.memory.members[id(made)] = made
        made.kept = node.head.copies() if made.is_deferred else None
        node.head.readers[id(made)] = made
        return made

    @property
    def is_deferred(self) -> bool:
        """Whether the values have not been computed."""
        return self.memory.base is None

    def like(self) -> Tensor:
        """A tensor of its shape, strides and dtype, on ``meta``."""
        with _plain():
            made = torch.empty(0, dtype=self.dtype, device="meta")
            return made.as_strided(self.shape, self.stride(), self.storage_offset())

    def shared(self) -> Tensor:
        """The values, in the memory that they share with their views; without gradients."""
        if self._real is None:
            real = self.memory.values()
            with torch.inference_mode(real.is_inference()), torch.no_grad():
                for view in self._views:
                    real = view(real)
            self._real, self._part = real, None
        return self._real

    def values(self) -> Tensor:
        """The values, to be read; without gradients. Of some of the rows only these are computed."""
        if not self.is_deferred or self.gradient is not None or self.memory.numel == self.node.shape.numel():
            return self.shared()
        if self._part is None:
            self._part = self.node.compute()
        return self._part

    @property
    def plain(self) -> Tensor:
        """They as a tensor of no subclass: the same memory, and a gradient that goes on to the head."""
        from twinkle.deferred.functions import with_memory

        # The same object for all that ask, unless the logits have been changed in place.
        state = (self.grad_fn, self._real)
        if self._plain is None or any(a is not b for a, b in zip(state, self._plain[0], strict=True)):
            made = with_memory(self)
            for name, value in vars(self).items():
                if name.startswith("_dynamo"):  # mark_dynamic
                    setattr(made, name, value)
            self._plain = ((self.grad_fn, self._real), made)
        return self._plain[1]

    def become(self, node: Node) -> None:
        """Stand for other logits of the same shape and dtype; nothing else shares their memory."""
        self.node, self._views, self._part = node, (), None
        self.memory = Memory(node.compute, node.shape.numel())
        self.memory.members[id(self)] = self

    def hold(self, values: Tensor) -> None:
        """Take other values, as ``logits.data = values`` does; what was a view of these is one no longer.

        Args:
            values: Of the same shape and dtype.

        Raises:
            RuntimeError: They are of another shape or dtype.
        """
        if values.shape != self.shape or values.dtype != self.dtype or values.device != self.device:
            raise RuntimeError(
                "`.data` of deferred logits can only be set to logits of their shape and dtype"
            )
        self.become(self.node)
        self.memory.base = values.detach()
        self._real, self.kept = None, None

    def as_subclass(self, cls: Any) -> Any:
        """As of ``torch.Tensor``, which asks neither of the two below."""
        from twinkle.deferred.functions import with_memory

        return with_memory(self).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Not at the top: it makes objects of this class.
        from twinkle.deferred.functions import answer

        return answer(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from twinkle.deferred.operations import answer

        return answer(func, args, kwargs or {})


# A compiled function that gets deferred logits is broken where it uses them: what they do is no part of it.
leave_to_python(
    within=(DeferredLogits.__torch_function__.__func__, DeferredLogits.__torch_dispatch__.__func__)  # type: ignore[attr-defined]
)
