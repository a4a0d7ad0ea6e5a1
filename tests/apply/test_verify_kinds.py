"""A kernel that was proven in one dtype is compared again where a call computes with another."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from twinkle.errors import TwinkleWarning
from twinkle.kernel import (
    apply_function_kernel,
    kernelize_model,
    register_external_layer,
    register_function_kernel,
    register_layer_kernel,
)
from twinkle.swap.dtype_keys import ANY, Proofs, dtype_key_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry")
X = torch.rand(4, 8) + 1


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class WrongInHalf(nn.Module):
    """Right in float32 alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if y.dtype == torch.float32 else y * 1.1


class Right(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.linear.weight)


def kernelized(kernel: type[nn.Module], verify: str = "first-use") -> nn.Module:
    register_layer_kernel("k", layer_impl=kernel, verify=verify)
    register_external_layer(Mix, "k")
    return kernelize_model(Mix())


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the comparisons that are made."""
    from twinkle.proof import first_use

    made: list[torch.dtype] = []
    real: Callable[..., object] = first_use.compare

    def compare(*given: object, **options: object) -> object:
        made.append(given[2][0].dtype)  # type: ignore[index]
        return real(*given, **options)

    monkeypatch.setattr(first_use, "compare", compare)
    return made


def test_a_model_that_changes_its_dtype_is_compared_again(clean_registry: Registry) -> None:
    model = kernelized(WrongInHalf)
    model(X)
    assert clean_registry.bindings[0].state == "active"
    model.to(torch.bfloat16)
    half = X.to(torch.bfloat16)
    with pytest.warns(TwinkleWarning, match="does not compute the same"):
        found = model(half)
    assert torch.equal(found, torch.nn.functional.linear(half, model.linear.weight))
    assert clean_registry.bindings[0].state == "quarantined"


def test_autocast_is_compared_by_itself(clean_registry: Registry) -> None:
    model = kernelized(WrongInHalf)
    model(X)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(TwinkleWarning, match="does not compute the same"):
            found = model(X)
        assert torch.equal(found, torch.nn.functional.linear(X, model.linear.weight))
    assert clean_registry.bindings[0].state == "quarantined"


def test_each_kind_is_compared_once(comparisons: list[torch.dtype]) -> None:
    model = kernelized(Right)
    for _ in range(3):
        model(X)
        model.to(torch.bfloat16)
        model(X.to(torch.bfloat16))
        model.to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            model(X)
    assert comparisons == [torch.float32, torch.bfloat16, torch.float32]


def test_gradients_are_compared_in_each_dtype(comparisons: list[torch.dtype]) -> None:
    model = kernelized(Right)
    model(X)
    model.to(torch.bfloat16)
    half = X.to(torch.bfloat16)
    with torch.no_grad():
        model(half)
    assert comparisons == [torch.float32, torch.bfloat16]
    model(half).sum().backward()
    model(half).sum().backward()
    assert comparisons == [torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("decided", [{"mode": "train"}, {}], ids=["decided once", "dispatched"])
def test_a_function_is_compared_in_each_dtype(
    decided: dict[str, str], clean_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("kinds_target")
    exec("def double(x):\n    return x * 2", module.__dict__)
    monkeypatch.setitem(sys.modules, "kinds_target", module)
    register_function_kernel(
        "double",
        "kinds_target",
        func_impl=lambda x: x * 2 if x.dtype == torch.float32 else x * 2.1,
        verify="first-use",
    )
    apply_function_kernel("kinds_target", **decided)
    assert torch.equal(module.double(X), X * 2)
    with pytest.warns(TwinkleWarning, match="does not compute the same"):
        found = module.double(X.double())
    assert torch.equal(found, X.double() * 2)
    assert clean_registry.bindings[0].state == "quarantined"


def test_a_compiled_call_in_the_proven_dtype_meets_the_kernel_alone() -> None:
    model = kernelized(Right)
    model(X)
    torch._dynamo.reset()
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(model, backend=keep, fullgraph=True)(X)
    torch._dynamo.reset()
    assert [name for name in seen if "linear" in name and "weight" not in name]


def test_a_trace_of_a_proven_kernel_is_no_call() -> None:
    model = kernelized(Right)
    model(X)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(X), model(X))


def test_what_no_tensor_tells_of_is_taken_once_anything_was_proven() -> None:
    proofs = Proofs(1)
    assert dtype_key_of("no tensor") == ANY
    assert proofs.pending(ANY, grad=False)
    proofs.record_pass(dtype_key_of(X), grad=False)
    assert not proofs.pending(ANY, grad=False)
    assert proofs.pending(ANY, grad=True)


def test_without_comparisons_every_kind_is_trusted() -> None:
    assert Proofs(0).proven_keys(grad=True) is None
    assert not Proofs(0).pending((torch.float16, None), grad=True)
