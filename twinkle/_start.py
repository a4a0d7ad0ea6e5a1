"""The doors of the interpreter's start: what ``twinkle.pth``, ``twinkle.start`` and sitecustomize call.

Standard library only. They ask the same question before they import this module, so an
interpreter without one of these variables does not even look for it; only ``twinkle.start`` cannot ask.
"""

from __future__ import annotations

import os
import sys

from twinkle._environment import VARIABLES, absolute, variables

__all__ = ["main"]


def _is_our_command() -> bool:
    if not any("twinkle" in word for word in sys.orig_argv[1:]):
        return False
    from twinkle.runner import is_our_command

    return is_our_command(sys.orig_argv)


_opened: list[str] = []

# Variables that hold a path, or several with what stands between them.
_PATHS = {
    "TWINKLE_CONFIG": os.pathsep,
    "TWINKLE_LOCK": "",
    "TWINKLE_REPORT": "",
    "TWINKLE_TRUST_FILES": os.pathsep,
}


def main(door: str = "pth") -> None:
    """Activate Twinkle when the environment asks for it; the program goes on whatever happens.

    Only the first call counts: Python reads the ``.pth`` files of a virtual environment twice, and
    several doors may lead into one interpreter.
    """
    environ = variables()
    if _opened or not any(map(environ.get, VARIABLES)):
        return
    _opened.append(door)
    try:
        if _is_our_command():  # it reads the configuration itself, and starts another interpreter
            return
        # Children may start in another directory.
        for name, separator in _PATHS.items():
            if environ.get(name):
                paths = environ[name].split(separator) if separator else [environ[name]]
                os.environ[name] = separator.join(absolute(path) for path in paths if path.strip())
        from twinkle._bootstrap import activate

        activate(door=door)
    except Exception as error:
        # A traceback here would be printed by every child process of a program that did nothing wrong.
        from twinkle.errors import say

        say(f"twinkle is not active: {error!r}")
