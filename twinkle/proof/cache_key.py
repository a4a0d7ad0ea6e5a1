"""The cache key of a verdict: everything on which the outcome of a comparison could depend."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from twinkle.ops import launch
from twinkle.proof.compare import dtype_of
from twinkle.proof.inputs import tensors_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["PACKAGE", "Source", "cache_key", "device_name", "kernel_version"]

PACKAGE = Path(__file__).resolve().parent.parent
_VALUES = (bool, int, float, str, type(None))
_IMPORTED = re.compile(r"twinkle\.ops\.(\w+)")


class Source(Protocol):
    """The source of an embedded kernel (:mod:`twinkle.sources.embedded`), as far as the key needs it."""

    op: str
    variant: Any
    facts: dict[str, Any]
    backend: str


def cache_key(
    source: Source,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    module: nn.Module | None,
    backward: bool,
) -> dict[str, Any] | None:
    """The cache key of the verdict on an embedded kernel at a call, as JSON has it.

    Args:
        source: Where the kernel comes from. Of its facts, the names that the target has for things change
            nothing; numbers, flags and the activation do.
        args: The arguments of the call, without the module.
        kwargs: Its keyword arguments.
        module: The layer, for a layer.
        backward: Whether gradients are compared.

    Returns:
        None where the source of the kernel cannot be read, so that nobody knows which version it is.
    """
    version = kernel_version(source.op)
    if version is None:
        return None
    inputs = (tuple(args), dict(kwargs))
    given = tensors_of(inputs)
    parameters = [*module.parameters()] if module is not None else []
    device = (given or parameters or [torch.empty(0)])[0].device
    autocast = torch.is_autocast_enabled(device.type)
    return {
        "op": source.op,
        "variant": source.variant.name,
        "backend": source.backend,
        "kernel": version,
        "facts": {
            name: value
            for name, value in sorted(source.facts.items())
            if isinstance(value, (bool, int, float, type(None))) or name == "activation"
        },
        "dtype": _short(dtype_of(inputs, module)),
        "inputs": [_layout(tensor) for tensor in given],
        "values": [value for value in tree_flatten(inputs)[0] if isinstance(value, _VALUES)],
        "parameters": [[_short(p.dtype), *p.shape, p.requires_grad] for p in parameters],
        "autocast": _short(torch.get_autocast_dtype(device.type)) if autocast else None,
        "device": device_name(device),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "gradients": backward,
    }


def _layout(tensor: torch.Tensor) -> list[Any]:
    """The properties of an input that kernels are compiled for: not its lengths, but which of them are 1."""
    order = sorted(range(tensor.ndim), key=lambda axis: -tensor.stride(axis))
    single = [size == 1 for size in tensor.shape]
    width = tensor.shape[-1] if tensor.ndim else 0
    return [_short(tensor.dtype), width, order, single, tensor.is_contiguous()]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def kernel_version(op: str) -> str | None:
    """A digest of the source of an op, of the ops it imports, of what they share, and of the comparison.

    None where the source cannot be read.
    """
    digest = hashlib.sha256()
    waiting, seen = [op], set()
    try:
        rooms = ("ops", "proof", *_RUN_BY.get(op, ()))
        shared = [path for room in rooms for path in sorted((PACKAGE / room).glob("*.py"))]
        # Kernels are dressed in generated functions.
        for path in (PACKAGE / "codegen.py", *shared):
            if path.stem not in _BESIDE:
                digest.update(path.read_bytes())
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            files = _files_of(name)
            if name == op and not files:
                return None
            for path in files:
                if path.stem not in _BESIDE:
                    text = path.read_bytes()
                    digest.update(path.name.encode() + b"\0" + text)
                    waiting += sorted(set(_IMPORTED.findall(text.decode("utf-8"))))
    except (OSError, UnicodeDecodeError):
        return None
    return digest.hexdigest()[:16]


# Where an op is run and compared, beside its own folder.
_RUN_BY = {"causal_lm_loss": ("deferred",)}


def _files_of(op: str) -> list[Path]:
    """The modules in the folder of an op: in this package, or where else ops were added from."""
    folders = (PACKAGE / "ops", *map(Path, import_module("twinkle.ops").__path__[1:]))
    found = (sorted((folder / op).rglob("*.py")) for folder in folders)
    return next((files for files in found if files), [])


# Files that no kernel and no comparison depends on.
_BESIDE = ("samples", "recognition", "verify", "cache")


def device_name(device: torch.device) -> str:
    """The model of a device, so that a verdict holds for another one of the same model."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
    if device.type == "cpu":
        how = ", triton's interpreter" if "cpu" in launch.DEVICE_TYPES else ""
        return f"cpu {platform.machine()} ({torch.backends.cpu.get_cpu_capability()}{how})"
    return str(device.type)


@functools.cache
def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except Exception:  # a build without metadata
        return "unknown"
