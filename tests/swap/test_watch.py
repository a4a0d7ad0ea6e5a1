"""``watch = "nan"``: kernels whose results have NaN that does not come from what they were given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from twinkle.config import validate
from twinkle.errors import ConfigError, TwinkleWarning
from twinkle.options import Options
from twinkle.swap.functions import dispatcher

if TYPE_CHECKING:
    from collections.abc import Callable

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        return x * self.w


def broken_from(call: int, result: Callable[[Tensor], Any] = lambda y: y) -> type[nn.Module]:
    """A kernel that is right until a call, and then gives one NaN among its numbers."""
    calls = [0]

    def forward(self: Any, x: Tensor) -> Any:
        calls[0] += 1
        y = x * self.w
        if calls[0] >= call:
            y = torch.where(torch.arange(8, device=y.device) == 3, y * float("nan"), y)
        return result(y)

    return type("Kernel", (nn.Module,), {"forward": forward})


def test_a_kernel_that_turns_to_nan_is_taken_out(kit: Any) -> None:
    layer, wanted = Scale(), kit.candidate(broken_from(5), watch=1)
    kit.swap_in(layer, [wanted])
    x = torch.randn(4, 8)
    with pytest.warns(TwinkleWarning, match="gave NaN at about call"):
        found = [layer(x) for _ in range(8)]
    assert all(torch.equal(y, x) for y in found)
    assert wanted.binding.state == "quarantined"


def test_one_of_n_calls_is_looked_at(kit: Any) -> None:
    layer, wanted = Scale(), kit.candidate(broken_from(3), watch=4)
    kit.swap_in(layer, [wanted])
    with pytest.warns(TwinkleWarning, match="watched every 4 calls"):
        found = [bool(layer(torch.ones(2, 8)).isnan().any()) for _ in range(9)]
    # The first call is not one of those that are counted.
    assert found == [False, False, True, True, *[False] * 5]


def test_without_it_nothing_is_looked_at(kit: Any) -> None:
    layer, wanted = Scale(), kit.candidate(broken_from(2))
    kit.swap_in(layer, [wanted])
    assert [bool(layer(torch.ones(2, 8)).isnan().any()) for _ in range(4)] == [False, True, True, True]
    assert wanted.binding.state == "active"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_what_was_given_is_not_the_kernels_fault(kit: Any, bad: float, where: str) -> None:
    layer, wanted = Scale(), kit.candidate(broken_from(2), watch=1)
    kit.swap_in(layer, [wanted])
    x = torch.ones(2, 8)
    layer(x)
    with torch.no_grad():
        (x if where == "input" else layer.w)[..., 0] = bad
    for _ in range(3):
        layer(x)
    assert wanted.binding.state == "active"


def test_nan_in_one_of_several_results(kit: Any) -> None:
    class Pair(Scale):
        def forward(self, x: Tensor) -> Any:
            return x, x * self.w

    layer, wanted = Pair(), kit.candidate(broken_from(3, lambda y: (y.nan_to_num(), y)), watch=1)
    kit.swap_in(layer, [wanted])
    with pytest.warns(TwinkleWarning):
        found = [layer(torch.ones(2, 8)) for _ in range(5)]
    assert not any(y.isnan().any() for pair in found for y in pair)


def test_functions_are_watched_too(kit: Any) -> None:
    def scale(x: Tensor) -> Tensor:
        return x * 2

    def kernel(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2 if len(calls) < 3 else x * float("nan")

    calls: list[int] = []
    wanted = kit.function_candidate(kernel)
    wanted.watch = 1
    made = dispatcher(scale, [wanted])
    with pytest.warns(TwinkleWarning):
        found = [made(kit.x) for _ in range(5)]
    assert all(torch.equal(y, kit.x * 2) for y in found)


def run(layer: nn.Module, x: Tensor) -> None:
    for _ in range(3):
        layer(x)


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_nobody_waits(kit: Any) -> None:
    layer, wanted = Scale().cuda(), kit.candidate(broken_from(3), watch=1)
    kit.swap_in(layer, [wanted])
    x = torch.ones(2, 8, device="cuda")
    run(layer, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.warns(TwinkleWarning, match="gave NaN at about call 2"):
            run(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not layer(x).isnan().any()
    assert wanted.binding.state == "quarantined"


@pytest.mark.parametrize(("text", "every"), [("off", 0), ("nan", 16), ("nan:3", 3)])
def test_the_setting(text: str, every: int) -> None:
    options = Options()
    assert options.watched(None) == 0
    assert options.watched(text) == every
    options.watch = "nan:5"
    assert options.watched(None) == 5
    assert options.watched("off") == 0
    assert validate({"twinkle": {"watch": text}}).settings["watch"] == text


@pytest.mark.parametrize("value", ["nan:0", "nan:", "inf", "nan:-1", True, 3, ""])
def test_a_setting_that_is_none(value: object) -> None:
    with pytest.raises(ConfigError, match="watch"):
        validate({"twinkle": {"watch": value}})
