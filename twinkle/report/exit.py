"""The report in files and on stderr: when something changes, and when the process ends."""

from __future__ import annotations

import os
import sys

from twinkle.errors import say
from twinkle.report import idle, job
from twinkle.report.records import snapshot
from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from twinkle.session import Ends

__all__ = ["at_exit", "changed", "print_report", "write_json"]


def changed(ends: Ends) -> None:
    """Write the report of this process now that a kernel came to something; never an exception.

    A worker of a pool is ended by a signal, and a program may call ``os._exit``: neither comes to its end.
    Kernels that wait for their targets are nothing yet, and a process that only waits leaves no file.
    """
    try:
        path = job.path_of_this_process(ends.path)
        if path is not None and any(b.state != "pending" or b.ran for b in runtime.registry.bindings):
            write_json(snapshot(), path)
    except Exception:
        return  # at the end it is tried again, and said


def at_exit(ends: Ends) -> None:
    """Write and say what was asked for; nothing of it fails the program but ``strict``."""
    first = job.is_first()
    job.remove_left_behind()
    data = snapshot()
    others = job.others(ends.path) if first else []
    if others:
        job.add_others(data, others)
    path = job.path_of_this_process(ends.path) if ends.path is not None else None
    if path is not None:
        try:
            write_json(data, path)
        except OSError as error:
            say(f"twinkle: cannot write the report to {path}: {error}")
    if not first:
        return
    lines = idle.lines(data)
    if ends.text:
        print_report(data)
    elif ends.idle:
        for line in lines:
            say(f"twinkle: {line}")
    if lines and runtime.options.strict and runtime.session.door:
        _end_with_an_error(len(lines))


def print_report(data: dict[str, Any]) -> None:
    """Print the report on stderr as a table."""
    import shutil

    from twinkle.report.text import render

    say(render(data, width=max(80, shutil.get_terminal_size((120, 24)).columns)), end="")


def write_json(data: dict[str, Any], path: str) -> None:
    """Write ``data`` to ``path`` in one step: a reader sees the old file or the new one, whole."""
    import json

    from twinkle.files import write_whole

    write_whole(path, json.dumps(data, indent=2).encode() + b"\n")


def _end_with_an_error(number: int) -> None:
    """End the process with exit code 1: under ``strict`` what was asked for and did nothing is an error.

    An exception would be printed and dropped here. This is the last of the functions that run at exit, as
    it was the first to be registered; what Python does behind it is to flush and to take modules apart.
    """
    say(f"twinkle: strict: {number} of the kernels that were asked for did nothing; the exit code is 1")
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(1)
