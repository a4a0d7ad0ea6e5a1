"""The proof accepts what is as good as the original, and each kind of wrong kernel is caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twinkle.proof.compare import compare


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def fused(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


def scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return Norm.forward(self, x) * 1.01


def nan(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = Norm.forward(self, x).clone()
    out[..., -1, -1] = float("nan")
    return out


def dtype(self: Any, x: torch.Tensor) -> torch.Tensor:
    return Norm.forward(self, x).double()


def in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = Norm.forward(self, x)
    with torch.no_grad():
        x.mul_(2)
    return out


def detached(self: Any, x: torch.Tensor) -> torch.Tensor:
    return Norm.forward(self, x.detach())


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 0.99


def wrong_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _HalfGradient.apply(Norm.forward(self, x))


def shape(self: Any, x: torch.Tensor) -> torch.Tensor:
    return Norm.forward(self, x)[..., :-1]


def raises(self: Any, x: torch.Tensor) -> torch.Tensor:
    raise ValueError("not this shape")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def judged(kernel: Any, dtype: torch.dtype, *, backward: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    module = Norm(64).to(dtype)
    x = torch.randn(4, 33, 64, dtype=dtype)
    before = x.clone()
    verdict = compare(Norm.forward, kernel, (x,), {}, module=module, backward=backward, **options)
    assert torch.equal(x, before), "the program's own input is never touched"
    assert module.weight.grad is None, "the program's own gradients are never touched"
    return verdict


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [fused, Norm.forward], ids=["fused", "itself"])
def test_a_right_kernel_is_accepted(kernel: Any, dtype: torch.dtype) -> None:
    verdict = judged(kernel, dtype)
    assert verdict.ok, verdict.text
    assert "original" in verdict.text


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (scaled, "result off by"),
        (nan, "result off by nan"),
        (dtype, "float64"),
        (in_place, "writes to its input"),
        (detached, "gradient is missing"),
        (wrong_gradient, "gradient off by"),
        (shape, "a result is"),
        (raises, "not this shape"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_kernel_is_caught(kernel: Any, reason: str, kind: torch.dtype) -> None:
    verdict = judged(kernel, kind)
    assert not verdict.ok
    assert reason in verdict.text


def test_a_wrong_gradient_does_not_matter_in_inference() -> None:
    assert judged(wrong_gradient, torch.float32, backward=False).ok


def test_dropout_draws_the_same_numbers_for_both() -> None:
    def drop(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5)

    x = torch.randn(64, 64)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    assert compare(drop, drop, (x,), {}, backward=True).ok
    assert torch.equal(torch.rand(1), expected), "the program's random numbers go on as if nothing had been"


def test_strides_of_the_input_are_kept() -> None:
    seen = []

    def original(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.stride())
        return x * 1

    compare(original, original, (torch.randn(8, 4).t(),), {})
    assert seen[0] == (1, 4)
    assert seen.count((1, 4)) > 3, "both, and in higher precision"


def test_rows_bound_the_work() -> None:
    seen = []

    def kernel(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return Norm.forward(self, x)

    assert judged(kernel, torch.float32, rows=7).ok
    assert seen[:2] == [torch.Size([2, 7, 64])] * 2
    assert max(shape.numel() for shape in seen) <= 1 << 19, "and no derived call is large"


class Channels(nn.Module):
    """Its weight has the length of an axis that a comparison takes for one of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.parametrize(("factor", "ok"), [(1.0, True), (1.01, False)])
def test_an_axis_that_cannot_be_cut_is_compared_whole(factor: float, ok: bool) -> None:
    seen = []

    def kernel(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x * self.weight * factor

    x = torch.randn(5, 64, 40, 6, requires_grad=True)
    verdict = compare(Channels.forward, kernel, (x,), {}, module=Channels(), backward=True, rows=16)
    assert verdict.ok is ok
    assert seen[0] == (2, 64, 40, 6)


def test_what_the_original_refuses_whole_is_not_compared_yet() -> None:
    def refuses(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not these")

    x = torch.randn(5, 64, 40, 6)
    verdict = compare(refuses, refuses, (x,), {}, module=Channels(), rows=16)
    assert verdict.pending
    assert "not these" in str(verdict)
