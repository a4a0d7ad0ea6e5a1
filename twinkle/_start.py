"""The doors of the interpreter's start: what ``twinkle.pth``, ``twinkle.start`` and sitecustomize call.

Standard library only. They ask the same question before they import this module, so an
interpreter without one of these variables does not even look for it; only ``twinkle.start`` cannot ask.
"""

from __future__ import annotations

import os

__all__ = ["VARIABLES", "main"]

VARIABLES = ("TWINKLE_CONFIG", "TWINKLE_LAYERS", "TWINKLE_FUNCTIONS")
"""The variables of which one must be set, and not empty, for the door to open."""


_opened: list[str] = []


def main(door: str = "pth") -> None:
    """Activate Twinkle when the environment asks for it; the program goes on whatever happens.

    Only the first call counts: Python reads the ``.pth`` files of a virtual environment twice, and
    several doors may lead into one interpreter.
    """
    if _opened or not any(map(os.environ.get, VARIABLES)):
        return
    _opened.append(door)
    try:
        from twinkle._bootstrap import activate

        activate(door=door)
    except Exception as error:
        import sys

        # A traceback here would be printed by every child process of a program that did nothing wrong.
        print("twinkle is not active:", repr(error), file=sys.stderr)
