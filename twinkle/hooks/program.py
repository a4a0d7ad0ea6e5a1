"""Watch for what the program itself defines: its lines are followed until all that is watched is there.

An imported module is finished when its import ends; the program never is, and calls at its top what it has
just defined there. So from torch's import to the last definition that is waited for, and no longer, the
lines of the program's own top level are traced. Meanwhile other code of that thread runs as under any tracer
(imports take half as long again), which is why nothing is traced where nothing is waited for.

Standard library only.
"""

from __future__ import annotations

import sys

from twinkle.hooks.finder import own_dict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import CodeType, FrameType
    from typing import Any

__all__ = ["follow_program", "has_begun"]


def follow_program(names: Collection[str], look: Callable[[], object]) -> None:
    """Call ``look`` after each line of the program's top level, to the last that sets one of the names.

    In the thread that runs the program; not where something else traces it already (a debugger).

    Args:
        names: Of functions or classes in the program.
        look: Sees what is there by now; what it raises leaves the line.
    """
    if sys.gettrace() is not None:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_top(frame):
        frame = frame.f_back
    following = _Following(frozenset(names), look)
    if frame is not None:
        following.begin(frame)
    elif not has_begun():
        sys.settrace(following.wait)


def _is_top(frame: FrameType) -> bool:
    return frame.f_code.co_name == "<module>" and frame.f_globals is own_dict(sys.modules.get("__main__"))


def has_begun() -> bool:
    """Whether the program is under way: its file, or its name for ``-m``, is known."""
    main = own_dict(sys.modules.get("__main__"))
    return main.get("__spec__") is not None or "__file__" in main


class _Following:
    """Follows the program's top level by the line."""

    def __init__(self, names: frozenset[str], look: Callable[[], object]) -> None:
        self._names = names
        self._look = look
        self._last = -1

    def wait(self, frame: FrameType, event: str, argument: object) -> Any:
        """Wait for the program's first line (a package may import torch before ``-m`` runs its module)."""
        return self.begin(frame) if _is_top(frame) else None

    def begin(self, frame: FrameType) -> Any:
        """Follow a frame from where it is."""
        self._last = _last_store(frame.f_code, self._names)
        if frame.f_lasti >= self._last:
            sys.settrace(None)
            return None
        frame.f_trace = self._line
        sys.settrace(_nothing)
        return self._line

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event in ("line", "return"):
            done = frame.f_lasti > self._last or event == "return"
            if done:
                sys.settrace(None)
                frame.f_trace = None
            self._look()
            if done:
                return None
        return self._line


def _nothing(frame: FrameType, event: str, argument: object) -> None:
    """Trace no other frame."""


def _last_store(code: CodeType, names: frozenset[str]) -> int:
    """Where the last instruction is that gives one of the names a value; -1 where none does."""
    import dis

    stores = ("STORE_NAME", "STORE_GLOBAL")
    found = [one.offset for one in dis.get_instructions(code) if one.opname in stores and one.argval in names]
    return max(found, default=-1)
