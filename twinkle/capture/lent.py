"""Gradients of weights in the memory that replays write to, which parameters are lent."""

from __future__ import annotations

import itertools
import weakref
from types import NoneType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from twinkle.capture.pool import Pool
    from twinkle.capture.weights import Weights

__all__ = ["Lent", "lend"]

_NOTHING = frozenset({NoneType})
_COPIES = 2  # backwards of a recording whose gradients are copied before others are lent


class Lent:
    """Gradients of the weights of one recording, where each of its replays writes them.

    Where the program drops its gradients before the next forward, as most do, they are not copied. What it
    still has when an earlier graph is about to be replayed is moved out of the way; from there on it gets
    copies. It gets copies at first as well, until the uses that the memory has of its own are known:
    autograd's thread may hold it a moment longer.

    Args:
        found: The gradients.
        weights: Their weights.
        index: Of the graph that writes them.
        pool: The memory is of.

    Attributes:
        index: Of the graph.
        present: The numbers of those that there are.
        is_plain: Which are laid out as their weights are.
        lends: Whether the parameters get the memory itself.
        taker: Where the gradients wait to be taken to the parameters, and the place there.
    """

    def __init__(
        self, found: Sequence[Tensor | None], weights: Sequence[Tensor], index: int, pool: Pool
    ) -> None:
        self.index = index
        self.present = [number for number, one in enumerate(found) if one is not None]
        self.is_plain = [
            one is not None and one.dtype is weight.dtype and one.stride() == weight.stride()
            for one, weight in zip(found, weights, strict=True)
        ]
        self.lends = self._is_out = False
        self._found = found
        self._weights = [weakref.ref(one) for one in weights]
        self._pool = pool
        self.taker: tuple[weakref.ref[Weights], int] | None = None
        self._left = _COPIES
        self._storages = [one.untyped_storage() for one in found if one is not None]
        self._addresses = [one._cdata for one in self._storages]
        self._uses: list[int] = []

    def give(self, weights: Weights, at: int) -> None:
        """Leave the gradients with those that take them to the parameters.

        Args:
            weights: Of the pass.
            at: The place among them.
        """
        weights.give(at, self._found, self)
        self.taker = weakref.ref(weights), at

    def is_let_go(self) -> bool:
        """Whether nobody has any of the memory; gradients of the parameters are moved elsewhere."""
        if self.taker is not None:
            weights = self.taker[0]()
            if weights is not None:
                weights.settle(self.taker[1])
            self.taker = None
        if self._left:
            self._left -= 1
            self._uses = self._counted()
            self.lends = self._is_out = not self._left and self._pool.lends
            return True
        if not self._is_out:
            return True
        grads, uses = map(getattr, map(_alive, self._weights), _GRAD, _NONE), self._counted()
        if uses != self._uses:
            self._uses = [*map(min, uses, self._uses)]
        if uses != self._uses or not _NOTHING.issuperset(map(type, grads)):
            self._move()
            if self._counted() != self._uses:
                self.lends = False
                return False
        self._is_out = self.lends
        return True

    def _move(self) -> None:
        """Give gradients of the parameters that are this memory memory of their own."""
        with torch.inference_mode(False), torch.no_grad():
            for one, known in zip(self._found, self._weights, strict=True):
                weight = known()
                grad = None if weight is None else weight.grad
                if one is not None and grad is not None and grad.data_ptr() == one.data_ptr():
                    self.lends = False
                    grad.data = grad.clone()

    def _counted(self) -> list[int]:
        return [*map(_uses_of, self._addresses)]


_GRAD, _NONE = itertools.repeat("grad"), itertools.repeat(None)
_alive = weakref.ref.__call__
_uses_of: Callable[[int], int] = torch._C._storage_Use_Count


def lend(
    parameters: Sequence[Tensor], made: list[Tensor | None], lent: Sequence[tuple[int, Lent, int]]
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
