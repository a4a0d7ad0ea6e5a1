"""The order of replays, and which results in the graphs' shared memory are still valid."""

from __future__ import annotations

from typing import Protocol

__all__ = ["STILL", "Claim", "Order"]


class Claim(Protocol):
    """Memory of a graph's results that somebody may need after it.

    Attributes:
        index: Of the graph.
    """

    index: int

    def is_let_go(self) -> bool:
        """Whether it may be written to: what is needed of it has been moved elsewhere."""


class Order:
    """The order in which the graphs of one pool of memory are replayed.

    A graph that is recorded is given memory that earlier ones need only while they run, and its results keep
    it. So a replay may write over all that later recorded graphs gave, and never over what earlier ones gave.
    Going back to an earlier graph is a *rewind*: nothing that lies in the pool is to be relied on after it,
    but for what backwards wait for, which :meth:`~twinkle.capture.pool.Pool.may_run` looks after.

    Who replays a graph that comes after the last one sets ``last``; for any other :meth:`rewind` is asked.

    Attributes:
        claims: Memory that is to be looked after at the next rewind.
        last: The place of the graph that was replayed last.
        rewinds: How often an earlier graph was gone back to.
    """

    __slots__ = ("claims", "last", "rewinds")

    def __init__(self) -> None:
        self.rewinds = self.last = 0
        self.claims: list[Claim] = []

    def rewind(self, index: int) -> bool:
        """Prepare for the replay of an earlier graph; False where what it would write to is in use.

        Args:
            index: Its place in the order of all that were recorded.
        """
        self.look_after()
        if self.claims and any(one.index >= index for one in self.claims):
            return False
        self.rewinds += 1
        self.last = index
        return True

    def look_after(self) -> None:
        """Move what is still needed of earlier results elsewhere, where that can be done."""
        self.claims = [one for one in self.claims if not one.is_let_go()]


STILL = Order()
"""The order of memory that no graph was given: nothing is ever written over there."""
