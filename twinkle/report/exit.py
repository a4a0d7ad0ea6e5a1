"""The report at exit: a table on stderr, a JSON file, or both, as was asked for.

Standard library only and imported at interpreter start, so the writing itself imports late.
"""

from __future__ import annotations

import os
import sys

from twinkle.runtime import runtime

__all__ = ["register_at_exit", "write_json", "write_report"]

_OWNER = "_TWINKLE_REPORT_OWNER"


class _AtExit:
    """What is written when this process ends."""

    def __init__(self) -> None:
        self.registered = False
        self.text = False
        self.path: str | None = None


def register_at_exit(*, text: bool, path: str | None) -> None:
    """Write the report when this process ends.

    Forked children never write it; a child that was started as a program of its own writes its
    JSON beside the parent's (``report.1234.json``), so that nothing is overwritten.

    Args:
        text: Print the table on stderr.
        path: Write JSON there.
    """
    wanted = runtime.of(_AtExit)
    wanted.text = text or wanted.text
    wanted.path = path or wanted.path
    if wanted.registered:
        return
    wanted.registered = True
    import atexit

    pid = os.getpid()
    os.environ.setdefault(_OWNER, str(pid))

    def at_exit() -> None:
        if os.getpid() == pid and runtime.of(_AtExit) is wanted:
            write_report(text=wanted.text, path=wanted.path)

    atexit.register(at_exit)


def write_report(*, text: bool, path: str | None) -> None:
    """Write what was asked for; a report that cannot be written never fails the program."""
    from twinkle.report.records import snapshot

    owner = os.environ.get(_OWNER) in (None, str(os.getpid()))
    data = snapshot()
    if path is not None:
        try:
            write_json(data, path if owner else _beside(path, os.getpid()))
        except OSError as error:
            print(f"twinkle: cannot write the report to {path}: {error}", file=sys.stderr)
    if text and owner and sys.stderr is not None:
        import shutil

        from twinkle.report.text import render

        width = max(80, shutil.get_terminal_size((120, 24)).columns)
        try:
            sys.stderr.write(render(data, width=width))
        except (OSError, ValueError):
            return


def write_json(data: dict[str, object], path: str) -> None:
    """Write ``data`` to ``path`` in one step: a reader sees the old file or the new one, whole."""
    import json

    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2)
            file.write("\n")
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _beside(path: str, pid: int) -> str:
    stem, suffix = os.path.splitext(path)
    return f"{stem}.{pid}{suffix}"
