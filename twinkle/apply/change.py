"""What one request put in place, and how to take it back."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Change"]


class Change:
    """The steps of one request, undone in reverse.

    Attributes:
        applied: ``"module.function"`` of each function that runs a kernel.
    """

    def __init__(self) -> None:
        self.applied: list[str] = []
        self._steps: list[Callable[[], object]] = []

    def did(self, undo: Callable[[], object]) -> None:
        """Remember how to undo a step that was just made."""
        self._steps.append(undo)

    def undo(self) -> None:
        """Take every step back, the last first; a second call does nothing."""
        while self._steps:
            self._steps.pop()()
