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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import Any

    from torch import nn

__all__ = ["ROOMS", "covering", "declined", "device", "function_for", "layer_for"]

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
    if kind in launch.DEVICE_TYPES:
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


def device() -> str:
    """The device that models run on here: the GPU that triton serves, else the CPU."""
    import torch

    from twinkle.ops.launch import DEVICE_TYPES

    if "cuda" in DEVICE_TYPES and torch.cuda.is_available():
        return "rocm" if torch.version.hip else "cuda"
    return "cpu"


def layer_for(op: str, form: Any, facts: Mapping[str, Any]) -> type[nn.Module] | str | None:
    """What ``for_form`` of a layer of the pack answers on this machine.

    Where no implementation pays, that is the one with triton's kernels, which computes the definition there:
    whoever binds it by hand asks for it.

    Args:
        op: The folder under ``twinkle.ops``.
        form: As recognised.
        facts: What was read from the instance.

    Returns:
        The layer class; None where there is no kernel for the form, or in words why none is for the instance.
    """
    room = _room_for(op, form)
    if room is None:
        return None
    why = declined(op, room, facts)
    if why is not None:
        return why
    made: type[nn.Module] = _room(op, room).layer_class(form, facts)
    return made


def function_for(
    op: str, form: Any, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any] | None:
    """As :func:`layer_for`, for a function.

    Args:
        op: The folder under ``twinkle.ops``.
        form: As recognised.
        facts: From each argument of the definition to the argument or the number it is.
        original: The function that is replaced.

    Returns:
        A function with the arguments of the original, or None where there is no kernel for the form.
    """
    room = _room_for(op, form)
    if room is None:
        return None
    made: Callable[..., Any] = _room(op, room).function_for(form, facts, original)
    return made


def _room_for(op: str, form: Any) -> str | None:
    room = covering(op, form, device())
    if room is None and _has(op, "layer") and _room(op, "layer").covers(form):
        return "layer"
    return room


def _room(op: str, name: str) -> ModuleType:
    return import_module(f"twinkle.ops.{op}.{name}")


@functools.cache
def _has(op: str, name: str) -> bool:
    return importlib.util.find_spec(f"twinkle.ops.{op}.{name}") is not None
