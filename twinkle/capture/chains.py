"""Which blocks are called one after the other, and share the node of their weights."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from twinkle.capture.weights import Weights, is_awaited, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from twinkle.capture.buffers import Shared
    from twinkle.capture.recording import Recording

__all__ = ["Chains"]

_MOST = 256  # recordings of one node


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
        if len(recordings) > 1 and is_awaited(tensors):
            recordings, tensors = [first], first.weights
        self._weights = weights = Weights(recordings)
        self._tokens = [*tokens(weights, len(recordings), *tensors)]
        self._places = weakref.WeakKeyDictionary({one: at for at, one in enumerate(recordings)})
        token = self._tokens[0]
        assert token is not None
        return weights, 0, token
