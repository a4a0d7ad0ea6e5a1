"""The device of the tensors of a call, and calls with that GPU as the current one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = [
    "call_there",
    "constant",
    "current_gpu",
    "device_number",
    "device_of",
    "first_tensor",
    "fits_this_build",
    "on_another_gpu",
    "several_gpus",
    "version_of",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def first_tensor(values: Any, depth: int = 2) -> torch.Tensor | None:
    """The first tensor among values and in the lists, tuples and dicts among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
        if depth and isinstance(value, (list, tuple, dict)):
            found = first_tensor(value.values() if isinstance(value, dict) else value, depth - 1)
            if found is not None:
                return found
    return None


def device_of(values: tuple[Any, ...]) -> str | None:
    """The device type of the first tensor, or of the parameters of a module that comes first."""
    tensor = first_tensor(values)
    if tensor is not None:
        return str(tensor.device.type)
    for value in values[:1]:
        if isinstance(value, torch.nn.Module):
            for parameter in value.parameters():
                return str(parameter.device.type)
    return None


def device_number(devices: tuple[str, ...], values: tuple[Any, ...]) -> int:
    """The position of a call's device in ``devices``, counted from 1; 0 where it is another."""
    device = device_of(values)
    return devices.index(device) + 1 if device in devices else 0


def several_gpus() -> bool:
    """Whether there is more than one GPU (asking does not start CUDA)."""
    return bool(torch.version.cuda or torch.version.hip) and torch.cuda.device_count() > 1


def on_another_gpu(values: tuple[Any, ...]) -> bool:
    """Whether the first tensor lies on another GPU than the current one."""
    tensor = first_tensor(values)
    if tensor is None or not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return bool(tensor.get_device() != torch.cuda.current_device())


def call_there(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a kernel with the GPU of its tensors as the current one: raw launches go there."""
    tensor = first_tensor((*args, *kwargs.values()))
    if tensor is None or not on_another_gpu((tensor,)):
        return function(*args, **kwargs)
    with torch.cuda.device(tensor.device):
        return function(*args, **kwargs)


def fits_this_build(device: str | None) -> bool:
    """Whether this build of torch serves the device: CUDA and ROCm tensors both say ``cuda``."""
    if device in ("cuda", "rocm") and (torch.version.cuda or torch.version.hip):
        return (device == "rocm") == bool(torch.version.hip)
    return True


def version_of(value: Any) -> int | None:
    """How often a tensor was written to; None for one of inference, which does not count, and for others."""
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return int(value._version)


def _current_gpu() -> int:
    return int(torch._C._cuda_getDevice())


def constant(function: _Function) -> _Function:
    """Have ``torch.compile`` run the function while it traces, and take the result for a constant.

    That is ``torch.compiler.assume_constant_result``, which imports all of dynamo (over a second) to
    set this one attribute.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Under a compiler a constant: the code it makes sets the device itself.
current_gpu: Callable[[], int] = constant(_current_gpu)
