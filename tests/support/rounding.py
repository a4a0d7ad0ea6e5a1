"""How far rounding may take a result: from its dtype and the operations behind it, not from a measurement."""

from __future__ import annotations

import math

import torch

__all__ = ["across_a_boundary", "assert_near", "rounding_bound", "terms"]


def rounding_bound(dtype: torch.dtype, operations: int, magnitude: float = 1.0) -> float:
    """How far a result can be from the exact one after so many roundings in a row: ``n·u / (1 - n·u)``.

    Higham, Accuracy and Stability of Numerical Algorithms (2nd edition), lemma 3.1.

    Args:
        dtype: What each operation rounds to.
        operations: How many lie one behind another; for a sum or a product of matrices see :func:`terms`.
        magnitude: Of the largest number on the way, or the norm of them.
    """
    unit = operations * torch.finfo(dtype).eps / 2
    assert unit < 0.5, f"{operations} roundings to {dtype} leave nothing to compare"
    return unit / (1 - unit) * float(magnitude)


def terms(count: int) -> int:
    """The operations that a sum of so many terms counts as, in whatever order and blocks they are added.

    All of them where they are few, else ``6·√n``: roundings of random sign go further only once in a hundred
    million sums (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, theorem 2.4).
    """
    return min(count, 6 * math.isqrt(count) + 6)


def across_a_boundary(dtype: torch.dtype, operations: int) -> float:
    """The share of results that may round to another neighbour in ``dtype``, for another order of float32.

    Args:
        dtype: What the results are rounded to: bfloat16 or float16.
        operations: In float32, behind each result.
    """
    return 2 * rounding_bound(torch.float32, operations) / (torch.finfo(dtype).eps / 2)


def assert_near(found, expected, operations, *, dtype=None, magnitude=0.0):
    """Two tensors (or as many) are as near as any two ways of rounding the same operations.

    Each number may be off by what rounding makes of the largest: a small one may be their difference.

    Args:
        found: A tensor, or a sequence of tensors.
        expected: As many, of the same shapes and dtypes.
        operations: Behind each number of each of the two; as for :func:`rounding_bound`.
        dtype: What they round to, where it is not the dtype of ``found``.
        magnitude: Of numbers on the way that are larger than all of the result.
    """
    if not isinstance(found, torch.Tensor):
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other, operations, dtype=dtype, magnitude=magnitude)
        return
    found, expected = found.detach(), expected.detach()
    largest = max(expected.abs().max().item() if expected.numel() else 0.0, magnitude)
    room = 2 * rounding_bound(dtype or found.dtype, operations, largest)
    torch.testing.assert_close(found, expected, rtol=0, atol=room)
