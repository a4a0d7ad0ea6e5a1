"""Locks by name, for what must not happen twice at once; in a forked child none of them is held."""

from __future__ import annotations

from twinkle import forks

__all__ = ["NamedLocks"]


class NamedLocks:
    """The locks of this process by their names: a repository of the Hub, the directory of a variant."""

    def __init__(self) -> None:
        self._locks: dict[str, forks.Lock] = {}

    def of(self, name: str) -> forks.Lock:
        """The lock of that name; the same one for all threads."""
        # One step for the interpreter: of two threads, both get the lock of the first.
        return self._locks.setdefault(name, forks.lock())
