"""Kinds of calls of alike blocks, and whether the host is the wall in them."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any

import torch

from twinkle.capture.chains import Chains

if TYPE_CHECKING:
    from torch import nn

    from twinkle.capture.block import BlockCall
    from twinkle.capture.pool import Pool
    from twinkle.capture.state import StackRecord

__all__ = ["MOST_KINDS", "WARM", "Kind", "Stack"]

WARM = 2
"""Calls of a kind that run as they are before one is recorded."""
MOST_KINDS = 64
"""Kinds of calls of one stack that are kept in mind."""
_MARGIN = 2
"""Times what a call keeps that it may need while it runs, and in its backward."""
_HOST_IS_SLOW = 1.15
"""Device time over host time above which a replay would gain nothing: the device is the wall."""


class Stack:
    """Alike blocks of one model, or the one module that calls them: what is decided for all of them.

    Args:
        record: What the report knows of them.
        pool: Where recordings go; that of the blocks' device where None.
        always: Record also where it was not found to be faster.
    """

    def __init__(self, record: StackRecord, pool: Pool | None = None, *, always: bool = False) -> None:
        self.record = record
        self._always = always
        self.pool = pool
        self.kinds: dict[Any, Kind] = {}
        self.blocks: weakref.WeakSet[BlockCall] = weakref.WeakSet()
        self.chains = Chains()

    def needs(self, elements: int) -> int:
        """Bytes that a call may need, by what others of this stack have kept for each element given.

        Args:
            elements: Of its inputs.
        """
        kept = max((one.kept / one.elements for one in self.kinds.values() if one.elements), default=0.0)
        return int(_MARGIN * kept * elements)

    def kind(self, key: Any) -> Kind | None:
        """One kind of call; None where there are more kinds than are kept in mind."""
        known = self.kinds.get(key)
        if known is None:
            if len(self.kinds) >= MOST_KINDS:
                seldom = next((one for one, kind in self.kinds.items() if not kind.chosen), None)
                if seldom is None:
                    return None
                del self.kinds[seldom]
            known = self.kinds[key] = Kind(chosen=self._always)
        return known


class Kind:
    """One kind of call of the blocks of a stack, and whether it is captured.

    Attributes:
        refused: Why it is not; None while that is open, or when it is.
        chosen: Whether it was found that the host is the wall.
        device_is_wall: Whether it is refused since that is the device.
        attempts: Recordings that failed.
        kept: Bytes that a call has kept for its backward.
        elements: Of the inputs of such a call.
    """

    def __init__(self, *, chosen: bool = False) -> None:
        self.kept = self.elements = 0
        self.refused: str | None = None
        self.device_is_wall = False
        self.chosen = chosen
        self.attempts = 0
        self._times: list[tuple[float, Any, Any]] = []
        self._late = 0

    def another(self) -> Kind:
        """A kind like this one, of which as much is known."""
        made = Kind(chosen=self.chosen)
        made.kept, made.elements = self.kept, self.elements
        return made

    def timed(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], pool: Pool) -> Any:
        """Run a call as it is, and look how long host and device are at it, and what it keeps."""
        before = pool.allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.perf_counter()
        result = block._call_impl(*args, **kwargs)
        taken = time.perf_counter() - began
        end.record()
        self.kept = max(self.kept, pool.allocated() - before)
        self._times.append((taken, start, end))
        return result

    def leave_to_device(self, why: str) -> None:
        """Refuse it: nothing is gained where the device is the wall."""
        self.refused, self.device_is_wall = why, True

    def decide(self) -> str | None:
        """Why it is not captured now; None where it is to be."""
        if self.chosen or self.refused is not None or not self._times:
            self.chosen = self.refused is None
            return self.refused
        if not self._times[-1][2].query():
            self._late += 1
            if self._late > WARM * len(self._times):
                self.leave_to_device("not faster here: the device is more than a step behind the host")
            return self.refused or "the device has not come so far"
        host = sorted(taken for taken, _, _ in self._times)[len(self._times) // 2] * 1e3
        device = sorted(start.elapsed_time(end) for _, start, end in self._times)[len(self._times) // 2]
        self._times.clear()
        if device > host * _HOST_IS_SLOW:
            self.leave_to_device(f"not faster here: the device takes {device:.2f} ms, the host {host:.2f} ms")
        self.chosen = self.refused is None
        return self.refused
