"""How the embedded kernels are reached: what computes a call, and a launch that costs little of the host."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from twinkle.ops.direct import Launched
from twinkle.ops.replay import recorder

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from torch import Tensor

__all__ = [
    "CUSTOM_OP",
    "DEVICE_TYPES",
    "EAGER",
    "REFERENCE",
    "DispatchPath",
    "Launcher",
    "cdiv",
    "dispatch_path",
    "lazy_module",
    "multiprocessors",
    "on_device",
    "power_of_2",
    "shared_memory",
    "tl_dtype",
]


class DispatchPath(Enum):
    """What computes a call.

    Attributes:
        EAGER: The kernel itself, launched from an autograd ``Function``.
        REFERENCE: The definition in plain torch.
        CUSTOM_OP: The op of ``torch.library``, for compilers and tracers.
    """

    EAGER = "eager"
    REFERENCE = "reference"
    CUSTOM_OP = "custom op"


# As globals: a look-up in the class of an Enum at each call takes longer.
EAGER, REFERENCE, CUSTOM_OP = DispatchPath

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def _kinds() -> frozenset[str]:
    if importlib.util.find_spec("triton") is None:
        return frozenset()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return frozenset({"cuda", "cpu"}) if interpreted else frozenset({"cuda"})


DEVICE_TYPES = _kinds()
"""Device types whose kernels triton runs here; the CPU with ``TRITON_INTERPRET=1``, as the tests do."""


def dispatch_path(x: Tensor, *others: Tensor | None, wide: tuple[Tensor, ...] = ()) -> DispatchPath:
    """What computes with these tensors.

    Args:
        x: The tensor that says the device.
        others: Further inputs; None is skipped.
        wide: Inputs that may be float64 as well.

    Returns:
        `EAGER` for plain tensors outside every transform; `CUSTOM_OP` under a compiler, a tracer or a fake
        mode; `REFERENCE` where no kernel runs: another device, no triton, another dtype, a tensor
        subclass (its own rules apply to plain torch), a transform of ``torch.func``, ``torch.jit.trace``
        (which takes what a kernel wrote for a constant, or fails at an autograd ``Function``).
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and (
        torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    ):
        return REFERENCE
    if compiling or torch._C._len_torch_dispatch_stack() > 0:
        return CUSTOM_OP if _runs(x, others, wide) else REFERENCE
    # The rest does not change for a kind of tensors. Types are kept, so plain ones alone, which stay anyway.
    kinds = [None if t is None else (t.device, t.dtype, type(t)) for t in (x, *others, *wide)]
    key = (DEVICE_TYPES, len(wide), *kinds)
    path = _paths.get(key)
    if path is None:
        if not all(t is None or type(t) in _PLAIN for t in (x, *others, *wide)):
            return REFERENCE
        path = _paths[key] = EAGER if _runs(x, others, wide) else REFERENCE
    return path


_paths: dict[Any, DispatchPath] = {}


def _runs(x: Tensor, others: tuple[Tensor | None, ...], wide: tuple[Tensor, ...]) -> bool:
    """Whether a kernel takes tensors of these devices and dtypes."""
    device = x.device
    if device.type not in DEVICE_TYPES or x.dtype not in _DTYPES:
        return False
    for tensor in others:
        if tensor is not None and (tensor.device != device or tensor.dtype not in _DTYPES):
            return False
    for tensor in wide:
        if tensor.device != device or (tensor.dtype not in _DTYPES and tensor.dtype != torch.float64):
            return False
    return True


NOTHING = contextlib.nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``tensor`` current: triton launches on the current one, wherever the data are."""
    device = tensor.device
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return NOTHING
    return torch.cuda.device(device)  # type: ignore[no-any-return]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 4 in the interpreter, to have several."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have, less what reductions want."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return int(getattr(properties, "shared_memory_per_block_optin", 65536)) - 8192


class Launcher:
    """A triton kernel whose repeated launches skip triton's own look-up.

    A training step repeats the same launches; triton binds and specialises all arguments again each time.
    Here the compiled kernel is found by the numbers themselves, and by whether all tensors are aligned.

    The kernel takes its tensors first, then its numbers, then its constants. A launch inside a call that is
    recorded (see :mod:`twinkle.ops.replay`) is part of the record.
    """

    _MOST = 512  # Kept launches; shapes that vary without end go through triton.

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self._known: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self, grid: tuple[int, ...], tensors: tuple[Tensor, ...], numbers: tuple[float, ...], **constants: Any
    ) -> None:
        """Launch on the current device.

        Args:
            grid: One to three sizes.
            tensors: The first arguments.
            numbers: The next.
            constants: The rest, and options such as ``num_warps``.
        """
        sizes: Any = (*grid, 1, 1)[:3]
        recording = recorder()
        if any(tensor.data_ptr() & 15 for tensor in tensors):
            if recording is not None:
                recording.whole = False
            self.jitted[grid](*tensors, *numbers, **constants)
            return
        key = (tensors[0].device, numbers, *[tensor.dtype for tensor in tensors], *constants.values())
        known = self._known.get(key)
        if known is not None:
            compiled, rest = known
            compiled[sizes](*tensors, *numbers, *rest)
        else:
            with NOTHING if recording is None else recording.unnoticed():
                compiled = self.jitted[grid](*tensors, *numbers, **constants)
            rest = tuple(constants[name] for name in self.jitted.arg_names[len(tensors) + len(numbers) :])
            if not hasattr(compiled, "function"):  # the interpreter
                compiled = None
            elif len(self._known) < self._MOST:
                self._known[key] = compiled, rest
        if recording is not None:
            recording.launches.append(
                Launched(self.jitted, compiled, sizes, tensors, numbers, rest, constants)
            )


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up; triton's own takes 14 us on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two; triton's own takes 14 us on the host."""
    return 1 << max(0, n - 1).bit_length()


def lazy_module(name: str) -> Callable[[], Any]:
    """A function that gives a module, imported at its first call: one with Triton's kernels takes a while."""
    return functools.cache(functools.partial(import_module, name))


_CODES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


@functools.cache
def tl_dtype(dtype: torch.dtype) -> Any:
    """The dtype of triton."""
    import triton.language as tl

    return getattr(tl, _CODES[dtype])
