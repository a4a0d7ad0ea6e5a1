"""The door of the interpreter's start: what ``twinkle.pth`` and ``twinkle.start`` call.

Standard library only. ``twinkle.pth`` asks the same question before it imports this module, so an
interpreter without one of these variables does not even look for it; ``twinkle.start`` cannot ask.
"""

from __future__ import annotations

import os

__all__ = ["VARIABLES", "main"]

VARIABLES = ("TWINKLE_CONFIG", "TWINKLE_LAYERS", "TWINKLE_FUNCTIONS")
"""The variables of which one must be set, and not empty, for the door to open."""


def main() -> None:
    """Activate Twinkle when the environment asks for it; the program goes on whatever happens."""
    if not any(map(os.environ.get, VARIABLES)):
        return
    try:
        from twinkle._bootstrap import activate

        activate(door="pth")
    except Exception as error:
        import sys

        # A traceback here would be printed by every child process of a program that did nothing wrong.
        print("twinkle is not active:", repr(error), file=sys.stderr)
