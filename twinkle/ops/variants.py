"""Which implementation of an op a device gets: triton's kernels, or plain torch on the CPU.

An op has a folder. Its ``layer.py`` runs triton's kernels, on a GPU or in triton's interpreter. Its
``cpu.py``, where there is one, computes the same with torch's own functions and covers the forms for which
that was measured to be faster than the code it replaces (``benchmarks/cpu_ops.py``). An ``everywhere.py`` is
for devices that have neither: torch's own kernel in the place of code that writes it out.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType
    from typing import Any

__all__ = ["ROOMS", "covering", "declined"]

ROOMS = {"layer": "triton", "cpu": "plain torch", "everywhere": "plain torch"}
"""The modules in the folder of an op that hold an implementation, and what the report calls it."""


def covering(op: str, form: Any, device: str) -> str | None:
    """The module with an implementation of a form for a device, or None where the original stays.

    Args:
        op: The folder under ``twinkle.ops``.
        form: As recognised (``twinkle.ops.<op>.reference``).
        device: ``cuda``, ``rocm`` or ``cpu``.
    """
    from twinkle.ops import launch

    kind = "cuda" if device == "rocm" else device
    if kind in launch.KINDS:
        rooms = ["layer", "everywhere"]
    else:
        rooms = ["cpu", "everywhere"] if kind == "cpu" else ["everywhere"]
    for room in rooms:
        if _has(op, room) and _room(op, room).covers(form):
            return room
    return None


def declined(op: str, room: str, facts: Mapping[str, Any]) -> str | None:
    """Why an implementation is not for an instance, though it covers its form, or None.

    Args:
        op: The folder under ``twinkle.ops``.
        room: As :func:`covering` gave it.
        facts: What was read from the instance (``twinkle.match.instance``).
    """
    declines = getattr(_room(op, room), "declines", None)
    return None if declines is None else declines(facts)


def _room(op: str, name: str) -> ModuleType:
    return import_module(f"twinkle.ops.{op}.{name}")


@functools.cache
def _has(op: str, name: str) -> bool:
    return importlib.util.find_spec(f"twinkle.ops.{op}.{name}") is not None
