"""The backward of a recording as a graph."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from twinkle.capture.buffers import Shared, alias
from twinkle.capture.lent import Lent
from twinkle.capture.signature import BUSY, IN_USE, Unservable
from twinkle.capture.surroundings import as_if_run
from twinkle.ops.cuda_graphs import Recorded
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from twinkle.capture.recording import Recording
    from twinkle.capture.weights import Weights

__all__ = ["Backward"]

_ANY = 0
"""Gradients are handed on at once: in which pass over the blocks is nothing to them."""


class Backward:
    """The graph of a recording's backward.

    Args:
        recording: Its forward was replayed and keeps what this needs.
        grads: Of its results, in the call at hand; those of later calls must be given in the same places.

    Attributes:
        shared: Where the gradients of the inputs lie.
    """

    def __init__(self, recording: Recording, grads: tuple[Tensor | None, ...]) -> None:
        self._pattern = [grad is not None for grad in grads]
        pool = self._pool = recording.pool
        kept, places = recording.kept, [at for at, grad in enumerate(grads) if grad is not None]
        self._given: list[tuple[int, Tensor, Shared | None]] = []
        with torch.no_grad():
            for at in places:
                grad: Any = grads[at]
                shared = pool.gradient_with(grad)
                buffer = torch.empty_like(kept[at]).copy_(grad) if shared is None else shared.buffer
                self._given.append((at, buffer, shared))
        assert recording.aliases is not None
        wanted = [recording.inputs[at].leaf for at in recording.where]
        wanted += [recording.aliases.of(one) for one in recording.weights]
        given = [buffer for _, buffer, _ in self._given]

        def run() -> Any:
            results = [kept[at] for at in places]
            return torch.autograd.grad(results, wanted, given, retain_graph=True, allow_unused=True)

        with torch.enable_grad(), as_if_run():
            state = runtime.of(Recorded)
            state.backward = True
            try:
                self._replay, found = recording.graphs.record(run)
            finally:
                state.backward = False
        self._index = pool.next_index()
        self._order = recording.order
        count = len(recording.where)
        self._found = [None if one is None else one.detach() for one in found[:count]]
        self.shared = [None if one is None else Shared(alias(one), self._order) for one in found[:count]]
        of_weights = [None if one is None else one.detach() for one in found[count:]]
        self._lent = Lent(of_weights, recording.weights, self._index, pool)
        self._fresh = True

    def replay(
        self, grads: tuple[Tensor | None, ...], weights: Weights | None, at: int
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs.

        Args:
            grads: Of the results.
            weights: Takes the gradients of the weights.
            at: The place for them.

        Raises:
            Unservable: Other results have gradients, a later forward waits, or the memory is in use.
        """
        if [grad is not None for grad in grads] != self._pattern:
            raise Unservable("its backward is that of other results")
        if not self._pool.may_run(self._index):
            raise Unservable(BUSY)
        if self._index > self._order.last:
            self._order.last = self._index
        elif not self._pool.rewind(self._order, self._index):
            raise Unservable(IN_USE)
        if not self._fresh:
            for place, buffer, shared in self._given:
                grad: Any = grads[place]
                if shared is None or not shared.has(grad, _ANY):
                    buffer.copy_(grad)
        self._fresh = False
        self._replay()
        if weights is not None:
            self._lent.give(weights, at)
            self._order.claims.append(self._lent)
        made: list[Tensor | None] = []
        for found, shared in zip(self._found, self.shared, strict=True):
            copy = None if found is None else found.clone()
            if copy is not None and shared is not None:
                shared.note(copy, _ANY)
            made.append(copy)
        self._pool.last_backward = weakref.ref(self)
        return made
