"""Inputs too small for a kernel of Twinkle's own go to the original before anything else is asked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from twinkle.ops.plain import at_every_size, paying_from
from twinkle.ops.rotary import cpu_backend
from twinkle.runtime import runtime
from twinkle.swap.functions import dispatcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Kit


def kernel_for(kit: Kit, elements: int, without_gradients: int) -> type[nn.Module]:
    """A kernel that gives twice as much, and pays from so many elements on."""
    kernel = kit.kernel_times(2.0, can_torch_compile=True, has_backward=True)
    paying_from(kernel.forward, "x", elements, without_gradients)  # type: ignore[arg-type]
    return kernel


def swapped(kit: Kit, elements: int, without_gradients: int = 0, kind: str = "embedded") -> Any:
    gate = kit.Gate()
    one = kit.candidate(kernel_for(kit, elements, without_gradients or elements), device="cpu", kind=kind)
    assert kit.swap_in(gate, [one])
    with at_every_size():
        assert kit.factor(gate) == 2.0  # loaded, and run once
    return gate


def frames(call: Callable[[], object]) -> int:
    """How many functions of Python run in a call."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("elements", "factor"), [(12, 2.0), (13, 1.0)])
def test_a_kernel_runs_from_the_size_on_that_it_names(kit: Kit, elements: int, factor: float) -> None:
    assert kit.factor(swapped(kit, elements)) == factor


def test_without_gradients_another_size_counts(kit: Kit) -> None:
    gate = swapped(kit, 12, 13)
    assert kit.factor(gate) == 2.0
    with torch.no_grad():
        assert kit.factor(gate) == 1.0
    with torch.inference_mode():
        assert kit.factor(gate) == 1.0


def test_a_small_call_has_one_more_frame_than_the_original(kit: Kit) -> None:
    gate, plain = swapped(kit, 13), kit.Gate()
    x = kit.x
    assert frames(lambda: gate.forward(x)) == frames(lambda: type(gate).forward.__wrapped__(plain, x)) + 1


def test_every_size_goes_to_the_kernel_where_that_is_asked_for(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = swapped(kit, 13)
    with at_every_size():
        assert kit.factor(gate) == 2.0
    assert kit.factor(gate) == 1.0
    monkeypatch.setattr(runtime.options, "sizes", "all")
    assert kit.factor(swapped(kit, 13)) == 2.0


def test_a_kernel_of_the_users_runs_at_any_size(kit: Kit) -> None:
    assert kit.factor(swapped(kit, 13, kind="code")) == 2.0


def test_a_small_input_of_another_kind_goes_the_long_way(kit: Kit) -> None:
    gate = swapped(kit, 13)
    traced = torch.fx.symbolic_trace(gate)  # a stand-in has no number of elements
    assert torch.equal(traced(kit.x), 2 * gate(kit.x))

    class Sub(torch.Tensor):
        pass

    assert gate(kit.x.as_subclass(Sub)).shape == kit.x.shape


def test_a_compiler_follows_the_question(kit: Kit) -> None:
    gate = swapped(kit, 13)
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    for rows in (3, 8):
        x = torch.randn(rows, 4)
        assert torch.allclose(compiled(x), gate(x))


def test_a_layer_that_stands_for_a_function_is_asked_by_name(kit: Kit) -> None:
    """As ``kernels`` makes one of each function that it decorates: its forward takes whatever comes."""
    import inspect

    def rotate(x: torch.Tensor, y: torch.Tensor, factor: int = 3) -> torch.Tensor:
        return x * factor + y

    class Func(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return rotate(*args, **kwargs)

    signature = inspect.signature(rotate)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    Func.forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[itself, *signature.parameters.values()]
    )
    function = dispatcher(Func(), [kit.function_candidate(lambda x, y, factor=3: 0 * x, device="cpu")])
    x = torch.ones(2)
    assert function(x, y=x).sum() == 0
    assert function.__code__.co_varnames[:3] == ("x", "y", "factor")
    meta = torch.ones(2, device="meta")
    assert function(meta, meta).device.type == "meta"  # no kernel there: the layer itself, with its default


def test_the_rotation_says_from_which_size_on_it_pays() -> None:
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        raise NotImplementedError

    names = ("q", "k", "cos", "sin", "unsqueeze_dim")
    made: Any = cpu_backend.function_for(cpu_backend.HALF, {n: n for n in names}, apply_rotary_pos_emb)
    assert made.least == ("q", cpu_backend.LEAST, cpu_backend.LEAST_INFERENCE)
