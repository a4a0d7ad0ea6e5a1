"""What a program changes in a layer that has a kernel counts from the next call on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from twinkle.deferred.forward import reason_against
from twinkle.kernel import (
    kernelize_model,
    register_external_layer,
    register_kernels,
    register_layer_kernel,
)

if TYPE_CHECKING:
    from twinkle.registry import Registry

THIS = sys.modules[__name__]
FACTOR = 1.0


def root(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.eps = 1e-5

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        wide = values.to(torch.float32)
        if FACTOR != 1.0:
            wide = wide * FACTOR
        return self.scale * (wide * root(wide, self.eps)).to(values.dtype)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(4, 4) for _ in range(3))
        self.act = nn.SiLU()

    def forward(module, x: torch.Tensor) -> torch.Tensor:
        return module.down(module.act(module.gate(x)) * module.up(x))


class Marked(nn.Module):
    """Gives what no layer gives: a test can tell that it ran."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * 0 + 7


class MarkedMLP(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 + 7


def kernel_ran(model: nn.Module, x: torch.Tensor) -> bool:
    return bool((model(x) == 7).all())


@pytest.fixture
def norm(clean_registry: Registry) -> Any:
    register_kernels({"layers": {"mine": {"match": "rms_norm", "layer_impl": Marked, "verify": "off"}}})
    return kernelize_model(nn.Sequential(Norm()))


@pytest.fixture
def mlp(clean_registry: Registry) -> Any:
    register_kernels({"layers": {"mine": {"match": "gated_mlp", "layer_impl": MarkedMLP, "verify": "off"}}})
    return kernelize_model(nn.Sequential(MLP()))


def note(registry: Registry) -> str:
    [binding] = registry.bindings
    assert binding.state == "active"
    binding.look()
    return "; ".join(binding.notes)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (None, "eps", 0.5, "eps"),
        (THIS, "root", lambda x, eps: x * 0 + 2, "test_changed_later.root"),
        (THIS, "FACTOR", 3.0, "test_changed_later.FACTOR"),
        (Norm, "forward", lambda self, values: values + 1, "its forward"),
        (torch, "rsqrt", torch.reciprocal, "torch.rsqrt"),
    ],
)
def test_a_change_counts_and_is_undone(
    norm: Any,
    clean_registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    value: Any,
    said: str,
    late: bool,
) -> None:
    x = torch.randn(2, 4)
    if late:
        assert kernel_ran(norm, x)
    with monkeypatch.context() as patch:
        patch.setattr(norm[0] if owner is None else owner, name, value)
        plain = Norm()
        plain.eps = norm[0].eps
        assert torch.equal(norm(x), plain(x))
        assert note(clean_registry).endswith(f"{said} changed since it was recognised: the original runs")
    assert kernel_ran(norm, x)


@pytest.mark.parametrize("late", [False, True])
def test_hooks_on_an_activation_fire_and_count(mlp: Any, clean_registry: Registry, late: bool) -> None:
    x, seen = torch.randn(2, 4), []
    if late:
        assert kernel_ran(mlp, x)

    def tripled(act: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out)
        return out * 3

    handles = [
        mlp[0].act.register_forward_pre_hook(lambda m, given: (given[0] * 2,)),
        mlp[0].act.register_forward_hook(tripled),
        mlp[0].act.register_full_backward_hook(lambda m, into, out: seen.append(out)),
    ]
    layer = mlp[0]
    expected = layer.down(3 * nn.functional.silu(2 * layer.gate(x)) * layer.up(x))
    given = mlp(x)
    given.sum().backward()
    assert torch.equal(given, expected)
    assert len(seen) == 2
    assert "the hooks of act changed since it was recognised" in note(clean_registry)
    for handle in handles:
        handle.remove()
    assert kernel_ran(mlp, x)


@pytest.mark.parametrize("name", ["gate", "down"])
def test_a_layer_that_a_kernel_may_not_call_is_watched(mlp: Any, name: str) -> None:
    x = torch.randn(2, 4)
    assert kernel_ran(mlp, x)
    before = getattr(mlp[0], name)
    setattr(mlp[0], name, nn.Sequential(before, nn.Tanh()))
    assert torch.equal(mlp(x), MLP.forward(mlp[0], x))
    setattr(mlp[0], name, before)
    assert kernel_ran(mlp, x)


