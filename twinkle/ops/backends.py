"""Backends: the implementations of an op for a kind of device, and which of them computes a variant here.

A backend is a module in the folder of its op:

    triton_backend.py   Triton's kernels: on a GPU that Triton serves, or in Triton's interpreter
    cpu_backend.py      plain torch for the CPU, where that was measured to be faster than what it replaces
    torch_backend.py    plain torch for any device: torch's own kernel in the place of code that writes it out

It answers one question, ``supports(variant, device, facts)``: why it is not for a variant of the op and an
instance, or None. ``layer_class(variant, facts)`` or ``function_for(variant, facts, original)`` gives the
kernel.

Standard library only: the records of the ops, which name their backends, are imported at interpreter start.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import Any

    from torch import nn

__all__ = ["KINDS", "Backend", "backend_for", "device", "function_for", "layer_for"]

KINDS = {"triton_backend": "triton", "cpu_backend": "plain torch", "torch_backend": "plain torch"}
"""The kinds of backends, and what the report calls each."""


class Backend:
    """An implementation of an op for a kind of device.

    Args:
        op: The name of the op.
        name: One of :data:`KINDS`.
        module: The dotted name of the module that holds it.

    Attributes:
        label: What the report calls it.
    """

    def __init__(self, op: str, name: str, module: str) -> None:
        self.op = op
        self.name = name
        self.label = KINDS[name]
        self.module = module

    def __repr__(self) -> str:
        return f"Backend({self.op!r}, {self.name!r})"

    def load(self) -> ModuleType:
        """The module that holds it, imported."""
        return import_module(self.module)

    def supports(
        self, variant: Any, device: str | None = None, facts: Mapping[str, Any] | None = None
    ) -> str | None:
        """Why it does not compute a variant, or None where it does.

        Args:
            variant: As recognised (``twinkle.ops.<op>.reference``).
            device: ``cuda``, ``rocm`` or ``cpu``; None for a device that it is for.
            facts: What was read from an instance (``twinkle.match.instance``); None before there is one.
        """
        if device is not None and not self.is_for(device):
            return f"{self.label} ({self.name}) is not for {device}"
        asked = getattr(self.load(), "supports", None)
        reason: str | None = None if asked is None else asked(variant, device, facts)
        return reason

    def is_for(self, device: str) -> bool:
        """Whether it has kernels for a device, such as ``cuda`` or ``cpu``."""
        device = "cuda" if device == "rocm" else device
        from twinkle.ops import launch

        if self.name == "triton_backend":
            return device in launch.DEVICE_TYPES
        return self.name == "torch_backend" or (device == "cpu" and device not in launch.DEVICE_TYPES)


def backend_for(op: str, variant: Any, device: str) -> Backend | None:
    """The backend for a variant of an op on a device, or None where the original stays.

    Args:
        op: The name of the op.
        variant: As recognised.
        device: ``cuda``, ``rocm`` or ``cpu``.
    """
    from twinkle.ops.catalog import find_op

    return next((b for b in find_op(op).backends if b.supports(variant, device) is None), None)


def device() -> str:
    """The device that models run on here: the GPU that Triton serves, else the CPU."""
    import torch

    from twinkle.ops.launch import DEVICE_TYPES

    if "cuda" in DEVICE_TYPES and torch.cuda.is_available():
        return "rocm" if torch.version.hip else "cuda"
    return "cpu"


def layer_for(op: str, variant: Any, facts: Mapping[str, Any]) -> type[nn.Module] | str | None:
    """What ``for_variant`` of an embedded layer answers on this machine.

    Where no backend is for this machine, that is Triton's, which computes the definition here: whoever
    binds it by hand asks for it.

    Args:
        op: The name of the op.
        variant: As recognised.
        facts: What was read from the instance.

    Returns:
        The layer class; None where there is no kernel for the variant, or in words why none is for the
        instance.
    """
    backend = _here(op, variant)
    if backend is None:
        return None
    reason = backend.supports(variant, None, facts)
    if reason is not None:
        return reason
    made: type[nn.Module] = backend.load().layer_class(variant, facts)
    return made


def function_for(
    op: str, variant: Any, facts: Mapping[str, Any], original: Callable[..., Any]
) -> Callable[..., Any] | None:
    """As :func:`layer_for`, for a function.

    Args:
        op: The name of the op.
        variant: As recognised.
        facts: From each argument of the definition to the argument or the number it is.
        original: The function that is replaced.

    Returns:
        A function with the arguments of the original; None where there is no kernel for the variant or the
        facts.
    """
    backend = _here(op, variant)
    if backend is None:
        return None
    if backend.supports(variant, None, facts) is not None:
        return None
    made: Callable[..., Any] = backend.load().function_for(variant, facts, original)
    return made


def _here(op: str, variant: Any) -> Backend | None:
    from twinkle.ops.catalog import find_op

    backend = backend_for(op, variant, device())
    if backend is not None:
        return backend
    triton = [b for b in find_op(op).backends if b.name == "triton_backend" and b.supports(variant) is None]
    return triton[0] if triton else None
