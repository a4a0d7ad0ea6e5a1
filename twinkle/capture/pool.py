"""The memory that recordings share, the order in which they may be replayed, and how much they may hold."""

from __future__ import annotations

import contextlib
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch

from twinkle import forks
from twinkle.capture.buffers import Shared
from twinkle.capture.graphs import CudaGraphs
from twinkle.capture.order import Order
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from twinkle.capture.backward import Backward

__all__ = ["Pool", "pool_of"]

_MOST_SHARED = 64
_MASKS, _MASK_DIMS = frozenset({torch.bool, torch.int32, torch.int64}), 2
_SECONDS = 0.05
"""Between two looks at whether memory is short, which take 20 us."""


class Holder(Protocol):
    """What holds recordings."""

    def close(self) -> None:
        """Drop all of them."""


class Pending:
    """A forward that was replayed and waits for its backward: what it keeps lies in the pool's memory."""

    __slots__ = ("context", "index", "shared")

    def __init__(self, index: int, context: Any, shared: list[Shared]) -> None:
        self.index = index
        self.context = weakref.ref(context)
        self.shared = shared


class Pool:
    """The recordings of one device.

    Graphs are recorded one after the other into one pool of memory. What a graph keeps for its backward is
    held and given to no later graph; what it needs only while it runs is used again by later ones. So a graph
    may run while forwards wait for their backwards that were recorded before it, and must not while one waits
    that was recorded after it: that one may keep its tensors where the graph writes. Forwards in their usual
    order, and backwards in the reverse of it, never meet this; what does runs without its graph.

    Args:
        device: Of all tensors.
        limit: Bytes that recordings may hold.
        graphs: Makes what records.

    Attributes:
        lock: Held from the copy of the inputs to the copy of the results.
        passed: Counts the passes over the blocks.
        used: Bytes that recordings hold.
        is_short: Whether the program was found to need the memory itself: nothing is recorded any more.
        holders: Of recordings.
        last_backward: The one that was replayed last.
        nothing: An empty tensor.
        undecided: An item for each call under way that may soon be captured with all that is called in it.
        walls: For each call under way in which the device is the wall, what was found.
        lends: Whether parameters may be lent the memory of their gradients.
        age: Counts how often all was to be recorded anew.
    """

    def __init__(
        self, device: torch.device, limit: int, graphs: Callable[[torch.device], Any] = CudaGraphs
    ) -> None:
        self.device = device
        self.limit = limit
        self.lock = forks.lock()
        self.passed = 0
        self.used = 0
        self.count = 0
        self.is_short = False
        self.holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        self._looked = 0.0
        self.lends = True
        self.undecided: list[None] = []
        self.walls: list[str] = []
        self._mask: tuple[Callable[[], Any], int, str] = (lambda: None), -1, "else"
        self.age = 0
        self._training, self._inference = graphs(device), graphs(device)
        self._order_of_training, self._order_of_inference = Order(), Order()
        self._home = self._training.stream()
        self._shortages = self._training.shortages()
        self._pending: list[Pending] = []
        self._shared: list[weakref.ref[Shared]] = []
        self.last_backward: weakref.ref[Backward] | None = None
        self.nothing = torch.empty(0, device=device)

    def graphs(self, *, training: bool) -> Any:
        """What records calls with, or without gradients."""
        return self._training if training else self._inference

    def order(self, *, training: bool) -> Order:
        """The order of the graphs that are recorded with gradients, or without."""
        return self._order_of_training if training else self._order_of_inference

    def next_index(self) -> int:
        """The place of a graph that is recorded now in the order of all."""
        self.count += 1
        return self.count

    def is_home(self) -> bool:
        """Whether the current stream is the one that all recordings are replayed on."""
        return bool(self._training.stream() == self._home)

    def pending(self) -> list[Pending]:
        """The forwards that wait for their backwards, in the order of their recordings."""
        pending = self._pending
        while pending and pending[-1].context() is None:
            pending.pop()
        return pending

    def may_run(self, index: int) -> bool:
        """Whether no forward waits that was recorded after a graph."""
        pending = self.pending()
        return not pending or pending[-1].index < index

    def is_waiting(self, index: int) -> bool:
        """Whether a forward waits for its backward that was replayed by this graph."""
        return any(one.index == index for one in self._pending if one.context() is not None)

    def rewind(self, order: Order, index: int) -> bool:
        """Prepare for the replay of an earlier graph than the last one; False where it must not run.

        Then the program has views of gradients that it was lent, where the graph would write. All is recorded
        anew, behind that memory, and gradients are lent no more.
        """
        if order.rewind(index):
            return True
        self.lends = False
        self.age += 1
        self._drop()
        return False

    def look_after(self) -> None:
        """Move what is needed of the memory of a recording that has gone elsewhere."""
        self._order_of_training.look_after()

    def waits(self, index: int, context: Any, shared: list[Shared]) -> None:
        """A forward was replayed, and keeps what its backward needs."""
        self._pending.append(Pending(index, context, shared))

    def ends(self, context: Any) -> bool:
        """The backward of a forward has come: whether what it needs is still there; it is kept no longer."""
        for at in range(len(self._pending) - 1, -1, -1):
            if self._pending[at].context() is context:
                del self._pending[at]
                return True
        return False

    def is_needed(self, shared: Shared) -> bool:
        """Whether a forward that waits for its backward was given what a shared input holds now."""
        return any(shared in one.shared for one in self._pending if one.context() is not None)

    def shared_with(self, tensor: Tensor) -> Shared | None:
        """Memory with what a tensor holds, copied or computed there in this pass."""
        for known in self._shared:
            one = known()
            if one is not None and one.has(tensor, self.passed) and one.buffer.stride() == tensor.stride():
                return one
        return None

    def share(self, tensor: Tensor, buffer: Tensor) -> Shared:
        """An input, which others that are given the same tensor in this pass find."""
        made = Shared(buffer)
        made.note(tensor, self.passed)
        self.offer(made)
        return made

    def offer(self, made: Shared) -> None:
        """Have recordings find memory that they may read."""
        self._shared = [known for known in self._shared[-_MOST_SHARED:] if known() is not None]
        self._shared.append(weakref.ref(made))

    def gradient_with(self, grad: Tensor) -> Shared | None:
        """Where the gradient lies that the backward before this one has given."""
        last = None if self.last_backward is None else self.last_backward()
        for one in () if last is None else last.shared:
            if one is not None and one.has(grad, 0) and one.buffer.stride() == grad.stride():
                return one
        return None

    def next_pass(self) -> None:
        """The blocks are gone through anew: give all back where memory was short since the last look.

        The allocator counts how often the device had nothing left and it took back what it had cached: the
        last thing it does before it gives up, and what a program without captures might not have come to.
        Where much is free again, somebody else had it.
        """
        self.passed += 1
        now = time.monotonic()
        if now - self._looked < _SECONDS:
            return
        self._looked = now
        shortages = self._training.shortages()
        if shortages != self._shortages:
            self._shortages = shortages
            if self._training.free() < self._training.total() // 8 + self.used:
                self.give_back()

    def give_back(self) -> None:
        """Drop all recordings, and make no more: their memory goes as soon as no backward waits for it."""
        self.is_short = True
        self._drop()

    def make_way(self, needed: int) -> None:
        """Drop all recordings where a call may need what they hold; they are made anew where there is room.

        Args:
            needed: Bytes that the call may need at most, as far as that is known.
        """
        # What recordings hold is given to nobody else, though some of it counts as given back.
        if self.used and needed > self._training.spare() - self.used:
            self._drop()

    def _drop(self) -> None:
        for holder in [*self.holders]:
            holder.close()

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """Keep what is called within from being captured by itself."""
        self.undecided.append(None)  # an item, for threads do not count together
        try:
            yield
        finally:
            self.undecided.pop()

    @contextlib.contextmanager
    def at_the_wall(self, why: str) -> Iterator[None]:
        """Leave what is called within alone: the device is the wall in all of it.

        What is found of a part says less: a part may be issued slower than it is computed, while the device
        is behind with what came before.

        Args:
            why: What was found of the whole.
        """
        self.walls.append(why)
        try:
            yield
        finally:
            self.walls.pop()

    def contents(self, mask: Any) -> str:
        """What is in a mask ``[batch, tokens]``: ``ones``, or ``zeros`` as well; ``else`` of anything else.

        It is waited for, once for each.
        """
        if type(mask) is not torch.Tensor or mask.dim() != _MASK_DIMS or mask.dtype not in _MASKS:
            return "else"
        version = -1 if mask.is_inference() else mask._version
        known, of, contents = self._mask
        if known() is not mask or of != version or version < 0:
            ones, filled = torch.stack([(mask == 1).all(), mask.all()]).tolist()
            contents = "ones" if ones else "else" if filled else "zeros"
            self._mask = weakref.ref(mask), version, contents
        return contents

    def allocated(self) -> int:
        """Bytes that tensors of this process have."""
        return int(self._training.allocated())

    def has_room(self, needed: int = 0) -> bool:
        """Whether one recording more may be made: within the limit, and more stays free than recordings hold.

        A program that suddenly needs more than it ever had finds at least half of what it would have without
        recordings; where it needs that, all are given back (:meth:`next_pass`). For calls that may need more
        recordings make way before (:meth:`make_way`).

        Args:
            needed: Bytes that it will hold; 0 where it is like those before it.
        """
        if self.is_short:
            return False
        last = needed or self.used // max(1, self.count)
        if self.used + last > self.limit:
            return False
        return bool(self._training.free() > self._training.total() // 20 + self.used + 2 * last)


class Pools:
    """Those of this process, by device."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, Pool] = {}
        self.lock = forks.lock()


def pool_of(device: torch.device) -> Pool:
    """The pool of a device."""
    pools = runtime.of(Pools)
    with pools.lock:
        pool = pools.by_device.get(device)
        if pool is None:
            total = int(torch.cuda.mem_get_info(device)[1])
            pool = pools.by_device[device] = Pool(device, runtime.options.capture_bytes(total))
        return pool
