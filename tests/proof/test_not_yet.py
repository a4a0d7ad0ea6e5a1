"""Where a call leaves no room for a comparison the original runs, and the next ordinary call is compared."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from twinkle.errors import TwinkleWarning
from twinkle.kernel import kernelize_model, register_external_layer, register_layer_kernel
from twinkle.ops.cases import cases, variants
from twinkle.proof.first_use import prove
from twinkle.sources.embedded import EmbeddedLayer

if TYPE_CHECKING:
    from pathlib import Path

    from twinkle.proof.compare import Verdict
    from twinkle.records import Binding
    from twinkle.registry import Registry

X = torch.linspace(-1, 1, 12).reshape(3, 4)


RAN: list[str] = []


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RAN.append("original")
        return torch.sin(self.linear(x))


class Kernel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RAN.append("kernel")
        return torch.sin(nn.functional.linear(x, self.linear.weight))


def swapped(registry: Registry, kernel: type[nn.Module] = Kernel) -> tuple[nn.Module, Binding]:
    register_layer_kernel("k", layer_impl=kernel, verify="first-use")
    register_external_layer(Mix, "k")
    model: nn.Module = kernelize_model(Mix())
    return model, registry.bindings[0]


def in_vmap(model: nn.Module) -> Any:
    return torch.func.vmap(model)(X)


def in_grad(model: nn.Module) -> Any:
    return torch.func.grad(lambda x: model(x).sum())(X)


def in_forward_ad(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, X))).tangent


def in_fake(model: nn.Module) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return list(model(mode.from_tensor(X)).shape)


def in_jit_trace(model: nn.Module) -> Any:
    return torch.jit.trace(model, (X,), check_trace=False)(X)


def in_fx(model: nn.Module) -> Any:
    return torch.fx.Tracer().trace(nn.Sequential(model)).nodes.__len__()


def in_flop_counter(model: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        model(X).sum().backward()
    return counter.get_total_flops()


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return out * 2 if func is torch.sin else out


def in_function_mode(model: nn.Module) -> Any:
    with Doubling():
        return model(X)


@pytest.mark.parametrize(
    ("road", "words"),
    [
        (in_vmap, "inside torch.func"),
        (in_grad, "inside torch.func"),
        (in_forward_ad, "inside forward-mode autograd"),
        (in_fake, "under FakeTensorMode"),
        (in_jit_trace, "inside torch.jit.trace"),
        (in_fx, "inside torch.fx.symbolic_trace"),
        (in_flop_counter, "under FlopCounterMode"),
        (in_function_mode, "under Doubling"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_the_original_runs_for_that_call_only(road: Any, words: str, clean_registry: Registry) -> None:
    model, binding = swapped(clean_registry)
    plain = Mix()
    plain.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", TwinkleWarning)
        for _ in range(4):
            RAN.clear()
            found = road(model)
            assert RAN == ["original"]
            assert binding.proof == f"not compared yet: {words}"
    expected = road(plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    model(X)
    assert binding.state == "active"
    assert binding.proof.startswith("proven")
    RAN.clear()
    model(X)
    assert RAN == ["kernel"]


def test_a_verdict_that_is_there_is_not_overwritten(clean_registry: Registry) -> None:
    model, binding = swapped(clean_registry)
    model(X)
    model.double()
    torch.func.vmap(model)(X.double())
    assert binding.proof.startswith("proven")
    assert binding.proof.endswith("float32")
    model(X.double())
    assert binding.proof.endswith("float64")


def test_the_default_device_is_no_mode_to_wait_for(clean_registry: Registry) -> None:
    model, binding = swapped(clean_registry)
    with torch.device("cpu"):
        model(X)
    assert binding.proof.startswith("proven")


@pytest.mark.parametrize("selective", [False, True])
def test_under_a_checkpoint_the_same_runs_twice(selective: bool, clean_registry: Registry) -> None:
    model, binding = swapped(clean_registry)

    def contexts() -> Any:
        keep = CheckpointPolicy.PREFER_RECOMPUTE
        return create_selective_checkpoint_contexts(lambda *_, **__: keep)

    options = {"context_fn": contexts} if selective else {}
    for _ in range(2):
        x = X.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=False, **options).sum().backward()
    assert binding.proof.startswith("proven")
    y = X.clone().requires_grad_()
    torch.sin(nn.functional.linear(y, model.linear.weight)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_what_a_mode_kept_from_being_compared_is_computed_again_by_the_original(
    clean_registry: Registry,
) -> None:
    model, binding = swapped(clean_registry)
    x = X.clone().requires_grad_()
    with FlopCounterMode(display=False):
        out = checkpoint(model, x, use_reentrant=False)
    RAN.clear()
    out.sum().backward()
    assert RAN == ["original"]
    assert binding.state == "active"


class Failing(nn.Module):
    """An original that cannot run twice for one call, as long as the flag says so."""

    fails = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails and x.dtype == torch.float64:
            raise MemoryError("no room for a second copy")
        return x * 1

    def kernel(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, clean_registry: Registry) -> tuple[nn.Module, Binding]:
    monkeypatch.setattr(Failing, "fails", True)
    made = type("K", (nn.Module,), {"forward": Failing.kernel})
    register_layer_kernel("k", layer_impl=made, verify="first-use")
    register_external_layer(Failing, "k")
    return kernelize_model(Failing()), clean_registry.bindings[0]


def test_a_failed_comparison_is_tried_again(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, binding = failing
    for _ in range(2):
        layer(X)
        assert binding.proof == "not compared yet: MemoryError: no room for a second copy"
        assert binding.state == "active"
    monkeypatch.setattr(Failing, "fails", False)
    layer(X)
    assert binding.proof.startswith("proven")


def test_after_three_tries_the_original_stays_and_the_report_says_so(failing: Any) -> None:
    layer, binding = failing
    layer(X)
    layer(X)
    words = "could not be compared with the original in 3 calls: MemoryError"
    with pytest.warns(TwinkleWarning, match=words):
        layer(X)
    assert binding.state == "failed"
    assert "does not compute" not in binding.reason


def test_a_dtype_that_cannot_be_compared_takes_nothing_from_another(failing: Any) -> None:
    layer, binding = failing
    layer(X.to(torch.bfloat16))
    assert binding.proof.startswith("proven")
    for _ in range(5):
        layer(X)
    assert binding.state == "active"
    assert len(binding.notes) == 1
    assert binding.notes[0].endswith("the original runs for calls in float32")


@pytest.mark.parametrize("first", [torch.float16, torch.float32])
def test_two_models_of_one_class_are_proven_each_for_itself(
    first: torch.dtype, clean_registry: Registry
) -> None:
    register_layer_kernel("k", layer_impl=Kernel, verify="first-use")
    register_external_layer(Mix, "k")
    half, whole = kernelize_model(Mix().to(torch.float16)), kernelize_model(Mix())
    binding = clean_registry.bindings[0]
    for dtype in (first, *({torch.float16, torch.float32} - {first})):
        (half if dtype == torch.float16 else whole)(X.to(dtype))
        assert binding.proof.startswith("proven")
        assert binding.proof.endswith(str(dtype).removeprefix("torch."))
    assert binding.state == "active"


def test_no_kept_verdict_is_taken_inside_a_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_CACHE", str(tmp_path))
    variant = variants("rms_norm")[0]
    sample = next(iter(cases("rms_norm", variant, torch.float32, torch.device("cpu"))))
    source = EmbeddedLayer("rms_norm", variant, sample.facts)

    def proven(x: torch.Tensor) -> Verdict:
        return prove(source, sample.original, sample.kernel, (x,), {}, module=sample.module, recall=True)

    x = sample.args[0]
    assert proven(x).ok
    assert proven(x).date is not None
    found: list[Verdict] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        found.append(proven(x))
        return x

    torch.func.vmap(inside)(x)
    assert str(found[0]) == "not compared yet: inside torch.func"