def test_a_class_that_was_given_another_forward_is_another_layer(clean_registry: Registry) -> None:
    class Own(Norm):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            wide = values.to(torch.float32)
            return self.scale * (wide * root(wide, self.eps)).to(values.dtype)

    register_kernels({"layers": {"mine": {"match": "rms_norm", "layer_impl": Marked, "verify": "off"}}})
    first = kernelize_model(nn.Sequential(Own()))
    x = torch.randn(2, 4)
    assert kernel_ran(first, x)
    before, Own.forward = Own.forward, lambda self, values: values + 1  # type: ignore[method-assign]
    second = kernelize_model(nn.Sequential(Own()))
    assert torch.equal(first(x), x + 1)
    assert torch.equal(second(x), x + 1)
    Own.forward = before  # type: ignore[method-assign]
    assert kernel_ran(first, x)


def test_two_models_have_settings_of_their_own(clean_registry: Registry) -> None:
    register_kernels({"layers": {"mine": {"match": "rms_norm", "layer_impl": Marked, "verify": "off"}}})
    model = nn.Sequential(Norm(), Norm())
    model[1].eps = 0.25
    kernelize_model(model)
    x = torch.randn(2, 4)
    assert kernel_ran(model[0], x)
    assert kernel_ran(model[1], x)
    model[0].eps = 0.25
    assert not kernel_ran(model[0], x)
    assert kernel_ran(model[1], x)


def test_a_compiled_model_follows_as_well(norm: Any, clean_registry: Registry) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    norm = kernelize_model(nn.Sequential(Norm(), Norm(), Norm()))
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=backend)
    x = torch.randn(2, 4)
    for layer in norm:
        assert bool((compiled(layer, x) == 7).all())
    assert len(graphs) == 1
    norm[0].eps = 0.5
    plain = Norm()
    plain.eps = 0.5
    torch.testing.assert_close(compiled(norm[0], x), plain(x))
    norm[0].eps = 1e-5
    assert bool((compiled(norm[0], x) == 7).all())


def test_a_pruned_weight_keeps_its_kernel(norm: Any) -> None:
    x = torch.randn(2, 4)
    prune.l1_unstructured(norm[0], "scale", 0.5)
    assert kernel_ran(norm, x)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", [None, "inference", "train"])
def test_the_newest_forward_of_a_class_counts_for_a_kernel_that_was_bound_by_name(
    clean_registry: Registry, late: bool, mode: str | None
) -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Below(Layer):
        pass

    register_layer_kernel("mine", layer_impl=MarkedMLP, verify="off")
    register_external_layer(Layer, "mine")
    model = kernelize_model(nn.Sequential(Layer(), Below()), mode)
    x, before = torch.randn(2, 4), Layer.forward
    if late:
        assert kernel_ran(model[0], x)
        assert kernel_ran(model[1], x)
    Layer.forward = lambda self, x: before(self, x) + 1  # type: ignore[assignment]
    for layer in model:  # a wrapper stays around the kernel
        assert torch.equal(layer(x), torch.full_like(x, 8))
    assert not note(clean_registry)
    Layer.forward = lambda self, x: x + 1  # type: ignore[assignment]
    for layer in model:
        assert torch.equal(layer(x), x + 1)
    assert note(clean_registry).endswith("its forward changed since it was recognised: the original runs")
    Layer.forward = before  # type: ignore[method-assign]
    assert kernel_ran(model[0], x)
    assert kernel_ran(model[1], x)


def test_a_head_is_not_deferred_past_another_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    head = nn.Linear(4, 4)
    assert reason_against(head) is None
    plain = nn.Linear.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) * 0.9)
        assert "was replaced" in str(reason_against(head))
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda x, weight, bias=None: x)
        assert "was replaced" in str(reason_against(head))
    assert reason_against(head) is None


def test_the_newest_forward_counts_where_a_kernel_was_rejected(clean_registry: Registry) -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Raising(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError

    register_layer_kernel("mine", layer_impl=Raising, verify="off")
    register_external_layer(Layer, "mine")
    model = kernelize_model(nn.Sequential(Layer()))
    x = torch.randn(2, 4)
    assert torch.equal(model(x), x)
    Layer.forward = lambda self, x: x + 1  # type: ignore[assignment]
    assert torch.equal(model(x), x + 1)
