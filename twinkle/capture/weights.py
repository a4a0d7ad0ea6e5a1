"""The way of gradients from replayed backwards to the parameters: one autograd node for all blocks of a pass.

A node that has the weights of one block among its inputs costs the host more than the replay. Where each
block is given what the one before it gave, one node for all of them is made with the first. The node of each
replay takes a token of it, an empty tensor, and leaves the gradients of its weights there; autograd comes to
it last, when all that have a token have run. What autograd promises of a block's inputs and results holds as
it did.

Where somebody waits for single gradients (a process group, an optimizer within the backward) each block has a
node of its own.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from twinkle.capture.buffers import copies_of
from twinkle.capture.lent import lend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from twinkle.capture.lent import Lent
    from twinkle.capture.recording import Recording

__all__ = ["Calls", "Weights", "is_awaited", "is_taken", "tokens"]

_HOOKS = (attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks"))


class Calls:
    """How often a block was called, with gradients, since some were taken to its parameters."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Weights:
    """Gradients of the weights of some recordings, until they are taken to the parameters.

    Args:
        recordings: Those of one pass; they are not held.

    Attributes:
        done: Whether they were taken.
        nothing: The gradient of a token.
    """

    __slots__ = ("__weakref__", "_calls", "_counts", "_found", "_lock", "done", "nothing")

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self._counts = [len(one.weights) for one in recordings]
        self._calls = [one.calls for one in recordings]
        self._lock = recordings[0].pool.lock
        self._found: list[tuple[Sequence[Tensor | None], Lent | None] | None] = [None] * len(recordings)
        self.nothing = recordings[0].pool.nothing
        self.done = False

    def give(self, at: int, found: Sequence[Tensor | None], owner: Lent | None = None) -> None:
        """Leave the gradients of the weights of a recording.

        Args:
            at: Which.
            found: The gradients.
            owner: Whose memory they lie in, where the next replay writes.
        """
        self._found[at] = found, owner

    def settle(self, at: int) -> None:
        """Copy what a replay is about to write to."""
        found = self._found[at]
        if found is not None and found[1] is not None:
            self._found[at] = _settled(found[0]), None

    def take(
        self, wanted: Sequence[Tensor | None], parameters: Sequence[Tensor], nodes: Sequence[Any]
    ) -> list[Tensor | None]:
        """The gradients of all weights, but for those that the parameters have already.

        Args:
            wanted: Those of the tokens: there is one where the replay was followed backward just now.
            parameters: The weights.
            nodes: Of autograd, which come next for each of them.
        """
        with self._lock:
            self.done = True
            made: list[Tensor | None] = []
            lent: list[tuple[int, Lent, int]] = []
            copied: list[int] = []
            for at, (count, token) in enumerate(zip(self._counts, wanted, strict=True)):
                found = self._found[at]
                if token is None or found is None:
                    made += [None] * count
                    continue
                start, owner = len(made), found[1]
                made += found[0]
                self._found[at] = None
                if owner is None:
                    continue
                owner.taker = None
                if owner.lends and self._calls[at].count == 1:
                    lent += [(start + n, owner, n) for n in owner.present]
                else:  # to sum the gradients of several calls in autograd's order is autograd's work
                    copied += [start + n for n in owner.present]
            for calls in self._calls:
                calls.count = 0
            if len(lent) > 1 and _are_given(parameters, nodes):
                # One goes autograd's way, and has it wait for the stream.
                copied += [lent[0][0], *lend(parameters, made, lent[1:])]
            else:
                copied += [at for at, _, _ in lent]
            for at, copy in zip(
                copied, copies_of([one for at in copied if (one := made[at]) is not None]), strict=True
            ):
                made[at] = copy
        return made


def _settled(found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies of those gradients that there are."""
    copies = iter(copies_of([one for one in found if one is not None]))
    return [None if one is None else next(copies) for one in found]


def is_awaited(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody waits for the gradients of single parameters before the backward is over."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return True
    return any(any(map(hooks, tensors)) for hooks in _HOOKS)


def _are_given(parameters: Sequence[Tensor], nodes: Sequence[Any]) -> bool:
    """Whether autograd is about to add gradients to all of these parameters, and nobody looks on."""
    if torch.is_grad_enabled() or len(nodes) != len(parameters):
        return False
    if is_awaited(parameters):
        return False
    try:
        return all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:  # of torch.autograd.grad, which gives them to its caller
        return False


class _Weights(torch.autograd.Function):
    """From the weights to the tokens."""

    @staticmethod
    def forward(ctx: Any, weights: Weights, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.weights = weights
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple([weights.nothing.detach() for _ in range(count)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        parameters = ctx.saved_tensors  # says what autograd says: freed, or written to
        return None, None, *ctx.weights.take(grads, parameters, [one for one, _ in ctx.next_functions])


tokens: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Weights).apply
"""Of the class below torch's: that one looks for tensors of transforms, in which nothing is replayed."""


def is_taken(node: Any) -> bool:
    """Whether autograd comes to the node of the weights, in the backward at hand.

    Args:
        node: Of a replay with a token.
    """
    kind = _Weights._backward_cls
    return any(
        isinstance(one, kind) and torch._C._will_engine_execute_node(one) for one, _ in node.next_functions
    )
