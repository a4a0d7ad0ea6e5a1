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

import weakref
from operator import attrgetter
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twinkle.capture.buffers import Shared
    from twinkle.capture.recording import Recording

__all__ = ["Calls", "Chains", "Static", "Weights", "is_taken"]

_MOST = 256  # recordings of one node
_COPIES = 2  # backwards of a recording whose gradients are copied before others are lent
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
        self._found: list[tuple[Sequence[Tensor | None], Static | None] | None] = [None] * len(recordings)
        self.nothing = recordings[0].pool.nothing
        self.done = False

    def give(self, at: int, found: Sequence[Tensor | None], owner: Static | None = None) -> None:
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
            self._found[at] = copies_of(found[0]), None

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
            lent: list[tuple[int, Static, int]] = []
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
                if owner.lends and self._calls[at].count == 1:
                    lent += [(start + n, owner, n) for n in owner.present]
                else:  # to sum the gradients of several calls in autograd's order is autograd's work
                    copied += [start + n for n in owner.present]
            for calls in self._calls:
                calls.count = 0
            if len(lent) > 1 and _are_given(parameters, nodes):
                # One goes autograd's way, and has it wait for the stream.
                copied += [lent[0][0], *_lend(parameters, made, lent[1:])]
            else:
                copied += [at for at, _, _ in lent]
            for at, copy in zip(copied, copies_of([made[at] for at in copied]), strict=True):
                made[at] = copy
        return made


