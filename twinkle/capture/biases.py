"""Gradients of biases in recordings: summed by a kernel where that is proven right.

Torch's own sum of the rows takes a GPU three times as long as reading them. Outside recordings a second node
of autograd for each linear layer would cost the host more than that is worth; in a recording it is free.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from twinkle.capture.surroundings import instead
from twinkle.ops.backends import backend_for
from twinkle.ops.catalog import find_op
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["OP", "biases_by_kernel"]

OP = "linear_bias"
_ROWS, _WIDTH = 4096, 264
"""Of the sums that are compared: the width is no multiple of what a program takes."""
_ULPS = 1
"""Of the largest sum, besides twice torch's own error."""


class Proven:
    """Which kernels were found to be right: by device, and dtypes of the rows and of the bias."""

    def __init__(self) -> None:
        self.verdicts: dict[Any, bool] = {}


def biases_by_kernel(weights: Iterable[Tensor], device: torch.device, autocast: torch.dtype | None) -> Any:
    """Have linear layers that this thread calls leave the gradients of their biases to a kernel.

    Args:
        weights: The parameters of what is called.
        device: Where they are.
        autocast: What products are computed in, where that is not their own dtype.
    """
    dtypes = {one.dtype for one in weights if one.dim() == 1 and one.requires_grad}
    if not dtypes or not runtime.options.wants(OP):
        return contextlib.nullcontext()
    backend = backend_for(OP, find_op(OP).variants[0], device.type)
    if backend is None or not all(_is_proven(device, autocast or one, one) for one in dtypes):
        return contextlib.nullcontext()
    module = backend.load()
    return instead(
        [
            (F, "linear", functools.partial(module.linear, theirs=F.linear)),
            (torch, "addmm", functools.partial(module.addmm, theirs=torch.addmm)),
        ]
    )


def _is_proven(device: torch.device, dtype: torch.dtype, bias: torch.dtype) -> bool:
    """Whether the kernel sums rows of a dtype as well as torch does; it is compiled for that, once."""
    verdicts = runtime.of(Proven).verdicts
    key = device, dtype, bias
    verdict = verdicts.get(key)
    if verdict is None:
        of = f"{dtype}".removeprefix("torch.")
        try:
            found, theirs, bound = _errors(device, dtype, bias)
        except Exception as error:
            verdict, said = False, f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            verdict, said = found <= bound, f"error {found:.1e}, torch's {theirs:.1e}"
        done = "sums the gradients of biases in captured calls" if verdict else "is left alone"
        runtime.session.remark(f"{OP} of {of} {done}: {said}")
        verdicts[key] = verdict
    return verdict


def _errors(device: torch.device, dtype: torch.dtype, bias: torch.dtype) -> tuple[float, float, float]:
    """The largest errors of the kernel and of torch's sum against float64, and how large the first may be."""
    module: Any = find_op(OP).module("triton")
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.randn(_ROWS, _WIDTH, device=device, dtype=torch.float32, generator=generator).to(dtype)
        exact = rows.double().sum(0)
        sums = module.sum_rows(rows, bias), rows.sum(0).to(bias)
        found, theirs = (float((one.double() - exact).abs().max()) for one in sums)
        ulps = _ULPS * torch.finfo(bias).eps * float(exact.abs().max())
        return found, theirs, 2 * theirs + ulps
