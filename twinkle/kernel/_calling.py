"""From the arguments of a call to records, through the one validator."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from twinkle._bootstrap import settle
from twinkle.errors import say

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["caller", "given", "moment", "register_document"]


def caller() -> str:
    """``file:line`` of the first frame outside Twinkle: where a registration was written."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package + os.sep):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def moment(device: object, mode: object, where: str) -> object:
    """The device to put kernels in place for: what the call says, else what is in force.

    A mode or a device that the call says goes before a variable; where they differ, one line says so.

    Args:
        device: As given to the call.
        mode: As given to the call, or its default.
        where: The call.

    Raises:
        ConfigError: The device or the mode is unknown.
    """
    from twinkle.devices import parse_device
    from twinkle.modes import Mode
    from twinkle.runtime import runtime

    said = {"mode": Mode.parse(mode, where=where), "device": parse_device(device, where=where)}
    for key, value in said.items():
        in_force = getattr(runtime.options, key)
        text = f"{key} = {in_force} has no effect where the program itself asks for {key} = {value}"
        if in_force is not None and value is not None and in_force != value:
            if text not in runtime.session.remarks:
                say(f"twinkle: {text}")
            runtime.session.remark(text)
    return runtime.options.device if device is None else device


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

    settle()
    register(document, where=where)
    watch_new()
