"""What the implementations decide by the machine they run on: all of it is asked here, as ``machine.name()``.

A test sets these both ways, so that what it expects does not follow from the machine it runs on.
"""

from __future__ import annotations

import functools
import platform

import torch

__all__ = ["multiplies", "one_thread"]


def one_thread() -> bool:
    """Whether torch's operators run on one thread: then none waits for another at the end of each."""
    return int(torch.get_num_threads()) == 1


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies 16-bit matrices: x86 without these instructions is four times slower.

    Args:
        dtype: bfloat16 or float16.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    names = ("amx_fp16",) if dtype == torch.float16 else ("amx_tile", "avx512_bf16")
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in names)
