"""``verify``: a kernel is compared with its original at its first call, where that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from twinkle.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry")


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * 1.01


class WrongFromTheThirdCall(nn.Module):
    factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * WrongFromTheThirdCall.factor


X = torch.rand(4, 8) + 1


def kernelized(kernel: type[nn.Module], verify: str | None) -> nn.Module:
    register_layer_kernel("k", layer_impl=kernel, verify=verify)
    register_external_layer(Scale, "k")
    return kernelize_model(Scale(), mode="train")


def test_a_right_kernel_is_proven_and_the_report_has_the_errors(clean_registry: Registry) -> None:
    model = kernelized(Same, "first-use")
    model(X).sum().backward()
    (binding,) = clean_registry.bindings
    assert binding.state == "active"
    assert binding.proof.startswith("proven: error")
    assert "gradients" in binding.proof
    assert model.weight.grad is not None


def test_a_wrong_kernel_is_rejected_and_the_original_answers(clean_registry: Registry) -> None:
    model = kernelized(Wrong, "first-use")
    with pytest.warns(TwinkleWarning, match="result off by"):
        out = model(X)
    assert torch.equal(out, X * model.weight)
    assert torch.equal(model(X), X * model.weight)
    assert clean_registry.bindings[0].state == "failed"


@pytest.mark.parametrize("verify", ["off", "auto", None])
def test_the_users_word_is_taken_for_what_was_bound_by_name(
    verify: str | None, clean_registry: Registry
) -> None:
    model = kernelized(Wrong, verify)
    assert torch.equal(model(X), X * model.weight * 1.01)
    assert clean_registry.bindings[0].proof == "unproven"


def test_always_goes_on_comparing_and_quarantines(
    clean_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kernelized(WrongFromTheThirdCall, "always")
    model(X)
    model(X)
    assert clean_registry.bindings[0].state == "active"
    monkeypatch.setattr(WrongFromTheThirdCall, "factor", 1.01)
    with pytest.warns(TwinkleWarning, match="does not compute the same"):
        out = model(X)
    assert torch.equal(out, X * model.weight)
    assert clean_registry.bindings[0].state == "quarantined"


@pytest.mark.parametrize("decided", [{"mode": "train"}, {}], ids=["decided once", "dispatched"])
def test_a_wrong_function_is_rejected(
    decided: dict[str, Any], clean_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    module = types.ModuleType("verify_target")
    exec("def double(x):\n    return x * 2", module.__dict__)
    monkeypatch.setitem(sys.modules, "verify_target", module)
    register_function_kernel("double", "verify_target", func_impl=lambda x: x * 2.02, verify="first-use")
    apply_function_kernel("verify_target", **decided)
    with pytest.warns(TwinkleWarning, match="result off by"):
        out = module.double(X)
    assert torch.equal(out, X * 2)
    assert clean_registry.bindings[0].state == "failed"
