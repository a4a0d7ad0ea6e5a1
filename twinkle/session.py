"""How Twinkle came into this process, and what a reader of the report should know beside the bindings.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["JOB", "Ends", "Session"]

JOB = "_TWINKLE_JOB"
"""The variable that tells the processes of a job which of them was first: its process id, and when."""


class Ends:
    """What is said and written when a process ends.

    Attributes:
        text: The report is printed as a table.
        idle: Bindings that did nothing are named.
        path: The file of the JSON report, or ``None``.
    """

    def __init__(self) -> None:
        self.text = False
        self.idle = False
        self.path: str | None = None


class Session:
    """How Twinkle came into this process.

    Attributes:
        door: ``api``, ``run``, ``pth``, ``sitecustomize``, or empty when nothing activated it.
        configs: The configuration files that were read.
        remarks: What a reader should know that belongs to no binding.
        remarks_at_report: Who has more to remark at the moment of a report, by subject.
        ends: What is said and written when the process ends; ``None`` when nothing is.
    """

    def __init__(self) -> None:
        self.door = ""
        self.configs: tuple[str, ...] = ()
        self.remarks: list[str] = []
        self.remarks_at_report: dict[str, Callable[[], list[str]]] = {}
        self.ends: Ends | None = None

    def remark(self, text: str) -> None:
        """Add a remark once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def all_remarks(self) -> list[str]:
        """Every remark there is now."""
        late = [text for remarks in self.remarks_at_report.values() for text in remarks()]
        return [*self.remarks, *late]
