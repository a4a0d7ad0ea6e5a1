"""From the arguments of a call to records, through the one validator."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["caller", "given", "register_document"]


def caller() -> str:
    """``file:line`` of the first frame outside Twinkle: where a registration was written."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package + os.sep):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def given(**arguments: object) -> dict[str, object]:
    """The arguments that are not None, by name."""
    return {name: value for name, value in arguments.items() if value is not None}


def register_document(document: Mapping[str, object], *, where: str) -> None:
    """Validate all of ``document``, then register all of it.

    Raises:
        ConfigError: Something in it cannot be right; nothing was registered.
    """
    from twinkle.apply.activation import watch_new
    from twinkle.apply.documents import register

    register(document, where=where)
    watch_new()
