"""Locks that nobody holds in a forked child, and what else begins anew there: one handler for all of it.

A child has only the thread that forked. A lock that another thread held at that moment would never be let go
of in the child, so every lock of the package is made here (``tests/test_house.py`` looks).

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import os
from _thread import RLock
from _weakref import ref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Lock", "in_child", "known", "lock"]

Lock = RLock
"""The type of a lock."""

_locks: set[ref[RLock]] = set()
_steps: list[Callable[[], object]] = []


def lock() -> RLock:
    """A re-entrant lock, which is free in a forked child whoever held it in the parent."""
    made = RLock()
    _locks.add(ref(made, _locks.discard))
    return made


def known() -> tuple[RLock, ...]:
    """The locks that are alive."""
    return tuple(made for one in tuple(_locks) if (made := one()) is not None)


def in_child(step: Callable[[], object]) -> None:
    """Call ``step`` in every forked child, after the locks are free; for records of threads."""
    _steps.append(step)


def _forked() -> None:
    for made in known():
        made._at_fork_reinit()  # type: ignore[attr-defined]
    for step in _steps:
        step()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
