"""How Twinkle came into this process, and what a reader of the report should know beside the bindings.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["JOB", "Ends", "Session", "job_folder", "job_folders"]

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
        self._before = frozenset(sys.modules)

    @property
    def has_to_be_said(self) -> bool:
        """Whether there is anything to write, or a program that kernels could have been for.

        One that imports the standard library alone is none: ``python -c …`` in a shell that exports
        ``TWINKLE_CONFIG`` ends without a word.
        """
        if self.text or self.path is not None or os.path.isdir(job_folder()):
            return True
        known = {*sys.stdlib_module_names, "twinkle", "wrapt", "__mp_main__"}
        return any(name.partition(".")[0] not in known for name in sys.modules.keys() - self._before)


def job_folder() -> str:
    """Where the processes of a job without a report file leave theirs for the first one."""
    return f"{job_folders()}{os.environ.get(JOB, '')}"


def job_folders() -> str:
    """How the paths of these folders begin: of this user, and where process ids mean what they do here."""
    root = os.environ.get("TMPDIR") or ("/tmp" if os.name == "posix" else os.environ.get("TEMP", os.curdir))
    user = os.getuid() if hasattr(os, "getuid") else ""
    machine = os.uname().nodename if hasattr(os, "uname") else ""
    try:
        numbers: object = os.stat("/proc/self/ns/pid").st_ino  # a container has process ids of its own
    except OSError:
        numbers = ""
    return os.path.join(root, f"twinkle-{user}-{machine}-{numbers}-")


class Session:
    """How Twinkle came into this process.

    Attributes:
        door: ``api``, ``run``, ``pth``, ``sitecustomize``, or empty when nothing activated it.
        configs: The configuration files that were read.
        remarks: What a reader should know that belongs to no binding.
        misses: Those remarks of the last report that tell of kernels of the user's that did nothing.
        remarks_at_report: Who has more to remark at the moment of a report, by subject.
        ends: What is said and written when the process ends; ``None`` when nothing is.
    """

    def __init__(self) -> None:
        self.door = ""
        self.configs: tuple[str, ...] = ()
        self.remarks: list[str] = []
        self.misses: list[str] = []
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
