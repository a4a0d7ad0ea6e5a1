"""What the normaliser takes for one and the same, tried in torch: equal bits, in every dtype."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EQUAL: dict[str, Pair] = {
    "a product with itself": (lambda x: x * x, lambda x: x.pow(2)),
    "square": (lambda x: x.square(), lambda x: x**2),
    "power of a half": (lambda x: x.abs() ** 0.5, lambda x: torch.sqrt(x.abs())),
    "power of minus a half": (lambda x: x.abs().pow(-0.5), lambda x: torch.rsqrt(x.abs())),
    "norm of torch": (
        lambda x: torch.norm(x, dim=-1, keepdim=True),
        lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    ),
    "norm of a tensor": (
        lambda x: x.norm(2, -1, keepdim=True),
        lambda x: x.norm(p="fro", dim=(-1,), keepdim=True),
    ),
    "normalize": (
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / x.norm(2, -1, keepdim=True).clamp(min=1e-12),
    ),
    "a least value": (lambda x: x.clamp_min(1e-3), lambda x: torch.clip(x, min=1e-3)),
    "an operator expands": (
        lambda x: x / x.sum(-1, keepdim=True).expand_as(x),
        lambda x: x / x.sum(-1, keepdim=True),
    ),
    "no correction": (
        lambda x: x.var(-1, correction=0, keepdim=True),
        lambda x: x.var(-1, unbiased=False, keepdim=True),
    ),
    "a deviation's correction": (
        lambda x: torch.std(x, dim=-1, correction=1, keepdim=True),
        lambda x: x.std(-1, keepdim=True),
    ),
    "the last dimension": (
        lambda x: F.rms_norm(x, (x.size(-1),)),
        lambda x: F.rms_norm(x, x.shape[-1:]),
    ),
    "a flag is a number": (lambda x: x + True, lambda x: x + 1.0),
}
DIFFERENT: dict[str, Pair] = {
    "divided by the root": (lambda x: x / x.abs().sqrt(), lambda x: x * x.abs().rsqrt()),
    "a sum over the width": (
        lambda x: x.sum(-1, keepdim=True) * (1 / 96),
        lambda x: x.sum(-1, keepdim=True) / 96,
    ),
    "two groupings": (lambda x: x * x.sin() * x.cos(), lambda x: x * (x.sin() * x.cos())),
}
"""What would be one in exact arithmetic, and has terms of its own."""


def numbers(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 96, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(-6, 3, 64, dtype=torch.float64)[:, None]
    rows[3] = 0
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EQUAL)
def test_two_spellings_of_one_term_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    one, other = (spelling(numbers(dtype)) for spelling in EQUAL[name])
    assert one.dtype == other.dtype
    assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_has_two_terms_differs_in_bits(name: str) -> None:
    one, other = (spelling(numbers(torch.float32)) for spelling in DIFFERENT[name])
    assert not torch.equal(one.nan_to_num(), other.nan_to_num())


def test_the_two_roots_of_a_width_are_not_always_one_number() -> None:
    assert any(math.sqrt(width) != width**0.5 for width in range(1, 1 << 16))
