"""What the doors, ``twinkle run`` and the configuration share: door variables, switches and paths.

Standard library only: this module is imported at interpreter start.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "FALSE",
    "TRUE",
    "VARIABLES",
    "absolute",
    "asking",
    "check_path",
    "is_switch",
    "switched_off",
    "variables",
]

_ASKING = ("TWINKLE_CONFIG", "TWINKLE_LAYERS", "TWINKLE_FUNCTIONS", "TWINKLE_KERNELS")

VARIABLES = (*_ASKING, "TWINKLE_LOG", "TWINKLE_REPORT")
"""The variables of which one must be set, and not empty, for the door to open."""

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")


def variables() -> Mapping[str, str]:
    """The environment as every way into Twinkle reads it.

    ``python -E`` and ``-I`` say that the environment does not count. They hide ``PYTHONPATH``, and who types
    them for safety means the variables that name code to run as well.
    """
    if not sys.flags.ignore_environment:
        return os.environ
    return {name: text for name, text in os.environ.items() if not name.startswith("TWINKLE_")}


def asking(environ: Mapping[str, str]) -> list[str]:
    """The variables that ask for kernels; the others settle how, or what is said of them."""
    return [
        name
        for name in _ASKING
        if environ.get(name, "").strip()
        and not (name == "TWINKLE_KERNELS" and environ[name].strip().lower() in FALSE)
    ]


def switched_off(environ: Mapping[str, str]) -> bool:
    """Whether ``TWINKLE_DISABLE=1`` or ``TWINKLE_USE_KERNELS=0`` turns Twinkle off; never raises."""
    return (
        environ.get("TWINKLE_DISABLE", "").strip().lower() in TRUE
        or environ.get("TWINKLE_USE_KERNELS", "").strip().lower() in FALSE
    )


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
