"""A swapped layer: which kernel runs when, and that it looks like the original."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.modes import Mode
from twinkle.swap.layers import original_class, placed, swap_out


def test_the_kernel_runs(kit: Any, gate: Any) -> None:
    assert kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    assert kit.factor(gate) == 2


def test_nothing_but_the_mark_is_kept_in_the_instance(kit: Any, gate: Any) -> None:
    keys = set(gate.__dict__)
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    gate(kit.x)
    assert set(gate.__dict__) == keys | {"_tw"}


def test_names_and_state_are_unchanged(kit: Any) -> None:
    model = kit.Model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    names = [n for n, _ in model.named_modules()], [n for n, _ in model.named_parameters()]
    kit.swap_in(model.first, [kit.candidate(kit.GateKernel)])
    model(kit.x)
    assert ([n for n, _ in model.named_modules()], [n for n, _ in model.named_parameters()]) == names
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_repr_is_unchanged(kit: Any) -> None:
    model = kit.Model()
    before = repr(model)
    kit.swap_in(model.first, [kit.candidate(kit.GateKernel)])
    assert repr(model) == before


def test_the_class_looks_like_the_original(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    cls = type(gate)
    assert (cls, original_class(gate)) == (kit.Gate, kit.Gate)
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(3, shift=1))])
    gate(kit.x)
    cls = type(gate)
    assert isinstance(gate, kit.Gate)
    assert original_class(gate) is kit.Gate
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        kit.Gate.__name__,
        kit.Gate.__qualname__,
        kit.Gate.__module__,
        kit.Gate.__doc__,
    )


def test_the_signature_of_forward_is_the_originals(kit: Any) -> None:
    class Layer(nn.Module):
        def forward(
            self, x: torch.Tensor, /, scale: float = 2.0, *rest: int, bias: int = 1, **more: int
        ) -> Any:
            return x * scale

    class Kernel(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return torch.stack([args[0] * args[1], args[0] * kwargs["bias"]])

    layer = Layer()
    signature = inspect.signature(layer.forward)
    kit.swap_in(layer, [kit.candidate(Kernel, device="cpu")])
    assert inspect.signature(layer.forward) == signature
    out = layer(kit.x, 3.0, 7, bias=5, other=1)
    assert torch.equal(out, torch.stack([kit.x * 3, kit.x * 5]))
    assert inspect.signature(layer.forward) == signature


def test_the_originals_defaults_hold(kit: Any) -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
            return x * scale

    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 100.0) -> torch.Tensor:
            return x * scale

    layer = Layer()
    kit.swap_in(layer, [kit.candidate(Kernel)])
    assert torch.equal(layer(kit.x), kit.x * 2)
    assert torch.equal(layer(kit.x), kit.x * 2)


def test_keyword_calls_reach_the_kernel(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.GateKernel, device="cpu")])
    gate(x=kit.x)
    assert torch.equal(gate(x=kit.x), kit.GateKernel.forward(gate, kit.x))


def test_forward_hooks_run(kit: Any, gate: Any) -> None:
    seen = []
    gate.register_forward_hook(lambda m, a, out: seen.append(out))
    gate.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    out = gate(kit.x)
    assert [id(t) for t in seen] == [id(kit.x), id(out)]


def test_gradients_flow_through_the_kernel(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    gate(kit.x).sum().backward()
    swapped = gate.proj.weight.grad.clone()
    gate.proj.weight.grad = None
    swap_out(gate)
    gate(kit.x).sum().backward()
    torch.testing.assert_close(swapped, 2 * gate.proj.weight.grad)


def test_modes_are_followed(kit: Any, gate: Any) -> None:
    kit.swap_in(
        gate,
        [
            kit.candidate(kit.kernel_times(3), mode="train"),
            kit.candidate(kit.kernel_times(5), mode="inference"),
        ],
    )
    assert [kit.factor(gate.train()), kit.factor(gate.eval()), kit.factor(gate.train())] == [3, 5, 3]


def test_inference_may_use_a_training_kernel_and_never_the_reverse(kit: Any) -> None:
    one, other = kit.Gate(), kit.Gate()
    kit.swap_in(one, [kit.candidate(kit.kernel_times(3), mode="train")])
    kit.swap_in(other, [kit.candidate(kit.kernel_times(5), mode="inference")])
    assert kit.factor(one.eval()) == 3
    assert kit.factor(other.train()) == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_pinned_mode_holds_until_the_mode_is_set(kit: Any, gate: Any, training: bool) -> None:
    gate.train(training)
    asked = Mode.parse("inference" if training else "train")
    kit.swap_in(
        gate,
        [
            kit.candidate(kit.kernel_times(3), mode="train"),
            kit.candidate(kit.kernel_times(5), mode="inference"),
        ],
        pinned=asked,
    )
    pinned = kit.factor(gate)
    gate.train(training)
    followed = kit.factor(gate)
    assert (pinned, followed) == ((5, 3) if training else (3, 5))


def test_a_parents_train_call_ends_the_pin(kit: Any) -> None:
    model = kit.Model()
    kernels = [
        kit.candidate(kit.kernel_times(3), mode="train"),
        kit.candidate(kit.kernel_times(5), mode="inference"),
    ]
    kit.swap_in(model.first, kernels, pinned=Mode.parse("inference"))
    assert model.train() is model
    assert kit.factor(model.first) == 3


def test_pinned_to_compile_runs_the_compile_kernel(kit: Any, gate: Any) -> None:
    kernels = [
        kit.candidate(kit.kernel_times(3), mode="compile"),
        kit.candidate(kit.kernel_times(5), mode="train"),
    ]
    kit.swap_in(gate, kernels[:1], pinned=Mode.parse("compile"))
    assert kit.factor(gate) == 3
    gate.eval()
    assert kit.factor(gate) == 1


def test_another_device_runs_the_original(kit: Any, gate: Any) -> None:
    wanted = kit.candidate(kit.GateKernel, device="cuda")
    kit.swap_in(gate, [wanted])
    assert kit.factor(gate) == 1
    assert wanted.kernel.source.loads == 0


def test_a_kernel_for_the_device_goes_before_one_for_any(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(3)), kit.candidate(kit.kernel_times(5), device="cpu")])
    assert kit.factor(gate) == 5


def test_a_kernel_loads_at_the_first_forward(kit: Any, gate: Any) -> None:
    wanted = kit.candidate(kit.GateKernel)
    kit.swap_in(gate, [wanted])
    assert wanted.kernel.source.loads == 0
    gate(kit.x)
    gate(kit.x)
    assert wanted.kernel.source.loads == 1


def test_a_kernel_does_not_load_on_meta(kit: Any) -> None:
    with torch.device("meta"):
        gate = kit.Gate()
    wanted = kit.candidate(kit.GateKernel)
    kit.swap_in(gate, [wanted])
    kit.resolve_now(gate)
    assert gate(torch.empty(3, 4, device="meta")).is_meta
    assert wanted.kernel.source.loads == 0
    gate.to_empty(device="cpu")
    nn.init.ones_(gate.proj.weight)
    nn.init.ones_(gate.proj.bias)
    assert kit.factor(gate) == 2


def test_resolve_now_loads_the_kernel_for_the_moment_only(kit: Any, gate: Any) -> None:
    first, second = (kit.candidate(kit.GateKernel, mode=m) for m in ("train", "inference"))
    kit.swap_in(gate, [first, second])
    kit.resolve_now(gate)
    assert (first.kernel.source.loads, second.kernel.source.loads) == (1, 0)


def test_bindings_say_what_happens(kit: Any, gate: Any) -> None:
    wanted = kit.candidate(kit.GateKernel)
    kit.swap_in(gate, [wanted])
    assert (wanted.binding.state, wanted.binding.instances) == ("pending", 1)
    gate(kit.x)
    assert wanted.binding.state == "active"
    assert wanted.binding.load_seconds is not None
    swap_out(gate)
    assert wanted.binding.instances == 0


@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_dtype_changes_are_followed(kit: Any, gate: Any, change: str) -> None:
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    gate(kit.x)
    getattr(gate, change)()
    x = kit.x.to(gate.proj.weight.dtype)
    assert torch.equal(gate(x), kit.GateKernel.forward(gate, x))


def test_a_kernel_without_backward_does_not_run_where_gradients_flow(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(3, has_backward=False), mode="inference")])
    gate.eval()
    with torch.no_grad():
        assert kit.factor(gate) == 3
    assert kit.factor(gate) == 1


def test_functional_call_uses_the_kernel(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.GateKernel)])
    doubled = {k: 2 * v for k, v in gate.named_parameters()}
    out = torch.func.functional_call(gate, doubled, (kit.x,))
    expected = (
        2 * torch.sigmoid(nn.functional.linear(kit.x, doubled["proj.weight"], doubled["proj.bias"])) * kit.x
    )
    torch.testing.assert_close(out, expected)


def test_a_tensor_after_other_arguments_tells_the_device(kit: Any) -> None:
    class Layer(nn.Module):
        def forward(self, size: int, x: torch.Tensor | None = None) -> Any:
            return size

    class Kernel(nn.Module):
        def forward(self, size: int, x: torch.Tensor | None = None) -> Any:
            return size + 1

    layer = Layer()
    kit.swap_in(layer, [kit.candidate(Kernel, device="cpu")])
    assert [layer(1, kit.x), layer(1, x=kit.x), layer(1), layer(1, [kit.x])] == [2, 2, 1, 2]


def test_code_for_several_gpus_runs_on_the_cpu_too(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from twinkle.swap import dispatch

    monkeypatch.setattr(dispatch, "several_gpus", lambda: True)
    for device in (None, "cpu"):
        gate = kit.Gate()
        kit.swap_in(
            gate, [kit.candidate(kit.GateKernel, device=device), kit.candidate(kit.GateKernel, device="cuda")]
        )
        gate(kit.x)
        assert kit.factor(gate) == 2
        assert "get_device()" in placed(gate).text
        torch._dynamo.reset()
        assert torch.equal(torch.compile(gate, backend="eager", fullgraph=True)(kit.x), gate(kit.x))


def test_members_of_the_kernel_class_come_along(kit: Any, gate: Any) -> None:
    class Kernel(nn.Module):
        FACTOR = 3

        @staticmethod
        def shift(x: torch.Tensor) -> torch.Tensor:
            return x + 1

        @property
        def width(self) -> int:
            return self.proj.in_features

        def helper(self, x: torch.Tensor) -> torch.Tensor:
            return self.shift(x) * self.FACTOR

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.helper(x) * self.width * self.extra

    kit.swap_in(gate, [kit.candidate(Kernel, attributes={"extra": 2})])
    assert torch.equal(gate(kit.x), (kit.x + 1) * 3 * 4 * 2)
    swap_out(gate)
    assert not any(hasattr(gate, name) for name in ("helper", "FACTOR", "shift", "width", "extra"))


def test_super_in_a_kernel_is_the_original(kit: Any, gate: Any) -> None:
    class Kernel(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.around(x)

        def around(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x)

    kit.swap_in(gate, [kit.candidate(Kernel)])
    assert [kit.factor(gate), kit.factor(gate)] == [3, 3]


def test_a_kernel_may_derive_from_its_target(kit: Any, gate: Any) -> None:
    class Kernel(kit.Gate):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x)

    kit.swap_in(gate, [kit.candidate(Kernel)])
    assert [kit.factor(gate), kit.factor(gate)] == [3, 3]
    assert not isinstance(gate, Kernel)


def test_a_constant_of_the_kernel_does_not_hide_a_parameter(kit: Any, gate: Any) -> None:
    kit.swap_in(gate, [kit.candidate(kit.kernel_times(3, proj=None))])
    assert kit.factor(gate) == 3