def _is_awaited(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody waits for the gradients of single parameters before the backward is over."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return True
    return any(any(map(hooks, tensors)) for hooks in _HOOKS)


def _are_given(parameters: Sequence[Tensor], nodes: Sequence[Any]) -> bool:
    """Whether autograd is about to add gradients to all of these parameters, and nobody looks on."""
    if torch.is_grad_enabled() or len(nodes) != len(parameters):
        return False
    if _is_awaited(parameters):
        return False
    try:
        return all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:  # of torch.autograd.grad, which gives them to its caller
        return False


def _lend(
    parameters: Sequence[Tensor], made: list[Tensor | None], lent: Sequence[tuple[int, Static, int]]
) -> list[int]:
    """Give gradients to the parameters that have none.

    Args:
        parameters: The weights.
        made: Their gradients; those that are given are taken out.
        lent: The places of those that may be, whose they are and which.

    Returns:
        The places that are left to autograd.
    """
    left: list[int] = []
    for at, owner, number in lent:
        parameter, found = parameters[at], made[at]
        if found is not None and owner.is_plain[number] and parameter.grad is None:
            parameter.grad = found.detach()
            made[at] = None
        else:
            left.append(at)
    return left


class Static:
    """Gradients of weights in memory that a replay writes to, which parameters may be lent.

    Where the program drops its gradients before the next backward, as most do, they are not copied. What it
    still has then is moved out of the way; from there on it gets copies. It gets copies at first as well,
    until the uses that the memory has of its own are known: autograd's thread may hold it a moment longer.

    Args:
        found: The gradients.
        weights: Their weights.

    Attributes:
        found: The gradients.
        present: The numbers of those that there are.
        is_plain: Which are laid out as their weights are.
        lends: Whether the parameters get the memory itself.
    """

    def __init__(self, found: Sequence[Tensor | None], weights: Sequence[Tensor]) -> None:
        self.found = found
        self.present = [number for number, one in enumerate(found) if one is not None]
        self.is_plain = [
            one is not None and one.dtype is weight.dtype and one.stride() == weight.stride()
            for one, weight in zip(found, weights, strict=True)
        ]
        self.lends = self._is_out = False
        self._left = _COPIES
        self._none = [NoneType] * len(weights)
        self._storages = [one.untyped_storage() for one in found if one is not None]
        self._addresses = [one._cdata for one in self._storages]
        self._uses: list[int] = []

    def is_free(self, weights: Sequence[Tensor]) -> bool:
        """Whether nobody has any of the memory; gradients of the parameters are moved elsewhere.

        Args:
            weights: The parameters.
        """
        if self._left:
            self._left -= 1
            self._uses = self._counted()
            self.lends = self._is_out = not self._left
            return True
        if not self._is_out:
            return True
        grads, uses = [*map(_grad_of, weights)], self._counted()
        if uses != self._uses:
            self._uses = [*map(min, uses, self._uses)]
        if uses != self._uses or [*map(type, grads)] != self._none:
            for one, grad in zip(self.found, grads, strict=True):
                if one is not None and grad is not None and grad.data_ptr() == one.data_ptr():
                    self.lends = False
                    grad.data = grad.clone()
            if self._counted() != self._uses:
                self.lends = False
                return False
        self._is_out = self.lends
        return True

    def _counted(self) -> list[int]:
        return [*map(_uses_of, self._addresses)]


_grad_of = attrgetter("grad")
_uses_of: Callable[[int], int] = torch._C._storage_Use_Count


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


_apply: Callable[..., Any] = super(torch.autograd.Function, _Weights).apply
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


class Chains:
    """The nodes of weights of the blocks of one stack: that of the pass at hand, and who comes after whom."""

    __slots__ = ("_given", "_last", "_next", "_places", "_tokens", "_weights")

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._tokens: list[Tensor | None] = []
        self._places: weakref.WeakKeyDictionary[Recording, int] = weakref.WeakKeyDictionary()
        self._given: Sequence[Shared] = ()
        self._last: weakref.ref[Recording] | None = None
        self._next: weakref.WeakKeyDictionary[Recording, weakref.ref[Recording]] = weakref.WeakKeyDictionary()

    def token(self, recording: Recording, tensors: Sequence[Tensor]) -> tuple[Weights, int, Tensor]:
        """Where the node of a replay leaves the gradients of its weights.

        Args:
            recording: Has weights that want gradients.
            tensors: The inputs of the call.

        Returns:
            The gradients, the place among them, and the input by which autograd comes there.
        """
        weights, at = self._weights, None
        if weights is not None and not weights.done and self._follows(recording, tensors):
            at = self._places.get(recording)
            last = None if self._last is None else self._last()
            if at is None and last is not None:
                self._next[last] = weakref.ref(recording)
        token = None if at is None else self._tokens[at]
        if at is None or token is None:
            weights, at, token = self._begin(recording)
        self._tokens[at] = None
        assert weights is not None
        return weights, at, token

    def note(self, recording: Recording) -> None:
        """A recording with a token was replayed."""
        self._given = recording.outputs
        self._last = weakref.ref(recording)

    def _follows(self, recording: Recording, tensors: Sequence[Tensor]) -> bool:
        """Whether one of the inputs is what the replay before it gave."""
        given = self._given
        for at in recording.where:
            tensor = tensors[at]
            for one in given:
                if one.last() is tensor:
                    return True
        return False

    def _begin(self, first: Recording) -> tuple[Weights, int, Tensor]:
        """A node for a recording and those that came after it in the last pass."""
        recordings, found = [first], self._next.get(first)
        seen = {first}
        while found is not None and len(recordings) < _MOST:
            one = found()
            if one is None or one in seen or one.broken is not None:
                break
            recordings.append(one)
            seen.add(one)
            found = self._next.get(one)
        tensors = [weight for one in recordings for weight in one.weights]
        if len(recordings) > 1 and _is_awaited(tensors):
            recordings, tensors = [first], first.weights
        self._weights = weights = Weights(recordings)
        self._tokens = [*_apply(weights, len(recordings), *tensors)]
        self._places = weakref.WeakKeyDictionary({one: at for at, one in enumerate(recordings)})
        token = self._tokens[0]
        assert token is not None
        return weights, 0, token


def copies_of(found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copies of gradients, those of one dtype in one go."""
    made: list[Tensor | None] = [None] * len(found)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for at, one in enumerate(found):
        if one is not None:
            by_dtype.setdefault(one.dtype, []).append(at)
    with torch.no_grad():
        for places in by_dtype.values():
            copies = torch._foreach_mul([found[at] for at in places], 1.0)
            for at, copy in zip(places, copies, strict=True):
                made[at] = copy
    return made
