"""Products of groups of rows with the matrix of their expert: torch's own where it has them, else triton's.

``torch.nn.functional.grouped_mm`` runs CUTLASS on the tensor cores for bfloat16 (any GPU from Ampere on with
torch 2.9, Hopper alone before); it wants rows that begin at multiples of 16 bytes. Other dtypes it computes
product after product, and waits for the host to know how many: taken for exact float32 alone, where triton
has no tensor cores either. Where an expert gets a few rows alone, what a product costs is the reading of its
matrix, and triton's kernel, which gathers the rows as it goes, is faster. Whatever is left goes to triton, on
the CPU to slices.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from twinkle.ops import launch
from twinkle.ops.experts import plain

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from torch import Tensor

__all__ = ["grouped_mm", "grouped_mm_of", "is_few", "outer", "rows", "steps"]

_FEW_ROWS, _FEW_OUTER_ROWS = 32, 1
"""Rows for an expert, on average, up to which triton's products in half precision were faster on an H200
(``benchmarks/experts.py``): those with a matrix, and those of rows with rows."""


def steps(device: torch.device) -> ModuleType:
    """The module with what lies between the products: triton's kernels, or plain torch."""
    if device.type not in launch.DEVICE_TYPES:
        return plain
    from twinkle.ops.experts import triton

    return triton


def rows(a: Tensor, w: Tensor, offsets: Tensor, count: int, index: Tensor | None = None) -> Tensor:
    """As ``triton_products.rows``."""
    grouped = None
    if _aligned(w) and not is_few(a, count, w.shape[0], _FEW_ROWS):
        grouped = grouped_mm(a, w.dtype, w.shape[1], w.shape[2])
    if grouped is None:
        return _own(a.device).rows(a, w, offsets, count, index)
    a = a.contiguous() if index is None else a.index_select(0, index)
    return grouped(a, w, offs=offsets[1:])


def outer(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    a_index: Tensor | None = None,
    b_index: Tensor | None = None,
) -> Tensor:
    """As ``triton_products.outer``."""
    grouped = None
    if not is_few(a, max(a.shape[0], b.shape[0]), offsets.shape[0] - 1, _FEW_OUTER_ROWS):
        grouped = grouped_mm(a, b.dtype, a.shape[1], b.shape[1])
    if grouped is None:
        return _own(a.device).outer(a, b, offsets, a_index, b_index)
    a = a.contiguous() if a_index is None else a.index_select(0, a_index)
    b = b.contiguous() if b_index is None else b.index_select(0, b_index)
    return grouped(a.t(), b, offs=offsets[1:])


def is_few(a: Tensor, count: int, groups: int, least: int) -> bool:
    """Whether groups have so few of ``count`` rows, on average, that triton's product is the faster one."""
    return a.dtype != torch.float32 and count <= least * groups


def _own(device: torch.device) -> ModuleType:
    between = steps(device)
    if between is plain:
        return plain
    from twinkle.ops.experts import triton_products

    return triton_products


def grouped_mm(a: Tensor, dtype: torch.dtype, *widths: int) -> Any:
    """The product of torch for these, or None."""
    if a.device.type != "cuda" or a.dtype != dtype or any(width * a.element_size() % 16 for width in widths):
        return None
    if a.dtype == torch.float16:
        return None
    if a.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return None
    return grouped_mm_of(a.device, a.dtype)


@functools.cache
def grouped_mm_of(device: torch.device, dtype: torch.dtype) -> Any:
    """Torch's grouped product for a GPU and a dtype, or None where it has none that is fast."""
    major = torch.cuda.get_device_capability(device)[0]
    if torch.version.hip or major < 8:
        return None
    public = getattr(torch.nn.functional, "grouped_mm", None)
    if public is not None:
        return public
    recent = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
    if dtype == torch.bfloat16 and (recent or major == 9):
        return getattr(torch, "_grouped_mm", None)
    return None


def _aligned(w: Tensor) -> bool:
    """Whether the last two dimensions are a matrix or its transpose that begins where it should."""
    steps = (*w.stride()[1:], w.stride(0) if w.shape[0] > 1 else 0)
    whole = all(step == 1 or step * w.element_size() % 16 == 0 for step in steps)
    return whole and 1 in steps and w.data_ptr() % 16 == 0
