"""How Twinkle came into this process, and what a reader of the report should know beside the bindings.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Session"]


class Session:
    """How Twinkle came into this process.

    Attributes:
        door: ``api``, ``run``, ``pth``, ``sitecustomize``, or empty when nothing activated it.
        configs: The configuration files that were read.
        remarks: What a reader should know that belongs to no binding.
        remarks_at_report: Who has more to remark at the moment of a report, by subject.
    """

    def __init__(self) -> None:
        self.door = ""
        self.configs: tuple[str, ...] = ()
        self.remarks: list[str] = []
        self.remarks_at_report: dict[str, Callable[[], list[str]]] = {}

    def remark(self, text: str) -> None:
        """Add a remark once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def all_remarks(self) -> list[str]:
        """Every remark there is now."""
        late = [text for remarks in self.remarks_at_report.values() for text in remarks()]
        return [*self.remarks, *late]
