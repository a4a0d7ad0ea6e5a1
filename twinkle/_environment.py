"""What the doors, ``twinkle run`` and the configuration share: door variables, switches and paths.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import os

__all__ = ["FALSE", "TRUE", "VARIABLES", "absolute", "check_path", "is_switch"]

VARIABLES = ("TWINKLE_CONFIG", "TWINKLE_LAYERS", "TWINKLE_FUNCTIONS")
"""The variables of which one must be set, and not empty, for the door to open."""

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")


def is_switch(text: str) -> bool:
    """Whether a text turns something on or off (``1``, ``off``); where a path is meant, it is a mistake."""
    return text.strip().lower() in (*TRUE, *FALSE)


def absolute(path: str) -> str:
    """Make a path for a variable absolute: child processes may start in another directory.

    ``auto`` stays, and so does what is no path, for the error to show it. Nothing is normalised:
    ``link/../twinkle.toml`` is another file than ``twinkle.toml``.
    """
    path = os.path.expanduser(path)
    if path == "auto" or os.path.isabs(path) or is_switch(path):
        return path
    return os.path.join(os.getcwd(), path)


def check_path(name: str, path: str, expected: str, *, where: str | None = None) -> None:
    """Refuse a value that looks like a switch where a path is meant.

    Args:
        name: The variable or the option.
        path: Its value.
        expected: What it names.
        where: Where it stands; by default ``name``.

    Raises:
        ConfigError: The value is ``1``, ``true``, ``off`` or the like.
    """
    if is_switch(path):
        from twinkle.errors import ConfigError

        raise ConfigError(
            f"{name}: not a path",
            where=where or name,
            found=repr(path),
            expected=expected,
            fix=f"write {os.path.join(os.curdir, path.strip())} if a file of that name is meant",
        )
