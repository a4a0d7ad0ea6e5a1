"""What happened, and why not more?

``snapshot()`` is the report as data, ``text()`` as a table, ``show()`` prints it on stderr and
``save(path)`` writes the data as JSON.
"""

from __future__ import annotations

__all__ = ["save", "show", "snapshot", "text"]


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def snapshot() -> dict[str, Any]:
    """The report as JSON-ready data; ``docs/report.md`` describes the schema."""
    from twinkle.report import records

    return records.snapshot()


def text(*, width: int = 120) -> str:
    """The report as a table of at most ``width`` columns."""
    from twinkle.report.text import render

    return render(snapshot(), width=width)


def show() -> None:
    """Print the report on stderr."""
    from twinkle.report.exit import print_report

    print_report(snapshot())


def save(path: str) -> None:
    """Write the report to ``path`` as JSON.

    Raises:
        OSError: The file cannot be written.
    """
    from twinkle.report.exit import write_json

    write_json(snapshot(), path)
