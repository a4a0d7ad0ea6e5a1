"""Locks by name, for what must not happen twice at once; in a forked child none of them is held."""

from __future__ import annotations

import os
import threading

from twinkle.runtime import runtime

__all__ = ["NamedLocks"]


class NamedLocks:
    """The locks of this process by their names: a repository of the Hub, the directory of a variant."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.RLock] = {}

    def of(self, name: str) -> threading.RLock:
        """The lock of that name; the same one for all threads."""
        # One step for the interpreter: of two threads, both get the lock of the first.
        return self._locks.setdefault(name, threading.RLock())

    def let_go(self) -> None:
        """Begin anew: whoever holds a lock is not in this process."""
        self._locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: runtime.of(NamedLocks).let_go())
